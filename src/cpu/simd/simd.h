// Vectors of any width.  Arithmetic, shifts and comparisons are the compiler's vector extensions (GCC, Clang); what
// they cannot say (byte lookup, quad dot product, loading groups of words) each instruction set's file adds in its
// `Simd` struct:
//
//   bytes                       width of a vector
//   Table, table(p)             16 levels, for lookups;  lookup(table, v): by the low nibble of each byte
//   load_groups<bits>(p, n)     n groups of `bits` words to the low words of n 128-bit chunks; the rest is anything
//   load_halves(p)              float16 numbers as float32; left out where no instruction does it
//   merge(mask, a, b)           bits of a where mask has ones, else of b; exclusive_or(a, b, c): left out likewise
//   interleaves                 registers suffice to unpack between multiplications (unpack.h)
//   score_rows                  query rows whose scores are taken at a time
//   level_offset                what is added to levels in tables
//   Levels, levels(v)           bytes of levels in the form that dot wants
//   Weights, load_weights(p)    two vectors of prepared 16-bit weights; broadcast_weights: one quad for all lanes
//   quad_step, quad_offset      where quad i of a row of prepared weights lies: words [i * step] and [.. + offset]
//   put_weights(out, i, w)      prepares a vector of 16-bit weights that starts at token i of kBlock
//   Acc, dot(acc, l, w)         acc += sum of the four products of each 32-bit lane;  total(acc)
//
// Everything is in an unnamed namespace: see kernels.h.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/kernels.h"

namespace turboquant::cpu {
namespace {

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <class T, int Bytes>
using Vec = typename VectorOf<T, Bytes>::type;

template <class V>
inline V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class To, class From>
inline To as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, v);
}
template <class V, class T>
inline V splat(T x) {
  return V{} + x;
}

/// Elements of the low or high halves of each 128-bit chunk of a and b, in turn.
template <class E, bool high, class V>
inline V interleave(V a, V b) {
  constexpr int n = sizeof(V) / sizeof(E), m = 16 / sizeof(E);
  using W = Vec<E, sizeof(V)>;
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    return as<V>(
        __builtin_shufflevector(as<W>(a), as<W>(b), (I / m * m + I % m / 2 + (high ? m / 2 : 0) + (I % 2 ? n : 0))...));
  }
  (std::make_integer_sequence<int, n>());
}

/// Sums of neighbouring 128-bit chunks of a, then of b.
template <class V>
inline V add_pairs(V a, V b) {
  constexpr int n = sizeof(V) / 4;
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    return V(__builtin_shufflevector(a, b, (I / 4 * 8 + I % 4)...)) +
           V(__builtin_shufflevector(a, b, (I / 4 * 8 + I % 4 + 4)...));
  }
  (std::make_integer_sequence<int, n>());
}

/// Combines all elements of a vector by a binary operation.
template <class V, class Op>
inline auto reduce(V v, Op op) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  auto halve = [&]<int half>(std::integral_constant<int, half>, auto&& self) {
    if constexpr (half > 0) {
      v = op(
          v, [&]<int... I>(std::integer_sequence<int, I...>) {
            return V(__builtin_shufflevector(v, v, (I ^ half)...));
          }(std::make_integer_sequence<int, n>()));
      self(std::integral_constant<int, half / 2>(), self);
    }
  };
  halve(std::integral_constant<int, n / 2>(), halve);
  return v[0];
}

/// The larger number; b when either is NaN.
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
/// x, at least `least`; NaN stays.
template <class V>
inline V at_least(V x, float least) {
  return x < splat<V>(least) ? splat<V>(least) : x;
}
template <class V>
inline V absolute(V x) {
  using U = Vec<uint32_t, sizeof(V)>;
  return as<V>(as<U>(x) & 0x7fffffffu);
}

/// 2^x for x <= 0, to 2 ulp; below 2^-126 it is 0.  NaN stays NaN.
template <class V>
inline V exp2_of(V x) {
  using U = Vec<uint32_t, sizeof(V)>;
  x = at_least(x, -127.0f);
  const V shifted = x + 12582912.0f;  // 1.5 * 2^23: the nearest integer is in the low bits
  const V f = x - (shifted - 12582912.0f);
  V p = splat<V>(1.540353e-4f);  // Taylor of degree 6: the next term is below 2^-22
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return p * as<V>((as<U>(shifted) + 127u) << 23);
}

/// fp16 bits, widened to 32-bit lanes, as float.
template <class U>
inline auto half_lanes_to_float(U h) {
  using F = Vec<float, sizeof(U)>;
  const U sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  const U finite = as<U>(as<F>(rest << 13) * 0x1p112f);
  return as<F>(sign | (rest >= 0x7c00u ? (0x7f800000u | rest << 13) : finite));
}

/// Loads a vector of floats from `i` on.
template <class F>
inline F load_floats(const void* data, Dtype dtype, int i) {
  using U = Vec<uint32_t, sizeof(F)>;
  using H = Vec<uint16_t, sizeof(F) / 2>;
  if (dtype == Dtype::float32) return load<F>(static_cast<const float*>(data) + i);
  const U wide = __builtin_convertvector(load<H>(static_cast<const uint16_t*>(data) + i), U);
  return dtype == Dtype::float16 ? half_lanes_to_float(wide) : as<F>(wide << 16);
}

inline float half_bits_to_float(uint16_t h) { return half_lanes_to_float(Vec<uint32_t, 16>{h})[0]; }

/// float to fp16 bits, to nearest even; overflow gives infinity, NaN stays NaN.
inline uint16_t float_to_half_bits(float f) {
  const uint32_t bits = as<uint32_t>(f), rest = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;
  if (rest < 0x38800000) return sign | uint16_t(as<uint32_t>(as<float>(rest) + 0.5f) - as<uint32_t>(0.5f));
  return sign | uint16_t((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

/// float_to_half_saturated of half.h.
inline uint16_t float_to_half_saturated_bits(float f) {
  return float_to_half_bits(f > 65504.0f ? 65504.0f : f < -65504.0f ? -65504.0f : f);
}

}  // namespace
}  // namespace turboquant::cpu
