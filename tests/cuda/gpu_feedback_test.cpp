// Encoding with error feedback on a GPU, held to targets computed from its own earlier codes (tests/cpp/feedback.h).
#include <cstring>

#include "attend.h"
#include "feedback.h"
#include "gpu.h"

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
      for (int row = 0; row < heads * tokens; ++row) {
        const int head = row / tokens;
        const FeedbackInput in{x,
                               size_t(row),
                               dim,
                               bits,
                               kSeed,
                               centre ? centre + head * dim : nullptr,
                               g.data() + size_t(head) * dim * dim};
        ASSERT_EQ(wrong_with_feedback(in, &keys.codes[size_t(row) * words_per_vector(bits, dim)], keys.scales[row]), "")
            << "row " << row;
      }
      const Encoded plain = encode_rows(x, heads, tokens, dim, 6 - bits, Backend::reference, kSeed);
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
  for (const Encoded* e : {&keys, &values}) {
    for (int row = 0; row < tokens; ++row) {
      ASSERT_EQ(wrong_with_feedback({x, size_t(row), dim, e->bits, kSeed, nullptr, g.data()},
                                    &e->codes[size_t(row) * words_per_vector(e->bits, dim)], e->scales[row]),
                "")
          << row;
    }
  }
}

TEST_F(Gpu, FeedbackCodesDoNotDependOnTheCompany) {
  const int heads = 2, tokens = 37, dim = 256, bits = 3, words = words_per_vector(bits, dim);
  const Buffer x = gaussian(size_t(heads) * tokens * dim, Dtype::float16);
  const auto g = random_feedback(heads, dim);
  Encoded together(heads, tokens, dim, bits);
  EncodeParams p = params(x, together, 1, heads, tokens);
  p.feedback = g.data();
  jit::encode_on_gpu(p, nullptr);
  for (int row : {0, 7, 8, 31, 32, 36, 37, 73}) {
    Buffer one(Dtype::float16, dim);
    for (int i = 0; i < dim; ++i) one.set(i, x.get(size_t(row) * dim + i));
    Encoded alone(1, 1, dim, bits);
    EncodeParams q = params(one, alone, 1, 1, 1);
    q.feedback = g.data() + size_t(row / tokens) * dim * dim;
    jit::encode_on_gpu(q, nullptr);
    EXPECT_EQ(std::memcmp(alone.codes.data(), &together.codes[size_t(row) * words], words * 4), 0) << row;
    EXPECT_EQ(alone.scales[0], together.scales[row]) << row;
  }
}

TEST_F(Gpu, FeedbackKeepsZeroAndSpoilsNothingButBadVectors) {
  const int tokens = 6, dim = 128, bits = 3, words = words_per_vector(bits, dim);
  Buffer x = gaussian(size_t(tokens) * dim);
  for (int i = 0; i < dim; ++i) x.set(i, 0);
  x.set(dim + 5, NAN);
  x.set(2 * dim + 9, INFINITY);
  const auto g = random_feedback(1, dim);
  Encoded e(1, tokens, dim, bits);
  EncodeParams p = params(x, e, 1, 1, tokens);
  p.feedback = g.data();
  jit::encode_on_gpu(p, nullptr);
  EXPECT_EQ(e.scales[0], 0);
  for (int t : {1, 2}) EXPECT_TRUE(std::isnan(half_to_float(e.scales[t]))) << t;
  for (int i = 0; i < 3 * words; ++i) EXPECT_EQ(e.codes[i], 0u) << i;
  for (int t = 3; t < tokens; ++t) {
    EXPECT_EQ(wrong_with_feedback({x, size_t(t), dim, bits, kSeed, nullptr, g.data()}, &e.codes[size_t(t) * words],
                                  e.scales[t]),
              "");
  }
}

}  // namespace
}  // namespace turboquant
