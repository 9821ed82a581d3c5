// `encode` and `decode` on CUDA: a group of lanes a vector (codec.cu.h).
#pragma once

#include "cuda/codec.cu.h"

namespace turboquant::cuda {

/// One side (keys or values) of an `encode` launch; EncodeParams of turboquant.h on the device.
struct EncodeArgs {
  int batch, heads, tokens;
  unsigned long long seed;
  const void* x;                                // [batch, heads, tokens, D]
  long long x_strides[4];                       // in elements
  const float* centre;                          // [heads, D] or null
  unsigned* codes;                              // [batch, heads, tokens, BITS * D / 32]
  __half* scales;                               // [batch, heads, tokens]
  long long code_strides[2], scale_strides[2];  // of batch and head, in elements; rows are dense
};

/// Vectors that a block of `warps` warps encodes or decodes.
template <int D>
__host__ __device__ constexpr int vectors_per_block(int warps) {
  return warps * Lanes<D>::vectors;
}

/// Encodes the vectors of block `block`.
template <int D, int BITS, class T>
__device__ void encode(const EncodeArgs& a, int block) {
  using L = Lanes<D>;
  const int lane = threadIdx.x & 31, slot = lane / L::vector, eighth = lane - slot * L::vector;
  const int warps = blockDim.x / 32;
  const long long count = (long long)a.batch * a.heads * a.tokens;
  const long long vector = ((long long)block * warps + threadIdx.x / 32) * L::vectors + slot;
  const bool active = slot < L::vectors && vector < count;
  const long long row = active ? vector : 0;
  const int t = int(row % a.tokens), h = int(row / a.tokens % a.heads), b = int(row / a.tokens / a.heads);

  float v[8] = {};
  if (active) {
    const T* x = static_cast<const T*>(a.x) + b * a.x_strides[0] + h * a.x_strides[1] + t * a.x_strides[2];
    load8(x + 8 * eighth * a.x_strides[3], v, a.x_strides[3]);
    if (a.centre) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] -= a.centre[h * D + 8 * eighth + j];
    }
  }
  float unscale = 1;
  if constexpr (wide_exponent(T())) {  // squares of wide exponents leave float's range
    float top = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) top = fmaxf(top, fabsf(v[j]));
    top = over_vector<D, true>(top);
    const int exponent = min(max(254 - int(__float_as_uint(top) >> 23), 1), 253);
    if (top < __uint_as_float(0x7f800000)) {
      unscale = __uint_as_float(unsigned(254 - exponent) << 23);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] *= __uint_as_float(unsigned(exponent) << 23);
    }
  }
  float square = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) square += v[j] * v[j];
  square = over_vector<D>(square);
  const bool finite = square < __uint_as_float(0x7f800000);  // false for NaN too

  apply_signs(v, a.seed, eighth, 1.f);
  hadamard<D>(v);
  // |H x| = |x|, so the RMS of the unscaled coordinates is sqrt(square * power / D).
  const float to_levels = finite && square > 0 ? 2 * unit(BITS) * rsqrtf(square * (float(L::power) / D)) : 0.f;
  unsigned nibbles = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float doubled = fabsf(v[j]) * to_levels;
    unsigned code = v[j] < 0 ? 1u << (BITS - 1) : 0u;
