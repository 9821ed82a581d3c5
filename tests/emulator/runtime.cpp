// Fibers and their scheduler.
#include "runtime.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "threadgroup.h"

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, and goes on with another stack.  ucontext does the same with
// two system calls, which would be most of the emulator's time.
extern "C" void emulator_switch(void** save, void* load);
__asm__(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#else
#include <ucontext.h>
#endif

namespace emulator {

Position position;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kLanes = 32;

struct MatrixCall {
  Site site;
  const void* address;
  uint64_t argument;
  bool operator==(const MatrixCall& o) const {
    return site.op == o.site.op && site.line == o.site.line && address == o.address && argument == o.argument;
  }
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
#if defined(__x86_64__)
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  uint32_t simdgroup = 0, lane = 0;
  bool done = false;
  Site site{};  // where it waits
  uint32_t value = 0, argument = 0;
  size_t matrix_calls = 0;  // since the last wait
};

struct State {
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  std::vector<std::vector<MatrixCall>> matrix_log;  // of each SIMD-group since its last wait
  std::string error;
  Entry entry = nullptr;
  void* const* buffers = nullptr;
  std::mt19937 random{1};
};
State state;

void to_scheduler(bool last) {
  Fiber& f = *state.running;
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, state.stack_bottom, state.stack_size);
#else
  (void)last;
#endif
#if defined(__x86_64__)
  emulator_switch(&f.pointer, state.scheduler);
#else
  swapcontext(&f.context, &state.scheduler);
#endif
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(f.fake_stack, &state.stack_bottom, &state.stack_size);
#endif
}

void fiber_main() {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &state.stack_bottom, &state.stack_size);
#endif
  state.entry(state.buffers);
  state.running->done = true;
  to_scheduler(true);
}

void prepare(Fiber& f) {
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(f.stack.get(), kStackBytes);
#endif
  f.done = false;
  f.matrix_calls = 0;
  f.fake_stack = nullptr;
#if defined(__x86_64__)
  // Six registers and a return address; a function starts with the stack 8 bytes off a multiple of 16.
  uintptr_t top = (reinterpret_cast<uintptr_t>(f.stack.get()) + kStackBytes) & ~uintptr_t(15);
  void** sp = reinterpret_cast<void**>(top) - 8;
  std::fill(sp, sp + 8, nullptr);
  sp[6] = reinterpret_cast<void*>(&fiber_main);
  f.pointer = sp;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
#endif
}

void resume(Fiber& f) {
  state.running = &f;
  position.simdgroup = f.simdgroup;
  position.lane = f.lane;
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&state.fake_stack, f.stack.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  emulator_switch(&state.scheduler, f.pointer);
#else
  swapcontext(&state.scheduler, &f.context);
#endif
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(state.fake_stack, nullptr, nullptr);
#endif
  if (!state.error.empty()) throw std::runtime_error(state.error);
}

[[noreturn]] void fail(const std::string& what, const Fiber& f) {
  throw std::runtime_error("[emulator] " + what + "; threadgroup (" + std::to_string(position.group[0]) + ", " +
                           std::to_string(position.group[1]) + ", " + std::to_string(position.group[2]) +
                           "), SIMD-group " + std::to_string(f.simdgroup) + ", lane " + std::to_string(f.lane) +
                           ", line " + std::to_string(f.site.line));
}

/// Carries out the function at which all lanes wait.
void exchange(Fiber* lanes) {
  std::array<uint32_t, kLanes> in, out{};
  for (int i = 0; i < kLanes; ++i) in[i] = lanes[i].value;
  const auto reduce = [&](auto combine) {
    auto level = in;
    for (int n = kLanes / 2; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) level[i] = combine(level[i], level[i + n]);
    }
    out.fill(level[0]);
  };
  const auto number = [](uint32_t bits) { return std::bit_cast<float>(bits); };
  const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
  switch (lanes[0].site.op) {
    case Op::simdgroup_barrier:
      pass_simdgroup_barrier(lanes[0].simdgroup);
      break;
    case Op::sum_float:
      reduce([&](uint32_t a, uint32_t b) { return bits(number(a) + number(b)); });
      break;
    case Op::sum_int:
      reduce([](uint32_t a, uint32_t b) { return a + b; });
      break;
    case Op::max_float:
      reduce([&](uint32_t a, uint32_t b) { return bits(std::fmax(number(a), number(b))); });
      break;
    case Op::or_uint:
    case Op::any:
      reduce([](uint32_t a, uint32_t b) { return a | b; });
      break;
    case Op::all:
      reduce([](uint32_t a, uint32_t b) { return a & b; });
      break;
    case Op::shuffle:
    case Op::shuffle_xor:
      for (int i = 0; i < kLanes; ++i) {
        const uint32_t from = lanes[i].site.op == Op::shuffle ? lanes[i].argument : uint32_t(i) ^ lanes[i].argument;
        if (from >= kLanes) fail("a shuffle reads lane " + std::to_string(from), lanes[i]);
        out[i] = in[from];
      }
      break;
    default:
      break;
  }
  for (int i = 0; i < kLanes; ++i) lanes[i].value = out[i];
}

