// How the warps of many_rows.cu.h pass values to one another: a warp has some tokens' codes and sums some coordinates
// of all.
#pragma once

#include "cuda/device/int8.cu.h"

namespace turboquant::cuda {

/// A round's values in shared memory, sixteen tokens a warp, as codes.
///
/// Codes of four tokens at two coordinates, c and c + 2, are a word.  A group of 32 coordinates has 16 such pairs; they
/// are the columns of two products, pair 8 s + g being column g of those of set s: its low half of one, its high half
/// of the other.  Four words between groups, and halves exchanged for every other two of the four threads that share a
/// group, keep reads and writes free of bank conflicts.
template <int D, int CODING, int WARPS, int ORDERS>
struct PassedValues {
  // A warp sums one set of 16 coordinates, or the two sets of one group of 32 or of several.
  static constexpr int kSets = D <= 16 * WARPS && WARPS >= 16 ? 1 : 2;
  static constexpr int kGroups = kSets == 1 ? 1 : (D / 32 + WARPS - 1) / WARPS;
  static constexpr int kHalves = (D / 32 + 7) / 8;  // a warp stores eight groups at a time
  // Words 0 and 1 of a group are in one set, 2 and 3 in the other: a warp that has both may look up two orders of bits.
  static constexpr int kOrders = ORDERS == 1 ? 1 : kSets;
  using Table = LevelTable<CODING, ORDERS>;
  static constexpr int kStep = Table::kStep, kBias = CODING == 4 ? 0 : Table::kBias;  // of `load`
  // At 8 bits a pair of coordinates takes two words, each in its plane.
  static constexpr int kPlanes = CODING == 8 ? 2 : 1;
  alignas(16) unsigned words[kPlanes][D / 32][WARPS * 64 + 4];
  /// Of a group, [word][token]; at 8 bits the first four coordinates of words, then the last four.
  struct Words {
    unsigned of[kPlanes][4][4];
  };

  static __device__ int pair_at(int pair) { return kSets == 2 ? pair % 8 * 2 + pair / 8 : pair; }
  static __device__ int exchanged(int t) { return (t & 2) * 4; }

  /// First of the sets that a warp sums.  Where a head has fewer than the warps could take, some repeat the last ones'
  /// work for nothing.
  static __device__ int first_set(int warp, int group = 0) {
    return min(kSets * (kGroups * warp + group), D / 16 - kSets);
  }

  /// Transposes and stores half of the nibble words [word][token] of a group, four tokens of a warp's sixteen being
  /// thread t's.  Pairs 4 w to 4 w + 3 come from word w.
  __device__ void store(int half, int warp, int group, int t, const Words& nibbles) {
    unsigned out[kPlanes][2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int word = kSets == 2 ? half + 2 * i : 2 * half + i;
      if constexpr (CODING == 8) {
        unsigned first[4], last[4];
        transpose_bytes(nibbles.of[0][word], first), transpose_bytes(nibbles.of[1][word], last);
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // in the order of transpose_codes
          out[0][i][k] = k % 2 ? last[k / 2] : first[k / 2];
          out[1][i][k] = k % 2 ? last[k / 2 + 2] : first[k / 2 + 2];
        }
      } else {
        transpose_codes<CODING>(nibbles.of[0][word], out[0][i]);
      }
    }
    if (group >= D / 32) return;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const auto& x = out[plane];
      uint4* at = reinterpret_cast<uint4*>(&words[plane][group][(4 * warp + t) * 16 + (8 * half ^ exchanged(t))]);
      if constexpr (kSets == 2) {  // words half and half + 2, pair by pair
        at[0] = make_uint4(x[0][0], x[1][0], x[0][1], x[1][1]);
        at[1] = make_uint4(x[0][2], x[1][2], x[0][3], x[1][3]);
      } else {
        at[0] = make_uint4(x[0][0], x[0][1], x[0][2], x[0][3]);
        at[1] = make_uint4(x[1][0], x[1][1], x[1][2], x[1][3]);
      }
    }
  }

  /// Reads what a thread of a warp brings to its products.
  struct Reader {
    const unsigned* from;
    Table levels;
    __device__ void read(int plane, int k, int half, unsigned (&codes)[kSets]) const {
      const unsigned* at = from + plane * (D / 32) * (WARPS * 64 + 4) + (8 * k + 4 * half) * 16;
      if constexpr (kSets == 2) {
        const uint2 x = *reinterpret_cast<const uint2*>(at);
        codes[0] = x.x, codes[kSets - 1] = x.y;
      } else {
        codes[0] = *at;
      }
    }
    /// Of the low four nibbles, of set i.
    __device__ unsigned look_up(unsigned codes, int i) const {
      return CODING == 4 ? levels(codes) ^ 0x80808080u : levels.in_order(codes, kOrders == 1 ? 0 : i);
    }
    /// Levels of 32 tokens, the k-th: [product][sixteen tokens].  Bytes * kStep - kBias, unsigned if biased.
    __device__ void load(int k, unsigned (&bytes)[2 * kSets][2]) const {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unsigned codes[kSets];
        read(0, k, half, codes);
        if constexpr (CODING == 8) {
          unsigned more[kSets];
          read(kPlanes - 1, k, half, more);
#pragma unroll
          for (int i = 0; i < kSets; ++i) bytes[2 * i][half] = codes[i], bytes[2 * i + 1][half] = more[i];
          continue;
        }
#pragma unroll
        for (int i = 0; i < kSets; ++i) {
          bytes[2 * i][half] = look_up(codes[i], i), bytes[2 * i + 1][half] = look_up(codes[i] >> 16, i);
        }
      }
    }
  };
  __device__ Reader reader(int warp, int group, int g, int t, const Table& levels) const {
    const int first = first_set(warp, group);
    return {&words[0][first / 2][t * 16 + (pair_at(first % 2 * 8 + g) ^ exchanged(t))], levels};
  }
};

}  // namespace turboquant::cuda
