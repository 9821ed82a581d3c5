// The attention kernel: a tile of query rows against a range of packed tokens, kBlock tokens at a time.
//
// Per block: keys are unpacked to nibbles, looked up and multiplied with the rows' queries in integers, which gives the
// scores; an online softmax (softmax.h, here in base 2 and for a block at a time) turns them to weights, the values'
// scales multiply the weights, and these are rounded to 16 bits relative to the block's largest; values are unpacked,
// looked up and accumulated in integers, which are added to the float result once per block.  Unpacking happens between
// the multiplications where registers suffice: values during the scores, the next keys during the sums.
//
// Queries and weights are 16-bit integers (of high and low int8 parts where dot products are of bytes), |w| <=
// kLargest. Hidden tokens have the score minus infinity, and nothing of theirs is read after that.  NaN and infinity of
// a visible key's or value's scale, or in q, make the row's sum NaN.
#pragma once

#include "cpu/simd/simd.h"
#include "cpu/simd/unpack.h"
#include "cpu/simd/workspace.h"

namespace turboquant::cpu {
namespace {

/// Scores of 16 tokens for `count` rows from `row` on, while `next` takes `pieces` steps for every two planes.
template <class S, bool bytes, int count, Kind next_kind, int pieces>
void score(const Workspace<S>& w, int row, int quad, const typename S::Table* tables, Feed<S, uint8_t>& next) {
  using F = Vec<float, S::bytes>;
  using I32 = Vec<int32_t, S::bytes>;
  constexpr int per_plane = bytes ? 1 : 2;  // positions
  const int64_t quad_bytes = w.key.quad_bytes, row_bytes = int64_t(w.key.positions) * 2 * S::bytes;
  const uint8_t* planes = w.keys + quad * quad_bytes;
  const uint8_t* queries = w.queries + row * row_bytes;
  typename S::Acc acc[count][4] = {};
  constexpr int run = pieces > 0 ? 4 : 1;
  for (int p = 0; p < w.key.planes; p += run) {
#pragma GCC unroll 4
    for (int i = 0; i < run; ++i, planes += S::bytes, queries += per_plane * 2 * S::bytes) {
      typename S::Weights q[per_plane][count];
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) {
#pragma GCC unroll 2
        for (int h = 0; h < per_plane; ++h) q[h][r] = S::load_weights(queries + r * row_bytes + h * 2 * S::bytes);
      }
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        typename S::Levels l[per_plane];
        look_up<S, bytes, per_plane>(tables[(p + i) % 4], planes + t * quad_bytes, l);
#pragma GCC unroll 2
        for (int h = 0; h < per_plane; ++h) {
#pragma GCC unroll 4
          for (int r = 0; r < count; ++r) S::dot(acc[r][t], l[h], q[h][r]);
        }
      }
      if constexpr (pieces > 0) {
        if (i % 2 < pieces) next.template step<next_kind>();
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < count; ++r) {
    const float step = w.query_step[row + r];
    const int32_t bias = w.query_bias[row + r];
    float* out = w.scores + size_t(row + r) * kBlock + quad * 4;
    I32 x[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) x[t] = S::total(acc[r][t]);
    if constexpr (kChunks<S> == 4) {
      x[0] = add_pairs(add_pairs(x[0], x[1]), add_pairs(x[2], x[3]));
    } else if constexpr (kChunks<S> == 2) {
      x[0] = add_pairs(x[0], x[1]);
      x[1] = add_pairs(x[2], x[3]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < 4 / kChunks<S>; ++t) {
      store(out + t * S::bytes / 4, __builtin_convertvector(x[t] + bias, F) * step);
    }
  }
}

/// Scales and masks the scores of a row and a block; tokens [lo, hi) are visible.  Returns the block's largest.
/// `key_scales` are finite or NaN.
template <class S>
inline float finish_scores(const Workspace<S>& w, int row, const float* key_scales, int lo, int hi, const Tile& tile,
                           int t) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  float* scores = w.scores + size_t(row) * kBlock;
  F top = splat<F>(kHidden);
  for (int i = 0; i < kBlock; i += lanes) {
    const F s = load<F>(scores + i) * load<F>(key_scales + i);
    store(scores + i, s);
    top = larger(s, top);
  }
  if (tile.add_mask || lo > 0 || hi < kBlock) {
    if (tile.add_mask && hi > lo) tile.add_mask(tile.context, row, t + lo, hi - lo, scores + lo);
    for (int i = 0; i < lo; ++i) scores[i] = kHidden;
    for (int i = hi; i < kBlock; ++i) scores[i] = kHidden;
    top = splat<F>(kHidden);
    for (int i = 0; i < kBlock; i += lanes) top = larger(load<F>(scores + i), top);
  }
  return reduce(top, [](F a, F b) { return larger(a, b); });
}

/// Scores to weights times `value_scales`, which are finite or NaN, in place; `block` is the largest score.  Leaves the
/// largest weight in w.step.
template <class S>
inline void soften(const Workspace<S>& w, int row, float block, const float* value_scales, const Tile& tile) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  float* scores = w.scores + size_t(row) * kBlock;
  const float old = tile.max[row];
  const float now = block > old ? block : old;
  const float base = now == kHidden ? 0 : now;
  F sum = {}, most = {}, poison = {};
  for (int i = 0; i < kBlock; i += lanes) {
    const F s = load<F>(scores + i);
    const F p = exp2_of(s - base);
    const F weight = s == splat<F>(kHidden) ? F{} : p * load<F>(value_scales + i);
    sum += p;
    most = larger(weight, most);
    poison += weight - weight;
    store(scores + i, weight);
  }
  const float factor = old == kHidden ? 0 : exp2_of(Vec<float, 16>{old - base})[0];
  tile.max[row] = now;
  tile.sum[row] = tile.sum[row] * factor + reduce(sum + poison, [](F a, F b) { return a + b; });
  w.factor[row] = factor;
  w.step[row] = reduce(most, [](F a, F b) { return larger(a, b); });
}

/// Rounds a row's weights of a block to 16 bits.
template <class S>
inline void round_weights(const Workspace<S>& w, int row, Kind kind) {
  using F = Vec<float, S::bytes>;
  using I32 = Vec<int32_t, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  const float* weights = w.scores + size_t(row) * kBlock;
  const float largest = w.step[row];
  const float inverse = largest > 1e-30f ? kLargest / largest : 0;  // below, the block is nothing
  w.step[row] = largest / kLargest * step_of(kind);
  I32 total = {};
  for (int i = 0; i < kBlock; i += lanes) {
    const F x = load<F>(weights + i) * inverse;  // within [0, kLargest], or NaN in a poisoned row: then 0
    const I32 rounded = __builtin_convertvector((x >= F{} ? x : F{}) + 0.5f, I32);
    S::put_weights(w.weights + size_t(row) * 2 * kBlockQuads, i, rounded);
    total += rounded;
  }
  w.weight_bias[row] = -S::level_offset * reduce(total, [](I32 a, I32 b) { return a + b; });
}

/// Adds the block's weighted values for `count` rows and positions p and p + 1, while `next` takes `pieces` steps for
/// every four quads.  Weights beyond the last quad are 0.
template <class S, bool bytes, int count, Kind next_kind, int pieces>
void accumulate_values(const Workspace<S>& w, int row, int p, int quads, const typename S::Table& table,
                       Feed<S, uint32_t>& next) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  typename S::Acc acc[count][2] = {};
  const uint8_t* plane = w.values + size_t(p) / (bytes ? 1 : 2) * S::bytes;
  const uint32_t* weights = w.weights + size_t(row) * 2 * kBlockQuads;
  constexpr int run = pieces > 0 ? 4 : 1;
  for (int q = 0; q < quads; q += run) {
#pragma GCC unroll 4
    for (int t = 0; t < run; ++t, plane += w.value.quad_bytes, weights += S::quad_step) {
      typename S::Levels l[2];
      look_up<S, bytes, 2>(table, plane, l);
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) {
        const uint32_t* at = weights + r * 2 * kBlockQuads;
        const auto x = S::broadcast_weights(at[0], at[S::quad_offset]);
        S::dot(acc[r][0], l[0], x);
        S::dot(acc[r][1], l[1], x);
      }
      if constexpr (pieces > 0) {
        if (t % (4 / pieces) == 4 / pieces - 1) next.template step<next_kind>();
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < count; ++r) {
    float* out = w.acc + (size_t(row + r) * w.value.positions + p) * lanes;
    const float factor = w.factor[row + r], step = w.step[row + r];
    const int32_t bias = w.weight_bias[row + r];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const F x = __builtin_convertvector(S::total(acc[r][i]) + bias, F);
      store(out + i * lanes, load<F>(out + i * lanes) * factor + x * step);
    }
  }
}

