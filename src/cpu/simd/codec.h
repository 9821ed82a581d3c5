// Encode and decode kernels: a row at a time, rotation and quantisation and packing fused.
#pragma once

#include "cpu/simd/hadamard.h"
#include "cpu/simd/simd.h"
#include "turboquant/format.h"

namespace turboquant::cpu {
namespace {

/// Nibble planes of a group (unpack.h) to its words.
template <int bits>
inline void pack_group(const uint32_t* plane, uint32_t* words) {
  if constexpr (bits == 4) {
    for (int w = 0; w < 4; ++w) words[w] = plane[w];
  } else if constexpr (bits == 3) {
    for (int w = 0; w < 3; ++w) words[w] = plane[w] | (plane[3] & 0x11111111u << w) << (3 - w);
  } else {
    for (int w = 0; w < 2; ++w) words[w] = plane[w] | plane[w + 2] << 2;
  }
}

template <int bits>
inline void unpack_group(const uint32_t* words, uint32_t* plane) {
  if constexpr (bits == 4) {
    for (int w = 0; w < 4; ++w) plane[w] = words[w];
  } else if constexpr (bits == 3) {
    plane[3] = 0;
    for (int w = 0; w < 3; ++w) {
      plane[w] = words[w] & 0x77777777u;
      plane[3] |= words[w] >> (3 - w) & 0x11111111u << w;
    }
  } else {
    for (int w = 0; w < 4; ++w) plane[w] = words[w % 2] >> (w / 2 * 2) & 0x33333333u;
  }
}

/// Codes of `rotated`, the sizes of their levels and the sum of those squared.  `doubled` turns a coordinate into twice
/// its value in levels: decision thresholds are then integers (format.h), so truncation does not move a coordinate
/// across one.
template <int bits, class F>
inline uint32_t quantize(const float* rotated, int dim, float doubled, uint32_t* words, uint8_t* levels) {
  constexpr int lanes = sizeof(F) / 4, width = sizeof(F) < 32 ? 16 : 32;
  using I32 = Vec<int32_t, sizeof(F)>;
  using Narrow = Vec<uint8_t, lanes>;
  using U8 = Vec<uint8_t, width>;
  using U16 = Vec<uint16_t, width>;
  alignas(64) uint8_t size[256], sign[256];
  for (int i = 0; i < dim; i += lanes) {
    const F x = load<F>(rotated + i), y = absolute(x) * doubled;
    const I32 whole = __builtin_convertvector(y < splat<F>(255.0f) ? y : splat<F>(255.0f), I32);
    store(size + i, __builtin_convertvector(whole, Narrow));
    store(sign + i, __builtin_convertvector(as<I32>(x < F{}), Narrow));
  }
  alignas(64) uint8_t nibbles[128];
  for (int i = 0; i < dim; i += width) {
    const U8 s = load<U8>(size + i);
    U8 code = load<U8>(sign + i) & uint8_t(magnitudes(bits)), magnitude_of = splat<U8>(uint8_t(magnitude(bits, 0)));
    for (int m = 0; m + 1 < magnitudes(bits); ++m) {
      const U8 above = as<U8>(s >= splat<U8>(uint8_t(double_threshold(bits, m))));
      code -= above;
      magnitude_of += above & uint8_t(magnitude(bits, m + 1) - magnitude(bits, m));
    }
    store(levels + i, magnitude_of);
    const U16 pairs = as<U16>(code) | as<U16>(code) >> 4;
    store(nibbles + i / 2, __builtin_convertvector(pairs, Vec<uint8_t, width / 2>));
  }
  uint32_t square = 0;
  for (int i = 0; i < dim; ++i) square += uint32_t(levels[i]) * levels[i];
  for (int g = 0; g < dim / 32; ++g) {
    uint32_t plane[4];
    __builtin_memcpy(plane, nibbles + 16 * g, 16);
    pack_group<bits>(plane, words + g * bits);
  }
  return square;
}

/// |x|^2 of `dim` numbers; four sums hide the latency of the additions.
template <class F>
inline float sum_of_squares(const float* x, int dim) {
  constexpr int lanes = sizeof(F) / 4, step = lanes < 8 ? 4 : 32 / lanes;
  F sum[step] = {};
  for (int i = 0; i < dim; i += 32) {
#pragma GCC unroll 8
    for (int k = 0; k < 32 / lanes; ++k) {
      const F v = load<F>(x + i + k * lanes);
      sum[k % step] += v * v;
    }
  }
  for (int k = 1; k < step; ++k) sum[0] += sum[k];
  return reduce(sum[0], [](F a, F b) { return a + b; });
}

/// Brings the largest number of x near 1 by a power of two, so that no square over- or underflows, and returns what
/// undoes it: 0 for a zero vector, NaN when a number is not finite.
template <class F>
float normalize_range(float* x, int dim) {
  constexpr int lanes = sizeof(F) / 4;
  F largest = {}, poison = {};
  for (int i = 0; i < dim; i += lanes) {
    const F v = load<F>(x + i);
    largest = larger(absolute(v), largest);
    poison += v - v;  // NaN if v is not finite
  }
  const float top = reduce(largest, [](F a, F b) { return larger(a, b); });
  const float bad = reduce(poison, [](F a, F b) { return a + b; });
  if (!(bad == 0 && top > 0)) return bad;
  const int exponent = int(as<uint32_t>(top) >> 23) - 127;
  const int shift = exponent > 126 ? -126 : exponent < -126 ? 126 : -exponent;
  const float factor = as<float>(uint32_t(shift + 127) << 23);
  for (int i = 0; i < dim; i += lanes) store(x + i, load<F>(x + i) * factor);
  return as<float>(uint32_t(127 - shift) << 23);
}

/// Row t in the rotated basis, and its length.  What has none is written here, and false returned.
template <class S>
inline bool rotated_row(const EncodeRows& p, int t, float* x, float& norm, float& back) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  const char* row = static_cast<const char*>(p.x) + t * p.stride * (p.dtype == Dtype::float32 ? 4 : 2);
  for (int i = 0; i < p.dim; i += lanes) {
    F v = load_floats<F>(row, p.dtype, i);
    if (p.centre) v -= load<F>(p.centre + i);
    store(x + i, v * load<F>(p.signs + i));
  }
  float square = sum_of_squares<F>(x, p.dim);
  back = 1;
  if (!(square > 1e-20f && square < 1e30f)) {
    back = normalize_range<F>(x, p.dim);
    if (!(back > 0)) {
      const int words = words_per_vector(p.bits, p.dim);
      for (int w = 0; w < words; ++w) p.codes[int64_t(t) * words + w] = 0;
      p.scales[t] = back == 0 ? 0 : 0x7e00;
      return false;
    }
    square = sum_of_squares<F>(x, p.dim);
  }
  norm = __builtin_sqrtf(square);
  hadamard<F>(x, p.dim);
  return true;
}

/// quantize for a width known at run time.
template <class F>
inline uint32_t quantize(int bits, const float* rotated, int dim, float doubled, uint32_t* words, uint8_t* levels) {
  return (bits == 2   ? quantize<2, F>
          : bits == 3 ? quantize<3, F>
                      : quantize<4, F>)(rotated, dim, doubled, words, levels);
}

/// The stored scale of a vector of length norm * back and codes whose squared levels add up to `square`.
inline uint16_t stored_scale(int bits, float norm, uint32_t square, float back) {
  const float scale = norm / (__builtin_sqrtf(float(square)) * level_step(bits)) * back;
  return float_to_half_bits(scale < largest_scale() ? scale : largest_scale());
}

template <class S>
void encode_rows(const EncodeRows& p) {
  using F = Vec<float, S::bytes>;
  const int words = words_per_vector(p.bits, p.dim);
  for (int t = 0; t < p.count; ++t) {
    alignas(64) float x[256];
    alignas(64) uint8_t levels[256];
    float norm, back;
    if (!rotated_row<S>(p, t, x, norm, back)) continue;
    const float doubled = 2 * unit(p.bits) * __builtin_sqrtf(float(p.dim)) / norm;
    const uint32_t square = quantize<F>(p.bits, x, p.dim, doubled, p.codes + int64_t(t) * words, levels);
    p.scales[t] = stored_scale(p.bits, norm, square, back);
  }
}

template <class S>
void decode_rows(const DecodeRows& p) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  const int bits = p.in.bits, words = words_per_vector(bits, p.dim);
  float table[16];
  for (int c = 0; c < 16; ++c) table[c] = float(level(bits, c & ((1 << bits) - 1)));
  for (int t = 0; t < p.count; ++t) {
    alignas(64) float x[256];
    for (int g = 0; g < p.dim / 32; ++g) {
      uint32_t plane[4];
      (bits == 2   ? unpack_group<2>
       : bits == 3 ? unpack_group<3>
                   : unpack_group<4>)(p.in.codes + int64_t(t) * words + g * bits, plane);
      for (int w = 0; w < 4; ++w) {
        for (int j = 0; j < 8; ++j) x[32 * g + 8 * w + j] = table[plane[w] >> (4 * j) & 15];
      }
    }
    hadamard<F>(x, p.dim);
    const float scale = half_bits_to_float(p.in.scales[t]) * level_step(bits);
    for (int i = 0; i < p.dim; i += lanes) {
      F v = load<F>(x + i) * load<F>(p.signs + i) * scale;
      if (p.centre) v += load<F>(p.centre + i);
      store(x + i, v);
    }
    if (p.dtype == Dtype::float32) {
      __builtin_memcpy(static_cast<float*>(p.out) + t * p.stride, x, size_t(p.dim) * 4);
      continue;
    }
    uint16_t* out = static_cast<uint16_t*>(p.out) + t * p.stride;
    for (int i = 0; i < p.dim; ++i) {
      if (p.dtype == Dtype::float16) {
        out[i] = float_to_half_saturated_bits(x[i]);
      } else {
        const uint32_t b = as<uint32_t>(x[i]);
        out[i] =
            (b & 0x7fffffff) > 0x7f800000 ? uint16_t(b >> 16 | 0x40) : uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
      }
    }
  }
}

}  // namespace
}  // namespace turboquant::cpu
