// How the blocks of a launch divide the packed cache.
//
// A segment is one KV head of one batch row, read for one block of ROWS query rows.  In an even launch every segment
// has as many tiles as the others and a column of the grid to itself: block x of column y takes the x-th part of
// segment y. Otherwise (ragged batches, or many segments) the tiles of all segments, in order, are dealt to the blocks
// in equal contiguous runs, in which every segment has some tiles more at its beginning: what starting on a segment
// costs a block.  A block leaves one partial result for each segment of whose own tiles it has any.
#pragma once

#include "cuda/attention.cu.h"

namespace turboquant::cuda {

/// Tiles of a segment of batch row b: [first, last).
template <int TILE>
__device__ Range segment_tiles(const AttentionArgs& a, int b) {
  const int first = visible_keys(a, b, 0).first / TILE, last = (a.kv_len + TILE - 1) / TILE;
  return {first, max(first, last)};
}

/// Segments of a batch row whose query rows are read `rows_per_block` at a time.
__device__ inline int segments_of_row(const AttentionArgs& a, int rows_per_block) {
  return a.kv_heads * ((a.rows() + rows_per_block - 1) / rows_per_block);
}

/// Where part i of `parts` of `count` tiles begins, rounded; 0 and `count` come out exactly up to 2^21 tiles.  The
/// neighbour finds the same number; an exact division would take as long as a load from the cache.
__device__ inline int part_begin(int count, int parts, int i) {
  return __float2int_rn(float(count) * float(i) * reciprocal_fast(float(parts)));
}

/// Runs of tiles.
template <int TILE>
struct Runs {
  static constexpr unsigned kStart = 256 / TILE;  // what starting on a segment counts
  int blocks, segments_per_row;                   // of the batch
  unsigned total;                                 // tiles, and what starting counts

  __device__ Runs(const AttentionArgs& a, int rows_per_block, int launched) {
    segments_per_row = segments_of_row(a, rows_per_block);
    total = 0;
    for (int b = 0; b < a.batch; ++b) {
      const Range r = segment_tiles<TILE>(a, b);
      total += segment(r.last - r.first) * segments_per_row;
    }
    blocks = min(unsigned(launched), max(total, 1u));
  }
  /// What a segment of some tiles counts.
  static __device__ unsigned segment(unsigned tiles) { return tiles ? kStart + tiles : 0; }
  /// First tile of a block's run.
  __device__ unsigned begin(int block) const { return scaled(block, total, 0, blocks); }
  /// The block whose run holds a tile.
  __device__ int block_of(unsigned tile) const { return int(scaled(tile + 1, blocks, 1, total)); }

 private:
  /// (a b - c) / d; 64-bit division is slow, and seldom needed.
  static __device__ unsigned scaled(unsigned a, unsigned b, unsigned c, unsigned d) {
    if (__umulhi(a, b) == 0) return (a * b - c) / d;
    return unsigned(((unsigned long long)a * b - c) / d);
  }
};

/// Calls work(batch row, segment within it, first tile, last tile, slot) for every piece of the cache that this block
/// reads; `slot` is where its partial result belongs.
template <int TILE, int ROWS, class Work>
__device__ void for_each_piece(const AttentionArgs& a, const Work& work) {
  if (a.even) {
    const int segments_per_row = segments_of_row(a, ROWS), segment = blockIdx.y;
    const int row = a.batch == 1 ? 0 : segment / segments_per_row;
    const Range r = segment_tiles<TILE>(a, row);
    const int count = r.last - r.first, parts = gridDim.x, part = blockIdx.x;
    work(row, segment - row * segments_per_row, r.first + part_begin(count, parts, part),
         r.first + part_begin(count, parts, part + 1), segment * parts + part);
    return;
  }
  const Runs<TILE> runs(a, ROWS, gridDim.x);
  const int block = blockIdx.x;
  if (block >= runs.blocks) return;
  unsigned tile = runs.begin(block), base = 0;
  const unsigned end = runs.begin(block + 1);
  for (int row = 0; tile < end; ++row) {
    const Range r = segment_tiles<TILE>(a, row);
    const unsigned count = runs.segment(r.last - r.first), all = count * runs.segments_per_row;
    while (tile < end && tile < base + all) {
      const int local = int((tile - base) / count);
      const unsigned start = base + local * count, own = start + runs.kStart, stop = min(end, start + count);
      if (stop > own) {
        work(row, local, r.first + int(max(tile, own) - own), r.first + int(stop - own),
             block + row * runs.segments_per_row + local);
      }
      tile = stop;
    }
    base += all;
  }
}

/// Slots of the partial results of a segment of batch row b, of `slots` that there is room for: [first, last).
template <int TILE, int ROWS>
__device__ Range partial_slots(const AttentionArgs& a, int b, int segment_of_row, int slots) {
  const int segments_per_row = segments_of_row(a, ROWS);
  const int segment = b * segments_per_row + segment_of_row;
  if (a.even) {
    const int parts = slots / (a.batch * segments_per_row);
    return {segment * parts, segment * parts + parts};
  }
  const Runs<TILE> runs(a, ROWS, slots - a.batch * segments_per_row);
  unsigned begin = 0, tiles = 0;
  for (int i = 0; i <= b; ++i) {
    begin += tiles * segments_per_row;
    const Range r = segment_tiles<TILE>(a, i);
    tiles = runs.segment(r.last - r.first);
  }
  if (tiles == 0) return {0, 0};
  begin += tiles * segment_of_row;
  return {runs.block_of(begin + runs.kStart) + segment, runs.block_of(begin + tiles - 1) + 1 + segment};
}

}  // namespace turboquant::cuda
