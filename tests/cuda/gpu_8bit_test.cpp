// Codes of 8 bits on a GPU: attention, decode and encode against the oracle.
#include "compare.h"
#include "support/feedback.h"
#include "support/golden.h"
#include "support/vectors.h"

namespace turboquant {
namespace {

using namespace cases;

constexpr int kSeed = 3;

TEST_F(Gpu, AttentionOver8BitsMatchesTheOracle) {
  auto table = table_8bits();
  if (short_run()) {
    size_t kept = 0;
    for (size_t i = 0; i < table.size(); i += 7) table[kept++] = table[i];
    table.resize(kept);
  }
  expect_oracle(table, cuda::plan_attention, kPrefillTolerance, "as planned");
}

TEST_F(Gpu, EveryPlanOver8BitsMatchesTheOracle) {
  const jit::Planner planners[] = {
      cuda::plan_few_rows,
      [](const cuda::AttentionShape& s, const cuda::Device& device) {  // two warps: less memory than queries of a block
        return cuda::plan_few_rows(s, {device.multiprocessors, 101376});
      },
      [](const cuda::AttentionShape& s, const cuda::Device& device) {
        cuda::AttentionPlan p;
        EXPECT_TRUE(cuda::plan_many_rows(s, device, p));
        return p;
      }};
  for (const auto& planner : planners) {
    std::vector<Case> table;
    for (auto [key_bits, value_bits] : {std::pair{8, 8}, {8, 4}, {3, 8}}) {
      Case c{.key_bits = key_bits, .value_bits = value_bits, .query_len = 3, .kv_len = 300, .causal = true};
      if (key_bits == 3) c.key_code = Code::trellis;
      table.push_back(c);
      if (!short_run()) c.kv_len = 2500, table.push_back(c);
    }
    for (int dim : {160, 192}) {
      if (short_run()) continue;
      table.push_back({.key_bits = 8, .value_bits = 8, .head_dim = dim, .query_len = 2, .kv_len = 700, .causal = true});
    }
    expect_oracle(table, planner, kTolerance, "plan " + std::to_string(&planner - planners));
  }
}

Encoded encode_8bits(const Buffer& x, int heads, int tokens, int dim, int, const uint16_t* g) {
  Encoded e(heads, tokens, dim, 8);
  EncodeParams p;
  p.batch = 1, p.heads = heads, p.tokens = tokens, p.head_dim = dim, p.seed = kSeed, p.feedback = g;
  p.x = contiguous<const void*>(x.bytes.data(), x.dtype, heads, tokens, dim);
  p.out = e.view();
  jit::encode_on_gpu(p, nullptr);
  return e;
}

TEST_F(Gpu, CodesOf8BitsAreTheNearestLevels) {
  for (int dim : {32, 96, 128, 256}) {
    const Dtype dtype = Dtype(dim / 32 % 3);
    const int heads = 2, tokens = 9;
    SCOPED_TRACE(testing::Message() << "dim " << dim << " dtype " << int(dtype));
    const Buffer x = gaussian(size_t(heads) * tokens * dim, dtype);
    const Encoded got = encode_8bits(x, heads, tokens, dim, 8, nullptr);
    const Encoded want = encode_vectors(x, heads, tokens, dim, 8, Backend::reference, kSeed);
    int differ = 0;
    for (size_t row = 0; row < got.scales.size(); ++row) {
      for (int i = 0; i < dim; ++i) {
        const size_t at = row * words_per_vector(8, dim);
        const int a = level_at(&got.codes[at], 8, Code::scalar, i), b = level_at(&want.codes[at], 8, Code::scalar, i);
        EXPECT_LE(std::abs(a - b), 1);
        differ += a != b;
      }
      EXPECT_NEAR(half_to_float(got.scales[row]) / half_to_float(want.scales[row]), 1, 0x1p-10);
    }
    EXPECT_LE(differ, 2 + heads * tokens * dim / 2000);  // beside a threshold, of which there are 254
    DecodeParams p;
    p.batch = 1, p.heads = heads, p.tokens = tokens, p.head_dim = dim, p.seed = kSeed, p.in = got.packed();
    std::vector<float> y(x.size());
    p.out = contiguous<void*>(y.data(), Dtype::float32, heads, tokens, dim);
    jit::decode_on_gpu(p);
    const auto expected = decode_vectors(got, Backend::reference, kSeed);
    for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], expected[i], 1e-4) << i;
  }
}

TEST_F(Gpu, CodesOf8BitsWithFeedbackAreTheNearestToTheirTargets) {
  for (int dim : {32, 256}) {
    const int tokens = 11;
    const Buffer x = gaussian(size_t(tokens) * dim, Dtype::float32);
    const auto g = random_feedback(1, dim);
    EXPECT_EQ(wrong_vectors(x, encode_8bits(x, 1, tokens, dim, 8, g.data()), 1, kSeed, nullptr, g.data()), "");
  }
  EXPECT_EQ(wrong_beside_bad_vectors(encode_8bits, Dtype::float32, 128, 8, kSeed), "");
}

TEST_F(Gpu, CodesOf8BitsHaveTheGoldenBytes) {
  const auto numbers = golden::vector();
  Buffer x(Dtype::float32, golden::kDim);
  for (int i = 0; i < golden::kDim; ++i) x.set(i, numbers[i]);
  for (const auto& g : golden::bytes_of_8_bits()) {
    const Encoded e = encode_8bits(x, 1, 1, golden::kDim, 8, nullptr);
    EXPECT_EQ(e.codes, g.words);
    EXPECT_EQ(e.scales[0], g.scale);
  }
}

}  // namespace
}  // namespace turboquant
