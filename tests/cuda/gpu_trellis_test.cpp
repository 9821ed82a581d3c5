// Trellis codes on a GPU: attention and decode against the oracle, encode against the least error of all paths.
#include "compare.h"
#include "support/feedback.h"
#include "support/golden.h"
#include "support/vectors.h"

namespace turboquant {
namespace {

using namespace cases;

TEST_F(Gpu, AttentionOverTrellisCodesMatchesTheOracle) {
  auto table = table_trellis();
  if (short_run()) {
    size_t kept = 0;
    for (size_t i = 0; i < table.size(); i += 7) table[kept++] = table[i];
    table.resize(kept);
  }
  expect_oracle(table, cuda::plan_attention, kPrefillTolerance, "as planned");
}

TEST_F(Gpu, EveryPlanOverTrellisCodesMatchesTheOracle) {
  for (const auto& planner : kPlanners) {
    std::vector<Case> table;
    for (auto [key_bits, value_bits] : {std::pair{3, 3}, {2, 2}, {3, 2}}) {
      for (int kv_len : {1, 300, 2500}) {
        if (short_run() && kv_len != 300) continue;
        Case c{.key_bits = key_bits, .value_bits = value_bits, .query_len = std::min(kv_len, 3), .kv_len = kv_len};
        c.causal = true, c.key_code = c.value_code = Code::trellis;
        table.push_back(c);
        if (key_bits == value_bits) continue;
        c.value_bits = 4, c.value_code = Code::scalar;
        table.push_back(c);
        std::swap(c.key_bits, c.value_bits), std::swap(c.key_code, c.value_code);
        table.push_back(c);
      }
    }
    for (int dim : {160, 192, 224}) {
      if (short_run() && dim != 192) continue;
      Case c{.head_dim = dim, .query_len = 2, .kv_len = 700, .causal = true};
      c.key_code = c.value_code = Code::trellis;
      table.push_back(c);
    }
    expect_oracle(table, planner, kTolerance, "plan " + std::to_string(&planner - kPlanners));
  }
}

TEST_F(Gpu, DecodeOfTrellisCodesMatchesTheOracle) {
  for (int dim : {32, 96, 128, 160, 256}) {
    for (int bits : {2, 3}) {
      const int heads = 2, tokens = 19;
      const Buffer x = gaussian(size_t(heads) * tokens * dim, Dtype::float32);
      Encoded e = encode_vectors(x, heads, tokens, dim, bits, Backend::reference, 7, nullptr, nullptr, Code::trellis);
      DecodeParams p;
      p.batch = 1, p.heads = heads, p.tokens = tokens, p.head_dim = dim, p.seed = 7;
      p.in = e.packed();
      std::vector<float> got(x.size()), want(x.size());
      p.out = contiguous<void*>(got.data(), Dtype::float32, heads, tokens, dim);
      jit::decode_on_gpu(p);
      p.out.data = want.data();
      decode(p, Backend::reference);
      for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-4) << dim << " " << bits << " " << i;
    }
  }
}

constexpr int kSeed = 3;

/// A step's costs are rounded to whole numbers of a group's costs / 32,751: less than this many squared levels of what
/// the vectors here cost.
constexpr SearchRounding kSearch{.cost = 0.6};
const FeedbackRounding kRounding = [] {
  FeedbackRounding r;
  r.search = kSearch;
  return r;
}();

/// What is wrong with the codes of vectors [heads, tokens, dim] without feedback.
std::string wrong_plain(const Buffer& x, const Encoded& e, const float* centres) {
  std::ostringstream wrong;
  const FeedbackRounding float32;
  for (size_t row = 0; row < e.scales.size(); ++row) {
    const size_t head = row / e.tokens % e.heads;
    const FeedbackInput in{x, row, e.dim, e.bits, kSeed, centres ? centres + head * e.dim : nullptr, nullptr, e.code};
    const Direction of(in);
    const double length = unit(e.bits, 1) * std::sqrt(double(e.dim));
    const uint32_t* words = &e.codes[row * words_per_vector(e.bits, e.dim)];
    double square = 0;
    for (int block = 0; block < e.dim; block += 32) {
      double targets[32], tolerances[32];
      for (int i = 0; i < 32; ++i) {
        targets[i] = of.r[block + i] * length;
        tolerances[i] = (length * float32.of_a_coordinate + 4 * std::abs(targets[i])) * float32.unit;
        const double level = level_at(words, e.bits, e.code, block + i);
        square += level * level;
      }
      wrong << wrong_path(words + block / 32 * e.bits, e.bits, targets, tolerances, kSearch);
    }
    const int want = float_to_half(float(of.norm / (std::sqrt(square) * level_step(e.bits, 1))));
    if (std::abs(want - int(e.scales[row])) > 1) wrong << "row " << row << " has scale " << e.scales[row] << "; ";
  }
  return wrong.str();
}

EncodeParams params(const Buffer& x, Encoded& out) {
  EncodeParams p;
  p.batch = 1, p.heads = out.heads, p.tokens = out.tokens, p.head_dim = out.dim, p.seed = kSeed;
  p.x = contiguous<const void*>(x.bytes.data(), x.dtype, out.heads, out.tokens, out.dim);
  p.out = out.view();
  return p;
}

TEST_F(Gpu, TrellisCodesAreTheNearestPaths) {
  for (int dim : {32, 64, 96, 128, 160, 192, 224, 256}) {
    for (int bits : {2, 3}) {
      if (short_run() && (dim / 32 + bits) % 2) continue;
      const Dtype dtype = Dtype((dim / 32 + bits) % 3);
      SCOPED_TRACE(testing::Message() << "bits " << bits << " dim " << dim << " dtype " << int(dtype));
      const int heads = 2, tokens = 21;
      const Buffer x = gaussian(size_t(heads) * tokens * dim, dtype);
      const Buffer centres = gaussian(size_t(heads) * dim, Dtype::float32, 6);
      const float* centre = bits == 3 ? reinterpret_cast<const float*>(centres.bytes.data()) : nullptr;
      Encoded keys(heads, tokens, dim, bits, Code::trellis), values(heads, tokens, dim, 5 - bits, Code::trellis);
      EncodeParams k = params(x, keys), v = params(x, values);
      k.centre = centre;
      jit::encode_on_gpu(k, &v);
      EXPECT_EQ(wrong_plain(x, keys, centre), "");
      EXPECT_EQ(wrong_plain(x, values, nullptr), "");
    }
  }
}

TEST_F(Gpu, TrellisCodesWithFeedbackAreTheNearestPaths) {
  for (int dim : {32, 64, 160, 256}) {
    for (int bits : {2, 3}) {
      if (short_run() && (dim / 32 + bits) % 2) continue;
      SCOPED_TRACE(testing::Message() << "bits " << bits << " dim " << dim);
      const int heads = 2, tokens = dim == 256 ? 45 : 11;
      const Buffer x = gaussian(size_t(heads) * tokens * dim, Dtype::float16);
      const auto g = random_feedback(heads, dim);
      Encoded keys(heads, tokens, dim, bits, Code::trellis), values(heads, tokens, dim, bits, Code::trellis);
      EncodeParams k = params(x, keys), v = params(x, values);
      k.feedback = g.data();
      jit::encode_on_gpu(k, &v);
      EXPECT_EQ(wrong_vectors(x, keys, heads, kSeed, nullptr, g.data(), kRounding), "");
      EXPECT_EQ(wrong_plain(x, values, nullptr), "");
    }
  }
}

// One side by trellis, the other not; one with feedback, the other not: all in one launch.
TEST_F(Gpu, TrellisAndScalarSidesOfOneLaunch) {
  const int heads = 1, tokens = 9, dim = 256;
  const Buffer x = gaussian(size_t(tokens) * dim, Dtype::float16);
  const auto g = random_feedback(1, dim);
  for (bool fed_trellis : {false, true}) {
    Encoded keys(heads, tokens, dim, 3, Code::trellis), values(heads, tokens, dim, 4);
    EncodeParams k = params(x, keys), v = params(x, values);
    (fed_trellis ? k : v).feedback = g.data();
    jit::encode_on_gpu(k, &v);
    if (fed_trellis) {
      EXPECT_EQ(wrong_vectors(x, keys, heads, kSeed, nullptr, g.data(), kRounding), "");
      const Encoded want = encode_vectors(x, heads, tokens, dim, 4, Backend::reference, kSeed);
      size_t differ = 0;
      for (size_t i = 0; i < want.codes.size(); ++i) differ += want.codes[i] != values.codes[i];
      EXPECT_LE(differ, 2u);
    } else {
      EXPECT_EQ(wrong_plain(x, keys, nullptr), "");
      EXPECT_EQ(wrong_vectors(x, values, heads, kSeed, nullptr, g.data()), "");
    }
  }
}

Encoded encode_trellis(const Buffer& x, int heads, int tokens, int dim, int bits, const uint16_t* g) {
  Encoded e(heads, tokens, dim, bits, Code::trellis);
  EncodeParams p = params(x, e);
  p.feedback = g;
  jit::encode_on_gpu(p, nullptr);
  return e;
}
Encoded encode_plain_trellis(const Buffer& x, int heads, int tokens, int dim, int bits, const uint16_t*) {
  return encode_trellis(x, heads, tokens, dim, bits, nullptr);
}

TEST_F(Gpu, TrellisCodesDoNotDependOnTheCompany) {
  EXPECT_EQ(wrong_when_alone(encode_trellis, Dtype::float16, 11, 256, 3), "");
  EXPECT_EQ(wrong_when_alone(encode_plain_trellis, Dtype::float16, 19, 96, 3), "");
}

TEST_F(Gpu, TrellisKeepsZeroAndSpoilsNothingButBadVectors) {
  EXPECT_EQ(wrong_beside_bad_vectors(encode_trellis, Dtype::float32, 128, 3, kSeed), "");
  const int dim = 64, tokens = 4;
  Buffer x = gaussian(size_t(tokens) * dim, Dtype::float32);
  for (int i = 0; i < dim; ++i) x.set(i, 0);
  x.set(dim + 5, NAN), x.set(2 * dim + 9, INFINITY);
  const Encoded e = encode_plain_trellis(x, 1, tokens, dim, 2, nullptr);
  for (int i = 0; i < 3 * words_per_vector(2, dim); ++i) EXPECT_EQ(e.codes[i], 0u) << i;
  EXPECT_EQ(e.scales[0], 0);
  for (int t : {1, 2}) EXPECT_TRUE(std::isnan(half_to_float(e.scales[t])));
  EXPECT_TRUE(std::isfinite(half_to_float(e.scales[3])));
}

TEST_F(Gpu, TrellisCodesHaveTheGoldenBytes) {
  const auto numbers = golden::vector();
  Buffer x(Dtype::float32, golden::kDim);
  for (int i = 0; i < golden::kDim; ++i) x.set(i, numbers[i]);
  for (const auto& g : golden::trellis_bytes()) {
    const Encoded e = encode_plain_trellis(x, 1, 1, golden::kDim, g.bits, nullptr);
    EXPECT_EQ(e.codes, g.words) << g.bits;
    EXPECT_EQ(e.scales[0], g.scale) << g.bits;
  }
}

}  // namespace
}  // namespace turboquant
