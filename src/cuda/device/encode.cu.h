// The kernels of encode and decode: a group of lanes of a warp works on one vector (codec.cu.h).
#pragma once

#include "cuda/device/codes.cu.h"

namespace turboquant::cuda {

/// One side (keys or values) of an `encode` launch; EncodeParams of turboquant.h on the device.
struct EncodeArgs {
  int batch, heads, tokens;
  unsigned long long seed;
  const void* x;                                // [batch, heads, tokens, D]
  long long x_strides[4];                       // in elements
  const float* centre;                          // [heads, D] or null
  const __half* feedback;                       // [heads, D, D] or null
  unsigned* codes;                              // [batch, heads, tokens, BITS * D / 32]
  __half* scales;                               // [batch, heads, tokens]
  long long code_strides[2], scale_strides[2];  // of batch and head, in elements; rows are dense
  int ring, at;                                 // if ring > 0, token t goes into row (at + t) % ring

  __device__ int row_of(int t) const { return ring ? int(unsigned(at + t) % unsigned(ring)) : t; }
};

/// Vectors that a block of `warps` warps encodes or decodes.
template <int D>
__host__ __device__ constexpr int vectors_per_block(int warps) {
  return warps * Lanes<D>::vectors;
}

/// What the encoder knows of a vector beside its rotated coordinates.
struct Rotated {
  float unscale;  // coordinates are divided by it: a power of two, for squares of wide exponents leave float's range
  float square;   // |x - centre|^2, divided by its square
  bool finite;
  int b, h, t;  // of the vector
  /// The square of the rotated coordinates' RMS.
  template <int D>
  __device__ float mean_square() const {
    return square * (float(Lanes<D>::power) / D);  // |H x| = |x|
  }
  __device__ bool codable() const { return finite && square > 0; }
};

/// A lane's coordinates of a vector: eight of each set.
template <int D>
struct Coordinates {
  float of[Lanes<D>::sets][8];
};

/// Loads a lane's coordinates of `vector`, or zeros, and turns them into those of H (s * (x - centre)) without H's
/// factor; all lanes of a warp together.
template <int D, class T>
__device__ Rotated load_rotated(const EncodeArgs& a, long long vector, bool active, int first, Coordinates<D>& all) {
  constexpr int kSets = Lanes<D>::sets;
  Rotated r;
  const long long row = active ? vector : 0;
  r.t = int(row % a.tokens), r.h = int(row / a.tokens % a.heads), r.b = int(row / a.tokens / a.heads);
#pragma unroll
  for (int s = 0; s < kSets; ++s) {
    auto& v = all.of[s];
    const int eighth = first + 32 * s;
#pragma unroll
    for (float& x : v) x = 0;
    if (active && Lanes<D>::has(eighth)) {
      const T* x = static_cast<const T*>(a.x) + r.b * a.x_strides[0] + r.h * a.x_strides[1] + r.t * a.x_strides[2];
      load8(x + 8 * eighth * a.x_strides[3], v, a.x_strides[3]);
      if (a.centre) {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] -= a.centre[r.h * D + 8 * eighth + j];
      }
    }
  }
  r.unscale = 1;
  if constexpr (wide_exponent(T())) {
    float top = 0;
#pragma unroll
    for (const auto& v : all.of) {
#pragma unroll
      for (float x : v) top = fmaxf(top, fabsf(x));
    }
    top = over_vector<D, true>(top);
    const int exponent = min(max(254 - int(__float_as_uint(top) >> 23), 1), 253);
    if (top < __uint_as_float(0x7f800000)) {
      r.unscale = __uint_as_float(unsigned(254 - exponent) << 23);
#pragma unroll
      for (auto& v : all.of) {
#pragma unroll
        for (float& x : v) x *= __uint_as_float(unsigned(exponent) << 23);
      }
    }
  }
  r.square = 0;
#pragma unroll
  for (const auto& v : all.of) {
#pragma unroll
    for (float x : v) r.square += x * x;
  }
  r.square = over_vector<D>(r.square);
  r.finite = r.square < __uint_as_float(0x7f800000);  // false for NaN too
#pragma unroll
  for (int s = 0; s < kSets; ++s) apply_signs(all.of[s], a.seed, first + 32 * s, 1.f);
  hadamard<D>(all.of);
#pragma unroll
  for (int s = 0; s < kSets; ++s) {
    if (Lanes<D>::has(first + 32 * s)) continue;
#pragma unroll
    for (float& x : all.of[s]) x = 0;
  }
  return r;
}

/// The code of the level nearest to x, twice whose size is `doubled`.
template <int BITS>
__device__ unsigned nearest_code(float x, float doubled) {
  unsigned code = x < 0 ? 1u << (BITS - 1) : 0u;
#pragma unroll
  for (int m = 0; m + 1 < magnitudes(BITS); ++m) code += doubled >= float(double_threshold(BITS, m));
  return code;
}

