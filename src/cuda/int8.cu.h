// Int8 tensor core products, and which codes of a row each thread brings to them.
#pragma once

#include "cuda/attention.cu.h"

namespace turboquant::cuda {

/// c += a b: 16x32 by 32x8 bytes.  A and B are signed unless told.
template <bool A_UNSIGNED, bool B_UNSIGNED>
__device__ void mma_int8(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#define TQ_MMA(A, B)                                   \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." A "." B \
      ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "   \
      "{%0,%1,%2,%3};"                                 \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (A_UNSIGNED && B_UNSIGNED) {
    TQ_MMA("u8", "u8");
  } else if constexpr (A_UNSIGNED) {
    TQ_MMA("u8", "s8");
  } else if constexpr (B_UNSIGNED) {
    TQ_MMA("s8", "u8");
  } else {
    TQ_MMA("s8", "s8");
  }
#undef TQ_MMA
}

/// Which nibble words of which groups a thread holds, when `sharers` threads share the groups of a row.
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

}  // namespace turboquant::cuda