/// Scales of tokens [t, t + n) to float, 0 beyond; infinity becomes NaN.
template <class S>
inline void load_scales(const uint16_t* scales, int t, int n, float* out) {
  using F = Vec<float, S::bytes>;
  alignas(64) uint16_t padded[kBlock] = {};
  const uint16_t* from = scales + t;
  if (n < kBlock) {
    for (int i = 0; i < n; ++i) padded[i] = from[i];
    from = padded;
  }
  for (int i = 0; i < kBlock; i += S::bytes / 4) {
    const F x = load_floats<F>(from, Dtype::float16, i);
    store(out + i, x + (x - x));
  }
}

template <class S>
size_t workspace_bytes(const Tile& tile) {
  return Workspace<S>(nullptr, tile).bytes;
}

/// The levels of a kind, by plane.
template <class S>
struct Tables {
  typename S::Table at[4];
  explicit Tables(Kind kind) {
    of_kind(kind, [&]<Kind k>() {
      static constexpr LevelTables levels(k, S::level_offset);
      for (int w = 0; w < 4; ++w) at[w] = S::table(levels.at[w]);
    });
  }
};

/// Scores of a block for all rows.  `fed`: values of a kind are unpacked meanwhile.
template <class S, bool bytes, Kind next_kind, bool fed>
void score_block(const Workspace<S>& w, int rows, int quads, const typename S::Table* tables,
                 Feed<S, uint8_t>& values) {
  constexpr int some = S::score_rows;
  for (int q = 0; q < quads; q += 4) {
    int r = 0;
    const auto take = [&](auto score_rows, int count) {
      score_rows(w, r, q, tables, values);
      if (!fed) values.prefetch();
      r += count;
    };
    if (rows >= 2 * some) {  // two passes share the pieces
      while (r < 2 * some) take(score<S, bytes, some, next_kind, fed>, some);
      while (r + some <= rows) take(score<S, bytes, some, next_kind, 0>, some);
    } else if (rows >= some) {
      take(score<S, bytes, some, next_kind, 2 * fed>, some);
    }
    if (r == 0) take(score<S, bytes, 1, next_kind, 2 * fed>, 1);
    while (r < rows) take(score<S, bytes, 1, next_kind, 0>, 1);
  }
}

