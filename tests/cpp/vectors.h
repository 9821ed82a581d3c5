// Vectors, their codes, and one call that turns one into the other, for the tests of the codec.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "cases.h"

namespace turboquant::cases {

/// Codes and scales of vectors [heads, tokens, dim], dense.
struct Encoded {
  int heads, tokens, dim, bits;
  std::vector<uint32_t> codes;
  std::vector<uint16_t> scales;
  Encoded(int heads, int tokens, int dim, int bits)
      : heads(heads),
        tokens(tokens),
        dim(dim),
        bits(bits),
        codes(size_t(heads) * tokens * words_per_vector(bits, dim), 0xdeadbeef),
        scales(size_t(heads) * tokens, 0x1234) {}
  MutablePacked view() {
    const int64_t row = int64_t(tokens) * words_per_vector(bits, dim);
    return {codes.data(), scales.data(), bits, heads * row, row, int64_t(heads) * tokens, tokens};
  }
  Packed packed() const {
    const int64_t row = int64_t(tokens) * words_per_vector(bits, dim);
    return {codes.data(), scales.data(), bits, heads * row, row, int64_t(heads) * tokens, tokens};
  }
};

inline Encoded encode_rows(const Buffer& x, int heads, int tokens, int dim, int bits, Backend backend,
                           uint64_t seed = 3, const float* centre = nullptr, const uint16_t* feedback = nullptr) {
  Encoded e(heads, tokens, dim, bits);
  EncodeParams p;
  p.batch = 1, p.heads = heads, p.tokens = tokens, p.head_dim = dim, p.seed = seed;
  p.centre = centre, p.feedback = feedback;
  p.x = contiguous<const void*>(x.bytes.data(), x.dtype, heads, tokens, dim);
  p.out = e.view();
  encode(p, backend);
  return e;
}

inline std::vector<float> decode_rows(const Encoded& e, Backend backend, uint64_t seed = 3,
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

}  // namespace turboquant::cases
