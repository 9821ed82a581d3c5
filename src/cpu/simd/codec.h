// The kernels of encode and decode.  One pass over a vector rotates, quantises and packs it.
#pragma once

#include "cpu/simd/hadamard.h"
#include "cpu/simd/kinds.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/trellis.h"
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

/// Words of a group to nibbles of plane w, or of 8 bits to bytes.
template <Kind kind>
inline void unpack_group(const uint32_t* words, uint32_t* plane) {
  if constexpr (kind.bits == 8 || kind.bits == 4) {
    for (int w = 0; w < kind.bits; ++w) plane[w] = words[w];
  } else if constexpr (kind.trellis) {
    const uint32_t a = words[0], b = kind.bits == 3 ? words[1] : a, u = words[kind.bits - 1];
    const uint32_t r1 = u << 1 | u >> 31, r3 = u << 3 | u >> 29;
    const uint32_t even = ((u ^ r1) & 0x55555555u) ^ r3, odd = ((u ^ r3) & 0xaaaaaaaau) ^ r1;
    plane[0] = (a & 0xccccccccu) | (even & 0x33333333u);
    plane[1] = (b & 0xccccccccu) | (odd & 0x33333333u);
    plane[2] = (even & 0xccccccccu) | (a & 0x33333333u);
    plane[3] = (odd & 0xccccccccu) | (b & 0x33333333u);
  } else if constexpr (kind.bits == 3) {
    plane[3] = 0;
    for (int w = 0; w < 3; ++w) {
      plane[w] = words[w] & 0x77777777u;
      plane[3] |= words[w] >> (3 - w) & 0x11111111u << w;
    }
  } else {
    for (int w = 0; w < 4; ++w) plane[w] = words[w % 2] >> (w / 2 * 2) & 0x33333333u;
  }
}

/// Levels of a vector's codes.
template <Kind kind>
inline void levels_of(const uint32_t* words, int dim, float* levels) {
  static constexpr LevelTables tables(kind, 0);
  for (int g = 0; g < dim / 32; ++g, levels += 32) {
    uint32_t plane[8];
    unpack_group<kind>(words + g * kind.bits, plane);
    for (int i = 0; i < 32; ++i) {
      levels[i] = is_bytes(kind) ? float(int8_t(plane[i / 4] >> (8 * (i % 4))))
                                 : float(tables.at[i / 8][plane[i / 8] >> (4 * (i % 8)) & 15]);
    }
  }
}

/// Codes of 8 bits: the numbers nearest to `rotated` times half of `doubled`.  Otherwise as below.
template <class F>
inline uint32_t quantize_bytes(const float* rotated, int dim, float doubled, uint32_t* words, uint8_t* levels) {
  constexpr int lanes = sizeof(F) / 4;
  using I32 = Vec<int32_t, sizeof(F)>;
  using I8 = Vec<int8_t, lanes>;
  for (int i = 0; i < dim; i += lanes) {
    const F x = load<F>(rotated + i), y = absolute(x) * (0.5f * doubled) + 0.5f;
    const I32 size = __builtin_convertvector(y < splat<F>(127.0f) ? y : splat<F>(127.0f), I32);
    store(levels + i, __builtin_convertvector(size, I8));
    store(reinterpret_cast<int8_t*>(words) + i, __builtin_convertvector(x < F{} ? -size : size, I8));
  }
  uint32_t square = 0;
  for (int i = 0; i < dim; ++i) square += uint32_t(levels[i]) * levels[i];
  return square;
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
  alignas(64) uint8_t size[kMaxDim], sign[kMaxDim];
  for (int i = 0; i < dim; i += lanes) {
    const F x = load<F>(rotated + i), y = absolute(x) * doubled;
    const I32 whole = __builtin_convertvector(y < splat<F>(255.0f) ? y : splat<F>(255.0f), I32);
    store(size + i, __builtin_convertvector(whole, Narrow));
    store(sign + i, __builtin_convertvector(as<I32>(x < F{}), Narrow));
  }
  alignas(64) uint8_t nibbles[kMaxDim / 2];
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

/// Multiplies x by a power of two that brings its largest number near 1, so that no square over- or underflows.
/// Returns the inverse of that factor: 0 for a zero vector, NaN when a number is not finite.
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
inline bool rotated_vector(const EncodeVectors& p, int t, float* x, float& norm, float& back) {
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
      const int words = words_per_vector(p.kind.bits, p.dim);
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
          : bits == 4 ? quantize<4, F>
                      : quantize_bytes<F>)(rotated, dim, doubled, words, levels);
}

/// `doubled` of scalar codes of a vector of length `norm` that are nearest at its own scale.
template <class F>
inline float doubled_unit(int bits, const float* x, int dim, float norm) {
  if (bits != 8) return 2 * unit(bits) * __builtin_sqrtf(float(dim)) / norm;
  F largest = {};
  for (int i = 0; i < dim; i += int(sizeof(F) / 4)) largest = larger(absolute(load<F>(x + i)), largest);
  return 2 * 127 / reduce(largest, [](F a, F b) { return larger(a, b); });
}

/// The stored scale of a vector of length norm * back and codes whose squared levels add up to `square`.
inline uint16_t stored_scale(Kind kind, float norm, uint32_t square, float back) {
  const float scale = norm / (__builtin_sqrtf(float(square)) * step_of(kind)) * back;
  return float_to_half_bits(scale < largest_scale() ? scale : largest_scale());
}

template <class S>
void encode_vectors(const EncodeVectors& p) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  const int words = words_per_vector(p.kind.bits, p.dim);
  for (int t = 0; t < p.count; ++t) {
    alignas(64) float x[kMaxDim];
    float norm, back;
    if (!rotated_vector<S>(p, t, x, norm, back)) continue;
    uint32_t* const codes = p.codes + int64_t(t) * words;
    uint32_t square;
    if (p.kind.trellis) {
      const float factor = unit(p.kind.bits, 1) * __builtin_sqrtf(float(p.dim)) / norm;
      for (int i = 0; i < p.dim; i += lanes) store(x + i, load<F>(x + i) * factor);
      square = Trellis<S::bytes>::code(p.kind.bits, x, p.dim, codes, x);
    } else {
      alignas(64) uint8_t levels[kMaxDim];
      square = quantize<F>(p.kind.bits, x, p.dim, doubled_unit<F>(p.kind.bits, x, p.dim, norm), codes, levels);
    }
    p.scales[t] = stored_scale(p.kind, norm, square, back);
  }
}

template <class S>
void decode_vectors(const DecodeVectors& p) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  const Kind kind = p.in.kind;
  for (int t = 0; t < p.count; ++t) {
    alignas(64) float x[kMaxDim];
    const uint32_t* codes = p.in.codes + int64_t(t) * words_per_vector(kind.bits, p.dim);
    of_kind(kind, [&]<Kind k>() { levels_of<k>(codes, p.dim, x); });
    hadamard<F>(x, p.dim);
    const float scale = half_bits_to_float(p.in.scales[t]) * step_of(kind);
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
