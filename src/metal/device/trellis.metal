// The search for trellis codes: for each group of 32 coordinates the path with the least squared error of all 2^32.
//
// A path that leaves a state and comes back to it after 32 steps is found by going half the circle forward from the
// state and half of it backward, so that two lanes share each of 8 states; a SIMD-group searches two groups.  A lane
// keeps the cost of the best way to each of 8 states and, in a word, its u: no way has to be traced back.
//
// Both halves are one text.  With the bits of a state in reverse order, going back from it is going forward: the way
// to state s, whose lowest bit is new, comes from s >> 1 or from that and 4.  What differs is where z1 and z0 find
// their u: where the bits 1 and 2 of a state differ, going back costs what the subset with both z turned costs.

#pragma once

#include "metal/device/common.metal"

namespace turboquant {

/// Threadgroup memory of encoding: next to none without a trellis.
template <bool TRELLIS>
struct EncodeShared {
  // Of the four subsets, at the steps of a SIMD-group's two groups.
  TQ_ARRAY2(float4, costs, metal_layout::kSimdgroups, TRELLIS ? 64 : 1);
};

/// The level nearest to a target in each of four subsets (index modulo 4): squared distances, and w in two bits each.
template <int B>
uint nearest_of_subsets(float target, thread float4& cost) {
  const float limit = float(trellis_limit(B)), x = fmin(fmax(target, -limit), limit);
  uint nearest = 0;
  TQ_UNROLL
  for (int z = 0; z < 4; ++z) {
    float least = INFINITY;
    uint its = 0;
    TQ_UNROLL
    for (int w = 0; w < (1 << (B - 1)); ++w) {
      const float off = x - float(trellis_level(B, 4 * w + z)), square = off * off;
      its = select(its, uint(w), square < least);
      least = fmin(least, square);
    }
    cost[z] = least;
    nearest |= its << (2 * z);
  }
  return nearest;
}

/// The bits of a state in reverse order.
constexpr int reversed(int state) { return (state & 1) << 2 | (state & 2) | state >> 2; }

/// u of the best path of the group of this half of the SIMD-group, whose costs are in shared memory.
template <class Costs>
uint best_path(Costs costs, ushort lane) {
  const int start = lane & 7;
  const bool back = lane & 8;
  const int first = (lane & 16) * 2 + (back ? 31 : 0), stride = back ? -1 : 1;
  float cost[8];
  uint path[8];
  TQ_UNROLL
  for (int s = 0; s < 8; ++s) {
    cost[s] = s == (back ? reversed(start) : start) ? 0.0f : 1e30f;
    path[s] = 0;
  }
  for (int i = 0; i < 16; ++i) {
    const float4 its = costs[first + stride * i];
    // What a state's lowest bit is: u of this step, or, on the way back, of three steps before.
    const uint bit = 1u << (back ? 28 - i : i);
    float next[8];
    uint next_path[8];
    TQ_UNROLL
    for (int s = 0; s < 8; ++s) {
      const int z = ((s ^ s >> 1) & 1) * 2 + (s >> 2);  // coming from s >> 1
      const bool differ = ((s >> 1) ^ (s >> 2)) & 1;
      const float near = cost[s >> 1] + (differ && back ? its[z ^ 3] : its[z]);
      const float far = cost[s >> 1 | 4] + (differ && back ? its[z ^ 1] : its[z ^ 2]);
      next[s] = fmin(near, far);
      next_path[s] = select(path[s >> 1], path[s >> 1 | 4], far < near);
      if (s & 1) next_path[s] |= bit;
    }
    TQ_UNROLL
    for (int s = 0; s < 8; ++s) {
      cost[s] = next[s];
      path[s] = next_path[s];
    }
  }
  // The halves meet.
  float least = INFINITY;
  uint best = 0;
  TQ_UNROLL
  for (int s = 0; s < 8; ++s) {
    const float whole = cost[s] + exchange(cost[reversed(s)], 8);
    const uint other = simd_shuffle_xor(path[reversed(s)], 8);
    best = select(best, path[s] | other, whole < least);
    least = fmin(least, whole);
  }
  best |= uint(reversed(start)) << 29;  // u of the last three steps, which the way back takes from its start
  for (ushort step = 1; step < 8; step = ushort(2 * step)) {
    const float other = exchange(least, step);
    const uint its = simd_shuffle_xor(best, step);
    best = select(best, its, other < least);
    least = fmin(least, other);
  }
  return simd_shuffle(best, ushort(lane & 16));  // equal paths may have ended in several lanes: one is taken
}

/// 2 z1 + z0 of a step of a group, from its word of u.
inline int subset_of(uint path, int step) {
  return int(trellis_z1(path) >> step & 1u) * 2 + int(trellis_z0(path) >> step & 1u);
}

/// Code (u in bit 0, w above it) and level of a lane's coordinate, of a group whose path is known.
template <int B>
uint code_on_path(uint path, uint nearest, ushort lane, thread int& level) {
  const int step = trellis_step(lane), z = subset_of(path, step);
  const uint w = nearest >> (2 * z) & 3u;
  level = trellis_level(B, int(w) * 4 + z);
  return w << 1 | (path >> step & 1u);
}

/// Codes of the targets of one group of 32 coordinates, or of two; a lane has a coordinate of each.
template <int B, int GROUPS, class Shared>
void search_groups(Shared shared, const thread float* targets, thread uint* codes, thread int* levels, ushort lane,
                   ushort simdgroup) {
  uint nearest[GROUPS];
  simdgroup_barrier(mem_flags::mem_threadgroup);  // after the search before
  TQ_UNROLL
  for (int g = 0; g < GROUPS; ++g) {
    float4 cost;
    nearest[g] = nearest_of_subsets<B>(targets[g], cost);
    shared->costs[simdgroup][32 * g + trellis_step(lane)] = cost;
    if (GROUPS == 1) shared->costs[simdgroup][32 + trellis_step(lane)] = cost;  // both halves do the same
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const uint path = best_path(shared->costs[simdgroup] + 0, lane);
  TQ_UNROLL
  for (int g = 0; g < GROUPS; ++g) {
    codes[g] = code_on_path<B>(simd_shuffle(path, ushort(16 * g)), nearest[g], lane, levels[g]);
  }
}

}  // namespace turboquant
