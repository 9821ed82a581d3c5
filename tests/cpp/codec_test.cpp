// Encode and decode: every instruction set against the oracle, golden bytes, the codebooks, and what vectors that are
// zero, infinite or not numbers become.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "support/golden.h"
#include "support/vectors.h"
#include "turboquant/rotation.h"

namespace turboquant {
namespace {

using cases::Buffer;
using cases::code_at;
using cases::decode_vectors;
using cases::encode_vectors;
using cases::Encoded;
using cases::gaussian;

constexpr Backend kBackends[] = {Backend::reference, Backend::cpu};

/// Rotated coordinates of a vector in units of half a level: where thresholds are integers.
std::vector<double> doubled_coordinates(const Buffer& x, size_t row, int dim, int bits, const float* centre) {
  std::vector<double> r(dim);
  double square = 0;
  for (int i = 0; i < dim; ++i) {
    r[i] = double(x.get(row * dim + i)) - (centre ? centre[i] : 0);
    square += r[i] * r[i];
  }
  rotate(r.data(), dim, 3);
  for (double& v : r) v *= std::sqrt(dim / square) * 2 * unit(bits);
  return r;
}

class Codec : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { force_isa(GetParam()); }
  void TearDown() override { force_isa(""); }
};

TEST_P(Codec, EncodeMatchesTheOracleExceptWithinRoundingOfAThreshold) {
  const int tokens = 67, heads = 2;
  for (int bits : {2, 3, 4}) {
    for (int dim = 32; dim <= 256; dim += 32) {
      for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
        SCOPED_TRACE(testing::Message() << "bits " << bits << " dim " << dim << " dtype " << int(dtype));
        const Buffer x = gaussian(size_t(heads) * tokens * dim, dtype);
        const Buffer centre = gaussian(size_t(heads) * dim, Dtype::float32, 6);
        const float* centre_data =
            dtype == Dtype::float16 ? reinterpret_cast<const float*>(centre.bytes.data()) : nullptr;
        const Encoded want = encode_vectors(x, heads, tokens, dim, bits, Backend::reference, 3, centre_data);
        const Encoded got = encode_vectors(x, heads, tokens, dim, bits, Backend::cpu, 3, centre_data);
        int differences = 0;
        for (int row = 0; row < heads * tokens; ++row) {
          const uint32_t* a = &want.codes[size_t(row) * words_per_vector(bits, dim)];
          const uint32_t* b = &got.codes[size_t(row) * words_per_vector(bits, dim)];
          EXPECT_LE(std::abs(int(want.scales[row]) - int(got.scales[row])), 1) << "scale of row " << row;
          if (std::equal(a, a + words_per_vector(bits, dim), b)) continue;
          const auto r =
              doubled_coordinates(x, row, dim, bits, centre_data ? centre_data + row / tokens * dim : nullptr);
          for (int i = 0; i < dim; ++i) {
            if (code_at(a, bits, i) == code_at(b, bits, i)) continue;
            ++differences;
            double nearest = std::abs(r[i]);  // the threshold between the signs
            for (int m = 0; m + 1 < magnitudes(bits); ++m) {
              nearest = std::min(nearest, std::abs(std::abs(r[i]) - double_threshold(bits, m)));
            }
            // Thirty float roundings of a coordinate that is some 200 half-levels at most.
            EXPECT_LT(nearest, 30 * 200 * 0x1p-24) << "row " << row << " coordinate " << i << " at " << r[i];
          }
        }
        EXPECT_LE(differences, heads * tokens * dim / 1000);
      }
    }
  }
}

