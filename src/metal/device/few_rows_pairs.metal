// Scores and values of scalar codes of 2 bits, two codes at a time, from tables of what they add.

#pragma once

#include "metal/device/few_rows_shared.metal"

namespace turboquant {

/// Tables of the dot products of 2-bit keys: for each pair of coordinates that share a nibble, and each nibble, the
/// R queries times the two levels.  The nibble with both signs turned has the negative.
template <int D, int R, class Shared>
void fill_key_pairs(Shared shared, ushort thread_index) {
  for (int i = thread_index; i < 4 * D; i += metal_layout::kFewRowsThreads) {
    const int pair = i / 8, nibble = i % 8, coordinate = pair / 16 * 32 + pair % 16;
    const float low = float(level(2, nibble & 3)), high = float(level(2, nibble >> 2));
    typename RowVector<R>::halves dots, negative;
    TQ_UNROLL
    for (int r = 0; r < R; ++r) {
      dots[r] = half(fma(shared->x[r][coordinate], low, shared->x[r][coordinate + 16] * high));
      negative[r] = -dots[r];
    }
    shared->key_pairs[pair][nibble] = dots;
    shared->key_pairs[pair][nibble ^ kBothSigns] = negative;
  }
}

/// score_block for 2 bits, into `sums` of the lane's own token: all lanes read the same table of 16 entries, and an
/// entry is two codes of all R rows.
template <int D, int R, class Shared, class Codes>
void score_pairs(Shared shared, Codes codes, int block, int last, thread float* sums, ushort lane) {
  const long at = long(min(block + lane, last - 1)) * (D / 16);
  TQ_UNROLL
  for (int r = 0; r < R; ++r) sums[r] = 0.0f;
  for (int w = 0; w < D / 16; ++w) {
    const uint word = codes[at + w];
    TQ_UNROLL
    for (int j = 0; j < 8; ++j) {
      const typename RowVector<R>::halves dots = shared->key_pairs[8 * w + j][nibble_of(word, j)];
      TQ_UNROLL
      for (int r = 0; r < R; ++r) sums[r] += float(dots[r]);
    }
  }
}

/// accumulate_values for 2 bits, by pairs of tokens: a table of 16 entries holds what each pair of codes adds to R rows.
/// Weights are at most 1.
template <int D, int R, class Shared, class Codes>
void add_value_pairs(Shared shared, Codes codes, int block, int count, thread float* x, ushort lane, ushort simdgroup) {
  constexpr int groups = D / 32, words = 2 * groups, slices = value_slices(D);
  constexpr int lanes = 4 * lanes_per_token(D) / slices, pairs = 32 / lanes;
  const int part = lane % 4, shift = part & 2;
  const int nibble = lane % 8, pair = lane / 8;
  const float first_level = float(level(2, nibble & 3)), second_level = float(level(2, nibble >> 2));
  static_assert(8 * kPairs == 32, "a lane makes one entry and its negative");
  for (int begin = 0; begin < metal_layout::kBlock; begin += 2 * kPairs) {
    const typename RowVector<R>::type a = shared->weights[simdgroup][begin + 2 * pair],
                                 b = shared->weights[simdgroup][begin + 2 * pair + 1];
    typename RowVector<R>::halves sums, negative;
    TQ_UNROLL
    for (int r = 0; r < R; ++r) {
      sums[r] = half(fma(a[r], first_level, b[r] * second_level));
      negative[r] = -sums[r];
    }
    shared->value_pairs[simdgroup][16 * pair + nibble] = sums;
    shared->value_pairs[simdgroup][16 * pair + (nibble ^ kBothSigns)] = negative;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = lane / lanes; i < kPairs; i += pairs) {
      const int t = begin + 2 * i;
      TQ_UNROLL
      for (int s = 0; s < slices; ++s) {
        const int group = min((int(lane) % lanes + lanes * s) / 4, groups - 1), word = 2 * group + (part & 1);
        const uint a = codes[long(block + min(t, count - 1)) * words + word];
        const uint b = codes[long(block + min(t + 1, count - 1)) * words + word];
        const uint both = (a >> shift & 0x33333333u) | (b >> shift & 0x33333333u) << 2;
        TQ_UNROLL
        for (int j = 0; j < 8; ++j) {
          const typename RowVector<R>::halves sums = shared->value_pairs[simdgroup][16 * i + nibble_of(both, j)];
          TQ_UNROLL
          for (int r = 0; r < R; ++r) x[8 * (R * s + r) + j] += float(sums[r]);
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

}  // namespace turboquant
