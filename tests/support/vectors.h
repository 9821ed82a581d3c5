// Vectors, their codes, and one call that turns one into the other, for the tests of the codec.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "reference/trellis.h"
#include "support/cases.h"

namespace turboquant::cases {

/// Every kind of codes.
struct Kind {
  int bits;
  Code code;
};
constexpr Kind kScalarKinds[] = {{2, Code::scalar}, {3, Code::scalar}, {4, Code::scalar}, {8, Code::scalar}};
constexpr Kind kTrellisKinds[] = {{2, Code::trellis}, {3, Code::trellis}};
constexpr Kind kKinds[] = {{2, Code::scalar}, {3, Code::scalar},  {4, Code::scalar},
                           {8, Code::scalar}, {2, Code::trellis}, {3, Code::trellis}};
inline std::ostream& operator<<(std::ostream& out, Kind kind) {
  return out << kind.bits << (kind.code == Code::trellis ? " bits, trellis" : " bits");
}

/// Codes and scales of vectors [heads, tokens, dim], dense.
struct Encoded {
  int heads, tokens, dim, bits;
  std::vector<uint32_t> codes;
  std::vector<uint16_t> scales;
  Code code;
  Encoded(int heads, int tokens, int dim, int bits, Code code = Code::scalar)
      : heads(heads),
        tokens(tokens),
        dim(dim),
        bits(bits),
        codes(size_t(heads) * tokens * words_per_vector(bits, dim), 0xdeadbeef),
        scales(size_t(heads) * tokens, 0x1234),
        code(code) {}
  MutablePacked view() {
    const int64_t row = int64_t(tokens) * words_per_vector(bits, dim);
    return {codes.data(), scales.data(), bits, heads * row, row, int64_t(heads) * tokens, tokens, code};
  }
  Packed packed() const {
    const int64_t row = int64_t(tokens) * words_per_vector(bits, dim);
    return {codes.data(), scales.data(), bits, heads * row, row, int64_t(heads) * tokens, tokens, code};
  }
};

inline Encoded encode_vectors(const Buffer& x, int heads, int tokens, int dim, int bits, Backend backend,
                              uint64_t seed = 3, const float* centre = nullptr, const uint16_t* feedback = nullptr,
                              Code code = Code::scalar) {
  Encoded e(heads, tokens, dim, bits, code);
  EncodeParams p;
  p.batch = 1, p.heads = heads, p.tokens = tokens, p.head_dim = dim, p.seed = seed;
  p.centre = centre, p.feedback = feedback;
  p.x = contiguous<const void*>(x.bytes.data(), x.dtype, heads, tokens, dim);
  p.out = e.view();
  encode(p, backend);
  return e;
}

inline std::vector<float> decode_vectors(const Encoded& e, Backend backend, uint64_t seed = 3,
                                         const float* centre = nullptr) {
  std::vector<float> x(size_t(e.heads) * e.tokens * e.dim, NAN);
  DecodeParams p;
  p.batch = 1, p.heads = e.heads, p.tokens = e.tokens, p.head_dim = e.dim, p.seed = seed, p.centre = centre;
  p.in = e.packed();
  p.out = contiguous<void*>(x.data(), Dtype::float32, e.heads, e.tokens, e.dim);
  decode(p, backend);
  return x;
}

inline Buffer gaussian(size_t count, Dtype dtype = Dtype::float32, uint64_t seed = 5) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal;
  Buffer x(dtype, count);
  for (size_t i = 0; i < count; ++i) x.set(i, normal(rng));
  return x;
}

inline int code_at(const uint32_t* words, int bits, int i) {
  const uint32_t* group = words + i / 32 * bits;
  int code = 0;
  for (int bit = 0; bit < bits; ++bit) {
    code |= int(group[bit_word(bits, i % 32, bit)] >> bit_position(bits, i % 32, bit) & 1) << bit;
  }
  return code;
}

/// Levels of a group of 32 trellis codes, by coordinate, from format.h's own words about where bits lie.
inline std::vector<int> trellis_levels(const uint32_t* words, int bits) {
  const uint32_t u = words[bits - 1], z1 = trellis_z1(u), z0 = trellis_z0(u);
  std::vector<int> levels;
  for (int i = 0; i < 32; ++i) {
    const int t = trellis_step(i);
    int index = int(z1 >> t & 1) * 2 + int(z0 >> t & 1);
    for (int bit = 1; bit < bits; ++bit) {
      index |= int(words[trellis_word(bits, i, bit)] >> trellis_position(bits, i, bit) & 1) << (bit + 1);
    }
    levels.push_back(trellis_level(bits, index));
  }
  return levels;
}

/// Level of coordinate i of a vector, whatever its codes.
inline int level_at(const uint32_t* words, int bits, Code code, int i) {
  if (code == Code::scalar) return level(bits, code_at(words, bits, i));
  return trellis_levels(words + i / 32 * bits, bits)[size_t(i % 32)];
}

/// How a search may round the cost of a step: in squared levels, and relative to its size.
struct SearchRounding {
  double cost = 0, relative_cost = 0x1p-23;
};
/// The cpu backend counts costs in eighths at 3 bits, in thirty-seconds at 2.
inline SearchRounding rounding_of_cpu(int bits) { return {bits == 3 ? 0x1p-4 : 0x1p-6, 0x1p-23}; }

/// Empty when no path through the trellis is nearer to a group's targets than the path of `words`, else what is wrong.
/// `tolerance` [32]: how far off the encoder's targets may be.
inline std::string wrong_path(const uint32_t* words, int bits, const double* targets, const double* tolerance,
                              const SearchRounding& rounding = {}) {
  const double limit = trellis_limit(bits);
  const auto levels = trellis_levels(words, bits);
  int best[32];
  const double least = reference::search_trellis(bits, targets, best);
  double cost = 0, slack = 0;
  for (int i = 0; i < 32; ++i) {
    const double t = std::clamp(targets[i], -limit, limit), off = t - levels[i],
                 of_best = t - trellis_level(bits, best[i]);
    cost += off * off;
    slack += 2 * tolerance[i] * (std::abs(off) + std::abs(of_best) + tolerance[i]);
    slack += 2 * rounding.cost + 32 * rounding.relative_cost * (off * off + of_best * of_best + t * t);
  }
  if (cost <= least + slack) return "";
  std::ostringstream wrong;
  wrong << "a path's squared error is " << cost << ", the least is " << least << " +- " << slack << "; ";
  return wrong.str();
}

}  // namespace turboquant::cases
