// Divides the packed cache among the blocks of a launch.
//
// A segment is one KV head of one batch row, read for one block of ROWS query rows.  In an even launch every segment
// has as many tiles as the others and a column of the grid to itself: block x of column y takes the x-th split of
// segment y. Otherwise (ragged batches, or many segments) the tiles of all segments, in order, are dealt to the blocks
// in equal contiguous runs.  Starting on a segment costs a block some time; the dealing counts it as some more tiles at
// the segment's beginning.  A block leaves one partial result for each segment that it has tiles of; in an even launch
// it leaves one for its segment, even without tiles.
//
// Exact copies of a segment's newest and first tokens are read in `exact_splits` splits, each by one block for a
// partial result of its own, which lies behind those of the codes.  They count as some tiles more at the segment's end,
// so that a block which reads a split has less of the codes, or none.
#pragma once

#include "cuda/device/attention.cu.h"

namespace turboquant::cuda {

/// Tiles of codes of a segment of batch row b: [first, last).
template <int TILE>
__device__ Range segment_tiles(const AttentionArgs& a, int b) {
  const int first = max(visible_keys(a, b, 0).first, first_end(a, b)) / TILE;
  const int last = (last_ring_begin(a) + TILE - 1) / TILE;
  return {first, max(first, last)};
}

/// Tiles of 32 exact copies that some query of batch row b may read: those of the first tokens, then those of the ring.
struct ExactTiles {
  int start;    // of the row
  int firsts;   // tiles of first tokens
  int ring_at;  // the tile of tokens that the next one holds
  int count;

  __device__ ExactTiles(const AttentionArgs& a, int b) {
    start = a.starts ? max(a.starts[b], 0) : 0;
    firsts = (a.first + 31) / 32;
    ring_at = ring_begin(a, 0) / 32;
    count = firsts + (a.recent ? (a.kv_len + 31) / 32 - ring_at : 0);
  }
  /// The tiles of a split.
  __device__ Range split(const AttentionArgs& a, int i) const {
    return {count * i / a.exact_splits, count * (i + 1) / a.exact_splits};
  }
};

/// key % ring; an integer division would take as long as a load.
__device__ inline int in_ring(int key, int ring) {
  int slot = key - ring * int(float(key) * reciprocal_fast(float(ring)));
  while (slot < 0) slot += ring;
  while (slot >= ring) slot -= ring;
  return slot;
}

/// TOKENS of such copies.
template <int TOKENS>
struct ExactPlace {
  bool of_ring;
  int key;     // the first one's token
  int slot;    // and its row
  int tokens;  // that are there; at most TOKENS, and not always more than 0
  __device__ ExactPlace(const AttentionArgs& a, const ExactTiles& tiles, int place) {
    const int firsts = tiles.firsts * (32 / TOKENS);
    of_ring = place >= firsts;
    if (of_ring) {
      key = (tiles.ring_at * (32 / TOKENS) + place - firsts) * TOKENS;
      slot = in_ring(key, a.ring), tokens = min(TOKENS, a.kv_len - key);
    } else {
      key = tiles.start + place * TOKENS;
      slot = a.ring + place * TOKENS, tokens = min(TOKENS, a.first - place * TOKENS);
    }
  }
};

/// Tokens of codes that reading a segment's exact copies takes as long as.
constexpr int kExactCost = 768;

/// Segments of a batch row whose query rows are read `rows_per_block` at a time.
__device__ inline int segments_of_row(const AttentionArgs& a, int rows_per_block) {
  return a.kv_heads * ((a.rows() + rows_per_block - 1) / rows_per_block);
}

/// Where split i of `splits` of `count` tiles begins, rounded; 0 and `count` come out exactly up to 2^21 tiles.  The
/// neighbour finds the same number; an exact division would take as long as a load from the cache.
__device__ inline int split_begin(int count, int splits, int i) {
  return __float2int_rn(float(count) * float(i) * reciprocal_fast(float(splits)));
}

/// Whether a segment of batch row b with `tiles` of codes has anything to read.
__device__ inline bool has_work(const AttentionArgs& a, int b, int tiles) {
  return tiles > 0 || (a.exact_splits > 0 && (!a.starts || a.starts[b] < a.kv_len));
}

/// Of a batch's first rows: the tiles of one segment of each, and how many rows have work.  All lanes of a warp ask
/// together and each counts some rows, for one after the other they would wait for one `start` after the other.
template <int TILE>
struct Counted {
  unsigned tiles = 0, rows = 0;
  __device__ Counted(const AttentionArgs& a, int first_rows) {
    for (int b = threadIdx.x & 31; b < first_rows; b += 32) {
      const Range r = segment_tiles<TILE>(a, b);
      tiles += r.last - r.first, rows += has_work(a, b, r.last - r.first);
    }
    tiles = __reduce_add_sync(~0u, tiles), rows = __reduce_add_sync(~0u, rows);
  }
};

/// Runs of tiles.
template <int TILE>
struct Runs {
  int blocks, segments_per_row;  // of the batch
  unsigned start;                // what starting on a segment counts
  unsigned exact;                // what a segment's exact copies count
  unsigned total;                // tiles, and what these count

