// Divides the packed cache among the blocks of a launch.
//
// A segment is one KV head of one batch row, read for one block of ROWS query rows.  In an even launch every segment
// has as many tiles as the others and a column of the grid to itself: block x of column y takes the x-th part of
// segment y. Otherwise (ragged batches, or many segments) the tiles of all segments, in order, are dealt to the blocks
// in equal contiguous runs.  Starting on a segment costs a block some time; the dealing counts it as some more tiles at
// the segment's beginning.  A block leaves one partial result for each segment that it has tiles of; in an even launch
// it leaves one for its segment, even without tiles.
#pragma once

#include "cuda/device/attention.cu.h"

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

/// Of a batch's first rows: the tiles of one segment of each, and how many rows have any.  All lanes of a warp ask
/// together and each counts some rows, for one after the other they would wait for one `start` after the other.
template <int TILE>
struct Counted {
  unsigned tiles = 0, rows = 0;
  __device__ Counted(const AttentionArgs& a, int first_rows) {
    for (int b = threadIdx.x & 31; b < first_rows; b += 32) {
      const Range r = segment_tiles<TILE>(a, b);
      tiles += r.last - r.first, rows += r.last > r.first;
    }
    tiles = __reduce_add_sync(~0u, tiles), rows = __reduce_add_sync(~0u, rows);
  }
};

/// Runs of tiles.
template <int TILE>
struct Runs {
  int blocks, segments_per_row;  // of the batch
  unsigned start;                // what starting on a segment counts
  unsigned total;                // tiles, and what starting counts

  __device__ Runs(const AttentionArgs& a, int rows_per_block, int launched) {
    segments_per_row = segments_of_row(a, rows_per_block);
    const Counted<TILE> all(a, a.batch);
    // As measured, but so little that every block gets tiles.
    start = min(1024u / TILE, unsigned(float(all.tiles * segments_per_row) * reciprocal_fast(2.f * float(launched))));
    total = counts(all);
    blocks = min(unsigned(launched), max(total, 1u));
  }
  /// What the segments of some batch rows count.
  __device__ unsigned counts(const Counted<TILE>& of) const { return (of.tiles + of.rows * start) * segments_per_row; }
  /// What a segment of some tiles counts.
  __device__ unsigned segment(unsigned tiles) const { return tiles ? start + tiles : 0; }
  /// First tile of a block's run.
  __device__ unsigned begin(int block) const { return scaled(block, total, 0, blocks); }
  /// The block whose run holds a tile.
  __device__ int block_of(unsigned tile) const { return int(scaled(tile + 1, blocks, 1, total)); }

  /// The batch row whose segments hold a tile; `base` becomes the first of the row's tiles.
  __device__ int row_of(const AttentionArgs& a, unsigned tile, unsigned& base) const {
    const int lane = threadIdx.x & 31;
    base = 0;
    for (int first = 0;; first += 32) {
      const Range r = first + lane < a.batch ? segment_tiles<TILE>(a, first + lane) : Range{0, 0};
      const unsigned own = segment(r.last - r.first) * segments_per_row;
      unsigned end = own;  // of the rows up to this lane's
      for (int step = 1; step < 32; step *= 2) {
        const unsigned before = __shfl_up_sync(~0u, end, step);
        if (lane >= step) end += before;
      }
      const unsigned found = __ballot_sync(~0u, base + end > tile);
      if (found || first + 32 >= a.batch) {
        const int at = found ? __ffs(found) - 1 : 31;
        base += __shfl_sync(~0u, end - own, at);
        return first + at;
      }
      base += __shfl_sync(~0u, end, 31);
    }
  }

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
  unsigned tile = runs.begin(block), base;
  const unsigned end = runs.begin(block + 1);
  for (int row = runs.row_of(a, tile, base); tile < end; ++row) {
    const Range r = segment_tiles<TILE>(a, row);
    const unsigned count = runs.segment(r.last - r.first), all = count * runs.segments_per_row;
    while (tile < end && tile < base + all) {
      const int local = int((tile - base) / count);
      const unsigned start = base + local * count, own = start + runs.start, stop = min(end, start + count);
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
  const Range r = segment_tiles<TILE>(a, b);
  const unsigned count = runs.segment(r.last - r.first);
  if (count == 0) return {0, 0};
  const unsigned begin = runs.counts(Counted<TILE>(a, b)) + count * segment_of_row;
  return {runs.block_of(begin + runs.start) + segment, runs.block_of(begin + count - 1) + 1 + segment};
}

}  // namespace turboquant::cuda
