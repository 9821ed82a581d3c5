// The two forms of prepared 16-bit weights (simd.h), by what an instruction set multiplies: bytes or 16-bit words.
#pragma once

#include "cpu/simd.h"

namespace turboquant::cpu {
namespace {

/// Dot products of bytes: a weight is a high and a low int8 part, w = 256 high + low.
template <int Bytes>
struct ByteWeights {
  static constexpr int bytes = Bytes, level_vectors = 1;
  static constexpr int quad_step = 1, quad_offset = kBlock / 4;
  using I32 = Vec<int32_t, Bytes>;

  static void prepare(const int32_t w[4], uint32_t& a, uint32_t& b) {
    a = b = 0;
    for (int k = 0; k < 4; ++k) {
      a |= uint32_t(uint8_t((w[k] + 128) >> 8)) << (8 * k);
      b |= uint32_t(uint8_t(w[k])) << (8 * k);
    }
  }
  static void put_weights(uint32_t* out, int i, I32 w) {
    uint8_t* at = reinterpret_cast<uint8_t*>(out) + i;
    store(at, __builtin_convertvector((w + 128) >> 8, Vec<int8_t, Bytes / 4>));
    store(at + kBlock, __builtin_convertvector(w, Vec<int8_t, Bytes / 4>));
  }
  static void put_levels(uint8_t* out, Vec<uint8_t, Bytes> levels) { store(out, levels); }
};

/// Dot products of words: levels are widened when stored, the first two of each quad apart from the last two.
template <int Bytes>
struct WordWeights {
  static constexpr int bytes = Bytes, level_vectors = 2, level_offset = 0;
  static constexpr int quad_step = 2, quad_offset = 1;
  using I32 = Vec<int32_t, Bytes>;

  static void prepare(const int32_t w[4], uint32_t& a, uint32_t& b) {
    a = uint16_t(w[0]) | uint32_t(w[1]) << 16;
    b = uint16_t(w[2]) | uint32_t(w[3]) << 16;
  }
  static void put_weights(uint32_t* out, int i, I32 w) {
    store(reinterpret_cast<int16_t*>(out) + i, __builtin_convertvector(w, Vec<int16_t, Bytes / 2>));
  }
  static void put_levels(uint8_t* out, Vec<uint8_t, Bytes> levels) {
    const auto quads = as<I32>(levels);
    store(out, ((quads << 24) >> 24 & 0xffff) | (quads << 16 >> 24 << 16));
    store(out + Bytes, ((quads << 8) >> 24 & 0xffff) | (quads >> 24 << 16));
  }
};

}  // namespace
}  // namespace turboquant::cpu