  __device__ Runs(const AttentionArgs& a, int rows_per_block, int launched) {
    segments_per_row = segments_of_row(a, rows_per_block);
    const Counted<TILE> all(a, a.batch);
    // As measured, but so little that every block gets tiles.
    start = min(1024u / TILE, unsigned(float(all.tiles * segments_per_row) * reciprocal_fast(2.f * float(launched))));
    exact = a.exact_splits ? max(start, 1u) : 0;
    total = counts(all);
    blocks = min(unsigned(launched), max(total, 1u));
  }
  /// What the segments of some batch rows count.
  __device__ unsigned counts(const Counted<TILE>& of) const {
    return (of.tiles + of.rows * (start + exact)) * segments_per_row;
  }
  /// What a segment of a batch row with some tiles counts.
  __device__ unsigned segment(const AttentionArgs& a, int b, int tiles) const {
    return has_work(a, b, tiles) ? start + tiles + exact : 0;
  }
  /// First tile of a block's run.
  __device__ unsigned begin(int block) const { return scaled(block, total, 0, blocks); }
  /// The block whose run holds a tile.
  __device__ int block_of(unsigned tile) const { return int(scaled(tile + 1, blocks, 1, total)); }

  /// The batch row whose segments hold a tile; `base` becomes the first of the row's tiles.
  __device__ int row_of(const AttentionArgs& a, unsigned tile, unsigned& base) const {
    const int lane = threadIdx.x & 31;
    base = 0;
    for (int first = 0;; first += 32) {
      unsigned own = 0;
      if (const int b = first + lane; b < a.batch) {
        const Range r = segment_tiles<TILE>(a, b);
        own = segment(a, b, r.last - r.first) * segments_per_row;
      }
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

/// How an even launch divides a segment of some tiles of codes among `splits` blocks.  Where splits are short, every
/// split of exact copies has a block to itself, after those that read the codes; else each counts as kExactCost tokens.
template <int TILE>
struct EvenSplits {
  int tiles, exact;  // what a split of copies counts, 0 if it has a block to itself
  int splits, exact_splits;
  __device__ EvenSplits(const AttentionArgs& a, int tiles, int splits)
      : tiles(tiles), splits(splits), exact_splits(a.exact_splits) {
    const int most = kExactCost / TILE;
    exact = exact_splits < splits && tiles <= most * (splits - exact_splits) ? 0 : most;
    if (exact_splits == 0) exact = 0;
  }
  __device__ int begin(int split) const {
    if (exact == 0) return split_begin(tiles, splits - exact_splits, min(split, splits - exact_splits));
    return split_begin(tiles + exact * exact_splits, splits, split);
  }
  /// Whether the block reads codes.
  __device__ bool reads_codes(int split) const {
    return exact_splits == 0 || (exact ? begin(split) < tiles : split < splits - exact_splits);
  }
  /// The first split that does not.
  __device__ int reading_codes() const {
    if (exact == 0) return splits - exact_splits;
    int split = splits;
    while (split > 0 && !reads_codes(split - 1)) --split;
    return split;
  }
  /// Whether the block reads split i of the copies.
  __device__ bool reads_exact(int split, int i) const {
    if (exact == 0) return split == splits - exact_splits + i;
    const int at = tiles + i * exact;
    return begin(split) <= at && at < begin(split + 1);
  }
};

/// Calls work(batch row, segment within it, first tile, last tile, slot) for every split of the codes that this block
/// reads; `slot` is where its partial result belongs.  Then calls exact_work likewise for splits of exact copies, whose
/// tiles are those of ExactTiles.
template <int TILE, int ROWS, class Work, class ExactWork>
__device__ void for_each_split(const AttentionArgs& a, const Work& work, const ExactWork& exact_work) {
  const auto read_copies = [&](int row, int local, int split, int slots_of_codes) {
    const Range tiles = ExactTiles(a, row).split(a, split);
    exact_work(row, local, tiles.first, tiles.last,
               slots_of_codes + (row * segments_of_row(a, ROWS) + local) * a.exact_splits + split);
  };
  if (a.even) {
    const int segments_per_row = segments_of_row(a, ROWS), segment = blockIdx.y;
    const int row = a.batch == 1 ? 0 : segment / segments_per_row;
    const Range r = segment_tiles<TILE>(a, row);
    const int local = segment - row * segments_per_row, split = blockIdx.x;
    const EvenSplits<TILE> all(a, r.last - r.first, gridDim.x);
    if (all.reads_codes(split)) {
      work(row, local, r.first + all.begin(split), r.first + min(all.begin(split + 1), all.tiles),
           segment * all.splits + split);
    }
    for (int i = 0; i < a.exact_splits; ++i) {
      if (all.reads_exact(split, i)) read_copies(row, local, i, all.splits * a.batch * segments_per_row);
    }
    return;
  }
  const Runs<TILE> runs(a, ROWS, gridDim.x);
  const int block = blockIdx.x;
  if (block >= runs.blocks) return;
  unsigned tile = runs.begin(block), base;
  const unsigned end = runs.begin(block + 1);
  for (int row = runs.row_of(a, tile, base); tile < end; ++row) {
    const Range r = segment_tiles<TILE>(a, row);
    const unsigned tiles = r.last - r.first, count = runs.segment(a, row, tiles), all = count * runs.segments_per_row;
    while (tile < end && tile < base + all) {
      const int local = int((tile - base) / count);
      const unsigned start = base + local * count, own = start + runs.start, copies = own + tiles;
      const unsigned stop = min(end, start + count), first = max(tile, own), last = min(stop, copies);
      if (last > first) {
        work(row, local, r.first + int(first - own), r.first + int(last - own),
             block + row * runs.segments_per_row + local);
      }
      if (a.exact_splits && tile <= copies && copies < stop) {
        for (int i = 0; i < a.exact_splits; ++i) {
          read_copies(row, local, i, gridDim.x + a.batch * runs.segments_per_row);
        }
      }
      tile = stop;
    }
    base += all;
  }
}

/// Where the partial results of a segment lie: slots [first, last) of those of the codes, then `count` slots of exact
/// copies.
struct PartialSlots {
  int first, last, exact, count;
  __device__ int size() const { return last - first + count; }
  __device__ int operator[](int i) const { return i < last - first ? first + i : exact + i - (last - first); }
};

/// Those of a segment of batch row b, of `slots` that there is room for.
template <int TILE, int ROWS>
__device__ PartialSlots partial_slots(const AttentionArgs& a, int b, int segment_of_row, int slots) {
  const int segments_per_row = segments_of_row(a, ROWS), segments = a.batch * segments_per_row;
  const int segment = b * segments_per_row + segment_of_row, n = a.exact_splits;
  const int exact = slots - (segments - segment) * n;
  if (a.even) {
    const int splits = slots / segments - n;
    const Range r = segment_tiles<TILE>(a, b);
    const int used = n ? EvenSplits<TILE>(a, r.last - r.first, splits).reading_codes() : splits;
    return {segment * splits, segment * splits + used, exact, n};
  }
  const Runs<TILE> runs(a, ROWS, slots - segments * (1 + n));
  const Range r = segment_tiles<TILE>(a, b);
  const unsigned tiles = r.last - r.first, count = runs.segment(a, b, tiles);
  if (count == 0) return {0, 0, 0, 0};
  if (tiles == 0) return {0, 0, exact, n};
  const unsigned begin = runs.counts(Counted<TILE>(a, b)) + count * segment_of_row + runs.start;
  return {runs.block_of(begin) + segment, runs.block_of(begin + tiles - 1) + 1 + segment, exact, n};
}

}  // namespace turboquant::cuda
