// Encoding with error feedback on a GPU, held to targets computed from its own earlier codes
// (tests/support/feedback.h).
#include "gpu.h"
#include "support/cuda_attend.h"
#include "support/feedback.h"

namespace turboquant {
namespace {

using namespace cases;

constexpr int kSeed = 3;

/// Parameters of vectors [batch, heads, tokens, dim] that lie densely.
EncodeParams params(const Buffer& x, Encoded& out, int batch, int heads, int tokens) {
  EncodeParams p;
  p.batch = batch, p.heads = heads, p.tokens = tokens, p.head_dim = out.dim, p.seed = kSeed;
  p.x = contiguous<const void*>(x.bytes.data(), x.dtype, heads, tokens, out.dim);
  p.out = out.view();
  return p;
}

TEST_F(Gpu, FeedbackCodesAreTheNearestToTheirTargets) {
  const int heads = 2;
  for (int dim : {32, 64, 96, 128, 160, 192, 224, 256}) {
    for (int bits : {2, 3, 4}) {
      const Dtype dtype = Dtype((dim / 32 + bits) % 3);
      const int tokens = dim == 256 ? 45 : 11;  // more than a block takes, and some
      SCOPED_TRACE(testing::Message() << "bits " << bits << " dim " << dim << " dtype " << int(dtype));
      const Buffer x = gaussian(size_t(heads) * tokens * dim, dtype);
      const Buffer centres = gaussian(size_t(heads) * dim, Dtype::float32, 6);
      const float* centre = bits == 3 ? reinterpret_cast<const float*>(centres.bytes.data()) : nullptr;
      const auto g = random_feedback(heads, dim);
      Encoded keys(heads, tokens, dim, bits), values(heads, tokens, dim, 6 - bits);
      EncodeParams k = params(x, keys, 1, heads, tokens), v = params(x, values, 1, heads, tokens);
      k.centre = centre, k.feedback = g.data();
      jit::encode_on_gpu(k, &v);  // values without
      ASSERT_EQ(wrong_vectors(x, keys, heads, kSeed, centre, g.data()), "");
      const Encoded plain = encode_vectors(x, heads, tokens, dim, 6 - bits, Backend::reference, kSeed);
      size_t differ = 0;
      for (size_t i = 0; i < plain.codes.size(); ++i) differ += plain.codes[i] != values.codes[i];
      EXPECT_LE(differ, 2u) << "of the side without feedback";
    }
  }
}

TEST_F(Gpu, FeedbackOfBothSidesWithDifferentWidths) {
  const int tokens = 9, dim = 256;
  const Buffer x = gaussian(size_t(tokens) * dim, Dtype::float16);
  const auto g = random_feedback(1, dim);
  Encoded keys(1, tokens, dim, 4), values(1, tokens, dim, 3);
  EncodeParams k = params(x, keys, 1, 1, tokens), v = params(x, values, 1, 1, tokens);
  k.feedback = v.feedback = g.data();
  jit::encode_on_gpu(k, &v);
  for (const Encoded* e : {&keys, &values}) ASSERT_EQ(wrong_vectors(x, *e, 1, kSeed, nullptr, g.data()), "");
}

Encoded encode_with_feedback(const Buffer& x, int heads, int tokens, int dim, int bits, const uint16_t* g) {
  Encoded e(heads, tokens, dim, bits);
  EncodeParams p = params(x, e, 1, heads, tokens);
  p.feedback = g;
  jit::encode_on_gpu(p, nullptr);
  return e;
}

TEST_F(Gpu, FeedbackCodesDoNotDependOnTheCompany) {
  EXPECT_EQ(wrong_when_alone(encode_with_feedback, Dtype::float16, 37, 256, 3), "");
}

TEST_F(Gpu, FeedbackKeepsZeroAndSpoilsNothingButBadVectors) {
  EXPECT_EQ(wrong_beside_bad_vectors(encode_with_feedback, Dtype::float32, 128, 3, kSeed), "");
}

}  // namespace
}  // namespace turboquant
