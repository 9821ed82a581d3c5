// Encoding with error feedback in the emulator, held to targets computed from its own earlier codes (feedback.h).
#include "support/feedback.h"

#include <gtest/gtest.h>

#include "support/metal_launches.h"

namespace turboquant {
namespace {

using namespace cases;

constexpr int kSeed = 3, kBatch = 2, kHeads = 2, kTokens = 5;

/// Parameters of vectors [batch, heads, tokens, dim] that lie densely; `out` has batch x heads heads.
EncodeParams params(const Buffer& x, Encoded& out, int batch, int heads, int tokens) {
  EncodeParams p;
  p.batch = batch, p.heads = heads, p.tokens = tokens, p.head_dim = out.dim, p.seed = kSeed;
  p.x = contiguous<const void*>(x.bytes.data(), x.dtype, heads, tokens, out.dim);
  p.out = out.view();
  p.out.codes_batch_stride = heads * p.out.codes_head_stride;
  p.out.scales_batch_stride = heads * p.out.scales_head_stride;
  return p;
}

class MetalFeedback : public testing::TestWithParam<emulator::FeedbackCase> {};

TEST_P(MetalFeedback, CodesAreTheNearestToTheirTargets) {
  const auto& c = GetParam();
  const int dim = c.head_dim, rows = kBatch * kHeads * kTokens;
  const Buffer centres = gaussian(size_t(kHeads) * dim, Dtype::float32, 6);
  const float* centre = c.centred ? reinterpret_cast<const float*>(centres.bytes.data()) : nullptr;
  std::vector<Buffer> x;
  std::vector<Encoded> got;
  std::vector<std::vector<uint16_t>> g;
  for (size_t side = 0; side < c.sides.size(); ++side) {
    x.push_back(gaussian(size_t(rows) * dim, c.dtype, 5 + side));
    got.emplace_back(kBatch * kHeads, kTokens, dim, c.sides[side].coding.bits, c.sides[side].coding.code);
    g.push_back(random_feedback(kHeads, dim, 9 + side));  // NaN where nothing may be read
  }
  std::vector<EncodeParams> sides;
  for (size_t side = 0; side < c.sides.size(); ++side) {
    sides.push_back(params(x[side], got[side], kBatch, kHeads, kTokens));
    if (side == 0) sides[0].centre = centre;
    if (c.sides[side].feedback) sides[side].feedback = g[side].data();
  }
  emulator::encode(sides);

  for (size_t side = 0; side < c.sides.size(); ++side) {
    SCOPED_TRACE(testing::Message() << "side " << side << " bits " << got[side].bits << " dim " << dim << " dtype "
                                    << int(c.dtype));
    const int bits = got[side].bits;
    const float* shift = sides[side].centre;
    if (!c.sides[side].feedback) {
      Encoded plain(kBatch * kHeads, kTokens, dim, bits, got[side].code);
      EncodeParams p = params(x[side], plain, kBatch, kHeads, kTokens);
      p.centre = shift;
      encode(p, Backend::reference);
      int differing = 0;
      for (size_t i = 0; i < plain.codes.size(); ++i) differing += plain.codes[i] != got[side].codes[i];
      EXPECT_LE(differing, 1) << "of the side without feedback";
      continue;
    }
    ASSERT_EQ(wrong_vectors(x[side], got[side], kHeads, kSeed, shift, g[side].data()), "");
  }
}
INSTANTIATE_TEST_SUITE_P(All, MetalFeedback, testing::ValuesIn(emulator::feedback_cases()), [](const auto& info) {
  std::string name = std::to_string(info.index) + "_D" + std::to_string(info.param.head_dim);
  for (const auto& side : info.param.sides) {
    name += "_" + std::to_string(side.coding.bits) + (side.coding.code == Code::trellis ? "t" : "");
    name += side.feedback ? "fed" : "plain";
  }
  return name;
});

auto encoder(Code code) {
  return [=](const Buffer& x, int heads, int tokens, int dim, int bits, const uint16_t* g) {
    Encoded e(heads, tokens, dim, bits, code);
    EncodeParams p = params(x, e, 1, heads, tokens);
    p.feedback = g;
    emulator::encode({p});
    return e;
  };
}

TEST(MetalFeedback, CodesDoNotDependOnTheCompany) {
  for (const auto& c : emulator::feedback_company_cases()) {
    const auto& coding = c.sides[0].coding;
    EXPECT_EQ(wrong_when_alone(encoder(coding.code), c.dtype, kTokens, c.head_dim, coding.bits), "");
  }
}

TEST(MetalFeedback, ZeroStaysZeroAndBadVectorsSpoilThemselvesAlone) {
  for (const auto& c : emulator::feedback_edge_cases()) {
    const auto& coding = c.sides[0].coding;
    EXPECT_EQ(wrong_beside_bad_vectors(encoder(coding.code), c.dtype, c.head_dim, coding.bits, kSeed), "");
  }
}

// Feedback that moves targets beyond the largest level, which codes of 8 bits must not pass.
TEST(MetalFeedback, EightBitsStopAtTheLargestLevel) {
  const auto c = emulator::feedback_edge_cases().back();
  ASSERT_EQ(c.sides[0].coding.bits, 8);
  const int tokens = 24;
  const Buffer x = gaussian(size_t(tokens) * c.head_dim, c.dtype, 8);
  auto g = random_feedback(1, c.head_dim);
  for (auto& v : g) v = float_to_half(half_to_float(v) * 40);
  EXPECT_EQ(wrong_vectors(x, encoder(Code::scalar)(x, 1, tokens, c.head_dim, 8, g.data()), 1, kSeed, nullptr, g.data()),
            "");
}

TEST(MetalPlan, FeedbackHasKernelsOfItsOwnWhereItDoesSomething) {
  const metal::EncodeShape plain{1, 2, 3, 64, {3, 3}, {false, false}, 1};
  auto fed = plain;
  fed.feedback = {false, true};
  EXPECT_EQ(metal::encode_kernel(plain).name, "turboquant_encode_two");
  EXPECT_EQ(metal::encode_kernel(fed).name, "turboquant_encode_two_feedback");
  auto none = plain;
  none.feedback = {false, false};
  EXPECT_EQ(metal::encode_kernel(none).name, metal::encode_kernel(plain).name);
  EXPECT_EQ(metal::encode_kernel(none).source, metal::encode_kernel(plain).source);
  fed.head_dim = 32;
  EXPECT_EQ(metal::encode_kernel(fed).name, "turboquant_encode_two");
  EXPECT_EQ(metal::encode_kernel(fed).inputs, metal::encode_kernel(plain).inputs);
}

}  // namespace
}  // namespace turboquant
