// Attention on a GPU against the oracle, for many cases at once, and the plans that tests force.
#pragma once

#include <atomic>
#include <cstdlib>
#include <functional>
#include <thread>

#include "gpu.h"
#include "support/cuda_attend.h"
#include "support/table.h"

namespace turboquant {

// Queries and softmax weights have 15 bits or more in the int8 kernels, 11 in the fp16 kernel.
constexpr double kTolerance = 5e-4, kPrefillTolerance = 1e-3;

/// For compute-sanitizer and the emulator, which take long: tests then meet pairs of parameters, not all triples.
inline bool short_run() { return std::getenv("TURBOQUANT_SHORT"); }

/// Calls f(0) .. f(count - 1) on all processors: compilers and the oracle are slow.
inline void in_parallel(size_t count, const std::function<void(size_t)>& f) {
  std::atomic<size_t> next = 0;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
    threads.emplace_back([&] {
      for (size_t k; (k = next++) < count;) f(k);
    });
  }
  for (auto& t : threads) t.join();
}

/// Compares cases with the oracle, all at once, through the plans that `planner` makes.
inline std::vector<cases::Difference> compare(const std::vector<cases::Case>& table, jit::Planner planner) {
  std::vector<cases::Difference> found(table.size());
  in_parallel(table.size(), [&](size_t i) {
    found[i] = cases::compare(table[i], [&](const AttendParams& p) { jit::attend_on_gpu(p, planner); });
  });
  return found;
}

inline cuda::AttentionPlan many_warps(const cuda::AttentionShape& s, const cuda::Device& device, int warps,
                                      int stages) {
  cuda::AttentionPlan p;
  EXPECT_TRUE(cuda::plan_many_rows(s, device, p));
  p.warps = warps, p.stages = stages;
  p.shared_bytes = cuda::with_copies(s, p, cuda::many_rows_shared_bytes);
  return p;
}

/// Each int8 kernel, for heads of more than 128 coordinates and up to 16 rows.
inline const jit::Planner kPlanners[] = {
    cuda::plan_few_rows,
    [](const cuda::AttentionShape& s, const cuda::Device& device) { return many_warps(s, device, 8, 3); },
    [](const cuda::AttentionShape& s, const cuda::Device& device) { return many_warps(s, device, 16, 2); }};

/// Expects every case to be within a tolerance and the rounding of its output.
inline void expect_oracle(const std::vector<cases::Case>& table, jit::Planner planner, double tolerance,
                          const std::string& what) {
  const auto found = compare(table, planner);
  for (size_t i = 0; i < table.size(); ++i) {
    SCOPED_TRACE(testing::Message() << table[i].name() << ", " << what);
    const double limit = tolerance + cases::rounding(table[i].dtype);
    EXPECT_LE(found[i].overall, limit);
    EXPECT_LE(found[i].worst_row, limit);
  }
}

}  // namespace turboquant
