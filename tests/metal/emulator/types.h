// Types of the Metal Shading Language as strict C++14, as far as the kernels use them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "memory.h"

namespace metal {

using uint = unsigned int;
using ushort = unsigned short;
using ulong = unsigned long;
using uchar = unsigned char;

/// Bits of one type as another (spec 2.19).
template <class To, class From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

/// Storage types of 16 bits.  Conversions are explicit and there is no arithmetic but a change of sign, which makes a
/// kernel say where it rounds.
struct half {
  uint16_t bits;
  half() = default;
  explicit half(float f) {
    const uint32_t u = as_type<uint32_t>(f);
    const uint32_t rest = u & 0x7fffffffu;
    const uint32_t sign = u >> 16 & 0x8000u;
    if (rest > 0x7f800000u) {
      bits = uint16_t(sign | 0x7e00u);
    } else if (rest >= 0x477ff000u) {
      bits = uint16_t(sign | 0x7c00u);
    } else if (rest < 0x38800000u) {
      bits = uint16_t(sign | (as_type<uint32_t>(as_type<float>(rest) + 0.5f) - as_type<uint32_t>(0.5f)));
    } else {
      bits = uint16_t(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13));
    }
  }
  explicit operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest >= 0x7c00u) return as_type<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    return as_type<float>(sign | as_type<uint32_t>(as_type<float>(rest << 13) * 5.192296858534828e33f));  // 2^112
  }
  half operator-() const {
    half h;
    h.bits = uint16_t(bits ^ 0x8000u);
    return h;
  }
};

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float f) {
    const uint32_t u = as_type<uint32_t>(f);
    bits = (u & 0x7fffffffu) > 0x7f800000u ? uint16_t(u >> 16 | 0x40u) : uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
  explicit operator float() const { return as_type<float>(uint32_t(bits) << 16); }
};

/// A vector of N, with the components by index.
template <class T, int N>
struct Vector {
  T at[N];
  T& operator[](int i) { return at[emulator::checked(i, N)]; }
  const T& operator[](int i) const { return at[emulator::checked(i, N)]; }
};
using float2 = Vector<float, 2>;
using float4 = Vector<float, 4>;
using half4 = Vector<half, 4>;
struct half2 {
  half x, y;
  half2() = default;
  half2(half x, half y) : x(x), y(y) {}
  half& operator[](int i) { return emulator::checked(i, 2) ? y : x; }
  const half& operator[](int i) const { return emulator::checked(i, 2) ? y : x; }
};
struct int2 {
  int x, y;
  int2(int x, int y) : x(x), y(y) {}
};
struct ulong2 {
  ulong x, y;
  ulong2(ulong x, ulong y) : x(x), y(y) {}
};
struct uint3 {
  uint x, y, z;
};

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float fmax(float a, float b) { return std::fmax(a, b); }
inline float fmin(float a, float b) { return std::fmin(a, b); }
inline float fabs(float a) { return std::fabs(a); }
inline float sqrt(float a) { return std::sqrt(a); }
inline float exp2(float a) { return std::exp2(a); }
inline float log2(float a) { return std::log2(a); }
inline bool isfinite(float a) { return std::isfinite(a); }
template <class T>
inline T select(T a, T b, bool c) {
  return c ? b : a;
}
inline uint extract_bits(uint x, uint offset, uint bits) { return x >> offset & ((1u << bits) - 1u); }
inline uint rotate(uint x, uint n) { return n % 32 ? x << n % 32 | x >> (32 - n % 32) : x; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint min(uint a, uint b) { return a < b ? a : b; }

}  // namespace metal

// What MLX's own prelude adds.
using float16_t = metal::half;
using bfloat16_t = metal::bfloat;
