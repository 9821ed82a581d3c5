// Int8 tensor core products, and which codes of a row each thread brings to them.
#pragma once

#include "cuda/device/schedule.cu.h"
#include "cuda/device/tiles.cu.h"

namespace turboquant::cuda {

/// The nibble words that a thread holds, and their groups, when `sharers` threads share the groups of a row.
template <int D, int SHARERS>
struct Share {
  static constexpr int groups = D / 32;
  static constexpr int padded = groups > SHARERS ? SHARERS : groups > 4 ? 8 : groups > 2 ? 4 : groups;
  static constexpr int per_thread = (groups + SHARERS - 1) / SHARERS;
  static constexpr int parts = SHARERS / padded > 4 ? 4 : SHARERS / padded;  // threads that share a group
  static constexpr int words = 4 / parts;                                    // nibble words of a group a thread takes
  int group, part;
  bool valid;
  __device__ explicit Share(int thread) {
    group = thread % padded * per_thread;
    part = thread / padded % parts;
    valid = group < groups && thread < padded * parts;
    if (group >= groups) group = 0;
  }
  __device__ bool has(int i) const { return valid && group + i < groups; }
  __device__ int clamped(int i) const { return group + i < groups ? group + i : 0; }
  /// Its w-th word of a group's four.
  __device__ unsigned pick(const unsigned (&word)[4], int w) const {
    if constexpr (parts == 1) return word[w];
    if constexpr (parts == 2) return part ? word[2 + w] : word[w];
    const unsigned low = part & 1 ? word[1] : word[0], high = part & 1 ? word[3] : word[2];
    return part & 2 ? high : low;
  }
  /// First coordinate of its w-th word of its i-th group.
  __device__ int coordinate(int i, int w) const { return 32 * (group + i) + 8 * (part * words + w); }
};

/// Rotates N queries in one warp, eight coordinates a lane (of more than 256 each in two sets, one after the other),
/// and splits them into 127 * 256 steps: `parts` are the high and low bytes of four coordinates, then those of the
/// other four.  `scale` makes products with keys' levels scores in units of log2; `offset` is what the products with
/// keys' unsigned bytes have too much, negated, high and low part.
template <int D, int KEYS, class T, int N>
__device__ void split_queries(const AttentionArgs& a, const Raw8<T> (&raw)[N * Lanes<D>::sets],
                              uint4 (&parts)[N * Lanes<D>::sets], float (&scale)[N], int (&offset)[N][2]) {
  constexpr int kSets = Lanes<D>::sets;
  const int lane = threadIdx.x & 31;
  using Table = LevelTable<KEYS>;
  float v[N * kSets][8], largest[N], all = 0;
  bool bad[N];
#pragma unroll
  for (int i = 0; i < N * kSets; ++i) {
    const int eighth = lane + 32 * (i % kSets);
    raw[i].to_floats(v[i]);
    apply_signs(v[i], a.seed, eighth < D / 8 ? eighth : 0, rsqrtf(float(Lanes<D>::power)));
  }
  hadamard<D>(v);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    largest[i] = 0, bad[i] = false;
#pragma unroll
    for (int k = 0; k < 8 * kSets; ++k) {
      float& x = v[i * kSets + k / 8][k % 8];
      if (lane + 32 * (k / 8) >= D / 8) x = 0;
      largest[i] = fmaxf(largest[i], fabsf(x));
      bad[i] = bad[i] || x != x;
    }
    bad[i] = __any_sync(~0u, bad[i]);
  }
#pragma unroll
  for (int step = 16; step; step /= 2) {
#pragma unroll
    for (float& x : largest) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  }
  constexpr float limit = 127 * 256;
#pragma unroll
  for (int i = 0; i < N; ++i) all = lane == i ? largest[i] : all;
  all = all >= kLeastQuery ? limit / all : 0.f;  // of all queries at once, for division is slow
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float factor = __shfl_sync(~0u, all, i);
    int sums[2] = {};  // of high and of low parts
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      unsigned high[2] = {}, low[2] = {};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int q = __float2int_rn(v[i * kSets + s][j] * factor), top = (q + 128) >> 8;
        high[j / 4] |= unsigned(top & 255) << (8 * (j % 4));
        low[j / 4] |= unsigned((q - 256 * top) & 255) << (8 * (j % 4));
      }
      parts[i * kSets + s] = make_uint4(high[0], low[0], high[1], low[1]);
      if constexpr (Table::kBias != 0) {
        sums[0] = __dp4a(int(high[0]), 0x01010101, __dp4a(int(high[1]), 0x01010101, sums[0]));
        sums[1] = __dp4a(int(low[0]), 0x01010101, __dp4a(int(low[1]), 0x01010101, sums[1]));
      }
    }
    scale[i] =
        bad[i] ? __uint_as_float(0x7fc00000) : largest[i] * (step_of(KEYS) * Table::kStep * a.scale * kLog2E / limit);
    if constexpr (Table::kBias != 0) {
      offset[i][0] = sums[0], offset[i][1] = sums[1];
#pragma unroll
      for (int& x : offset[i]) {
        for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
      }
      if constexpr (Table::kStep == 1) {
        offset[i][0] *= -Table::kBias, offset[i][1] *= -Table::kBias;
      } else {  // half of an odd number
        const int all_bias = -(Table::kBias * (256 * offset[i][0] + offset[i][1])) / Table::kStep;
        offset[i][0] = all_bias >> 8, offset[i][1] = all_bias & 255;
      }
    }
  }
}

