// Encoding with error feedback: every instruction set and the oracle, by their own earlier codes (feedback.h).
#include "support/feedback.h"

#include <gtest/gtest.h>

namespace turboquant {
namespace {

using namespace cases;

constexpr Backend kBackends[] = {Backend::reference, Backend::cpu};
constexpr int kSeed = 3;

const float* floats(const Buffer& x) { return reinterpret_cast<const float*>(x.bytes.data()); }

class Feedback : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { force_isa(GetParam()); }
  void TearDown() override { force_isa(""); }
};

TEST_P(Feedback, EveryCodeIsTheNearestToItsTarget) {
  const int heads = 2, tokens = 11;  // two groups of four rows and three alone
  for (auto [bits, code] : kKinds) {
    for (int dim : {32, 64, 96, 128, 160, 192, 224, 256}) {
      for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
        if (code == Code::trellis && dtype != Dtype(dim / 32 % 3)) continue;  // the oracle's search takes its time
        SCOPED_TRACE(testing::Message() << "bits " << bits << " code " << int(code) << " dim " << dim << " dtype "
                                        << int(dtype));
        const Buffer x = gaussian(size_t(heads) * tokens * dim, dtype);
        const Buffer centres = gaussian(size_t(heads) * dim, Dtype::float32, 6);
        const float* centre = dtype == Dtype::float16 ? floats(centres) : nullptr;
        const auto g = random_feedback(heads, dim);
        for (Backend backend : kBackends) {
          const Encoded e = encode_vectors(x, heads, tokens, dim, bits, backend, kSeed, centre, g.data(), code);
          FeedbackRounding rounding;
          if (backend == Backend::cpu) rounding.search = rounding_of_cpu(bits);
          EXPECT_EQ(wrong_vectors(x, e, heads, kSeed, centre, g.data(), rounding), "") << "backend " << int(backend);
        }
      }
    }
  }
}

TEST_P(Feedback, VectorsOfAnySize) {
  const int dim = 128;
  const Buffer shape = gaussian(dim);
  const auto g = random_feedback(1, dim);
  for (float size : {1e-38f, 1e-20f, 1e-7f, 1e3f, 5e4f, 1e6f, 1e37f}) {
    Buffer x(Dtype::float32, dim);
    for (int i = 0; i < dim; ++i) x.set(i, size * shape.get(i));
    for (auto [bits, code] : kKinds) {
      const Encoded e = encode_vectors(x, 1, 1, dim, bits, Backend::cpu, kSeed, nullptr, g.data(), code);
      const FeedbackInput in{x, 0, dim, bits, kSeed, nullptr, g.data(), code};
      FeedbackRounding rounding;
      rounding.search = rounding_of_cpu(bits);
      EXPECT_EQ(wrong_with_feedback(in, e.codes.data(), e.scales[0], rounding), "") << size;
    }
  }
}