// Targets are computed in double; an encoder's are off by thirty float roundings of a coordinate that is some 220
// levels at most.
TEST_P(Codec, NoPathIsNearerThanTheOneFound) {
  const int tokens = 13, heads = 2;
  const std::vector<double> tolerance(32, 30 * 220 * 0x1p-24);
  for (auto [bits, code] : cases::kTrellisKinds) {
    for (int dim = 32; dim <= 256; dim += 32) {
      for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
        SCOPED_TRACE(testing::Message() << "bits " << bits << " dim " << dim << " dtype " << int(dtype));
        const Buffer x = gaussian(size_t(heads) * tokens * dim, dtype);
        const Encoded e = encode_vectors(x, heads, tokens, dim, bits, Backend::cpu, 3, nullptr, nullptr, code);
        const Encoded want = encode_vectors(x, heads, tokens, dim, bits, Backend::reference, 3, nullptr, nullptr, code);
        int differing = 0;
        for (int row = 0; row < heads * tokens; ++row) {
          const uint32_t* words = &e.codes[size_t(row) * words_per_vector(bits, dim)];
          auto targets = doubled_coordinates(x, row, dim, bits, nullptr);
          for (double& t : targets) t *= unit(bits, 1) / (2 * unit(bits));
          for (int g = 0; g < dim / 32; ++g) {
            EXPECT_EQ(cases::wrong_path(words + g * bits, bits, &targets[size_t(32 * g)], tolerance.data(),
                                        cases::rounding_of_cpu(bits)),
                      "");
            const uint32_t* others = &want.codes[size_t(row) * words_per_vector(bits, dim)];
            differing += !std::equal(words + g * bits, words + g * bits + bits, others + g * bits);
          }
          EXPECT_NEAR(half_to_float(e.scales[row]), half_to_float(want.scales[row]), 2e-3) << row;
        }
        EXPECT_LE(differing, 1 + heads * tokens * dim / 32 / 20);
      }
    }
  }
}

TEST_P(Codec, LevelsOfEightBitsAreTheNearest) {
  const int tokens = 67;
  for (int dim = 32; dim <= 256; dim += 32) {
    const Buffer x = gaussian(size_t(tokens) * dim);
    const Encoded e = encode_vectors(x, 1, tokens, dim, 8, Backend::cpu);
    for (int row = 0; row < tokens; ++row) {
      auto r = doubled_coordinates(x, row, dim, 3, nullptr);
      double largest = 0, square = 0;
      for (double v : r) largest = std::max(largest, std::abs(v));
      for (int i = 0; i < dim; ++i) {
        const int level = turboquant::level(8, code_at(&e.codes[size_t(row) * dim / 4], 8, i));
        EXPECT_NEAR(level, r[size_t(i)] * 127 / largest, 0.5 + 30 * 127 * 0x1p-24);
        square += level * level;
      }
      double norm = 0;
      for (int i = 0; i < dim; ++i) norm += std::pow(x.get(size_t(row) * dim + i), 2);
      EXPECT_NEAR(half_to_float(e.scales[row]) / (32 * std::sqrt(norm / square)), 1, 0x1p-10);
    }
  }
}

TEST_P(Codec, DecodeMatchesTheOracle) {
  const int tokens = 21, heads = 2;
  for (auto [bits, code] : cases::kKinds) {
    for (int dim = 32; dim <= 256; dim += 32) {
      SCOPED_TRACE(testing::Message() << "bits " << bits << " code " << int(code) << " dim " << dim);
      const Buffer centre = gaussian(size_t(heads) * dim, Dtype::float32, 6);
      const auto* c = reinterpret_cast<const float*>(centre.bytes.data());
      const Encoded e = encode_vectors(gaussian(size_t(heads) * tokens * dim), heads, tokens, dim, bits,
                                       Backend::reference, 3, nullptr, nullptr, code);
      const auto want = decode_vectors(e, Backend::reference, 3, c), got = decode_vectors(e, Backend::cpu, 3, c);
      for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-5) << i;
    }
  }
}

