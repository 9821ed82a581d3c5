// What the codec's kernels share on CUDA: the rotation over a warp, and loads and stores of its coordinates.
//
// Compiled by nvcc (tests, benchmarks) and, inside MLX, by NVRTC: no standard headers.  A vector of D coordinates lies
// in D/8 neighbouring lanes, eight consecutive coordinates a lane, so that a lane's codes are one nibble word.  Of more
// than 256 coordinates lane i has those of the eighths i and i + 32, as two sets.
#pragma once

#include "cuda/device/ptx.cu.h"
#include "turboquant/format.h"

namespace turboquant::cuda {

/// This thread's warp.  The compiler knows of the shuffle's result that a warp agrees on it; in branches on
/// threadIdx.x / 32 it would make every shuffle wait for threads that might have gone another way.
__device__ inline int warp_index() { return __shfl_sync(~0u, int(threadIdx.x / 32), 0); }

/// How vectors of D coordinates lie over the lanes of a warp.
template <int D>
struct Lanes {
  static_assert(D % 32 == 0 && D >= 32 && D <= 512, "head_dim must be a multiple of 32 from 32 to 512");
  static constexpr int power = D & -D;
  static constexpr int odd = D / power;
  static constexpr int sets = D > 256 ? 2 : 1;
  static constexpr int vector = sets == 2 ? 32 : D / 8;  // lanes of a vector
  static constexpr int vectors = 32 / vector;            // vectors of a warp; lanes left over idle
  static constexpr int block = power / 8;                // eighths of one Walsh-Hadamard block, a power of two
  /// Whether there is an eighth: of `vector` lanes all have the first set's.
  static __device__ bool has(int eighth) { return sets == 1 || eighth < D / 8; }
};

/// Signs of coordinates 32w .. 32w + 31 as bits: sign_word of rotation.h.
__device__ inline unsigned sign_bits(unsigned long long seed, int w) {
  unsigned long long z = seed + 0x9e3779b97f4a7c15ull * (unsigned long long)(w + 1);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return unsigned((z ^ z >> 31) >> 32);
}

/// Adds (or takes the largest of) one number a lane over the lanes of each vector.
template <int D, bool Max = false, class Number>
__device__ Number over_vector(Number x) {
  using L = Lanes<D>;
  const int lane = threadIdx.x & 31;
  if constexpr (L::sets == 2) {
    for (int step = 1; step < 32; step *= 2) {
      const Number other = __shfl_xor_sync(~0u, x, step);
      x = Max ? (other > x ? other : x) : x + other;
    }
    return x;
  }
  for (int step = 1; step < L::block; step *= 2) {
    const Number other = __shfl_xor_sync(~0u, x, step);
    x = Max ? (other > x ? other : x) : x + other;
  }
  if constexpr (L::odd > 1) {
    const int first = lane / L::vector * L::vector, place = lane - first;
    Number all = x;
    for (int k = 1; k < L::odd; ++k) {
      const Number other = __shfl_sync(~0u, x, first + (place + k * L::block) % L::vector);
      all = Max ? (other > all ? other : all) : all + other;
    }
    x = all;
  }
  return x;
}

/// H without its factor: unscaled_hadamard of rotation.h, for all vectors of a warp at once; of several such sets, too.
/// Of more than 256 coordinates two sets are a vector, whose coordinates beyond the last must be 0 and become anything.
template <int D, int SETS>
__device__ void hadamard(float (&v)[SETS][8]) {
  using L = Lanes<D>;
  static_assert(SETS % L::sets == 0, "sets of whole vectors");
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int half = 1; half < 8; half *= 2) {
#pragma unroll
    for (int i = 0; i < 8 * SETS; ++i) {
      const int j = i % 8;
      if (j & half) continue;
      const float a = v[i / 8][j], b = v[i / 8][j + half];
      v[i / 8][j] = a + b;
      v[i / 8][j + half] = a - b;
    }
  }
#pragma unroll
  for (int step = 1; step < L::block && step < 32; step *= 2) {
    const float sign = lane & step ? -1.f : 1.f;
#pragma unroll
    for (auto& set : v) {
#pragma unroll
      for (float& x : set) x = fmaf(sign, x, __shfl_xor_sync(~0u, x, step));
    }
  }
  if constexpr (L::sets == 2) {
#pragma unroll
    for (int i = 0; i < 4 * SETS; ++i) {
      float &low = v[i / 8 * 2][i % 8], &high = v[i / 8 * 2 + 1][i % 8];
      if constexpr (L::block == 64) {
        const float a = low, b = high;
        low = a + b, high = a - b;
      } else if constexpr (L::odd > 1) {
        float sum = low + high;  // over the blocks, of which 32 lanes have a whole number
        for (int step = L::block; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        low -= sum * (2.f / L::odd), high -= sum * (2.f / L::odd);
      }
    }
  } else if constexpr (L::odd > 1) {
    const int first = lane / L::vector * L::vector, place = lane - first;
#pragma unroll
    for (auto& set : v) {
#pragma unroll
      for (float& x : set) {
        float sum = x;
        for (int k = 1; k < L::odd; ++k) sum += __shfl_sync(~0u, x, first + (place + k * L::block) % L::vector);
        x -= sum * (2.f / L::odd);
      }
    }
  }
}
template <int D>
__device__ void hadamard(float (&v)[8]) {
  hadamard<D>(reinterpret_cast<float(&)[1][8]>(v));
}

/// Multiplies a lane's eight coordinates, the `eighth`-th of the vector, by the random signs and by `factor`.
__device__ inline void apply_signs(float (&v)[8], unsigned long long seed, int eighth, float factor) {
  const unsigned signs = sign_bits(seed, eighth / 4) >> (eighth % 4 * 8);
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] *= signs >> j & 1 ? -factor : factor;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float& x, float v) { x = v; }
/// As float_to_half_saturated of half.h.
__device__ inline void from_float(__half& x, float v) {
  x = __float2half_rn(v > 65504.f ? 65504.f : v < -65504.f ? -65504.f : v);
}
__device__ inline void from_float(__nv_bfloat16& x, float v) { x = __float2bfloat16_rn(v); }

constexpr __device__ bool wide_exponent(float) { return true; }
constexpr __device__ bool wide_exponent(__nv_bfloat16) { return true; }
constexpr __device__ bool wide_exponent(__half) { return false; }

__device__ inline bool aligned_to(const void* p, int bytes) { return (unsigned long long)p % bytes == 0; }

/// Eight numbers as they lie in memory, so that a load need not be waited for.
template <class T>
struct alignas(16) Raw8 {
  T x[8];
  /// From p on, `step` apart; wide loads where the address allows.
  __device__ void load(const T* p, long long step = 1) {
    if (step == 1 && aligned_to(p, 16)) {
#pragma unroll
      for (unsigned i = 0; i < sizeof(x) / 16; ++i) {
        reinterpret_cast<uint4*>(x)[i] = reinterpret_cast<const uint4*>(p)[i];
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = p[j * step];
    }
  }
  __device__ void to_floats(float (&v)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = to_float(x[j]);
  }
};

template <class T>
__device__ void load8(const T* p, float (&v)[8], long long step = 1) {
  Raw8<T> raw;
  raw.load(p, step);
  raw.to_floats(v);
}

template <class T>
__device__ void store8(T* p, const float (&v)[8]) {
  alignas(16) T x[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) from_float(x[j], v[j]);
  if (aligned_to(p, 16)) {
#pragma unroll
    for (unsigned i = 0; i < sizeof(x) / 16; ++i) reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<uint4*>(x)[i];
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) p[j] = x[j];
  }
}

}  // namespace turboquant::cuda