/// Sums of a block for all rows.  `fed`: keys of a kind are unpacked meanwhile.
template <class S, bool bytes, Kind next_kind, bool fed>
void accumulate_block(const Workspace<S>& w, int rows, int quads, const typename S::Table* tables,
                      Feed<S, uint32_t>& keys) {
  for (int p = 0; p < w.value.positions; p += 2) {
    const auto& table = tables[p / 2 % 4];  // of bytes none counts
    int r = 0;
    const auto take = [&](auto accumulate, int count) {
      accumulate(w, r, p, quads, table, keys);
      if (!fed) keys.prefetch();
      r += count;
    };
    constexpr int pieces = bytes ? 2 : 1;  // half as many steps of p
    if (fed)
      rows >= 4 ? take(accumulate_values<S, bytes, 4, next_kind, pieces>, 4)
                : take(accumulate_values<S, bytes, 1, next_kind, pieces>, 1);
    while (r + 4 <= rows) take(accumulate_values<S, bytes, 4, next_kind, 0>, 4);
    while (r < rows) take(accumulate_values<S, bytes, 1, next_kind, 0>, 1);
  }
}

/// The function that scores or accumulates a block of keys or values `own` while it unpacks `next`, if that is the same
/// number of pieces, or nothing.
template <class S>
auto scorer(bool bytes, bool fed, Kind next) {
  constexpr Kind none{4, false};
  if constexpr (S::interleaves) {
    if (fed && bytes) return score_block<S, true, Kind{8, false}, true>;
    if (fed) {
      return of_kind(next, []<Kind kind>() { return score_block<S, false, kind, true>; });
    }
  }
  return bytes ? score_block<S, true, none, false> : score_block<S, false, none, false>;
}
template <class S>
auto accumulator(bool bytes, bool fed, Kind next) {
  constexpr Kind none{4, false};
  if constexpr (S::interleaves) {
    if (fed && bytes) return accumulate_block<S, true, Kind{8, false}, true>;
    if (fed) {
      return of_kind(next, []<Kind kind>() { return accumulate_block<S, false, kind, true>; });
    }
  }
  return bytes ? accumulate_block<S, true, none, false> : accumulate_block<S, false, none, false>;
}