TEST_P(Codec, ReadsAndWritesStridedViews) {
  const int dim = 96, tokens = 9, heads = 3, bits = 3, stride = 3 * dim + 5;
  for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
    // [tokens, heads, dim] in memory with a gap after each row, as a model's projection gives it.
    const Buffer x = gaussian(size_t(tokens) * heads * stride, dtype);
    Buffer dense(dtype, size_t(heads) * tokens * dim);
    for (int h = 0; h < heads; ++h) {
      for (int t = 0; t < tokens; ++t) {
        for (int i = 0; i < dim; ++i) {
          dense.set((size_t(h) * tokens + t) * dim + i, x.get((size_t(t) * heads + h) * stride + i));
        }
      }
    }
    const Encoded want = encode_vectors(dense, heads, tokens, dim, bits, Backend::cpu);
    Encoded got(heads, tokens, dim, bits);
    EncodeParams p;
    p.batch = 1, p.heads = heads, p.tokens = tokens, p.head_dim = dim, p.seed = 3;
    p.x = {x.bytes.data(), dtype, 0, stride, int64_t(heads) * stride};
    p.out = got.view();
    encode(p);
    EXPECT_EQ(got.codes, want.codes);
    EXPECT_EQ(got.scales, want.scales);

    const auto plain = decode_vectors(want, Backend::cpu);
    Buffer out(dtype, size_t(tokens) * heads * stride);
    for (size_t i = 0; i < out.size(); ++i) out.set(i, 99);
    DecodeParams d;
    d.batch = 1, d.heads = heads, d.tokens = tokens, d.head_dim = dim, d.seed = 3;
    d.in = want.packed();
    d.out = {out.bytes.data(), dtype, 0, stride, int64_t(heads) * stride};
    decode(d);
    Buffer one(dtype, 1);
    for (int t = 0; t < tokens; ++t) {
      for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < stride; ++i) {
          one.set(0, i < dim ? plain[(size_t(h) * tokens + t) * dim + i] : 99);
          EXPECT_EQ(out.get((size_t(t) * heads + h) * stride + i), one.get(0));
        }
      }
    }
  }
}

TEST_P(Codec, ZeroInfiniteAndNotANumber) {
  const int dim = 64;
  const float inf = INFINITY;
  struct Row {
    float fill, first;
    uint16_t scale;  // NaN: any
  } rows[] = {{0, 0, 0}, {1, NAN, 0x7e00}, {1, inf, 0x7e00}, {1, -inf, 0x7e00}, {0, NAN, 0x7e00}, {inf, -inf, 0x7e00}};
  for (Backend backend : kBackends) {
    for (auto [bits, code] : cases::kKinds) {
      for (const Row& row : rows) {
        Buffer x(Dtype::float32, 3 * dim);  // ordinary vectors around it, which it must not touch
        for (int i = 0; i < 3 * dim; ++i) x.set(i, float(i % 7) - 3);
        for (int i = 0; i < dim; ++i) x.set(dim + i, i == 5 ? row.first : row.fill);
        const Encoded e = encode_vectors(x, 1, 3, dim, bits, backend, 3, nullptr, nullptr, code);
        const int words = words_per_vector(bits, dim);
        for (int w = 0; w < words; ++w) EXPECT_EQ(e.codes[words + w], 0u);
        if (row.scale == 0) {
          EXPECT_EQ(e.scales[1], 0);
        } else {
          EXPECT_TRUE(std::isnan(half_to_float(e.scales[1])));
        }
        const auto y = decode_vectors(e, backend);
        for (int i = 0; i < dim; ++i) {
          EXPECT_TRUE(std::isfinite(y[i]) && std::isfinite(y[2 * dim + i]));
          EXPECT_TRUE(row.scale == 0 ? y[dim + i] == 0 : std::isnan(y[dim + i]));
        }
      }
    }
  }
}

TEST_P(Codec, ScalesCoverTheRangeOfFp16) {
  const int dim = 128;
  const Buffer shape = gaussian(dim);
  for (float size : {1e-38f, 1e-20f, 1e-7f, 1e-3f, 1e3f, 5e4f, 1e6f, 1e37f}) {
    Buffer x(Dtype::float32, dim);
    for (int i = 0; i < dim; ++i) x.set(i, size * shape.get(i));
    for (auto [bits, code] : cases::kKinds) {
      const Encoded want = encode_vectors(x, 1, 1, dim, bits, Backend::reference, 3, nullptr, nullptr, code);
      const Encoded got = encode_vectors(x, 1, 1, dim, bits, Backend::cpu, 3, nullptr, nullptr, code);
      EXPECT_LE(std::abs(int(want.scales[0]) - int(got.scales[0])), 1) << size;
      EXPECT_EQ(want.codes, got.codes) << size;
      EXPECT_EQ(half_to_float(got.scales[0]) == largest_scale(), size >= 1e6f) << size;
    }
  }
}

