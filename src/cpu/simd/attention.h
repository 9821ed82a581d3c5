// The attention kernel: a tile of query rows against a range of packed tokens, kBlock tokens at a time.
//
// Per block: keys are unpacked to nibbles, looked up and multiplied with the rows' queries in integers, which gives the
// scores; an online softmax (softmax.h, here in base 2 and for a block at a time) turns them to weights, the values'
// scales fold into the weights, and these are rounded to 16 bits relative to the block's largest; values are unpacked,
// looked up and accumulated in integers, which are added to the float result once per block.  Unpacking happens between
// the multiplications where registers suffice: values during the scores, the next keys during the sums.
//
// Queries and weights are 16-bit integers (of high and low int8 parts where dot products are of bytes), |w| <=
// kLargest. Hidden tokens have the score minus infinity, and nothing of theirs is read after that.  NaN and infinity of
// a visible key's or value's scale, or in q, make the row's sum NaN.
#pragma once

#include "cpu/simd/hadamard.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/unpack.h"

namespace turboquant::cpu {
namespace {

constexpr float kLargest = 32512;  // 127 * 256: the high byte stays below 128 after rounding
constexpr float kHidden = -__builtin_inff();
constexpr int kBlockQuads = kBlock / 4;

/// Where things lie in the workspace.
template <class S>
struct Workspace {
  uint8_t *keys, *values;             // planes of a block: [kBlockQuads, positions / 2]
  uint32_t* padded;                   // the packed rows of a block
  uint8_t* queries;                   // [rows, positions, 2 vectors]
  float* acc;                         // [rows, positions, lanes]
  float* scores;                      // [rows, kBlock]
  uint32_t* weights;                  // [rows, 2 * kBlockQuads]
  float *factor, *step;               // [rows] of the block: what scales the old accumulator, a unit of weight
  float* query_step;                  // [rows] a unit of integer query, times the scale of scores
  int32_t *query_bias, *weight_bias;  // [rows] what undoes level_offset
  size_t bytes;

