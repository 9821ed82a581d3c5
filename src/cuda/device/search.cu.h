// The search for trellis codes: of each group of 32 coordinates the closed path of least squared error (format.h).
//
// A path passes two states that cut it in halves: `start`, before step 0 and after step 31, and `middle`, before step
// 16.  First the least costs from every state to every other are found for both halves, two of the states that a half
// begins with to a lane, as 16-bit numbers in the halves of a register.  Their sums tell the two states of the best
// path; then a lane walks each half again from its own state alone and remembers the way.  All that is exact but for
// the rounding of a step's costs to whole numbers.
#pragma once

#include "cuda/device/codes.cu.h"

namespace turboquant::cuda {

/// The costs of a group's steps in shared memory: of the four subsets, each twice in a word.  Four empty places between
/// halves, and one between groups, send what is read together to different banks.
struct StepCosts {
  uint4 of[37];
  static __device__ int at(int step) { return step + step / 16 * 4; }
};

/// What the search of some groups needs.
template <int GROUPS>
struct SearchMemory {
  StepCosts costs[GROUPS];
  uint4 second[GROUPS][8];     // costs of second halves [end], from eight middles, 16 bits each
  unsigned char ends[GROUPS];  // start + 8 middle
  unsigned u[GROUPS];          // the paths
};

constexpr unsigned kFar = 0x8000;         // no path costs as much
constexpr float kMostCost = kFar - 17.f;  // of a group's steps, each rounded by up to a half

/// Nearest levels of the four subsets of a trellis code.
template <int BITS>
struct Subsets {
  static constexpr int kWords = 1 << (BITS - 1);  // levels of a subset
  static constexpr float kLimit = trellis_limit(BITS);

  /// Squared distances to each subset's nearest.
  static __device__ void costs(float target, float (&cost)[4]) {
#pragma unroll
    for (int z = 0; z < 4; ++z) {
      float least = fabsf(target - float(trellis_level(BITS, z)));
#pragma unroll
      for (int w = 1; w < kWords; ++w) least = fminf(least, fabsf(target - float(trellis_level(BITS, 4 * w + z))));
      cost[z] = least * least;
    }
  }

  /// Index of the nearest level of subset z: w above as many thresholds, which are whole numbers.
  static __device__ unsigned nearest(float target, unsigned z) {
    const int whole = int(floorf(target));
    const unsigned extended = z * 0x1111u | 0x8880u;  // byte z with its sign
    unsigned index = z;
#pragma unroll
    for (int w = 0; w + 1 < kWords; ++w) index += whole >= int(prmt(thresholds(w), 0, extended)) ? 4 : 0;
    return index;
  }

 private:
  static constexpr __device__ unsigned threshold(int w, int z) {
    return unsigned((trellis_level(BITS, 4 * w + z) + trellis_level(BITS, 4 * w + 4 + z)) / 2 & 255);
  }
  static constexpr __device__ unsigned thresholds(int w) {
    return threshold(w, 0) | threshold(w, 1) << 8 | threshold(w, 2) << 16 | threshold(w, 3) << 24;
  }
};

/// The largest of a step's costs less the least, which is taken from all.
__device__ inline float less_least(float (&cost)[4]) {
  const float least = fminf(fminf(cost[0], cost[1]), fminf(cost[2], cost[3]));
#pragma unroll
  for (float& c : cost) c -= least;
  return fmaxf(fmaxf(cost[0], cost[1]), fmaxf(cost[2], cost[3]));
}

/// A step's costs as whole numbers, each twice.
__device__ inline uint4 whole_costs(const float (&cost)[4], float factor) {
  constexpr float shift = 8388608.f;  // 2^23: adding it leaves a rounded integer in the low bits
  const auto twice = [&](int z) { return prmt(__float_as_uint(fmaf(cost[z], factor, shift)), 0, 0x1010); };
  return make_uint4(twice(0), twice(1), twice(2), twice(3));
}

/// Subset of a step that leaves state `from` (its last three u, the last in bit 0) with u.
constexpr __device__ int subset(int from, int u) { return 2 * ((u ^ from ^ from >> 2) & 1) + (from >> 1 & 1); }

__device__ inline unsigned pick_of_eight(const unsigned (&x)[8], int i) {
  const unsigned a = i & 1 ? x[1] : x[0], b = i & 1 ? x[3] : x[2], c = i & 1 ? x[5] : x[4], d = i & 1 ? x[7] : x[6];
  const unsigned low = i & 2 ? b : a, high = i & 2 ? d : c;
  return i & 4 ? high : low;
}

/// Least costs of half of a group's steps from two states, 2 `pair` in the low halves and the next in the high ones, to
/// each of eight.
__device__ inline void half_costs(const StepCosts& costs, int half, int pair, unsigned (&cost)[8]) {
  const unsigned one = runtime_one();
#pragma unroll
  for (int s = 0; s < 8; ++s) cost[s] = s / 2 != pair ? kFar << 16 | kFar : s % 2 ? kFar : kFar << 16;
  const uint4* step = &costs.of[20 * half];
#pragma unroll 4
  for (int t = 0; t < 16; ++t) {
    const uint4 x = step[t];
    const unsigned of[4] = {x.x, x.y, x.z, x.w};
    unsigned next[8];
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      const int p = s / 2, q = p + 4, u = s % 2;
      next[s] = min_of_sums(cost[q], of[subset(q, u)], cost[p] * one + of[subset(p, u)]);
    }
#pragma unroll
    for (int s = 0; s < 8; ++s) cost[s] = next[s];
  }
}

