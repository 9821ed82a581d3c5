// `encode` with trellis codes.  A block's warps rotate and look for paths as each other's lanes: the groups of eight
// warps' vectors are 64.
#pragma once

#include "cuda/device/encode.cu.h"
#include "cuda/device/search.cu.h"

namespace turboquant::cuda {

/// Coordinates in levels, as far as a search looks.
template <int BITS>
__device__ float trellis_target(float x) {
  return fminf(fmaxf(x, -Subsets<BITS>::kLimit), Subsets<BITS>::kLimit);
}

/// Packs and writes a vector's codes and its scale, all lanes of a warp together: of eight coordinates a lane the
/// indices of levels, and of each group the path `u`; of each set.
template <int D, int BITS>
__device__ void write_trellis(const EncodeArgs& a, const Rotated& r, bool active, int first, const Nibbles<D>& of_sets,
                              const unsigned (&u_of_sets)[Lanes<D>::sets]) {
  constexpr unsigned w_bits = BITS == 3 ? 0x33333333u : 0x11111111u;
  const int word = first & 3;
  int square = 0;
#pragma unroll
  for (int s = 0; s < Lanes<D>::sets; ++s) {
    if (!Lanes<D>::has(first + 32 * s)) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned levels = Lookup<trellis(BITS)>::bytes(of_sets.of[s] >> (16 * i));
      if (Lookup<trellis(BITS)>::kUnsigned) levels ^= 0x80808080u;
      square = __dp4a(int(levels), int(levels), square);
    }
  }
  const unsigned squares = over_vector<D>(unsigned(square));
#pragma unroll
  for (int s = 0; s < Lanes<D>::sets; ++s) {
    const int eighth = first + 32 * s;
    unsigned w = of_sets.of[s] >> 2 & w_bits;
    if constexpr (BITS == 3) {
      w <<= word < 2 ? 2 : 0;
      w |= __shfl_xor_sync(~0u, w, 2);
    } else {
      w <<= word ^ 2;
      w |= __shfl_xor_sync(~0u, w, 1);
      w |= __shfl_xor_sync(~0u, w, 2);
    }
    if (active && Lanes<D>::has(eighth) && word < BITS) {
      const unsigned packed = !r.codable() ? 0 : word == BITS - 1 ? u_of_sets[s] : w;
      codes_of<D, trellis(BITS)>(a, r)[eighth / 4 * BITS + word] = packed;
    }
  }
  if (active && first == 0) write_scale<trellis(BITS)>(a, r, squares);
}

/// Encodes the vectors of block `block`.
template <int D, int BITS, class T>
__device__ void encode_trellis(const EncodeArgs& a, int block, SearchMemory<64>& memory) {
  using L = Lanes<D>;
  const int warp = warp_index(), lane = threadIdx.x & 31, slot = lane / L::vector, eighth = lane - slot * L::vector;
  const long long vector = ((long long)block * (blockDim.x / 32) + warp) * L::vectors + slot;
  const bool active = slot < L::vectors && vector < (long long)a.batch * a.heads * a.tokens;
  const int group = 8 * warp + lane / 4, word = lane & 3;
  Coordinates<D> all;
  const Rotated r = load_rotated<D, T>(a, vector, active, eighth, all);
  const float to_levels = r.codable() ? unit_of(trellis(BITS)) * rsqrtf(r.mean_square<D>()) : 0.f;
  Nibbles<D> found;
  unsigned paths[L::sets];
#pragma unroll
  for (int s = 0; s < L::sets; ++s) {
    auto& v = all.of[s];
    if (s > 0) __syncthreads();  // the first set's paths have been read
    float cost[8][4], most = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      v[j] = trellis_target<BITS>(v[j] * to_levels);
      Subsets<BITS>::costs(v[j], cost[j]);
      most += less_least(cost[j]);
    }
    most += __shfl_xor_sync(~0u, most, 1);
    most += __shfl_xor_sync(~0u, most, 2);
    StepCosts& costs = memory.costs[group];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      costs.of[StepCosts::at(4 * j) + word] = whole_costs(cost[j], kMostCost * reciprocal_fast(most));
    __syncwarp();
    unsigned least[8];
    half_costs(costs, 1, word, least);
    store_second(memory.second[group], word, least);
    __syncwarp();
    half_costs(costs, 0, word, least);
    const unsigned ends = best_ends(memory.second[group], word, least);
    if (word == 0) memory.ends[group] = (unsigned char)ends;
    __syncthreads();
    if (warp < 4) {
      const int walked = 16 * warp + lane / 2;
      const unsigned u = walk(memory.costs[walked], memory.ends[walked]);
      if (lane % 2 == 0) memory.u[walked] = u;
    }
    __syncthreads();
    const unsigned u = memory.u[group], z1 = trellis_z1(u) >> word, z0 = trellis_z0(u) >> word;
    unsigned indices = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      indices |= Subsets<BITS>::nearest(v[j], (z1 >> (4 * j) & 1) * 2 | (z0 >> (4 * j) & 1)) << (4 * j);
    }
    found.of[s] = indices, paths[s] = u;
  }
  write_trellis<D, BITS>(a, r, active, eighth, found, paths);
}

}  // namespace turboquant::cuda
