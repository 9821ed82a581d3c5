// The Metal kernels, run by the emulator, against the oracle.
#include <gtest/gtest.h>

#include <array>
#include <fstream>

#include "support/feedback.h"
#include "support/golden.h"
#include "support/metal_launches.h"
#include "turboquant/rotation.h"

namespace turboquant {
namespace {

// q and softmax weights as half: at most 2^-12 relative error each, which averages out below this.
constexpr double kTolerance = 5e-4;

class MetalTable : public testing::TestWithParam<cases::Case> {};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(MetalTable);  // in the sanitizers' build

TEST_P(MetalTable, AttentionMatchesTheOracle) {
  const auto& c = GetParam();
  const auto d = cases::compare(c, [](const AttendParams& p) { emulator::attend(p); });
  RecordProperty("overall", std::to_string(d.overall));
  EXPECT_LE(d.overall, kTolerance + cases::rounding(c.dtype));
  EXPECT_LE(d.worst_row, kTolerance + cases::rounding(c.dtype));
}

/// Rows of our own, which together meet every kernel and pair of its parameters.
class MetalVariants : public testing::TestWithParam<emulator::Variant> {};

TEST_P(MetalVariants, AttentionMatchesTheOracle) {
  const auto& v = GetParam();
  const auto d = cases::compare(v.c, [&](const AttendParams& p) { emulator::attend(p, v.splits); });
  EXPECT_LE(d.overall, kTolerance + cases::rounding(v.c.dtype));
  EXPECT_LE(d.worst_row, kTolerance + cases::rounding(v.c.dtype));
}
INSTANTIATE_TEST_SUITE_P(All, MetalVariants, testing::ValuesIn(emulator::variants()), [](const auto& info) {
  return std::to_string(info.index) + "_" + info.param.c.name() + "_splits" + std::to_string(info.param.splits);
});

TEST(MetalCases, PythonReadsTheSameRows) {
  std::ifstream file(TURBOQUANT_TEST_DATA "/cases.txt");
  std::vector<std::string> found;
  for (std::string line; std::getline(file, line);) found.push_back(line);
  const auto names = emulator::names_for_python();
  if (found == names) return;
  std::ofstream renewed("cases.txt");
  for (const auto& name : names) renewed << name << "\n";
  FAIL() << "tests/data/cases.txt is out of date; cases.txt in the working directory is what it should be";
}

std::string case_name(const testing::TestParamInfo<cases::Case>& info) {
  return std::to_string(info.index) + "_" + info.param.name();
}
INSTANTIATE_TEST_SUITE_P(All, MetalTable, testing::ValuesIn(emulator::attention_cases(false)), case_name);

/// The rows that take longest: a test of their own in ctest, so that they run beside the others.
std::vector<cases::Case> long_rows() {
  const auto all = emulator::attention_cases(true);
  return {all.begin() + ptrdiff_t(emulator::attention_cases(false).size()), all.end()};
}
INSTANTIATE_TEST_SUITE_P(Long, MetalTable, testing::ValuesIn(long_rows()), case_name);

/// Vectors of one side with the edge cases in front: zero, NaN, infinity, tiny, huge, one-hot.
std::vector<float> vectors(int count, int dim, Dtype dtype, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(size_t(count) * dim);
  for (auto& v : x) v = normal(rng);
  for (int i = 0; i < dim; ++i) {
    x[i] = 0;
    x[3 * dim + i] *= 1e-4f;
    x[4 * dim + i] *= dtype == Dtype::float16 ? 3e4f : 1e20f;  // a scale beyond float16's range, 2 bits or a wide dtype
    x[5 * dim + i] = i == 5 ? -2.0f : 0.0f;
  }
  x[1 * dim + 3] = NAN;
  x[2 * dim + 4] = INFINITY;
  return x;
}

/// Empty when trellis codes or codes of 8 bits are the nearest to a vector's coordinates (zero for one without a
/// direction) and its scale is that of their levels; else what is wrong.  Codes that are as near may have others.
std::string wrong_codes(const cases::FeedbackInput& in, const uint32_t* words, uint16_t scale) {
  const cases::Direction direction(in);
  const bool trellis = in.code == Code::trellis;
  double largest = 0, square = 0;
  for (double v : direction.r) largest = std::max(largest, std::abs(v));
  const double unit_of_levels = in.bits == 8 ? 127 / largest : unit(in.bits, 1) * std::sqrt(double(in.dim));
  const bool coded = std::isfinite(direction.norm) && direction.norm > 0;
  std::string wrong;
  for (int g = 0; g < in.dim / 32; ++g) {
    const uint32_t* group = words + g * in.bits;
    double targets[32], tolerances[32];
    for (int i = 0; i < 32 && coded; ++i) {
      targets[i] = direction.r[size_t(32 * g + i)] * unit_of_levels;
      tolerances[i] = 0x1p-24 * (16 * unit_of_levels + 4 * std::abs(targets[i]));  // feedback.h: of_a_coordinate
      if (in.bits == 8) tolerances[i] += 0x1p-20 / largest * std::abs(targets[i]);
      const int level = cases::level_at(group, in.bits, in.code, i);
      square += level * level;
      if (!trellis && !cases::is_nearest(8, level & 255, targets[i], tolerances[i])) {
        wrong += "level " + std::to_string(level) + " for the target " + std::to_string(targets[i]) + "; ";
      }
    }
    if (trellis && coded) wrong += cases::wrong_path(group, in.bits, targets, tolerances);
    for (int w = 0; w < in.bits && !coded; ++w) wrong += group[w] ? "a word is not zero; " : "";
  }
  const double want = coded ? direction.norm / (std::sqrt(square) * level_step(in.bits, trellis)) : 0;
  const int bits = float_to_half_saturated(float(want));
  const bool is_nan = (scale & 0x7fff) > 0x7c00;
  if (std::isfinite(direction.norm) ? std::abs(bits - int(scale)) > 1 : !is_nan) {
    wrong += "scale has bits " + std::to_string(scale) + " instead of " + std::to_string(bits);
  }
  return wrong;
}

class MetalCodec : public testing::TestWithParam<emulator::CodecCase> {};

TEST_P(MetalCodec, CodesMatchTheOracleExceptBesideThresholds) {
  const auto c = GetParam();
  constexpr int batch = 2, heads = 3, tokens = 11;
  std::vector<cases::Buffer> x;
  std::vector<cases::PackedBuffer> got, want;
  std::vector<float> centre(size_t(heads) * c.head_dim);
  // No multiples of one number: the vector of zeros would have coordinates that are zero but for rounding.
  for (size_t i = 0; i < centre.size(); ++i) centre[i] = 0.06f * std::sin(float(i) * 1.7f + 1.0f);
  std::vector<EncodeParams> sides;
  const int count = int(c.sides.size());
  for (int side = 0; side < count; ++side) {
    const auto [bits, code] = c.sides[size_t(side)];
    const auto numbers = vectors(batch * heads * tokens, c.head_dim, c.dtype, 7 + side);
    x.emplace_back(c.dtype, numbers.size());
    for (size_t i = 0; i < numbers.size(); ++i) x.back().set(i, numbers[i]);
    got.emplace_back(batch, heads, tokens + 2, c.head_dim, bits, code);
    want.emplace_back(batch, heads, tokens + 2, c.head_dim, bits, code);
  }
  for (int side = 0; side < count; ++side) {
    EncodeParams p;
    p.batch = batch, p.heads = heads, p.tokens = tokens, p.head_dim = c.head_dim, p.seed = 42;
    // Tokens before heads in memory, as a projection leaves them.
    p.x = {x[side].bytes.data(), c.dtype, int64_t(heads) * tokens * c.head_dim, c.head_dim,
           int64_t(heads) * c.head_dim};
    if (c.centred) p.centre = centre.data();
    p.out = want[side].view;
    encode(p, Backend::reference);
    p.out = got[side].view;
    sides.push_back(p);
  }
  emulator::encode(sides);
  for (int side = 0; side < count; ++side) {
    if (c.sides[size_t(side)].code == Code::trellis || got[side].view.bits == 8) {
      for (int row = 0; row < batch * heads * tokens; ++row) {
        const int b = row / heads / tokens, h = row / tokens % heads, t = row % tokens;
        const size_t its_row = size_t(row / tokens * (tokens + 2) + t);
        const cases::FeedbackInput in{x[side],    size_t((b * tokens + t) * heads + h),
                                      c.head_dim, got[side].view.bits,
                                      42,         sides[side].centre ? centre.data() + h * c.head_dim : nullptr,
                                      nullptr,    got[side].view.code};
        const uint32_t* words = &got[side].codes[its_row * words_per_vector(in.bits, in.dim)];
        EXPECT_EQ(wrong_codes(in, words, got[side].scales[its_row]), "") << "row " << row << " of side " << side;
      }
      continue;
    }
    int64_t differing = 0, numbers = 0;
    for (size_t i = 0; i < got[side].codes.size(); ++i) {
      differing += std::popcount(got[side].codes[i] ^ want[side].codes[i]);
      numbers += 32;
    }
    // Single against double precision moves a coordinate over a threshold about once in a million.
    EXPECT_LE(differing, numbers / 10000) << "side " << side;
    for (size_t i = 0; i < got[side].scales.size(); ++i) {
      const uint16_t a = got[side].scales[i], b = want[side].scales[i];
      EXPECT_LE(std::abs(int(a) - int(b)), (a & 0x7c00) == 0x7c00 ? 0 : 1) << "scale " << i << " of side " << side;
    }
  }

  cases::Buffer decoded(c.dtype, x[0].size()), oracle(Dtype::float32, x[0].size());
  DecodeParams d;
  d.batch = batch, d.heads = heads, d.tokens = tokens, d.head_dim = c.head_dim, d.seed = 42;
  d.in = want[0].packed();
  if (c.centred) d.centre = centre.data();
  d.out = cases::contiguous<void*>(oracle.bytes.data(), Dtype::float32, heads, tokens, c.head_dim);
  decode(d, Backend::reference);
  // The kernel takes dense rows alone.
  cases::PackedBuffer dense(batch, heads, tokens, c.head_dim, c.sides[0].bits, c.sides[0].code);
  const int words = words_per_vector(c.sides[0].bits, c.head_dim);
  for (int row = 0; row < batch * heads; ++row) {
    for (int t = 0; t < tokens; ++t) {
      dense.scales[row * tokens + t] = want[0].scales[row * (tokens + 2) + t];
      for (int w = 0; w < words; ++w) {
        dense.codes[(row * tokens + t) * words + w] = want[0].codes[(row * (tokens + 2) + t) * words + w];
      }
    }
  }
  d.in = dense.packed();
  d.out = cases::contiguous<void*>(decoded.bytes.data(), c.dtype, heads, tokens, c.head_dim);
  emulator::decode(d);
  for (size_t row = 0; row < decoded.size() / c.head_dim; ++row) {
    double error = 0, square = 0;
    for (int i = 0; i < c.head_dim; ++i) {
      const float a = decoded.get(row * c.head_dim + i), b = oracle.get(row * c.head_dim + i);
      if (!std::isfinite(b)) {
        EXPECT_FALSE(std::isfinite(a)) << "row " << row;
        continue;
      }
      if (c.dtype == Dtype::float16 && std::abs(b) > 65504) {  // outputs saturate
        EXPECT_EQ(a, std::copysign(65504.0f, b)) << "row " << row;
        continue;
      }
      error += (a - b) * (a - b);
      square += b * b;
    }
    EXPECT_LE(std::sqrt(error), (1e-6 + 2 * cases::rounding(c.dtype)) * std::sqrt(square) + 1e-7) << "row " << row;
  }
}

TEST(MetalCodec, GoldenBytes) {
  auto x = golden::vector();
  std::vector<std::pair<golden::Bytes, Code>> all;
  for (const auto& g : golden::bytes()) all.emplace_back(g, Code::scalar);
  for (const auto& g : golden::bytes_of_8_bits()) all.emplace_back(g, Code::scalar);
  for (const auto& g : golden::trellis_bytes()) all.emplace_back(g, Code::trellis);
  for (const auto& [g, code] : all) {
    SCOPED_TRACE(testing::Message() << "bits " << g.bits << (code == Code::trellis ? " trellis" : ""));
    cases::PackedBuffer got(1, 1, 1, golden::kDim, g.bits, code);
    EncodeParams e;
    e.batch = e.heads = e.tokens = 1, e.head_dim = golden::kDim, e.seed = golden::kSeed;
    e.x = cases::contiguous<const void*>(x.data(), Dtype::float32, 1, 1, golden::kDim);
    e.out = got.view;
    emulator::encode({e});
    EXPECT_EQ(got.codes, g.words);
    EXPECT_EQ(got.scales[0], g.scale);
    got.codes = g.words;
    got.scales[0] = g.scale;
    std::vector<float> y(golden::kDim), want(golden::kDim);
    DecodeParams d;
    d.batch = d.heads = d.tokens = 1, d.head_dim = golden::kDim, d.seed = golden::kSeed;
    d.in = got.packed();
    d.out = cases::contiguous<void*>(y.data(), Dtype::float32, 1, 1, golden::kDim);
    emulator::decode(d);
    d.out.data = want.data();
    decode(d, Backend::reference);
    for (int i = 0; i < golden::kDim; ++i) EXPECT_NEAR(y[i], want[i], 1e-5f * std::abs(want[i]) + 1e-5f);
  }
}

INSTANTIATE_TEST_SUITE_P(All, MetalCodec, testing::ValuesIn(emulator::codec_cases()));

/// A case whose inputs the caller changes before both sides run; returns (got, want).
template <class Change>
std::pair<std::vector<float>, std::vector<float>> run_changed(const cases::Case& c, Change change, int splits = 0) {
  cases::Inputs inputs(c);
  change(inputs);
  AttendParams p = inputs.params();
  emulator::attend(p, splits);
  std::vector<float> got(inputs.out.size()), want(inputs.out.size());
  for (size_t i = 0; i < got.size(); ++i) got[i] = inputs.out.get(i);
  p.out = cases::contiguous<void*>(want.data(), Dtype::float32, c.query_heads, c.query_len, c.value_width());
  attend(p, Backend::reference);
  return {got, want};
}

/// Rows hold NaN exactly where the oracle's do; other rows agree.
void expect_same_poison(const std::vector<float>& got, const std::vector<float>& want, int dim) {
  for (size_t row = 0; row < want.size() / dim; ++row) {
    bool bad_got = false, bad_want = false;
    double error = 0, square = 0;
    for (int i = 0; i < dim; ++i) {
      const float a = got[row * dim + i], b = want[row * dim + i];
      bad_got = bad_got || !std::isfinite(a);
      bad_want = bad_want || !std::isfinite(b);
      error += (a - b) * (a - b);
      square += b * b;
    }
    EXPECT_EQ(bad_got, bad_want) << "row " << row;
    if (!bad_want) {
      EXPECT_LE(std::sqrt(error), kTolerance * std::sqrt(square)) << "row " << row;
    }
  }
}

const cases::Case kFewRowsCase = emulator::few_rows_case();
const auto kSpecialCases = emulator::special_cases();

TEST(MetalRules, BadKeysAndValuesPoisonOnlyRowsThatSeeThem) {
  for (auto c : kSpecialCases) {
    for (bool values : {false, true}) {
      for (uint16_t bad : {uint16_t(0x7e00), uint16_t(0x7c00)}) {
        SCOPED_TRACE(c.name() + (values ? " values" : " keys"));
        const auto [got, want] = run_changed(c, [&](cases::Inputs& in) {
          auto& scales = values ? in.values.scales : in.keys.scales;
          scales[c.kv_len - 1] = bad;  // the last key of the first head: seen by the last query alone
        });
        expect_same_poison(got, want, c.head_dim);
      }
    }
  }
}

TEST(MetalRules, BlocksAndSplitsOfBadKeysAlonePoisonRowsThatSeeThem) {
  for (auto c : kSpecialCases) {
    const int blocks = (c.kv_len + metal_layout::kBlock - 1) / metal_layout::kBlock;
    const int half = (blocks + 1) / 2 * metal_layout::kBlock;  // the first of two splits
    const int block = metal_layout::kBlock;                    // for few rows the second SIMD-group's only one
    for (const auto& [begin, end, splits] : {std::array{block, 2 * block, 1}, {0, half, 2}, {half, c.kv_len, 2}}) {
      SCOPED_TRACE(c.name() + " keys " + std::to_string(begin) + " to " + std::to_string(end));
      const auto [got, want] = run_changed(
          c,
          [&, begin = begin, end = end](cases::Inputs& in) {
            for (int t = begin; t < end; ++t) in.keys.scales[t] = 0x7e00;
          },
          splits);
      expect_same_poison(got, want, c.head_dim);
    }
  }
}

TEST(MetalRules, BadQueriesPoisonThemselves) {
  for (auto c : kSpecialCases) {
    const auto [got, want] = run_changed(c, [&](cases::Inputs& in) {
      in.q.set(3, NAN);
      in.q.set(size_t(c.query_len) * c.head_dim + 1, INFINITY);
    });
    expect_same_poison(got, want, c.head_dim);
  }
}

TEST(MetalRules, ScalesOfAnySizeKeepTheirPrecision) {
  for (auto c : {kFewRowsCase, emulator::shared_tile_case(2), emulator::prefill_case(3)}) {
    for (float size : {1e-3f, 1e4f}) {
      const auto [got, want] = run_changed(c, [&](cases::Inputs& in) {
        for (auto& s : in.values.scales) s = float_to_half(half_to_float(s) * size);
        in.values.scales[5] = float_to_half(2000.0f);  // an outlier beside small ones
        in.values.scales[7] = 0;
      });
      expect_same_poison(got, want, c.head_dim);
    }
    const auto [got, want] = run_changed(
        c, [&](cases::Inputs& in) { std::fill(in.values.scales.begin(), in.values.scales.end(), uint16_t(0)); });
    expect_same_poison(got, want, c.head_dim);
  }
}

TEST(MetalRules, QueriesOfAnySizeKeepTheirPrecision) {
  for (auto c : kSpecialCases) {
    for (float size : {1e-39f, 1e-6f, 1e6f}) {  // the first makes subnormal numbers
      const auto [got, want] = run_changed(c, [&](cases::Inputs& in) {
        for (size_t i = 0; i < in.q.size(); ++i) in.q.set(i, in.q.get(i) * size);
        for (auto& s : in.keys.scales) s = float_to_half(std::min(6e4f, half_to_float(s) / size));
      });
      expect_same_poison(got, want, c.head_dim);
    }
  }
}

TEST(MetalRules, RowsThatSeeNothingAreZero) {
  for (auto c : kSpecialCases) {
    c.ragged = true;
    const auto [got, want] = run_changed(c, [&](cases::Inputs& in) { in.starts[0] = c.kv_len - 1; });
    expect_same_poison(got, want, c.head_dim);
    for (int i = 0; i < c.head_dim; ++i) EXPECT_EQ(got[i], 0) << "the first query stands before the first visible key";
  }
}

TEST(MetalRules, ALaterBlockMayBeHiddenOrFarSmaller) {
  for (auto c : kSpecialCases) {
    // The last block holds one key, which the last query alone sees; for few rows it is its SIMD-group's second.
    c.kv_len = (c.query_len == kFewRowsCase.query_len ? int(metal_layout::kFewRowsThreads) : 160) + 1;
    const auto [got, want] = run_changed(c, [&](cases::Inputs& in) {
      in.keys.scales[3] = float_to_half(300.0f);  // a score that leaves nothing to the others, or the reverse
    });
    expect_same_poison(got, want, c.head_dim);
  }
}

TEST(MetalPlan, DecodesUpToEightQueriesOfThirtyTwoRows) {
  const auto few_rows = [](int group, int queries) {
    return metal::plan_attention({.batch = 1,
                                  .query_heads = group,
                                  .kv_heads = 1,
                                  .query_len = queries,
                                  .kv_len = 1000,
                                  .head_dim = 256,
                                  .keys = 3,
                                  .values = 3,
                                  .dtype = Dtype::float16})
        .few_rows;
  };
  EXPECT_TRUE(few_rows(4, 8));
  EXPECT_FALSE(few_rows(4, 9));
  EXPECT_TRUE(few_rows(1, 8));
  EXPECT_FALSE(few_rows(1, 9));
  EXPECT_TRUE(few_rows(32, 1));
  EXPECT_FALSE(few_rows(16, 3));
  // What test_gpu.py expects on a Mac, where it first runs.
  for (int queries : {1, 4, 6}) EXPECT_STREQ(metal::kernel_name(16, 4, queries, 256), "metal decode");
  EXPECT_STREQ(metal::kernel_name(16, 4, 200, 256), "metal prefill (simdgroup_matrix)");
}

TEST(MetalPlan, FitsTheLimits) {
  for (const auto& c : emulator::attention_cases(true)) {
    const auto plan = metal::plan_attention(
        {c.batch, c.query_heads, c.kv_heads, c.query_len, c.kv_len, c.head_dim, c.key_bits, c.value_bits, c.dtype});
    // Partial results stay small whatever the length of the context.
    const double partial = double(c.batch) * c.query_heads * c.query_len * plan.splits * c.head_dim * 2;
    EXPECT_LE(plan.merged ? partial : 0, 64 << 20) << c.name();
    EXPECT_LE(plan.attend.threadgroup[0], 1024);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(plan.attend.grid[i] % plan.attend.threadgroup[i], 0) << c.name();
    EXPECT_STREQ(metal::kernel_name(c.query_heads, c.kv_heads, c.query_len, c.head_dim),
                 plan.few_rows ? "metal decode" : "metal prefill (simdgroup_matrix)");
  }
}

}  // namespace
}  // namespace turboquant
