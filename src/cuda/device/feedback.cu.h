// The kernel of encode with error feedback: the errors of a vector's earlier blocks move the targets of later ones
// (EncodeParams in turboquant.h).
//
// A block takes vectors of one head, eight at a time.  Each warp rotates one; then, 32 coordinates after another, all
// threads multiply the errors so far by G, a thread a row and every eighth four columns, and each warp codes its
// vector's 32 targets.  A thread's part of G stays in registers.  A vector's sums do not depend on what else the block
// holds.  With trellis codes G lies in shared memory instead and the 32 coordinates are a loop: the search is much
// code, which eight copies would fetch again for every vector.
#pragma once

#include "cuda/device/trellis.cu.h"

namespace turboquant::cuda {

/// Shared memory of a block, one for a kernel whatever widths and types its sides have.
template <int D>
struct FeedbackMemory {
  static constexpr int kWarps = 8;
  alignas(16) float u[kWarps][D], error[kWarps][D], sums[kWarps][kWarps][32];
  unsigned char codes[kWarps][D];
};
template <int D>
struct TrellisFeedbackMemory : FeedbackMemory<D> {
  StepCosts costs[8];
  alignas(16) unsigned second[8][8][8];  // [group][middle][end]: of second halves
  unsigned found[8];                     // paths of the groups in hand,
  unsigned paths[8][D / 32];             // and all
  static constexpr int kParts = D > 256 ? 0 : D / 32 * (D / 32 - 1) / 2;
  uint2 parts[kParts > 0 ? kParts : 1][256];  // of each thread, of G
};
template <int D>
__device__ FeedbackMemory<D>& feedback_memory() {
  __shared__ FeedbackMemory<D> memory;
  return memory;
}

/// Codes the targets of 32 coordinates of every warp's vector by a path through the trellis, the i-th time: a lane's
/// index.  Four warps, by turns, look for all eight paths, a lane for each state that a half can begin with: more work
/// than in trellis.cu.h, but sooner done, and here everybody waits.
template <int D, int BITS>
__device__ unsigned code_by_path(TrellisFeedbackMemory<D>& memory, int warp, int i, float target) {
  const int lane = threadIdx.x & 31, step = trellis_step(lane);
  float cost[4];
  Subsets<BITS>::costs(target, cost);
  // A step costs less than 2^15 more than the least, a group less than 2^20.
  const unsigned most = __reduce_add_sync(~0u, unsigned(__float2int_rn(less_least(cost) + 0.5f)));
  memory.costs[warp].of[StepCosts::at(step)] = whole_costs(cost, kMostCost * reciprocal_fast(float(most)));
  __syncthreads();
  const int searcher = (warp + 4 * i) & 7;  // 0 and 1: the first halves of four groups each, 2 and 3: the second
  const int group = 4 * (searcher & 1) + lane / 8, from = lane & 7;
  unsigned ways[8];
  if (searcher < 4) {
    walk_half(memory.costs[group], searcher / 2, from, ways);
    if (searcher >= 2) {
      uint4* to = reinterpret_cast<uint4*>(memory.second[group][from]);
      to[0] = make_uint4(ways[0], ways[1], ways[2], ways[3]), to[1] = make_uint4(ways[4], ways[5], ways[6], ways[7]);
    }
  }
  __syncthreads();
  if (searcher < 2) {
    const unsigned u = best_path(memory.second[group], ways);
    if (from == 0) memory.found[group] = u;
  }
  __syncthreads();
  const unsigned u = memory.found[warp];
  if (lane == 0) memory.paths[warp][i] = u;
  return Subsets<BITS>::nearest(target, (trellis_z1(u) >> step & 1) * 2 | (trellis_z0(u) >> step & 1));
}

/// Encodes the vectors of block `block`: up to TOKENS tokens of one head of one batch row.
template <int D, int CODING, int TOKENS, class T, class Memory>
__device__ void encode_with_feedback(const EncodeArgs& a, int block, Memory& memory) {
  constexpr int BITS = bits_of(CODING);
  constexpr int kWarps = FeedbackMemory<D>::kWarps, kBlocks = D / 32;
  constexpr bool kHeld = D <= 256;  // else G is more than registers or shared memory hold, and read again
  constexpr int kParts = kHeld ? kBlocks * (kBlocks - 1) / 2 : 0;
  auto& [u, error, sums, codes] = static_cast<FeedbackMemory<D>&>(memory);
  const int lane = threadIdx.x & 31, warp = warp_index();
  const int chunks = (a.tokens + TOKENS - 1) / TOKENS;
  const int row = block / chunks, first = block % chunks * TOKENS, last = min(a.tokens, first + TOKENS);
  if (row >= a.batch * a.heads) return;

  // Of the rows 32 i + lane, the columns 4 (warp + 8 k) to + 3, k < i.
  constexpr bool kRolled = is_trellis(CODING);
  constexpr int kBlocksAtOnce = kRolled || !kHeld ? 1 : kBlocks, kPartsAtOnce = kRolled || !kHeld ? 2 : kBlocks;
  uint2 parts[kParts > 0 && !kRolled ? kParts : 1];
  const auto part_at = [&](int i, int k) -> uint2& {
    if constexpr (kRolled) {
      return memory.parts[i * (i - 1) / 2 + k][threadIdx.x];
    } else {
      return parts[i * (i - 1) / 2 + k];
    }
  };
  const __half* g = a.feedback + (long long)(row % a.heads) * D * D;
  const auto copy_parts = [&] {  // needed only after the first 32 coordinates
#pragma unroll 4
    for (int i = 1; i < kBlocks; ++i) {
      for (int k = 0; k < i; ++k) {
        copy8(unsigned(__cvta_generic_to_shared(&part_at(i, k))), g + (32 * i + lane) * D + 4 * (warp + 8 * k));
      }
    }
    commit_copies();
  };
  const auto load_parts = [&](const auto& load) {
#pragma unroll
    for (int i = 1; i < kBlocks; ++i) {
#pragma unroll
      for (int k = 0; k < i; ++k) part_at(i, k) = load(g + (32 * i + lane) * D + 4 * (warp + 8 * k));
    }
  };
  const auto load_anywhere = [](const __half* from) {
    const unsigned short* x = reinterpret_cast<const unsigned short*>(from);
    return make_uint2(x[0] | unsigned(x[1]) << 16, x[2] | unsigned(x[3]) << 16);
  };
  if constexpr (kHeld) {
    if (kRolled && aligned_to(g, 8)) {
      copy_parts();
    } else if (aligned_to(g, 8)) {
      load_parts([](const __half* from) { return *reinterpret_cast<const uint2*>(from); });
    } else {
      load_parts(load_anywhere);
    }
  }

#pragma unroll 1
  for (int token = first; token < last; token += kWarps) {
    const int count = min(kWarps, last - token);
    const bool active = warp < count && lane < D / 8;
    Coordinates<D> v;
    const Rotated r = load_rotated<D, T>(a, (long long)row * a.tokens + token + warp, active, lane, v);
    if (lane >= D / 8) {
#pragma unroll
      for (float& x : v.of[0]) x = 0;  // of other vectors, where a warp could hold several
    }
    Nibbles<D> nibbles;
    Bytes<D> bytes;
    float to_levels;
    if constexpr (is_trellis(CODING)) {
      to_levels = (D == 32 ? unit_of(CODING) : feedback_unit(BITS)) * rsqrtf(r.mean_square<D>());
    } else if constexpr (BITS == 8) {
      bytes = nearest_bytes<D>(r, v);
      to_levels = sqrtf(float(bytes.square())) / sqrtf(r.square * Lanes<D>::power);
    } else {  // the scale that the nearest codes would have
      nibbles = nearest_codes<D, BITS>(r, v);
      const float length = sqrtf(float(level_square<D, BITS>(nibbles))), norm = sqrtf(r.square * Lanes<D>::power);
      to_levels = length / norm;
    }
#pragma unroll
    for (int s = 0; s < Lanes<D>::sets; ++s) {
      if (lane + 32 * s >= D / 8) continue;
#pragma unroll
      for (float& x : v.of[s]) x = r.codable() ? x * to_levels : 0.f;
      store8(&u[warp][8 * (lane + 32 * s)], v.of[s]);
    }
    __syncwarp();
#pragma unroll kBlocksAtOnce
    for (int i = 0; i < kBlocks; ++i) {
      if (i > 0) {
        if (kRolled && kHeld) wait_copies<0>();
#pragma unroll 1
        for (int some = 0; some < count; some += 4) {
          float sum[4] = {};
#pragma unroll kPartsAtOnce
          for (int k = 0; k < i; ++k) {
            const uint2 part = kHeld ? part_at(i, k) : load_anywhere(g + (32 * i + lane) * D + 4 * (warp + 8 * k));
            const float2 low = __half22float2(reinterpret_cast<const __half2&>(part.x));
            const float2 high = __half22float2(reinterpret_cast<const __half2&>(part.y));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float4 e = *reinterpret_cast<const float4*>(&error[some + j][4 * (warp + 8 * k)]);
              sum[j] = fmaf(low.x, e.x, fmaf(low.y, e.y, fmaf(high.x, e.z, fmaf(high.y, e.w, sum[j]))));
            }
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[warp][some + j][lane] = sum[j];
        }
        __syncthreads();
      }
      const float own = u[warp][32 * i + lane];
      float target = own;
      if (i > 0) {
        float moved = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) moved += sums[w][warp][lane];
        target -= moved;
      }
      unsigned code;
      int level;
      if constexpr (is_trellis(CODING)) {
        code = code_by_path<D, BITS>(memory, warp, i, trellis_target<BITS>(target));
        level = Lookup<CODING>::level(Lookup<CODING>::bytes(code), 0);
      } else if constexpr (BITS == 8) {
        level = __float2int_rn(fminf(fmaxf(target, -127.f), 127.f));
        code = unsigned(level) & 255;
      } else {
        code = nearest_code<BITS>(target, 2 * fabsf(target));
        const int size = magnitude(BITS, int(code & (magnitudes(BITS) - 1)));
        level = code < magnitudes(BITS) ? size : -size;
      }
      error[warp][32 * i + lane] = float(level) - own;
      codes[warp][32 * i + lane] = (unsigned char)code;
      __syncthreads();
    }
    if (r.codable() && (D > 32 || is_trellis(CODING))) {
      nibbles = {}, bytes = {};
#pragma unroll
      for (int s = 0; s < Lanes<D>::sets; ++s) {
        if (lane + 32 * s >= D / 8) continue;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const unsigned code = codes[warp][8 * (lane + 32 * s) + j];
          if constexpr (BITS == 8) {
            bytes.word[s][j / 4] |= code << (8 * (j % 4));
          } else {
            nibbles.of[s] |= code << (4 * j);
          }
        }
      }
    }
    if constexpr (is_trellis(CODING)) {
      unsigned paths[Lanes<D>::sets];
#pragma unroll
      for (int s = 0; s < Lanes<D>::sets; ++s) paths[s] = memory.paths[warp][(lane / 4 + 8 * s) % kBlocks];
      write_trellis<D, BITS>(a, r, active, lane, nibbles, paths);
    } else if constexpr (BITS == 8) {
      write_bytes<D>(a, r, active, lane, bytes);
    } else {
      write_codes<D, BITS>(a, r, active, lane, nibbles);
    }
    __syncthreads();
  }
}