// A float cache of these vectors is finite, so codes are: scales saturate, and so do float16 outputs.
TEST_P(Codec, FiniteVectorsStayFinite) {
  struct Row {
    Dtype dtype;
    float size;
    bool saturates[5];  // at 2, 3 and 4 bits
  } rows[] = {{Dtype::float16, 65504, {false, false, true, false, false}},
              {Dtype::bfloat16, 1e5f, {false, false, true, true, true}},
              {Dtype::float32, 1e5f, {false, false, true, true, true}},
              {Dtype::bfloat16, 3e38f, {false, false, true, true, true}},
              {Dtype::float32, 3.4e38f, {false, false, true, true, true}}};
  for (Backend backend : kBackends) {
    for (const Row& row : rows) {
      for (int dim : {32, 96, 256}) {
        for (int bits : {2, 3, 4}) {
          SCOPED_TRACE(testing::Message() << row.size << " dim " << dim << " bits " << bits);
          Buffer x(row.dtype, dim), small(Dtype::float32, dim);
          for (int i = 0; i < dim; ++i) {
            x.set(i, i % 3 ? row.size : -row.size);
            small.set(i, x.get(i) * 0x1p-64f);
          }
          const Encoded e = encode_vectors(x, 1, 1, dim, bits, backend);
          EXPECT_EQ(e.codes, encode_vectors(small, 1, 1, dim, bits, backend).codes);
          if (row.saturates[bits]) EXPECT_EQ(e.scales[0], 0x7bff);
          EXPECT_LE(e.scales[0], 0x7bff);
          for (float y : decode_vectors(e, backend)) EXPECT_TRUE(std::isfinite(y));
          Buffer out(Dtype::float16, dim);
          DecodeParams d;
          d.batch = d.heads = d.tokens = 1, d.head_dim = dim, d.seed = 3;
          d.in = e.packed();
          d.out = cases::contiguous<void*>(out.bytes.data(), Dtype::float16, 1, 1, dim);
          decode(d, backend);
          for (int i = 0; i < dim; ++i) EXPECT_TRUE(std::isfinite(out.get(i)));
        }
      }
    }
  }
}

// |x - x^|^2 / |x|^2 of Gaussian vectors: what the paper's theorem 1 bounds, at the Lloyd-Max optimum of each width.
// The stored length is the vector's own, so a vector's error is about 2 (1 - sqrt(1 - D)), a little above D: the
// distortion is taken with the best scale instead, |x|^2 sin^2 of the angle.
TEST_P(Codec, DistortionOfGaussianVectors) {
  const double scalar[] = {0, 0, 0.1175, 0.03455, 0.00951, 0, 0, 0, 4.85e-5}, trellis[] = {0, 0, 0.08483, 0.02315};
  for (auto [bits, code] : cases::kKinds) {
    const double optimum = code == Code::trellis ? trellis[bits] : scalar[bits];
    for (int dim = 32; dim <= 256; dim += 32) {
      const int tokens = (1 << 19) / dim;
      const Buffer x = gaussian(size_t(tokens) * dim, Dtype::float32, 8);
      const auto y = decode_vectors(encode_vectors(x, 1, tokens, dim, bits, Backend::cpu, 3, nullptr, nullptr, code),
                                    Backend::cpu);
      double lost = 0, all = 0;
      for (int t = 0; t < tokens; ++t) {
        double xx = 0, xy = 0, yy = 0;
        for (int i = 0; i < dim; ++i) {
          const double a = x.get(size_t(t) * dim + i), b = y[size_t(t) * dim + i];
          xx += a * a, xy += a * b, yy += b * b;
        }
        lost += xx - xy * xy / yy;
        all += xx;
      }
      EXPECT_LE(lost / all, 1.01 * optimum) << "bits " << bits << " dim " << dim;
      EXPECT_GE(lost / all, (bits == 8 ? 0.5 : 0.85) * optimum)
          << "better than any quantizer: the measurement is wrong";
    }
  }
}

