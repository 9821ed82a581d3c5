#include "cpu/pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <list>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "turboquant/turboquant.h"

namespace turboquant {
namespace cpu {
namespace {

int processors() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

int initial_threads() {
  if (const char* text = std::getenv("TURBOQUANT_NUM_THREADS")) {
    const int n = std::atoi(text);
    if (n >= 1) return n;
  }
  return processors();
}

/// One call of parallel_for.
struct Job {
  const std::function<void(int)>& task;
  const int count;
  std::atomic<int> next{0};
  std::atomic<int> helpers{0};  // grows under the pool's mutex, while the job is listed
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // of the first task that failed; written once, before its thread lets go of the job

  void run(int i) {
    try {
      task(i);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      next = count;  // the rest is not begun
    }
  }
};

class Pool {
 public:
  std::atomic<int> limit{initial_threads()};

  void run(Job& job) {
    ++active_;
    const int helpers = std::min(job.count, limit.load()) - 1;
    if (helpers > 0) {
      const std::lock_guard lock(mutex_);
      try {
        while (threads_ < limit - 1) spawn();
      } catch (const std::system_error&) {  // no more threads are to be had; those there are suffice
      }
      jobs_.push_back(&job);
      ++posted_;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    for (int i; (i = job.next++) < job.count;) job.run(i);
    if (helpers > 0) {
      {
        const std::lock_guard lock(mutex_);
        jobs_.remove(&job);
      }
      // What helpers still do is at most a task each: falling asleep and being woken would often take longer.
      const auto done = [&] { return job.helpers == 0; };
      if (!spin(kTaskSpins, done)) {
        std::unique_lock lock(mutex_);
        done_.wait(lock, done);
      }
    }
    --active_;
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  void spawn() {
    std::thread([this] { help(); }).detach();
    ++threads_;
  }

  /// Looks up to `times` times whether `done`, some 20 to 40 ns each; says whether it was.
  template <class Done>
  static bool spin(int times, const Done& done) {
    for (int i = 0; i < times; ++i) {
      if (done()) return true;
      relax();
    }
    return false;
  }

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  /// A helper's life: it joins the oldest job that has tasks left, while fewer than `limit` threads are active.
  void help() {
    std::unique_lock lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      if (const unsigned seen = posted_; !open_job()) {
        lock.unlock();
        spin(kIdleSpins, [&] { return posted_ != seen; });
        lock.lock();
      }
      wake_.wait(lock, [&] { return active_ < limit && (job = open_job()); });
      ++job->helpers;
      ++active_;
      lock.unlock();
      while (active_ <= limit) {  // another caller may have come: make room for it
        const int i = job->next++;
        if (i >= job->count) break;
        job->run(i);
      }
      lock.lock();
      --active_;
      if (--job->helpers == 0) done_.notify_all();
    }
  }

  Job* open_job() {
    for (Job* job : jobs_) {
      if (job->next < job->count) return job;
    }
    return nullptr;
  }

  static constexpr int kTaskSpins = 2000, kIdleSpins = 1000;
  std::atomic<unsigned> posted_{0};  // jobs, ever

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::list<Job*> jobs_;
  std::atomic<int> active_{0};  // callers and helpers at work
  int threads_ = 0;
};

Pool& pool() {
  static Pool* const p = new Pool;  // never destroyed: helpers may outlive static destructors
  return *p;
}

}  // namespace

void parallel_for(int count, const std::function<void(int)>& task) {
  Job job{task, count};
  pool().run(job);
}

}  // namespace cpu

int num_threads() { return cpu::pool().limit; }

void set_num_threads(int n) {
  if (n < 1) throw std::invalid_argument("[set_num_threads] n must be at least 1; got " + std::to_string(n));
  cpu::pool().limit = n;
}

}  // namespace turboquant