/// The same with T from a pointer, for generated code.
template <int D, int BITS, int TOKENS, class T>
__device__ void encode_feedback_as(const EncodeArgs& a, const T*, int block) {
  encode_with_feedback<D, BITS, TOKENS, T>(a, block, feedback_memory<D>());
}

/// A side of a kernel that codes any side by trellis, with or without feedback (TOKENS is 0).  Such a kernel's sides
/// share dynamic memory: static memory of two kinds would be too much.
template <int D, int CODING, int TOKENS, int SHARED_BYTES, class T>
__device__ void encode_beside_trellis_as(const EncodeArgs& a, const T*, int block, unsigned char* shared) {
  static_assert((TOKENS > 0 ? sizeof(TrellisFeedbackMemory<D>) : sizeof(SearchMemory<64>)) <= SHARED_BYTES,
                "plan.h counts too little shared memory");
  if constexpr (TOKENS > 0) {
    encode_with_feedback<D, CODING, TOKENS, T>(a, block, *reinterpret_cast<TrellisFeedbackMemory<D>*>(shared));
  } else if constexpr (is_trellis(CODING)) {
    encode_trellis<D, bits_of(CODING), T>(a, block, *reinterpret_cast<SearchMemory<64>*>(shared));
  } else {
    encode<D, CODING, T>(a, block);
  }
}

}  // namespace turboquant::cuda