/// Runs a SIMD-group until it waits at a threadgroup barrier (true) or ends (false).
bool run_simdgroup(Fiber* lanes, std::vector<MatrixCall>& log) {
  std::array<int, kLanes> order;
  for (int i = 0; i < kLanes; ++i) order[i] = i;
  for (;;) {
    // The first lane carries out matrix operations: before all others, or after them.
    std::shuffle(order.begin(), order.end(), state.random);
    std::iter_swap(std::find(order.begin(), order.end(), 0), state.random() % 2 ? order.begin() : order.end() - 1);
    log.clear();
    for (int i : order) {
      lanes[i].matrix_calls = 0;
      resume(lanes[i]);
    }
    for (int i = 0; i < kLanes; ++i) {
      const Fiber &a = lanes[0], &b = lanes[i];
      if (b.matrix_calls != log.size()) fail("matrix operations in divergent code", b);
      if (a.done != b.done) fail("a lane has ended while others of its SIMD-group wait", a.done ? b : a);
      if (!a.done && (a.site.op != b.site.op || a.site.line != b.site.line)) {
        fail("a SIMD-group function in divergent code (line " + std::to_string(a.site.line) + ")", b);
      }
    }
    if (lanes[0].done) return false;
    if (lanes[0].site.op == Op::threadgroup_barrier) return true;
    exchange(lanes);
  }
}

void run_threadgroup(int threads) {
  const int simdgroups = threads / kLanes;
  std::vector<int> order(simdgroups);
  for (int i = 0; i < threads; ++i) prepare(state.fibers[i]);
  start_threadgroup_memory(state.entry);
  for (int i = 0; i < simdgroups; ++i) order[i] = i;
  for (bool waiting = true; waiting;) {
    std::shuffle(order.begin(), order.end(), state.random);
    std::vector<bool> waits(simdgroups);
    for (int s : order) waits[s] = run_simdgroup(&state.fibers[s * kLanes], state.matrix_log[s]);
    waiting = waits[0];
    for (int s = 0; s < simdgroups; ++s) {
      const Fiber &a = state.fibers[0], &b = state.fibers[s * kLanes];
      if (waits[s] != waiting) fail("a SIMD-group has ended while others wait at a barrier", waits[s] ? b : a);
      if (waiting && a.site.line != b.site.line) fail("a threadgroup barrier in divergent code", b);
    }
    pass_threadgroup_barrier();
  }
}

std::map<std::string, Entry>& registry() {
  static std::map<std::string, Entry> entries;
  return entries;
}

}  // namespace

uint32_t wait(Site site, uint32_t value, uint32_t argument) {
  Fiber& f = *state.running;
  f.site = site;
  f.value = value;
  f.argument = argument;
  to_scheduler(false);
  return f.value;
}

bool matrix(Site site, const void* address, uint64_t argument) {
  Fiber& f = *state.running;
  auto& log = state.matrix_log[f.simdgroup];
  const MatrixCall call{site, address, argument};
  if (f.matrix_calls == log.size()) {
    log.push_back(call);
  } else if (!(f.matrix_calls < log.size() && log[f.matrix_calls] == call) && state.error.empty()) {
    state.error = "[emulator] lanes of a SIMD-group disagree on a matrix operation, line " + std::to_string(site.line);
  }
  ++f.matrix_calls;
  return f.lane == 0;
}

void thread_error(const char* what) {
  const Fiber& f = *state.running;
  state.error = std::string("[emulator] ") + what + "; SIMD-group " + std::to_string(f.simdgroup) + ", lane " +
                std::to_string(f.lane);
  for (;;) to_scheduler(false);  // which throws
}

void index_error(long index, long count) {
  thread_error(("index " + std::to_string(index) + " of " + std::to_string(count) + " in an array or vector").c_str());
}

void run_grid(Entry entry, void* const* buffers, const int grid[3], const int threadgroup[3]) {
  const int threads = threadgroup[0] * threadgroup[1] * threadgroup[2];
  if (threads % kLanes) throw std::runtime_error("[emulator] a threadgroup must be whole SIMD-groups");
  if (int(state.fibers.size()) < threads) state.fibers.resize(threads);
  state.matrix_log.resize(threads / kLanes);
  for (int i = 0; i < threads; ++i) {
    state.fibers[i].simdgroup = i / kLanes;
    state.fibers[i].lane = i % kLanes;
  }
  state.entry = entry;
  state.buffers = buffers;
  state.error.clear();
  for (uint32_t z = 0; z < uint32_t(grid[2] / threadgroup[2]); ++z) {
    for (uint32_t y = 0; y < uint32_t(grid[1] / threadgroup[1]); ++y) {
      for (uint32_t x = 0; x < uint32_t(grid[0] / threadgroup[0]); ++x) {
        position.group[0] = x, position.group[1] = y, position.group[2] = z;
        run_threadgroup(threads);
      }
    }
  }
}

Registration::Registration(const char* name, Entry entry) { registry()[name] = entry; }

Entry find(const char* name) {
  const auto found = registry().find(name);
  if (found == registry().end()) throw std::runtime_error(std::string("[emulator] no kernel was generated as ") + name);
  return found->second;
}

}  // namespace emulator