/// Stores the costs of the second half, four lanes a group.
__device__ inline void store_second(uint4 (&second)[8], int pair, const unsigned (&cost)[8]) {
#pragma unroll
  for (int s = 0; s < 8; ++s) reinterpret_cast<unsigned*>(&second[s])[pair] = cost[s];
}

/// Start and middle of a group's best path, as in SearchMemory, from the costs of the first half, four lanes a group.
__device__ inline unsigned best_ends(const uint4 (&second)[8], int pair, const unsigned (&cost)[8]) {
  unsigned best = ~0u;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int start = 2 * pair + k;
    const uint4 x = second[start];
    const unsigned from[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // middles 2 i and 2 i + 1; no sum fills its half
      const unsigned sums = prmt(cost[2 * i], cost[2 * i + 1], k ? 0x7632 : 0x5410);
      const unsigned low = (sums & 0xffff) + (from[i] & 0xffff), high = (sums >> 16) + (from[i] >> 16);
      best = min(best, low << 6 | unsigned(start) | (2 * i) << 3);
      best = min(best, high << 6 | unsigned(start) | (2 * i + 1) << 3);
    }
  }
  best = min(best, __shfl_xor_sync(~0u, best, 1));
  best = min(best, __shfl_xor_sync(~0u, best, 2));
  return best & 63;
}

/// Least costs of half of a group's steps from one state to each of eight, in the high halves of words; in the low
/// halves the ways: the u of three steps before each step, bit by bit.
__device__ inline void walk_half(const StepCosts& costs, int half, int from, unsigned (&cost)[8]) {
  const unsigned one = runtime_one();
#pragma unroll
  for (int s = 0; s < 8; ++s) cost[s] = s == from ? 0 : kFar << 16;
  const uint4* step = &costs.of[20 * half];
  unsigned bit = 1;
#pragma unroll 4
  for (int t = 0; t < 16; ++t, bit += bit) {
    const uint4 x = step[t];
    const unsigned of[4] = {x.x & 0xffff0000u, x.y & 0xffff0000u, x.z & 0xffff0000u, x.w & 0xffff0000u};
    unsigned next[8];
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      const int p = s / 2, q = p + 4, u = s % 2;
      next[s] = min_of_sum(cost[q], of[subset(q, u)] * one + bit, cost[p] * one + of[subset(p, u)]);
    }
#pragma unroll
    for (int s = 0; s < 8; ++s) cost[s] = next[s];
  }
}

/// The path of two halves' ways.
__device__ inline unsigned path_of(unsigned first, unsigned second) {
  return rotate_left((first & 0xffff) | second << 16, 29);
}

/// Two neighbouring lanes a group: the path through `ends`.
__device__ inline unsigned walk(const StepCosts& costs, unsigned ends) {
  const int half = threadIdx.x & 1, start = ends & 7, middle = ends >> 3;
  unsigned cost[8];
  walk_half(costs, half, half ? middle : start, cost);
  const unsigned way = pick_of_eight(cost, half ? start : middle), other = __shfl_xor_sync(~0u, way, 1);
  return half ? path_of(other, way) : path_of(way, other);
}

/// Eight neighbouring lanes a group, one for each start, with the walks of the first half; those of the second half,
/// [middle][end], in shared memory: the best path.
__device__ inline unsigned best_path(const unsigned (&second)[8][8], const unsigned (&cost)[8]) {
  const int start = threadIdx.x & 7;
  unsigned best = ~0u;
#pragma unroll
  for (int m = 0; m < 8; ++m) {
    best = min(best, ((cost[m] & 0xffff0000u) + (second[m][start] & 0xffff0000u)) | unsigned(m) << 3 | unsigned(start));
  }
#pragma unroll
  for (int step = 1; step < 8; step *= 2) best = min(best, __shfl_xor_sync(~0u, best, step));
  const int from = best & 7, middle = best >> 3 & 7;
  const unsigned first = __shfl_sync(~0u, pick_of_eight(cost, middle), int(threadIdx.x & 24) + from);
  return path_of(first, second[middle][from]);
}

}  // namespace turboquant::cuda