// Rotated coordinates +-0.6 and +-sqrt(1.64), as many of each, have the 2-bit levels 3 and 10: |levels|^2 is 3488,
// s0 = 8 / sqrt(3488), u = 4.429 and 9.454, and the errors of block 0 are -1.429 and 0.546.
TEST_P(Feedback, ComputedByHand) {
  const int dim = 64;
  std::vector<double> r(dim);
  for (int i = 0; i < dim; ++i) r[size_t(i)] = i % 2 ? std::sqrt(1.64) : 0.6;
  r[5] = -r[5];
  unrotate(r.data(), dim, kSeed);
  Buffer x(Dtype::float32, dim);
  for (int i = 0; i < dim; ++i) x.set(i, float(r[i]));
  std::vector<uint16_t> g(dim * dim);
  const auto set = [&](int row, int column, float value) { g[row * dim + column] = float_to_half(value); };
  set(32, 0, 2);     // 4.429 + 2 * 1.429 = 7.288: 10 instead of 3
  set(34, 0, 2);     // the same
  set(33, 0, -8);    // 9.454 - 8 * 1.429 = -1.981: -3 instead of 10
  set(35, 5, 16);    // 9.454 + 16 * 0.546 = 18.190, since coordinate 5 is negative: 10 as before
  set(36, 1, 4);     // 4.429 - 4 * 0.546 = 2.245: 3 as before
  set(38, 1, 4);     // and with 2 * 1.429 more ...
  set(38, 2, -2);    // ... less: -0.613, hence -3
  set(40, 40, 100);  // within a block nothing is fed back
  set(41, 63, 100);
  set(3, 0, 100);
  for (Backend backend : kBackends) {
    const Encoded e = encode_vectors(x, 1, 1, dim, 2, backend, kSeed, nullptr, g.data());
    for (int i = 0; i < dim; ++i) {
      const int want = i == 32 || i == 34 ? 10 : i == 33 || i == 38 ? -3 : i == 5 ? -10 : i % 2 ? 10 : 3;
      EXPECT_EQ(level(2, code_at(e.codes.data(), 2, i)), want) << i;
    }
    EXPECT_NEAR(half_to_float(e.scales[0]), 8 * 8 / std::sqrt(3488 + 91.0), 1e-3);  // one 3 more has become 10
  }
}

// What the codes are when no error is fed back: nearest at the scale that keeps the length.  One block is plain coding.
TEST_P(Feedback, OfZeros) {
  for (int dim : {32, 128}) {
    const Buffer x = gaussian(size_t(9) * dim);
    const std::vector<uint16_t> g(size_t(dim) * dim);
    for (Backend backend : kBackends) {
      const Encoded plain = encode_vectors(x, 1, 9, dim, 3, backend);
      const Encoded e = encode_vectors(x, 1, 9, dim, 3, backend, kSeed, nullptr, g.data());
      if (dim == 32) EXPECT_EQ(e.codes, plain.codes);
      if (dim == 32) EXPECT_EQ(e.scales, plain.scales);
      for (int row = 0; row < 9; ++row) {
        const uint32_t* words = &e.codes[size_t(row) * words_per_vector(3, dim)];
        EXPECT_EQ(wrong_with_feedback({x, size_t(row), dim, 3, kSeed, nullptr, g.data()}, words, e.scales[row]), "");
      }
    }
  }
}

// Bytes of a vector alone, beside others, behind others, in another head, and on another number of threads.
TEST_P(Feedback, DoesNotDependOnTheOthers) {
  const int dim = 256, tokens = 150, threads = num_threads();
  const auto one = random_feedback(1, dim);
  auto two = one;
  two.insert(two.end(), one.begin(), one.end());
  for (auto [bits, code] : kKinds) {
    const int words = words_per_vector(bits, dim);
    const Buffer x = gaussian(size_t(2) * tokens * dim);
    set_num_threads(1);
    const Encoded all = encode_vectors(x, 2, tokens, dim, bits, Backend::cpu, kSeed, nullptr, two.data(), code);
    set_num_threads(2);
    const Encoded again = encode_vectors(x, 2, tokens, dim, bits, Backend::cpu, kSeed, nullptr, two.data(), code);
    set_num_threads(threads);
    EXPECT_EQ(all.codes, again.codes);
    EXPECT_EQ(all.scales, again.scales);
    for (int count : {1, 2, 3, 5, 7}) {
      for (int row = 0; row + count <= 2 * tokens; row += row < 20 ? 1 : 29) {
        Buffer part(Dtype::float32, size_t(count) * dim);
        std::copy_n(x.bytes.begin() + size_t(row) * dim * 4, part.bytes.size(), part.bytes.begin());
        const Encoded e = encode_vectors(part, 1, count, dim, bits, Backend::cpu, kSeed, nullptr, one.data(), code);
        EXPECT_TRUE(std::equal(e.codes.begin(), e.codes.end(), all.codes.begin() + size_t(row) * words)) << row;
        EXPECT_TRUE(std::equal(e.scales.begin(), e.scales.end(), all.scales.begin() + row)) << row;
      }
    }
  }
}