/// What a tile's ranges share.
template <class S>
struct Reading {
  bool fed;  // as many pieces on both sides
  Tables<S> key_tables, value_tables;
  Pieces<S> key_pieces, value_pieces;

  Reading(const Tile& tile, const Workspace<S>& w)
      : fed(S::interleaves && w.key.bytes == w.value.bytes && tile.keys.dim == tile.values.dim),
        key_tables(tile.keys.kind),
        value_tables(tile.values.kind),
        key_pieces(tile.keys.kind, tile.keys.dim),
        value_pieces(tile.values.kind, tile.values.dim) {}
};

/// The tokens [begin, end) of a range against all rows, with queries prepared.
template <class S>
void attend_blocks(const Tile& tile, const Range& range, const Reading<S>& reading, const Workspace<S>& w, int begin,
                   int end) {
  const int rows = tile.rows, shift = range.shift, kv_len = range.kv_len;
  const bool fed = reading.fed;
  const auto score_keys = scorer<S>(w.key.bytes, fed, tile.values.kind);
  const auto accumulate_values = accumulator<S>(w.value.bytes, fed, tile.keys.kind);
  const auto accumulate_last = accumulator<S>(w.value.bytes, false, tile.keys.kind);
  alignas(64) float key_scales[kBlock], value_scales[kBlock];
  for (int t = begin; t < end; t += kBlock) {
    const int n = end - t < kBlock ? end - t : kBlock, quads = (n + 3) / 4, at = t + shift;
    if (t == begin || !fed) {
      Feed<S, uint32_t>(reading.key_pieces, tile.keys, at, n, kv_len + shift, 1, w.padded, w.keys).unpack();
    }
    const int scorings = (quads + 3) / 4 * (rows / S::score_rows + rows % S::score_rows);
    Feed<S, uint8_t> values(reading.value_pieces, tile.values, at, n, kv_len + shift, scorings, w.padded, w.values);
    score_keys(w, rows, quads, reading.key_tables.at, values);
    if (!fed) values.unpack();
    load_scales<S>(tile.keys.scales, at, n, key_scales);
    load_scales<S>(tile.values.scales, at, n, value_scales);
    // In three rounds over the rows, so that the reductions of one overlap with the work of others.
    const auto within = [](int x, int most) { return x < 0 ? 0 : x > most ? most : x; };
    float largest[kTileRows];
    for (int r = 0; r < rows; ++r) {
      largest[r] =
          finish_scores<S>(w, r, key_scales, within(range.first[r] - t, kBlock), within(range.last[r] - t, n), tile, t);
    }
    for (int r = 0; r < rows; ++r) soften<S>(w, r, largest[r], value_scales, tile);
    for (int r = 0; r < rows; ++r) round_weights<S>(w, r, tile.values.kind);
    const int next = end - t - kBlock < kBlock ? end - t - kBlock : kBlock;
    const bool more = next > 0;
    Feed<S, uint32_t> keys(reading.key_pieces, tile.keys, more ? at + kBlock : at, next, kv_len + shift,
                           (rows / 4 + rows % 4) * w.value.positions / 2, w.padded, w.keys);
    (more ? accumulate_values : accumulate_last)(w, rows, quads, reading.value_tables.at, keys);
  }
}