/// A lane's codes of a vector: eight nibbles of each set.
template <int D>
struct Nibbles {
  unsigned of[Lanes<D>::sets] = {};
};

/// |levels|^2 of eight codes.
template <int BITS>
__device__ unsigned square_of_eight(unsigned nibbles) {
  constexpr unsigned low = magnitude_bytes(BITS, 0), high = BITS == 4 ? magnitude_bytes(4, 4) : low;
  const unsigned indices = nibbles & (0x11111111u * (magnitudes(BITS) - 1));
  const unsigned first = prmt(low, high, indices), second = prmt(low, high, indices >> 16);
  return __dp4a(first, first, __dp4a(second, second, 0u));
}

/// |levels|^2 of a vector.
template <int D, int BITS>
__device__ unsigned level_square(const Nibbles<D>& nibbles) {
  unsigned square = square_of_eight<BITS>(nibbles.of[0]);
  // Code 0 has a level, which coordinates beyond the last have not.
  if (Lanes<D>::sets == 2 && Lanes<D>::has((threadIdx.x & 31) + 32)) {
    square += square_of_eight<BITS>(nibbles.of[Lanes<D>::sets - 1]);
  }
  return over_vector<D>(square);
}

/// The nearest codes of a lane's coordinates; of a vector without directions, zeros.
template <int D, int BITS>
__device__ Nibbles<D> nearest_codes(const Rotated& r, const Coordinates<D>& all) {
  const float to_levels = r.codable() ? 2 * unit(BITS) * rsqrtf(r.mean_square<D>()) : 0.f;
  Nibbles<D> codes;
#pragma unroll
  for (int s = 0; s < Lanes<D>::sets; ++s) {
    const auto& v = all.of[s];
    unsigned nibbles = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) nibbles |= nearest_code<BITS>(v[j], fabsf(v[j]) * to_levels) << (4 * j);
    codes.of[s] = r.codable() ? nibbles : 0;
  }
  return codes;
}

/// Where a vector's codes go.
template <int D, int CODING>
__device__ unsigned* codes_of(const EncodeArgs& a, const Rotated& r) {
  return a.codes + r.b * a.code_strides[0] + r.h * a.code_strides[1] +
         (long long)a.row_of(r.t) * (bits_of(CODING) * (D / 32));
}

/// Writes the scale with which levels of some length have the vector's; one lane a vector.
template <int CODING>
__device__ void write_scale(const EncodeArgs& a, const Rotated& r, unsigned squares) {
  if (CODING == 8) squares = max(squares, 1u);  // only there a level is 0
  const float scale = sqrtf(r.square) / (sqrtf(float(squares)) * step_of(CODING)) * r.unscale;
  a.scales[r.b * a.scale_strides[0] + r.h * a.scale_strides[1] + a.row_of(r.t)] =
      r.finite ? __float2half_rn(fminf(scale, largest_scale())) : __ushort_as_half(0x7e00);
}

/// Packs and writes a vector's codes, eight a lane and set, and its scale; all lanes of a warp together.
template <int D, int BITS>
__device__ void write_codes(const EncodeArgs& a, const Rotated& r, bool active, int first, const Nibbles<D>& codes) {
  const int lane = threadIdx.x & 31;
  const unsigned squares = level_square<D, BITS>(codes);
#pragma unroll
  for (int s = 0; s < Lanes<D>::sets; ++s) {
    const int eighth = first + 32 * s;
    const unsigned nibbles = codes.of[s];
    unsigned word = nibbles;
    bool writes = active && Lanes<D>::has(eighth);
    if constexpr (BITS == 3) {  // the fourth nibble word goes into the spare bits of the other three
      const unsigned spread = __shfl_sync(~0u, nibbles, lane | 3);
      word |= (spread >> (lane & 3) & 0x11111111u) << 3;
      writes = writes && (lane & 3) < 3;
    } else if constexpr (BITS == 2) {
      word |= __shfl_sync(~0u, nibbles, lane | 2) << 2;
      writes = writes && (lane & 3) < 2;
    }
    if (writes) codes_of<D, BITS>(a, r)[eighth / 4 * BITS + (eighth & 3)] = word;
  }
  if (active && first == 0) write_scale<BITS>(a, r, squares);
}

