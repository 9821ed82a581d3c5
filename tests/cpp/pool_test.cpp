// The CPU backend's pool of threads: every task runs once, and a task that throws harms nobody but its caller.
#include "cpu/pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "turboquant/turboquant.h"

namespace turboquant {
namespace {

class Pool : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { set_num_threads(GetParam()); }
  void TearDown() override { set_num_threads(before_); }

 private:
  const int before_ = num_threads();
};

INSTANTIATE_TEST_SUITE_P(Threads, Pool, testing::Values(1, 2, 8));

TEST_P(Pool, RunsEveryTaskOnce) {
  std::vector<std::atomic<int>> runs(1000);
  cpu::parallel_for(1000, [&](int i) { ++runs[i]; });
  for (const auto& n : runs) EXPECT_EQ(n, 1);
}

TEST_P(Pool, ATaskThatThrowsEndsTheCallWithItsException) {
  for (int round = 0; round < 200; ++round) {
    const int bad = round % 50;
    std::atomic<int> begun = 0;
    try {
      cpu::parallel_for(50, [&](int i) {
        ++begun;
        if (i == bad) throw std::runtime_error("task " + std::to_string(i));
      });
      FAIL() << "no exception reached the caller";
    } catch (const std::runtime_error& error) {
      EXPECT_EQ(error.what(), "task " + std::to_string(bad));
    }
    EXPECT_GT(begun, bad);
    std::atomic<int> after = 0;
    cpu::parallel_for(20, [&](int) { ++after; });
    EXPECT_EQ(after, 20);
  }
}

TEST_P(Pool, EveryTaskMayThrowAndOneExceptionArrives) {
  for (int round = 0; round < 200; ++round) {
    EXPECT_THROW(cpu::parallel_for(16, [](int i) { throw i; }), int);
  }
}

TEST_P(Pool, CallersDoNotSeeEachOthersExceptions) {
  std::atomic<int> good = 0, bad = 0;
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&, t] {
      for (int round = 0; round < 100; ++round) {
        try {
          cpu::parallel_for(8, [&](int i) {
            if (t % 2 && i == 3) throw std::runtime_error("mine");
          });
          ++good;
        } catch (const std::runtime_error&) {
          ++bad;
        }
      }
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(good, 200);
  EXPECT_EQ(bad, 200);
}

}  // namespace
}  // namespace turboquant
