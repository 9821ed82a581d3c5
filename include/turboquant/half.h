// Converts float to float16 and bfloat16 and back, on hosts whose compiler has no such types.
#pragma once

#include <bit>
#include <cstdint>

namespace turboquant {

/// IEEE binary16 to binary32; exact.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7fff;
  if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Shifting the fields up leaves the exponent 112 too small; one multiplication mends it, subnormals included.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

/// binary32 to IEEE binary16, to nearest even; overflow gives infinity, NaN stays NaN.
inline uint16_t float_to_half(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;
  if (rest < 0x38800000) {  // subnormal: adding 0.5 lets the float adder round at the 2^-24 place
    const float shifted = std::bit_cast<float>(rest) + 0.5f;
    return sign | uint16_t(std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f));
  }
  return sign | uint16_t((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

/// The same, but overflow gives the largest finite number: codes err, and must not make infinity of a finite number.
inline uint16_t float_to_half_saturated(float f) {
  return float_to_half(f > 65504.0f ? 65504.0f : f < -65504.0f ? -65504.0f : f);  // NaN stays
}

/// bfloat16 to binary32; exact.
inline float bfloat_to_float(uint16_t b) { return std::bit_cast<float>(uint32_t(b) << 16); }

/// binary32 to bfloat16, to nearest even; NaN stays NaN.
inline uint16_t float_to_bfloat(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace turboquant