  Workspace(std::byte* base, int dim, int rows) {
    const int pos = positions<S>(dim);
    size_t at = 0;
    auto take = [&]<class T>(T*& p, size_t count) {
      p = reinterpret_cast<T*>(base + at);
      at += (count * sizeof(T) + 63) / 64 * 64;
    };
    take(keys, size_t(kBlockQuads) * pos / 2 * S::bytes);
    values = keys;
    if (S::interleaves) take(values, size_t(kBlockQuads) * pos / 2 * S::bytes);
    take(padded, size_t(kBlock) * words_per_vector(4, dim) + 4);
    take(queries, size_t(rows) * pos * 2 * S::bytes);
    take(acc, size_t(rows) * pos * S::bytes / 4);
    take(scores, size_t(rows) * kBlock);
    take(weights, size_t(rows) * 2 * kBlockQuads);
    take(factor, rows);
    take(step, rows);
    take(query_step, rows);
    take(query_bias, rows);
    take(weight_bias, rows);
    bytes = at;
  }
};

/// Rotates and rounds the query of a row, and lays it out by position.
template <class S>
void prepare_query(const Tile& tile, int row, const Workspace<S>& w) {
  using F = Vec<float, S::bytes>;
  using I32 = Vec<int32_t, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  alignas(64) float x[256];
  alignas(64) int32_t rounded[256 + 96] = {};  // groups beyond dim (of a vector's last chunks) stay 0
  F largest = {}, poison = {};
  for (int i = 0; i < tile.dim; i += lanes) {
    store(x + i, load_floats<F>(tile.q[row], tile.q_dtype, i) * load<F>(tile.signs + i));
  }
  hadamard<F>(x, tile.dim);
  for (int i = 0; i < tile.dim; i += lanes) {
    const F v = absolute(load<F>(x + i));
    largest = larger(v, largest);
    poison += v - v;  // NaN if v is not finite
  }
  const float top = reduce(largest, [](F a, F b) { return larger(a, b); });
  const float bad = reduce(poison, [](F a, F b) { return a + b; });
  const bool usable = top > 1e-30f && bad == 0;
  const float inverse = usable ? kLargest / top : 0;
  w.query_step[row] = (usable ? top / kLargest : bad) * tile.scale * level_step(tile.keys.bits) * 1.44269504f;
  int32_t sum = 0;
  if (usable) {
    I32 total = {};
    for (int i = 0; i < tile.dim; i += lanes) {
      const F v = load<F>(x + i) * inverse;
      const F magic = splat<F>(12582912.0f);  // rounds to the nearest integer
      const I32 r = __builtin_convertvector((v + magic) - magic, I32);
      store(rounded + i, r);
      total += r;
    }
    sum = reduce(total, [](I32 a, I32 b) { return a + b; });
  }
  w.query_bias[row] = -S::level_offset * sum;
  const int pos = positions<S>(tile.dim);
  uint32_t* out = reinterpret_cast<uint32_t*>(w.queries + size_t(row) * pos * 2 * S::bytes);
  alignas(64) uint32_t a[8 * 8 + 24], b[8 * 8 + 24];  // by group and position within it
  for (int g = 0; g < pos / 8 * kChunks<S>; ++g) S::prepare(rounded + 32 * g, a + 8 * g, b + 8 * g);
  for (int p = 0; p < pos; ++p, out += 2 * lanes) {
    for (int c = 0; c < kChunks<S>; ++c) {  // a quad for each of the four tokens of a chunk
      const int at = 8 * (p / 8 * kChunks<S> + c) + p % 8;
      store(out + 4 * c, splat<Vec<uint32_t, 16>>(a[at]));
      store(out + lanes + 4 * c, splat<Vec<uint32_t, 16>>(b[at]));
    }
  }
}

/// Scores of 16 tokens for `count` rows from `row` on, while `next` takes `pieces` steps for every two planes.
template <class S, int count, int pieces, class Next>
void score(const Workspace<S>& w, int pos, int row, int quad, typename S::Table table, Next& next) {
  using F = Vec<float, S::bytes>;
  using I32 = Vec<int32_t, S::bytes>;
  const int64_t quad_bytes = int64_t(pos) / 2 * S::bytes, row_bytes = int64_t(pos) * 2 * S::bytes;
  const uint8_t* planes = w.keys + quad * quad_bytes;
  const uint8_t* queries = w.queries + row * row_bytes;
  typename S::Acc acc[count][4] = {};
  constexpr int run = pieces > 0 ? 2 : 1;
  for (int p = 0; p < pos; p += 2 * run) {
#pragma GCC unroll 2
    for (int i = 0; i < run; ++i, planes += S::bytes, queries += 4 * S::bytes) {
      typename S::Weights q[2][count];
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) {
        q[0][r] = S::load_weights(queries + r * row_bytes);
        q[1][r] = S::load_weights(queries + r * row_bytes + 2 * S::bytes);
      }
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        typename S::Levels l[2];
        look_up<S>(table, planes + t * quad_bytes, l);
#pragma GCC unroll 4
        for (int r = 0; r < count; ++r) S::dot(acc[r][t], l[0], q[0][r]);
#pragma GCC unroll 4
        for (int r = 0; r < count; ++r) S::dot(acc[r][t], l[1], q[1][r]);
      }
      if constexpr (pieces > 0) {
        if (i < pieces) next.step();
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
      x[0] = fold(fold(x[0], x[1]), fold(x[2], x[3]));
    } else if constexpr (kChunks<S> == 2) {
      x[0] = fold(x[0], x[1]);
      x[1] = fold(x[2], x[3]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < 4 / kChunks<S>; ++t) {
      store(out + t * S::bytes / 4, __builtin_convertvector(x[t] + bias, F) * step);
    }
  }
}

/// Scales and masks the scores of a row and a block, of which [lo, hi) are visible; returns the block's largest.
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
inline void round_weights(const Workspace<S>& w, int row, int value_bits) {
  using F = Vec<float, S::bytes>;
  using I32 = Vec<int32_t, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  const float* weights = w.scores + size_t(row) * kBlock;
  const float largest = w.step[row];
  const float inverse = largest > 1e-30f ? kLargest / largest : 0;  // below, the block is nothing
  w.step[row] = largest / kLargest * level_step(value_bits);
  I32 total = {};
  for (int i = 0; i < kBlock; i += lanes) {
    const F x = load<F>(weights + i) * inverse;  // within [0, kLargest], or NaN in a poisoned row: then 0
    const I32 rounded = __builtin_convertvector((x >= F{} ? x : F{}) + 0.5f, I32);
    S::put_weights(w.weights + size_t(row) * 2 * kBlockQuads, i, rounded);
    total += rounded;
  }
  w.weight_bias[row] = -S::level_offset * reduce(total, [](I32 a, I32 b) { return a + b; });
}

/// Adds the block's weighted values for `count` rows and two positions, while `next` takes `pieces` steps for every
/// four quads.  Weights beyond the last quad are 0.
template <class S, int count, int pieces, class Next>
void weigh(const Workspace<S>& w, int pos, int row, int p, int quads, typename S::Table table, Next& next) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  typename S::Acc acc[count][2] = {};
  const uint8_t* plane = w.values + size_t(p) / 2 * S::bytes;
  const uint32_t* weights = w.weights + size_t(row) * 2 * kBlockQuads;
  constexpr int run = pieces > 0 ? 4 : 1;
  for (int q = 0; q < quads; q += run) {
#pragma GCC unroll 4
    for (int t = 0; t < run; ++t, plane += size_t(pos) / 2 * S::bytes, weights += S::quad_step) {
      typename S::Levels l[2];
      look_up<S>(table, plane, l);
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) {
        const uint32_t* at = weights + r * 2 * kBlockQuads;
        const auto x = S::broadcast_weights(at[0], at[S::quad_offset]);
        S::dot(acc[r][0], l[0], x);
        S::dot(acc[r][1], l[1], x);
      }
    }
    if constexpr (pieces > 0) next.step();
  }
#pragma GCC unroll 4
  for (int r = 0; r < count; ++r) {
    float* out = w.acc + (size_t(row + r) * pos + p) * lanes;
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
size_t workspace_bytes(int dim, int rows) {
  return Workspace<S>(nullptr, dim, rows).bytes;
}

/// The tokens [begin, end) against all rows, with queries prepared and accumulators at 0.
template <class S, int key_bits, int value_bits>
void attend_blocks(const Tile& tile, const Workspace<S>& w, int begin, int end) {
  using Keys = Feed<S, key_bits, uint32_t>;
  using Values = Feed<S, value_bits, uint8_t>;
  constexpr int some = S::score_rows, fed = S::interleaves;
  const int pos = positions<S>(tile.dim), rows = tile.rows;
  constexpr LevelTable key_levels(key_bits, S::level_offset), value_levels(value_bits, S::level_offset);
  const auto key_table = S::table(key_levels.at), value_table = S::table(value_levels.at);
  const Pieces<S> key_pieces(key_bits, tile.dim), value_pieces(value_bits, tile.dim);
  alignas(64) float key_scales[kBlock], value_scales[kBlock];
  for (int t = begin; t < end; t += kBlock) {
    const int n = end - t < kBlock ? end - t : kBlock, quads = (n + 3) / 4;
    if (t == begin || !fed) {
      Keys(key_pieces, tile.keys, tile.dim, t, n, tile.kv_len, 1, w.padded, w.keys).unpack();
    }
    const int scorings = (quads + 3) / 4 * (rows / some + rows % some);
    Values values(value_pieces, tile.values, tile.dim, t, n, tile.kv_len, scorings, w.padded, w.values);
    for (int q = 0; q < quads; q += 4) {
      int r = 0;
      const auto take = [&](auto score_rows, int count) {
        score_rows(w, pos, r, q, key_table, values);
        if (!fed) values.prefetch();
        r += count;
      };
      if (rows >= 2 * some) {  // two passes share the pieces
        while (r < 2 * some) take(score<S, some, fed, Values>, some);
        while (r + some <= rows) take(score<S, some, 0, Values>, some);
      } else if (rows >= some) {
        take(score<S, some, 2 * fed, Values>, some);
      }
      if (r == 0) take(score<S, 1, 2 * fed, Values>, 1);
      while (r < rows) take(score<S, 1, 0, Values>, 1);
    }
    if (!fed) values.unpack();
    load_scales<S>(tile.keys.scales, t, n, key_scales);
    load_scales<S>(tile.values.scales, t, n, value_scales);
    // In three rounds over the rows, so that the reductions of one overlap with the work of others.
    const auto within = [](int x, int most) { return x < 0 ? 0 : x > most ? most : x; };
    float largest[kTileRows];
    for (int r = 0; r < rows; ++r) {
      largest[r] =
          finish_scores<S>(w, r, key_scales, within(tile.first[r] - t, kBlock), within(tile.last[r] - t, n), tile, t);
    }
    for (int r = 0; r < rows; ++r) soften<S>(w, r, largest[r], value_scales, tile);
    for (int r = 0; r < rows; ++r) round_weights<S>(w, r, value_bits);
    const int next = end - t - kBlock < kBlock ? end - t - kBlock : kBlock;
    const bool more = next > 0;
    Keys keys(key_pieces, tile.keys, tile.dim, more ? t + kBlock : t, next, tile.kv_len,
              (rows / 4 + rows % 4) * pos / 2, w.padded, w.keys);
    for (int p = 0; p < pos; p += 2) {
      int r = 0;
      const auto take = [&](auto weigh_rows, int count) {
        weigh_rows(w, pos, r, p, quads, value_table, keys);
        if (!fed) keys.prefetch();
        r += count;
      };
      if (more) rows >= 4 ? take(weigh<S, 4, fed, Keys>, 4) : take(weigh<S, 1, fed, Keys>, 1);
      while (r + 4 <= rows) take(weigh<S, 4, 0, Keys>, 4);
      while (r < rows) take(weigh<S, 1, 0, Keys>, 1);
    }
  }
}

template <class S, int key_bits>
void attend_blocks(const Tile& tile, const Workspace<S>& w, int begin, int end) {
  (tile.values.bits == 2   ? attend_blocks<S, key_bits, 2>
   : tile.values.bits == 3 ? attend_blocks<S, key_bits, 3>
                           : attend_blocks<S, key_bits, 4>)(tile, w, begin, end);
}

template <class S>
void attend_tile(const Tile& tile) {
  const Workspace<S> w(tile.workspace, tile.dim, tile.rows);
  const int pos = positions<S>(tile.dim), rows = tile.rows;
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  __builtin_memset(w.acc, 0, size_t(rows) * pos * S::bytes);
  int begin = tile.end, end = tile.begin;
  for (int r = 0; r < rows; ++r) {
    tile.max[r] = kHidden;
    tile.sum[r] = 0;
    if (tile.first[r] >= tile.last[r]) continue;
    if (tile.first[r] < begin) begin = tile.first[r];
    if (tile.last[r] > end) end = tile.last[r];
  }
  if (begin < tile.begin) begin = tile.begin;
  if (end > tile.end) end = tile.end;
  begin = tile.begin + (begin - tile.begin) / kBlock * kBlock;
  if (begin < end) {
    for (int r = 0; r < rows; ++r) prepare_query<S>(tile, r, w);
    (tile.keys.bits == 2   ? attend_blocks<S, 2>
     : tile.keys.bits == 3 ? attend_blocks<S, 3>
                           : attend_blocks<S, 4>)(tile, w, begin, end);
  }
  for (int r = 0; r < rows; ++r) {  // positions of a plane hold its coordinates in turn
    for (int p = 0; p < pos; p += 2) {
      const float* at = w.acc + (size_t(r) * pos + p) * lanes;
      const F even = load<F>(at), odd = load<F>(at + lanes);
      float halves[2][lanes];
      store(halves[0], interleave<float, false>(even, odd));
      store(halves[1], interleave<float, true>(even, odd));
      for (int c = 0; c < kChunks<S> && coordinate<S>(p, c, 0) < tile.dim; ++c) {
        float* out = tile.acc + size_t(r) * tile.dim + coordinate<S>(p, c, 0);
        __builtin_memcpy(out, halves[0] + 4 * c, 16);
        __builtin_memcpy(out + 4, halves[1] + 4 * c, 16);
      }
    }
  }
}

}  // namespace
}  // namespace turboquant::cpu