#pragma unroll
    for (int m = 0; m + 1 < magnitudes(BITS); ++m) code += doubled >= float(double_threshold(BITS, m));
    nibbles |= code << (4 * j);
  }
  if (!finite || square == 0) nibbles = 0;
  constexpr unsigned low = magnitude_bytes(BITS, 0), high = BITS == 4 ? magnitude_bytes(4, 4) : low;
  const unsigned indices = nibbles & (0x11111111u * (magnitudes(BITS) - 1));
  const unsigned first = prmt(low, high, indices), second = prmt(low, high, indices >> 16);
  const unsigned level_square = over_vector<D>(__dp4a(first, first, __dp4a(second, second, 0u)));

  unsigned word = nibbles;
  bool writes = active;
  if constexpr (BITS == 3) {  // the fourth nibble word goes into the spare bits of the other three
    const unsigned spread = __shfl_sync(~0u, nibbles, lane | 3);
    word |= (spread >> (lane & 3) & 0x11111111u) << 3;
    writes = writes && (lane & 3) < 3;
  } else if constexpr (BITS == 2) {
    word |= __shfl_sync(~0u, nibbles, lane | 2) << 2;
    writes = writes && (lane & 3) < 2;
  }
  if (writes) {
    unsigned* codes = a.codes + b * a.code_strides[0] + h * a.code_strides[1] + (long long)t * (BITS * (D / 32));
    codes[eighth / 4 * BITS + (eighth & 3)] = word;
  }
  if (active && eighth == 0) {
    const float scale = sqrtf(square) / (sqrtf(float(level_square)) * level_step(BITS)) * unscale;
    a.scales[b * a.scale_strides[0] + h * a.scale_strides[1] + t] =
        finite ? __float2half_rn(scale) : __ushort_as_half(0x7e00);
  }
}

/// A `decode` launch; DecodeParams of turboquant.h on the device.
struct DecodeArgs {
  int batch, heads, tokens;
  unsigned long long seed;
  const unsigned* codes;                        // [batch, heads, tokens, BITS * D / 32]
  const __half* scales;                         // [batch, heads, tokens]
  long long code_strides[2], scale_strides[2];  // of batch and head, in elements; rows are dense
  const float* centre;                          // [heads, D] or null
  void* out;                                    // [batch, heads, tokens, D], dense
};

/// Decodes the vectors of block `block`, as many as `encode` takes.
template <int D, int BITS, class T>
__device__ void decode(const DecodeArgs& a, int block) {
  using L = Lanes<D>;
  const int lane = threadIdx.x & 31, slot = lane / L::vector, eighth = lane - slot * L::vector;
  const long long vector = ((long long)block * (blockDim.x / 32) + threadIdx.x / 32) * L::vectors + slot;
  const bool active = slot < L::vectors && vector < (long long)a.batch * a.heads * a.tokens;
  const long long row = active ? vector : 0;
  const int t = int(row % a.tokens), h = int(row / a.tokens % a.heads), b = int(row / a.tokens / a.heads);
  float v[8] = {};
  if (active) {
    const unsigned* codes = a.codes + b * a.code_strides[0] + h * a.code_strides[1] + (long long)t * (BITS * (D / 32));
    unsigned packed[BITS];
#pragma unroll
    for (int i = 0; i < BITS; ++i) packed[i] = codes[eighth / 4 * BITS + i];
    const Group<BITS> group(packed);
    const float scale = __half2float(a.scales[b * a.scale_strides[0] + h * a.scale_strides[1] + t]);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (w != (eighth & 3)) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const unsigned byte = lookup<BITS>(group.clean(w) >> (16 * (j / 4))) >> (8 * (j % 4)) & 255;
        v[j] = scale * level_step(BITS) * float(BITS == 4 ? int(byte) - 128 : int((signed char)byte));
      }
    }
  }
  hadamard<D>(v);
  apply_signs(v, a.seed, eighth, rsqrtf(float(L::power)));
  if (!active) return;
  if (a.centre) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] += a.centre[h * D + 8 * eighth + j];
  }
  store8(static_cast<T*>(a.out) + row * D + 8 * eighth, v);
}

/// The same with T from a pointer, for generated code.
template <int D, int BITS, class T>
__device__ void encode_as(const EncodeArgs& a, const T*, int block) {
  encode<D, BITS, T>(a, block);
}
template <int D, int BITS, class T>
__device__ void decode_as(const DecodeArgs& a, const T*, int block) {
  decode<D, BITS, T>(a, block);
}

}  // namespace turboquant::cuda
