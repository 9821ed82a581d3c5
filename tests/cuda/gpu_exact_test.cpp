// Attention that reads exact copies of the newest and the first tokens, on a GPU, against the oracle.
#include "compare.h"

namespace turboquant {
namespace {

using namespace cases;

TEST_F(Gpu, AttentionOverExactCopiesMatchesTheOracle) {
  auto table = table_exact();
  if (short_run()) {
    size_t kept = 0;
    for (size_t i = 0; i < table.size(); i += 5) table[kept++] = table[i];
    table.resize(kept);
  }
  expect_oracle(table, cuda::plan_attention, kPrefillTolerance, "as planned");
}

/// Rows of `plan` whose copies are read in some number of splits.
template <int PARTS>
cuda::AttentionPlan split_copies(const cuda::AttentionShape& s, const cuda::Device& device) {
  auto p = cuda::plan_attention(s, device);
  const int segments = s.batch * s.kv_heads * ((s.rows() + p.rows - 1) / p.rows);
  p.slots += segments * (PARTS - p.exact_splits);
  p.exact_splits = PARTS;
  return p;
}

TEST_F(Gpu, EveryPlanOverExactCopiesMatchesTheOracle) {
  std::vector<jit::Planner> planners(std::begin(kPlanners), std::end(kPlanners) - 1);  // no room for sixteen warps
  planners.push_back([](const cuda::AttentionShape& s, const cuda::Device&) {  // few warps, and parts of many tiles
    return cuda::plan_few_rows(s, {2, 101376});
  });
  planners.push_back(split_copies<3>);
  for (size_t i = 0; i < planners.size(); ++i) {
    std::vector<Case> table;
    for (auto [len, kv_len] : {std::pair{1, 1}, {1, 300}, {3, 300}, {2, 2500}}) {
      if (short_run() && kv_len == 2500) continue;
      table.push_back({.key_bits = 4,
                       .value_bits = 2,
                       .query_heads = 4,
                       .kv_heads = 2,
                       .query_len = len,
                       .kv_len = kv_len,
                       .causal = true,
                       .recent = 128,
                       .first = 4,
                       .ring = 384});
      Case c = table.back();
      c.key_bits = c.value_bits = 3, c.key_code = c.value_code = Code::trellis;
      table.push_back(c);
      c.batch = 3, c.ragged = true, c.dtype = Dtype::bfloat16, c.sinks = c.centred = true;
      if (kv_len > 1) table.push_back(c);
    }
    expect_oracle(table, planners[i], kTolerance, "plan " + std::to_string(i));
  }
}

// The codes of tokens that are read from copies, and the copies of those that are not, may hold anything.
TEST_F(Gpu, WhatIsNotReadHasNoInfluence) {
  for (int len : {1, 3, 40}) {
    Case c{.query_heads = 4, .query_len = len, .kv_len = 200, .causal = true, .recent = 64, .first = 4, .ring = 128};
    SCOPED_TRACE(c.name());
    Inputs inputs(c);
    const Buffer want = oracle(inputs);
    for (int t : {0, 3, 137, 199}) {  // first, or recent for every query up to 199 - 63 + len - 1
      inputs.keys.scales[t] = inputs.values.scales[t] = 0x7e00;
    }
    for (int t : {73, 135}) {  // in the ring, and older than any query reads there
      if (t == 135 && len > 1) continue;
      inputs.exact_keys.scales[t % 128] = inputs.exact_values.scales[t % 128] = 0x7e00;
    }
    const auto found = cases::compare(inputs, want, [](const AttendParams& p) { jit::attend_on_gpu(p); });
    EXPECT_LE(found.worst_row, kPrefillTolerance);
  }
}

}  // namespace
}  // namespace turboquant
