// Trellis codes: where bits lie, how words decode, and that the oracle's search finds the nearest path.
#include <gtest/gtest.h>

#include <bit>

#include "support/vectors.h"

namespace turboquant {
namespace {

using namespace cases;

/// Words of nibbles, word k with those of coordinates 8k .. 8k + 7: how docs/format.md says that a group decodes.
struct Nibbles {
  uint32_t word[4];
  Nibbles(const uint32_t* words, int bits) {
    const uint32_t a = words[0], b = bits == 3 ? words[1] : words[0], u = words[bits - 1];
    const uint32_t r1 = std::rotl(u, 1), r3 = std::rotl(u, 3);
    const uint32_t p02 = ((u ^ r1) & 0x55555555u) ^ r3, p13 = ((u ^ r3) & 0xaaaaaaaau) ^ r1;
    word[0] = (a & 0xccccccccu) | (p02 & 0x33333333u);
    word[1] = (b & 0xccccccccu) | (p13 & 0x33333333u);
    word[2] = (p02 & 0xccccccccu) | (a & 0x33333333u);
    word[3] = (p13 & 0xccccccccu) | (b & 0x33333333u);
  }
};

/// Index of the level of a nibble of word k: bits from high to low w1 w0 z0 z1, w1 w0 z1 z0, z0 z1 w1 w0, z1 z0 w1 w0;
/// at 2 bits w is the lower of its two in words 0 and 2, the higher in words 1 and 3, and the other is not its own.
int index_of(int bits, int k, int nibble) {
  const int low = nibble & 3, high = nibble >> 2;
  const int w = k < 2 ? high : low, z = k < 2 ? low : high;
  const int own = bits == 3 ? w : w >> (k & 1) & 1;
  const int z1 = k == 0 || k == 2 ? z & 1 : z >> 1, z0 = k == 0 || k == 2 ? z >> 1 : z & 1;
  return own * 4 + z1 * 2 + z0;
}

TEST(Trellis, WordsDecodeToNibblesThatIndexLevels) {
  std::mt19937 rng(4);
  for (int bits : {2, 3}) {
    for (int round = 0; round < 1000; ++round) {
      uint32_t words[3];
      for (uint32_t& w : words) w = rng();
      int want[32];
      reference::read_group(bits, words, want);
      const auto levels = trellis_levels(words, bits);
      const Nibbles nibbles(words, bits);
      for (int i = 0; i < 32; ++i) {
        ASSERT_EQ(index_of(bits, i / 8, int(nibbles.word[i / 8] >> (4 * (i % 8)) & 15)), want[i]) << i;
        ASSERT_EQ(levels[size_t(i)], trellis_level(bits, want[i]));
      }
      uint32_t again[3];
      reference::write_group(bits, want, again);
      ASSERT_TRUE(std::equal(words, words + bits, again));
    }
  }
}

TEST(Trellis, ABitHasOnePlace) {
  for (int bits : {2, 3}) {
    std::vector<int> taken(size_t(32 * bits));
    for (int i = 0; i < 32; ++i) {
      EXPECT_EQ(trellis_coordinate(trellis_step(i)), i);
      for (int bit = 0; bit < bits; ++bit)
        ++taken[size_t(32 * trellis_word(bits, i, bit) + trellis_position(bits, i, bit))];
    }
    for (int count : taken) EXPECT_EQ(count, 1);
  }
}

// No path that differs in up to three u, whatever its w, is nearer.  What the search returns is its path's distance.
TEST(Trellis, TheSearchFindsTheNearestPath) {
  std::mt19937 rng(6);
  std::normal_distribution<double> normal;
  for (int bits : {2, 3}) {
    for (int round = 0; round < 12; ++round) {
      double targets[32];
      for (double& t : targets) t = normal(rng) * unit(bits, 1) * (round % 3 == 2 ? 3 : 1);
      const double limit = trellis_limit(bits);
      double cost[32][4];
      for (int i = 0; i < 32; ++i) {
        for (int z = 0; z < 4; ++z) {
          double& least = cost[trellis_step(i)][z] = INFINITY;
          for (int w = 0; w < 1 << (bits - 1); ++w) {
            least =
                std::min(least, std::pow(std::clamp(targets[i], -limit, limit) - trellis_level(bits, 4 * w + z), 2));
          }
        }
      }
      const auto distance = [&](uint32_t u) {
        const uint32_t z1 = trellis_z1(u), z0 = trellis_z0(u);
        double sum = 0;
        for (int t = 0; t < 32; ++t) sum += cost[t][(z1 >> t & 1) * 2 + (z0 >> t & 1)];
        return sum;
      };
      int indices[32];
      const double least = reference::search_trellis(bits, targets, indices);
      uint32_t words[3];
      reference::write_group(bits, indices, words);
      const uint32_t u = words[bits - 1];
      EXPECT_NEAR(distance(u), least, 1e-9 * least);
      for (int a = 0; a < 32; ++a) {
        for (int b = 0; b <= a; ++b) {
          for (int c = 0; c <= b; ++c) {
            const uint32_t flip = 1u << a ^ 1u << b ^ 1u << c;  // one bit where two are the same
            ASSERT_GE(distance(u ^ flip), least * (1 - 1e-12)) << flip;
            ASSERT_GE(distance(u ^ flip ^ 1u << c), least * (1 - 1e-12));
          }
        }
      }
    }
  }
}

// Of Gaussian vectors, as stored: |x - x^|^2 / |x|^2 with the scale that keeps the length.
TEST(Trellis, ErrsByAThirdLessThanScalarCodes) {
  const int dim = 256, tokens = 100;
  const Buffer x = gaussian(size_t(tokens) * dim);
  const double most[] = {0, 0, 0.0870, 0.0240};
  for (int bits : {2, 3}) {
    const auto y =
        decode_vectors(encode_vectors(x, 1, tokens, dim, bits, Backend::reference, 3, nullptr, nullptr, Code::trellis),
                       Backend::reference);
    double error = 0, all = 0;
    for (size_t i = 0; i < y.size(); ++i) error += std::pow(y[i] - x.get(i), 2), all += std::pow(x.get(i), 2);
    EXPECT_LE(error / all, most[bits]) << bits;
    EXPECT_GE(error / all, 0.9 * most[bits]) << "better than this trellis can: the measurement is wrong";
  }
}

}  // namespace
}  // namespace turboquant
