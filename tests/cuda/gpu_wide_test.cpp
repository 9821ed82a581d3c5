// Heads of more than 256 coordinates, values of another dimension than keys and latent attention on a GPU.
#include "compare.h"
#include "support/feedback.h"
#include "support/vectors.h"

namespace turboquant {
namespace {

using namespace cases;

/// Every n-th case for a short run.
std::vector<Case> some_of(std::vector<Case> table, size_t n) {
  if (!short_run()) return table;
  size_t kept = 0;
  for (size_t i = 0; i < table.size(); i += n) table[kept++] = table[i];
  table.resize(kept);
  return table;
}

TEST_F(Gpu, AttentionOfWideHeadsMatchesTheOracle) {
  expect_oracle(some_of(table_wide(), 20), cuda::plan_attention, kTolerance, "wide");
}

TEST_F(Gpu, AttentionOfTwoWidthsMatchesTheOracle) {
  expect_oracle(some_of(table_widths(), 17), cuda::plan_attention, kTolerance, "widths");
}

// Keys as values have no mean, so that sums of them are smaller beside the weights' rounding than the table's values.
TEST_F(Gpu, LatentAttentionMatchesTheOracle) {
  expect_oracle(some_of(table_latent(), 12), cuda::plan_attention, 2 * kTolerance, "latent");
}

constexpr int kSeed = 5;

EncodeParams encode_params(const Buffer& x, Encoded& out, const uint16_t* feedback) {
  EncodeParams p;
  p.batch = 1, p.heads = out.heads, p.tokens = out.tokens, p.head_dim = out.dim, p.seed = kSeed;
  p.x = contiguous<const void*>(x.bytes.data(), x.dtype, out.heads, out.tokens, out.dim);
  p.feedback = feedback;
  p.out = out.view();
  return p;
}

/// Codes of wide vectors, with feedback or without: each the nearest to its target, whoever made them.
TEST_F(Gpu, CodesOfWideVectorsAreTheNearest) {
  FeedbackRounding rounding;
  rounding.search = SearchRounding{.cost = 0.6};
  for (int dim : {288, 320, 352, 384, 416, 448, 480, 512}) {
    if (short_run() && dim != 448 && dim != 512) continue;
    for (auto [bits, code] : {std::pair{2, Code::trellis}, {3, Code::trellis}, {3, Code::scalar}, {8, Code::scalar}}) {
      if (short_run() && (dim == 448 ? bits != 8 : bits != 3 || code == Code::scalar)) continue;
      SCOPED_TRACE(testing::Message() << "bits " << bits << " code " << int(code) << " dim " << dim);
      const int heads = 2, tokens = 11;
      const Buffer x = gaussian(size_t(heads) * tokens * dim, Dtype(dim / 32 % 3));
      const auto g = random_feedback(heads, dim);
      const std::vector<uint16_t> zero(g.size(), 0);
      Encoded fed(heads, tokens, dim, bits, code), plain(heads, tokens, dim, bits, code);
      const EncodeParams k = encode_params(x, fed, g.data()), v = encode_params(x, plain, nullptr);
      jit::encode_on_gpu(k, &v);
      EXPECT_EQ(wrong_vectors(x, fed, heads, kSeed, nullptr, g.data(), rounding), "");
      DecodeParams p;
      p.batch = 1, p.heads = heads, p.tokens = tokens, p.head_dim = dim, p.seed = kSeed;
      p.in = plain.packed();
      std::vector<float> got(x.size()), want(x.size());
      p.out = contiguous<void*>(got.data(), Dtype::float32, heads, tokens, dim);
      jit::decode_on_gpu(p);
      p.out.data = want.data();
      decode(p, Backend::reference);
      double error = 0, square = 0;
      for (size_t i = 0; i < got.size(); ++i) {
        ASSERT_NEAR(got[i], want[i], 1e-4) << i;
        error += (want[i] - x.get(i)) * (want[i] - x.get(i)), square += x.get(i) * x.get(i);
      }
      // The reference's codes of the same vectors err as little.
      Encoded own(heads, tokens, dim, bits, code);
      EncodeParams e = encode_params(x, own, nullptr);
      encode(e, Backend::reference);
      p.in = own.packed();
      decode(p, Backend::reference);
      double least = 0;
      for (size_t i = 0; i < want.size(); ++i) least += (want[i] - x.get(i)) * (want[i] - x.get(i));
      EXPECT_LE(error, 1.001 * least);
    }
  }
}

}  // namespace
}  // namespace turboquant
