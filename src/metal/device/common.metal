// What the kernels share: the rotation of a vector that a SIMD-group holds in registers.
//
// Pointers whose address space depends on the size of an array (MLX passes small inputs as `constant`), or that lead
// to threadgroup memory, are template parameters.

#pragma once

#include "turboquant/format.h"
#include "metal/layout.h"
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;

// Arrays stay in registers only where loops over them are unrolled.
#ifdef __METAL_VERSION__
#define TQ_UNROLL _Pragma("clang loop unroll(full)")
#else
#define TQ_UNROLL
#endif

// Arrays in threadgroup memory; `name + i` is an address in one.  The emulator has its own, which check indices.
#ifndef TQ_ARRAY
#define TQ_ARRAY(TYPE, NAME, COUNT) TYPE NAME[COUNT]
#define TQ_ARRAY2(TYPE, NAME, ROWS, COLUMNS) TYPE NAME[ROWS][COLUMNS]
#endif

namespace turboquant {

/// An array of any strides, which count elements.
template <class Data, class Strides>
struct Strided {
  Data data;
  Strides strides;
};
template <class Data, class Strides>
Strided<Data, Strides> strided(Data data, Strides strides) {
  return {data, strides};
}

/// Where a thread stands.
struct Place {
  uint3 group;  // of its threadgroup in the grid
  ushort lane, simdgroup;
};

/// A number of the output's type; float16 saturates (float_to_half_saturated of half.h), and NaN stays.
template <class T>
T to_output(float x) {
  return T(x);
}
template <>
inline half to_output<half>(float x) {
  return half(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}

inline float not_a_number() { return as_type<float>(0x7fc00000u); }

/// The odd factor of a head dimension.
constexpr int odd_part(int dim) { return dim / (dim & -dim); }

/// x of the lane whose index differs in the bits of `step`: simd_shuffle_xor is specified for integers.
inline float exchange(float x, ushort step) { return as_type<float>(simd_shuffle_xor(as_type<uint>(x), step)); }

/// H without its factor 1/sqrt(2^k): register r of lane l is coordinate 32 r + l.
template <int D>
void hadamard(thread float* x, ushort lane) {
  constexpr int registers = D / 32, blocks = odd_part(D), of_block = registers / blocks;
  for (ushort step = 1; step < 32; step = ushort(2 * step)) {
    TQ_UNROLL
    for (int r = 0; r < registers; ++r) {
      const float other = exchange(x[r], step);
      x[r] = (lane & step) ? other - x[r] : x[r] + other;
    }
  }
  TQ_UNROLL
  for (int step = 1; step < of_block; step *= 2) {
    TQ_UNROLL
    for (int r = 0; r < registers; ++r) {
      if (r & step) continue;
      if (r % of_block + step >= of_block) continue;
      const float a = x[r], b = x[r + step];
      x[r] = a + b;
      x[r + step] = a - b;
    }
  }
  if (blocks == 1) return;
  TQ_UNROLL
  for (int j = 0; j < of_block; ++j) {
    float sum = 0.0f;
    TQ_UNROLL
    for (int b = 0; b < blocks; ++b) sum += x[b * of_block + j];
    TQ_UNROLL
    for (int b = 0; b < blocks; ++b) x[b * of_block + j] -= sum * (2.0f / float(blocks));
  }
}

/// 1/sqrt(2^k), the factor of H.
template <int D>
float hadamard_scale() {
  return 1.0f / sqrt(float(D / odd_part(D)));
}

/// x where bit `lane` of the sign word is 0, else -x.
inline float with_sign(float x, uint signs, ushort lane) { return (signs >> lane & 1u) ? -x : x; }

/// r = H (s * x).
template <int D, class Params>
void rotate_vector(thread float* x, Params params, ushort lane) {
  TQ_UNROLL
  for (int r = 0; r < D / 32; ++r) x[r] = with_sign(x[r], uint(params[metal_layout::kSigns + r]), lane);
  hadamard<D>(x, lane);
  TQ_UNROLL
  for (int r = 0; r < D / 32; ++r) x[r] *= hadamard_scale<D>();
}

/// x = s * (H r).
template <int D, class Params>
void unrotate_vector(thread float* x, Params params, ushort lane) {
  hadamard<D>(x, lane);
  TQ_UNROLL
  for (int r = 0; r < D / 32; ++r) {
    x[r] = with_sign(x[r] * hadamard_scale<D>(), uint(params[metal_layout::kSigns + r]), lane);
  }
}

}  // namespace turboquant