TEST_P(Feedback, ZeroInfiniteAndNotANumberAsWithoutIt) {
  const int dim = 96, rows = 8, bits = 3, words = words_per_vector(bits, dim);
  const auto g = random_feedback(1, dim);
  Buffer x = gaussian(size_t(rows) * dim);
  const Encoded clean = encode_vectors(x, 1, rows, dim, bits, Backend::cpu, kSeed, nullptr, g.data());
  for (int i = 0; i < dim; ++i) x.set(size_t(1) * dim + i, 0);
  x.set(2 * dim + 40, NAN);
  x.set(5 * dim + 3, -INFINITY);
  for (Backend backend : kBackends) {
    const Encoded e = encode_vectors(x, 1, rows, dim, bits, backend, kSeed, nullptr, g.data());
    for (int row = 0; row < rows; ++row) {
      const bool special = row == 1 || row == 2 || row == 5;
      for (int w = row * words; w < (row + 1) * words; ++w) {
        if (special) EXPECT_EQ(e.codes[w], 0u);
        if (!special && backend == Backend::cpu) EXPECT_EQ(e.codes[w], clean.codes[w]);
      }
      if (row == 1) EXPECT_EQ(e.scales[row], 0);
      EXPECT_EQ(std::isnan(half_to_float(e.scales[row])), row == 2 || row == 5);
    }
  }
}

// A few directions weigh most of what errors cost: feedback turns errors out of them, at no more than a little error
// in all.
TEST_P(Feedback, LowersWhatErrorsCost) {
  const int dim = 128, tokens = 400, rank = 20;
  const Buffer directions = gaussian(size_t(rank) * dim, Dtype::float32, 12);
  std::vector<double> s(size_t(dim) * dim);
  for (int k = 0; k < rank; ++k) {
    for (int i = 0; i < dim; ++i) {
      for (int j = 0; j < dim; ++j) s[size_t(i) * dim + j] += directions.get(k * dim + i) * directions.get(k * dim + j);
    }
  }
  const auto g = feedback_of(s, dim, kSeed);
  const Buffer x = gaussian(size_t(tokens) * dim);
  for (auto [bits, code] :
       {Kind{2, Code::scalar}, Kind{3, Code::scalar}, Kind{4, Code::scalar}, Kind{3, Code::trellis}}) {
    const auto cost = [&](const Encoded& e) {
      const auto y = decode_vectors(e, Backend::reference);
      double weighted = 0, plain = 0;
      for (int t = 0; t < tokens; ++t) {
        for (int k = 0; k < rank; ++k) {
          double product = 0;
          for (int i = 0; i < dim; ++i) {
            product += directions.get(k * dim + i) * (double(y[t * dim + i]) - x.get(size_t(t) * dim + i));
          }
          weighted += product * product;
        }
        for (int i = 0; i < dim; ++i) plain += std::pow(double(y[t * dim + i]) - x.get(size_t(t) * dim + i), 2);
      }
      return std::pair{weighted, plain};
    };
    const auto before = cost(encode_vectors(x, 1, tokens, dim, bits, Backend::cpu, kSeed, nullptr, nullptr, code));
    for (Backend backend : kBackends) {
      const auto after = cost(encode_vectors(x, 1, tokens, dim, bits, backend, kSeed, nullptr, g.data(), code));
      EXPECT_LT(after.first, 0.7 * before.first) << bits << " bits";
      EXPECT_LT(after.second, 1.5 * before.second) << bits << " bits";
      RecordProperty("weighted_" + std::to_string(bits), std::to_string(after.first / before.first));
      RecordProperty("plain_" + std::to_string(bits), std::to_string(after.second / before.second));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, Feedback, testing::ValuesIn(available_isas()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace turboquant
