// The codec on CUDA: the rotation over a warp, byte lookups of packed codes, and `encode`.
//
// Compiled by nvcc (tests, benchmarks) and, inside MLX, by NVRTC: no standard headers.  A vector of D coordinates lies
// in D/8 neighbouring lanes, eight consecutive coordinates a lane, so that a lane's codes are one nibble word.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#endif

#include "turboquant/format.h"

namespace turboquant::cuda {

__device__ inline unsigned prmt(unsigned a, unsigned b, unsigned selector) {
  unsigned d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

/// How vectors of D coordinates lie over the lanes of a warp.
template <int D>
struct Lanes {
  static_assert(D % 32 == 0 && D >= 32 && D <= 256, "head_dim must be a multiple of 32 from 32 to 256");
  static constexpr int odd = D % 7 == 0 ? 7 : D % 5 == 0 ? 5 : D % 3 == 0 ? 3 : 1;  // D = 2^k odd
  static constexpr int power = D / odd;
  static constexpr int vector = D / 8;         // lanes of a vector
  static constexpr int vectors = 32 / vector;  // vectors of a warp; lanes left over idle
  static constexpr int block = power / 8;      // lanes of one Walsh-Hadamard block, a power of two
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

/// H without its factor: unscaled_hadamard of rotation.h, for all vectors of a warp at once.
template <int D>
__device__ void hadamard(float (&v)[8]) {
  using L = Lanes<D>;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int half = 1; half < 8; half *= 2) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j & half) continue;
      const float a = v[j], b = v[j + half];
      v[j] = a + b;
      v[j + half] = a - b;
    }
  }
#pragma unroll
  for (int step = 1; step < L::block; step *= 2) {
    const float sign = lane & step ? -1.f : 1.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = fmaf(sign, v[j], __shfl_xor_sync(~0u, v[j], step));
  }
  if constexpr (L::odd > 1) {
    const int first = lane / L::vector * L::vector, place = lane - first;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float sum = v[j];
      for (int k = 1; k < L::odd; ++k) sum += __shfl_sync(~0u, v[j], first + (place + k * L::block) % L::vector);
      v[j] -= sum * (2.f / L::odd);
    }
  }
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
__device__ inline void from_float(__half& x, float v) { x = __float2half_rn(v); }
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

/// Four magnitudes as bytes, from the magnitude index m on.
TQ_FN unsigned magnitude_bytes(int bits, int m) {
  return unsigned(magnitude(bits, m)) | unsigned(magnitude(bits, m + 1)) << 8 |
         (bits == 2 ? 0u : unsigned(magnitude(bits, m + 2)) << 16 | unsigned(magnitude(bits, m + 3)) << 24);
}

/// Four signed levels as bytes, from code c on.
TQ_FN unsigned level_bytes(int bits, int c) {
  return unsigned(level(bits, c) & 0xff) | unsigned(level(bits, c + 1) & 0xff) << 8 |
         unsigned(level(bits, c + 2) & 0xff) << 16 | unsigned(level(bits, c + 3) & 0xff) << 24;
}

/// Turns the low four nibbles (codes; anything above 2- and 3-bit codes masked away) into four bytes.  Widths 2 and 3
/// give signed levels.  Width 4 gives 128 + level unsigned: prmt's sign mode makes the positive magnitudes of one
/// lookup and the negative ones of another 0, and the difference cannot borrow.
template <int BITS>
__device__ unsigned lookup(unsigned codes) {
  if constexpr (BITS < 4) {
    constexpr unsigned low = level_bytes(BITS, 0), high = BITS == 3 ? level_bytes(BITS, 4) : low;
    return prmt(low, high, codes);
  } else {
    constexpr unsigned low = magnitude_bytes(4, 0), high = magnitude_bytes(4, 4);
    return prmt(low, high, codes) - prmt(low, high, codes ^ 0x8888) + 0x80808080u;
  }
}

/// The nibble words of a group (word w holds the codes of coordinates 8w .. 8w + 7), from its packed words.  Words
/// whose unused bits may be set: `clean` masks them.
template <int BITS>
struct Group {
  static constexpr unsigned mask = BITS == 4 ? ~0u : BITS == 3 ? 0x77777777u : 0x33333333u;
  unsigned word[4];
  __device__ explicit Group(const unsigned (&packed)[BITS]) {
    if constexpr (BITS == 4) {
#pragma unroll
      for (int w = 0; w < 4; ++w) word[w] = packed[w];
    } else if constexpr (BITS == 3) {
#pragma unroll
      for (int w = 0; w < 3; ++w) word[w] = packed[w];
      word[3] = (packed[0] >> 3 & 0x11111111u) | (packed[1] >> 2 & 0x22222222u) | (packed[2] >> 1 & 0x44444444u);
    } else {
#pragma unroll
      for (int w = 0; w < 2; ++w) word[w] = packed[w], word[w + 2] = packed[w] >> 2;
    }
  }
  __device__ unsigned clean(int w) const { return word[w] & mask; }
};

/// One side (keys or values) of an `encode` launch; EncodeParams of turboquant.h on the device.
struct EncodeArgs {
  int batch, heads, tokens;
  unsigned long long seed;
  const void* x;           // [batch, heads, tokens, D]
  long long x_strides[4];  // in elements
  const float* centre;     // [heads, D] or null
  unsigned* codes;         // [batch, heads, tokens, BITS * D / 32], dense
  __half* scales;          // [batch, heads, tokens], dense
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
    a.codes[row * (BITS * (D / 32)) + eighth / 4 * BITS + (eighth & 3)] = word;
  }
  if (active && eighth == 0) {
    const float scale = sqrtf(square) / (sqrtf(float(level_square)) * level_step(BITS)) * unscale;
    a.scales[row] = finite ? __float2half_rn(scale) : __ushort_as_half(0x7e00);
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