/// Bytes of four tokens, the first or last four coordinates of each, coordinate by coordinate.
__device__ inline void transpose_bytes(const unsigned (&x)[4], unsigned (&out)[4]) {
  const unsigned low[2] = {prmt(x[0], x[1], 0x5140), prmt(x[2], x[3], 0x5140)};
  const unsigned high[2] = {prmt(x[0], x[1], 0x7362), prmt(x[2], x[3], 0x7362)};
  out[0] = prmt(low[0], low[1], 0x5410), out[1] = prmt(low[0], low[1], 0x7632);
  out[2] = prmt(high[0], high[1], 0x5410), out[3] = prmt(high[0], high[1], 0x7632);
}

/// Selectors of four tokens' codes, two coordinates a word: nibbles (0, 2), (4, 6), (1, 3), (5, 7).
template <int CODING>
__device__ void transpose_codes(const unsigned (&x)[4], unsigned (&out)[4]) {
  constexpr unsigned low = (Group<CODING>::mask & 15) * 0x01010101u, high = low << 4;
  if constexpr (low == 0x0f0f0f0fu) {
    const unsigned even[2] = {merge_bits<low>(x[0], x[1] << 4), merge_bits<low>(x[2], x[3] << 4)};
    const unsigned odd[2] = {merge_bits<low>(x[0] >> 4, x[1]), merge_bits<low>(x[2] >> 4, x[3])};
    out[0] = prmt(even[0], even[1], 0x5140), out[1] = prmt(even[0], even[1], 0x7362);
    out[2] = prmt(odd[0], odd[1], 0x5140), out[3] = prmt(odd[0], odd[1], 0x7362);
    return;
  }
  const unsigned even[2] = {(x[0] & low) | (x[1] << 4 & high), (x[2] & low) | (x[3] << 4 & high)};
  const unsigned odd[2] = {(x[0] >> 4 & low) | (x[1] & high), (x[2] >> 4 & low) | (x[3] & high)};
  out[0] = prmt(even[0], even[1], 0x5140), out[1] = prmt(even[0], even[1], 0x7362);
  out[2] = prmt(odd[0], odd[1], 0x5140), out[3] = prmt(odd[0], odd[1], 0x7362);
}

}  // namespace turboquant::cuda
