// How the warps of rows.cu.h pass values to one another: a warp has some tokens' codes and sums some coordinates of
// all.
#pragma once

#include "cuda/device/int8.cu.h"

namespace turboquant::cuda {

/// A round's values in shared memory, sixteen tokens a warp, as codes.
///
/// Codes of four tokens at two coordinates, c and c + 2, are a word.  A group of 32 coordinates has 16 such pairs; they
/// are the columns of two products, pair 8 s + g being column g of those of set s: its low half of one, its high half
/// of the other.  Four words between groups, and halves exchanged for every other two of the four threads that share a
/// group, keep reads and writes free of bank conflicts.
template <int D, int BITS, int WARPS>
struct PassedValues {
  static constexpr int kSets = 16 / WARPS;  // of 16 coordinates, that a warp sums
  alignas(16) unsigned words[D / 32][WARPS * 64 + 4];

  static __device__ int pair_at(int pair) { return kSets == 2 ? pair % 8 * 2 + pair / 8 : pair; }
  static __device__ int exchanged(int t) { return (t & 2) * 4; }

  /// First of the sets that a warp sums.  Where a head has fewer than the warps could take, some repeat the last ones'
  /// work for nothing.
  static __device__ int first_set(int warp) { return min(kSets * warp, D / 16 - kSets); }

  /// Transposes and stores half of the nibble words [word][token] of group g, four tokens of a warp's sixteen being
  /// thread t's.  Pairs 4 w to 4 w + 3 come from word w.
  __device__ void store(int half, int warp, int g, int t, const unsigned (&nibbles)[4][4]) {
    unsigned out[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) transpose_codes<BITS>(nibbles[kSets == 2 ? half + 2 * i : 2 * half + i], out[i]);
    if (g >= D / 32) return;
    uint4* at = reinterpret_cast<uint4*>(&words[g][(4 * warp + t) * 16 + (8 * half ^ exchanged(t))]);
    if constexpr (kSets == 2) {  // words half and half + 2, pair by pair
      at[0] = make_uint4(out[0][0], out[1][0], out[0][1], out[1][1]);
      at[1] = make_uint4(out[0][2], out[1][2], out[0][3], out[1][3]);
    } else {
      at[0] = make_uint4(out[0][0], out[0][1], out[0][2], out[0][3]);
      at[1] = make_uint4(out[1][0], out[1][1], out[1][2], out[1][3]);
    }
  }

  /// Reads what a thread of a warp brings to its products.
  struct Reader {
    const unsigned* from;
    LevelTable<BITS> levels;
    /// Of the low four nibbles.
    __device__ unsigned signed_level(unsigned codes) const {
      return BITS == 4 ? levels(codes) ^ 0x80808080u : levels(codes);
    }
    /// Signed levels of 32 tokens, the k-th: [product][sixteen tokens].
    __device__ void load(int k, unsigned (&bytes)[2 * kSets][2]) const {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned* at = from + (8 * k + 4 * half) * 16;
        unsigned codes[kSets];
        if constexpr (kSets == 2) {
          const uint2 x = *reinterpret_cast<const uint2*>(at);
          codes[0] = x.x, codes[kSets - 1] = x.y;
        } else {
          codes[0] = *at;
        }
#pragma unroll
        for (int i = 0; i < kSets; ++i) {
          bytes[2 * i][half] = signed_level(codes[i]), bytes[2 * i + 1][half] = signed_level(codes[i] >> 16);
        }
      }
    }
  };
  __device__ Reader reader(int warp, int g, int t, LevelTable<BITS> levels) const {
    const int first = first_set(warp);
    return {&words[first / 2][t * 16 + (pair_at(first % 2 * 8 + g) ^ exchanged(t))], levels};
  }
};

}  // namespace turboquant::cuda
