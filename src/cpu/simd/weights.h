// The two forms of prepared 16-bit weights (simd.h), by what an instruction set multiplies: bytes or 16-bit words.
#pragma once

#include "cpu/simd/simd.h"

namespace turboquant::cpu {
namespace {

/// Dot products of bytes: a weight is a high and a low int8 part, w = 256 high + low.
template <int Bytes>
struct ByteWeights {
  static constexpr int bytes = Bytes;
  static constexpr int quad_step = 1, quad_offset = kBlock / 4;
  using I32 = Vec<int32_t, Bytes>;

  static void prepare(const int32_t w[32], uint32_t a[8], uint32_t b[8]) {
    using I8 = Vec<int8_t, 32>;
    const auto all = load<Vec<int32_t, 128>>(w);
    const auto by_position = [](I8 v) {
      return [&]<int... I>(std::integer_sequence<int, I...>) {
        return I8(__builtin_shufflevector(v, v, (I / 8 * 8 + I % 4 * 2 + I / 4 % 2)...));
      }
      (std::make_integer_sequence<int, 32>());
    };
    store(a, by_position(__builtin_convertvector((all + 128) >> 8, I8)));
    store(b, by_position(__builtin_convertvector(all, I8)));
  }
  static void put_weights(uint32_t* out, int i, I32 w) {
    uint8_t* at = reinterpret_cast<uint8_t*>(out) + i;
    store(at, __builtin_convertvector((w + 128) >> 8, Vec<int8_t, Bytes / 4>));
    store(at + kBlock, __builtin_convertvector(w, Vec<int8_t, Bytes / 4>));
  }
};

/// Dot products of words: the even bytes of levels are widened apart from the odd ones, and weights lie likewise.
template <int Bytes>
struct WordWeights {
  static constexpr int bytes = Bytes, level_offset = 0;
  static constexpr int quad_step = 2, quad_offset = 1;
  using I32 = Vec<int32_t, Bytes>;
  using I16 = Vec<int16_t, Bytes>;

  static void prepare(const int32_t w[32], uint32_t a[8], uint32_t b[8]) {
    for (int p = 0; p < 8; ++p) {
      const int32_t* quad = w + p / 2 * 8 + p % 2;
      a[p] = uint16_t(quad[0]) | uint32_t(quad[4]) << 16;
      b[p] = uint16_t(quad[2]) | uint32_t(quad[6]) << 16;
    }
  }
  static void put_weights(uint32_t* out, int i, I32 w) {
    const auto words = __builtin_convertvector(w, Vec<int16_t, Bytes / 2>);
    const auto swapped = [&]<int... I>(std::integer_sequence<int, I...>) {
      return __builtin_shufflevector(words, words, (I / 4 * 4 + I % 4 / 2 + I % 2 * 2)...);
    }
    (std::make_integer_sequence<int, Bytes / 4>());
    store(reinterpret_cast<int16_t*>(out) + i, swapped);
  }
  struct Levels {
    I16 a, b;
  };
  using Weights = Levels;
  static Levels levels(Vec<uint8_t, Bytes> v) { return {as<I16>(v) << 8 >> 8, as<I16>(v) >> 8}; }
  static Weights load_weights(const uint8_t* p) { return {load<I16>(p), load<I16>(p + Bytes)}; }
  static Weights broadcast_weights(uint32_t a, uint32_t b) {
    return {as<I16>(splat<I32>(int32_t(a))), as<I16>(splat<I32>(int32_t(b)))};
  }
};

}  // namespace
}  // namespace turboquant::cpu