/// The sums of a row [positions, lanes] as numbers by coordinate.
template <class S>
void gather_row(const Tile& tile, const Workspace<S>& w, int row) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  const Layout<S>& of = w.value;
  const float* at = w.acc + size_t(row) * of.positions * lanes;
  const int dim = tile.values.dim;
  float* const out = tile.acc + size_t(row) * dim;
  if (of.bytes) {
    for (int p = 0; p < of.positions; ++p, at += lanes) {
      for (int c = 0; c < kChunks<S> && coordinate<S>(true, p, c, 0) < dim; ++c) {
        __builtin_memcpy(out + coordinate<S>(true, p, c, 0), at + 4 * c, 16);
      }
    }
    return;
  }
  for (int p = 0; p < of.positions; p += 2, at += 2 * lanes) {  // positions of a plane hold its coordinates in turn
    const F even = load<F>(at), odd = load<F>(at + lanes);
    float halves[2][lanes];
    store(halves[0], interleave<float, false>(even, odd));
    store(halves[1], interleave<float, true>(even, odd));
    for (int c = 0; c < kChunks<S> && coordinate<S>(false, p, c, 0) < dim; ++c) {
      __builtin_memcpy(out + coordinate<S>(false, p, c, 0), halves[0] + 4 * c, 16);
      __builtin_memcpy(out + coordinate<S>(false, p, c, 0) + 4, halves[1] + 4 * c, 16);
    }
  }
}

/// The part of a range that some row sees, from the beginning of a block on.
struct Seen {
  int begin, end;
};
inline Seen seen_of(const Tile& tile, const Range& range) {
  int begin = range.end, end = range.begin;
  for (int r = 0; r < tile.rows; ++r) {
    if (range.first[r] >= range.last[r]) continue;
    if (range.first[r] < begin) begin = range.first[r];
    if (range.last[r] > end) end = range.last[r];
  }
  if (begin < range.begin) begin = range.begin;
  if (end > range.end) end = range.end;
  return {range.begin + (begin - range.begin) / kBlock * kBlock, end};
}

template <class S>
void attend_tile(const Tile& tile) {
  const Workspace<S> w(tile.workspace, tile);
  const int rows = tile.rows;
  __builtin_memset(w.acc, 0, size_t(rows) * w.value.positions * S::bytes);
  for (int r = 0; r < rows; ++r) {
    tile.max[r] = kHidden;
    tile.sum[r] = 0;
  }
  const Reading<S> reading(tile, w);
  bool prepared = false;
  for (int i = 0; i < tile.ranges; ++i) {
    const Seen seen = seen_of(tile, tile.range[i]);
    if (seen.begin >= seen.end) continue;
    for (int r = 0; r < rows && !prepared; ++r) prepare_query<S>(tile, r, w);
    prepared = true;
    attend_blocks<S>(tile, tile.range[i], reading, w, seen.begin, seen.end);
  }
  for (int r = 0; r < rows; ++r) gather_row<S>(tile, w, r);
}

}  // namespace
}  // namespace turboquant::cpu