TEST_P(Codec, GoldenBytes) {
  const int dim = golden::kDim;
  const auto numbers = golden::vector();
  Buffer x(Dtype::float32, dim);
  for (int i = 0; i < dim; ++i) x.set(i, numbers[i]);
  const auto check = [&](const golden::Bytes& g, Code code, Backend backend) {
    SCOPED_TRACE(testing::Message() << "bits " << g.bits << " code " << int(code));
    Encoded e = encode_vectors(x, 1, 1, dim, g.bits, backend, golden::kSeed, nullptr, nullptr, code);
    EXPECT_EQ(e.codes, g.words);
    EXPECT_EQ(e.scales[0], g.scale);
    e.codes = g.words;
    auto y = decode_vectors(e, backend);
    rotate(y.data(), dim, golden::kSeed);
    for (int i = 0; i < dim; ++i) {
      const float step = half_to_float(g.scale) * level_step(g.bits, int(code));
      EXPECT_NEAR(y[i], step * cases::level_at(e.codes.data(), g.bits, code, i), 1e-4f);
    }
  };
  for (Backend backend : kBackends) {
    for (const auto& g : golden::bytes()) check(g, Code::scalar, backend);
    for (const auto& g : golden::bytes_of_8_bits()) check(g, Code::scalar, backend);
    for (const auto& g : golden::trellis_bytes()) check(g, Code::trellis, backend);
  }
}

// The int8 codebooks against the optimum, which Lloyd's iteration finds here for N(0, 1).
TEST(Codebook, Int8LevelsAreNearTheLloydMaxOptimum) {
  auto density = [](double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); };
  auto tail = [](double x) { return std::erfc(x / std::sqrt(2)) / 2; };
  // Mean squared error of magnitudes with thresholds half-way: 1 - 2 c E[x; cell] + c^2 P(cell), both signs.
  auto distortion = [&](const std::vector<double>& c) {
    double d = 1, low = 0;
    for (size_t m = 0; m < c.size(); ++m) {
      const double high = m + 1 < c.size() ? (c[m] + c[m + 1]) / 2 : 40;
      d += 2 * (c[m] * c[m] * (tail(low) - tail(high)) - 2 * c[m] * (density(low) - density(high)));
      low = high;
    }
    return d;
  };
  const double most_above[] = {0, 0, 1.00001, 1.00005, 1.0007};  // measured: 1 + 1e-6, 1 + 2.4e-5, 1 + 5.5e-4
  for (int bits : {2, 3, 4}) {
    std::vector<double> c(magnitudes(bits)), ours;
    for (size_t m = 0; m < c.size(); ++m) {
      c[m] = 0.2 + 2.5 * double(m) / double(c.size());
      ours.push_back(magnitude(bits, int(m)) / double(unit(bits)));
    }
    for (int iteration = 0; iteration < 20000; ++iteration) {
      double low = 0;
      auto next = c;
      for (size_t m = 0; m < c.size(); ++m) {
        const double high = m + 1 < c.size() ? (c[m] + c[m + 1]) / 2 : 40;
        next[m] = (density(low) - density(high)) / (tail(low) - tail(high));
        low = high;
      }
      c = next;
    }
    const double optimum = distortion(c), got = distortion(ours);
    RecordProperty("excess_of_" + std::to_string(bits) + "_bits", std::to_string(got / optimum - 1));
    EXPECT_GE(got, optimum);
    EXPECT_LE(got, most_above[bits] * optimum) << bits << " bits: optimum " << optimum << ", int8 levels " << got;
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, Codec, testing::ValuesIn(available_isas()), [](const auto& info) { return info.param; });

}  // namespace
}  // namespace turboquant