/// Codes of 8 bits: eight levels a lane and set.
template <int D>
struct Bytes {
  unsigned word[Lanes<D>::sets][2] = {};
  __device__ void set(int s, int j, float levels) {
    word[s][j / 4] |= unsigned(__float2int_rn(fminf(fmaxf(levels, -127.f), 127.f)) & 255) << (8 * (j % 4));
  }
  /// |levels|^2 of the vector.
  __device__ unsigned square() const {
    int square = 0;
#pragma unroll
    for (const auto& x : word) square = __dp4a(int(x[0]), int(x[0]), __dp4a(int(x[1]), int(x[1]), square));
    return over_vector<D>(unsigned(square));
  }
};

/// The nearest of a lane's coordinates, where the vector's largest has level 127.
template <int D>
__device__ Bytes<D> nearest_bytes(const Rotated& r, const Coordinates<D>& all) {
  float most = 0;
#pragma unroll
  for (const auto& v : all.of) {
#pragma unroll
    for (float x : v) most = fmaxf(most, fabsf(x));
  }
  most = over_vector<D, true>(most);
  const float to_levels = r.codable() ? 127 / most : 0.f;
  Bytes<D> bytes;
#pragma unroll
  for (int s = 0; s < Lanes<D>::sets; ++s) {
#pragma unroll
    for (int j = 0; j < 8; ++j) bytes.set(s, j, r.codable() ? all.of[s][j] * to_levels : 0.f);
  }
  return bytes;
}

/// Writes a vector's codes of 8 bits and its scale.
template <int D>
__device__ void write_bytes(const EncodeArgs& a, const Rotated& r, bool active, int first, const Bytes<D>& bytes) {
  const unsigned squares = bytes.square();
#pragma unroll
  for (int s = 0; s < Lanes<D>::sets; ++s) {
    if (!active || !Lanes<D>::has(first + 32 * s)) continue;
    unsigned* codes = codes_of<D, 8>(a, r) + 2 * (first + 32 * s);
    codes[0] = bytes.word[s][0], codes[1] = bytes.word[s][1];
  }
  if (active && first == 0) write_scale<8>(a, r, squares);
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
  Coordinates<D> v;
  const Rotated r = load_rotated<D, T>(a, vector, active, eighth, v);
  if constexpr (BITS == 8) {
    write_bytes<D>(a, r, active, eighth, nearest_bytes<D>(r, v));
  } else {
    write_codes<D, BITS>(a, r, active, eighth, nearest_codes<D, BITS>(r, v));
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
template <int D, int CODING, class T>
__device__ void decode(const DecodeArgs& a, int block) {
  constexpr int bits = bits_of(CODING);
  using L = Lanes<D>;
  const int lane = threadIdx.x & 31, slot = lane / L::vector, first = lane - slot * L::vector;
  const long long vector = ((long long)block * (blockDim.x / 32) + threadIdx.x / 32) * L::vectors + slot;
  const bool active = slot < L::vectors && vector < (long long)a.batch * a.heads * a.tokens;
  const long long row = active ? vector : 0;
  const int t = int(row % a.tokens), h = int(row / a.tokens % a.heads), b = int(row / a.tokens / a.heads);
  float all[L::sets][8] = {};
#pragma unroll
  for (int s = 0; s < L::sets; ++s) {
    auto& v = all[s];
    const int eighth = first + 32 * s;
    if (!active || !L::has(eighth)) continue;
    const unsigned* codes = a.codes + b * a.code_strides[0] + h * a.code_strides[1] + (long long)t * (bits * (D / 32));
    unsigned packed[bits];
#pragma unroll
    for (int i = 0; i < bits; ++i) packed[i] = codes[eighth / 4 * bits + i];
    const Group<CODING> group(packed);
    const float scale = __half2float(a.scales[b * a.scale_strides[0] + h * a.scale_strides[1] + t]);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (w != (eighth & 3)) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const unsigned bytes = Lookup<CODING>::bytes(group, w, j / 4);
        v[j] = scale * step_of(CODING) * float(Lookup<CODING>::level(bytes, j % 4));
      }
    }
  }
  hadamard<D>(all);
#pragma unroll
  for (int s = 0; s < L::sets; ++s) {
    auto& v = all[s];
    const int eighth = first + 32 * s;
    apply_signs(v, a.seed, eighth, rsqrtf(float(L::power)));
    if (!active || !L::has(eighth)) continue;
    if (a.centre) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] += a.centre[h * D + 8 * eighth + j];
    }
    store8(static_cast<T*>(a.out) + row * D + 8 * eighth, v);
  }
}

/// The same with T from a pointer, for generated code.
template <int D, int CODING, class T>
__device__ void encode_as(const EncodeArgs& a, const T*, int block) {
  encode<D, CODING, T>(a, block);
}
template <int D, int CODING, class T>
__device__ void decode_as(const DecodeArgs& a, const T*, int block) {
  decode<D, CODING, T>(a, block);
}

}  // namespace turboquant::cuda
