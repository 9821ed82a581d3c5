// Attention for few queries.  A threadgroup serves R rows of one KV head and one split of the keys; its SIMD-groups
// take blocks of 32 tokens in turn and keep their own softmax; at the end their results are added up.
//
// Scores: eight lanes share a token (fewer for small D, 16 beyond 256), a group of 32 coordinates each, so that a code
// is unpacked once for R rows.  Values: four lanes share a group, eight coordinates each, so that R * 8 sums fit the
// registers; beyond D = 256 a lane has two such shares.  Scalar codes of 2 bits have functions of their own.

#pragma once

#include "metal/device/attention.metal"
#include "metal/device/few_rows_pairs.metal"
#include "metal/device/few_rows_shared.metal"

namespace turboquant {

/// Adds up R sums over the first `lanes` lanes of each aligned set, halving the rows a lane keeps while it can: this
/// lane ends with the rows from `row` on, in front.
template <int R, int LANES>
int sum_over_lanes(thread float* sums, ushort lane) {
  int rows = R, row = 0;
  TQ_UNROLL
  for (ushort step = 1; step < LANES; step = ushort(2 * step)) {
    const bool upper = lane & step;
    if (rows > 1) {
      rows /= 2;
      TQ_UNROLL
      for (int i = 0; i < rows; ++i) {
        const float send = select(sums[i + rows], sums[i], upper), keep = select(sums[i], sums[i + rows], upper);
        sums[i] = keep + exchange(send, step);
      }
      row += upper ? rows : 0;
    } else {
      sums[0] += exchange(sums[0], step);
    }
  }
  return row;
}

/// Dot products of the R queries with the levels of 32 tokens from `block` on, into scores[row][token].
template <class K, int D, int R, class Shared, class Codes>
void score_block(Shared shared, Codes codes, int block, int last, const thread half2* q, ushort lane,
                 ushort simdgroup) {
  constexpr int groups = D / 32, stored = K::kBits * groups, lanes = lanes_per_token(D), tokens = 32 / lanes;
  constexpr int kept = lanes < R ? R / lanes : 1;
  const int group = min(int(lane) % lanes, groups - 1);
  auto its_group = codes + (long(block) * stored + group * K::kBits);
  for (int t = lane / lanes; t < metal_layout::kBlock; t += tokens) {
    const int at = min(t, last - 1 - block) * stored;
    uint packed[K::kBits], words[K::kWords];
    TQ_UNROLL
    for (int w = 0; w < K::kBits; ++w) packed[w] = its_group[at + w];
    Group<K>::unpack(packed, words);
    float sums[R] = {};
    TQ_UNROLL
    for (int i = 0; i < 16; ++i) {
      const int word = i / K::kPairs;
      const Pair levels = level_pair<K>(shared->key_table + table_of<K>(word), words[word], i % K::kPairs);
      TQ_UNROLL
      for (int r = 0; r < R; ++r) {
        const half2 pair = q[16 * r + i];
        sums[r] = fma(float(pair.x), levels.x, fma(float(pair.y), levels.y, sums[r]));
      }
    }
    const int row = sum_over_lanes<R, lanes>(sums, lane);
    if (lane % lanes < R) {  // lanes beyond hold what these hold
      TQ_UNROLL
      for (int i = 0; i < kept; ++i) shared->scores[simdgroup][(row + i) * metal_layout::kBlock + t] = sums[i];
    }
  }
}

/// Adds weights[token][row] times the levels of `count` tokens from `block` on, to 8 sums of a row and share.
template <class K, class V, int D, int R, class Shared, class Codes>
void accumulate_values(Shared shared, Codes codes, int block, int count, thread float* x, ushort lane, ushort simdgroup) {
  constexpr int groups = D / 32, stored = V::kBits * groups, slices = value_slices(D);
  constexpr int lanes = 4 * lanes_per_token(D) / slices, tokens = 32 / lanes;
  const Quarter<V> quarter = {ushort(lane % 4)};
  const auto table = value_table<K, V>(shared) + table_of<V>(lane % 4);
  auto its_block = codes + long(block) * stored;
  // As many times for all lanes; none beyond the last token if a SIMD-group takes one at a time.
  for (int begin = 0; begin < count; begin += tokens) {
    const int t = begin + lane / lanes, token = (tokens == 1 ? begin : min(t, count - 1)) * stored;
    TQ_UNROLL
    for (int s = 0; s < slices; ++s) {
      const int group = min((int(lane) % lanes + lanes * s) / 4, groups - 1);
      uint words[4 / V::kPairs];
      quarter.unpack(its_block + (token + group * V::kBits), words);
      const typename RowVector<R>::type weights = shared->weights[simdgroup][t];
      TQ_UNROLL
      for (int j = 0; j < 4; ++j) {
        const Pair levels = level_pair<V>(table, words[j / V::kPairs], j % V::kPairs);
        TQ_UNROLL
        for (int r = 0; r < R; ++r) {
          thread float* its = x + (8 * (R * s + r) + 2 * j);
          its[0] = fma(weights[r], levels.x, its[0]);
          its[1] = fma(weights[r], levels.y, its[1]);
        }
      }
    }
  }
}

/// The R queries, rotated and divided by their largest coordinates: pairs of halves, or, for key_pairs, floats in x.
template <class K, int D, int R, class Shared, class Query, class Params, class Starts>
void load_queries(Shared shared, Query query, Params params, Starts starts, int first, Place place) {
  const ushort lane = place.lane;
  const int kv_heads = params[metal_layout::kKvHeads], kv = place.group.z % kv_heads, b = place.group.z / kv_heads;
  for (int r = place.simdgroup; r < R; r += metal_layout::kFewRowsSimdgroups) {
    const Row row = find_row(params, starts, first + r, kv, b);
    float x[D / 32] = {};
    if (row.query < params[metal_layout::kQueryLen]) load_query<D>(x, query, row, params, lane);
    const float factor = normalise_query<K, D>(x, params);
    TQ_UNROLL
    for (int i = 0; i < D / 32; ++i) {
      if (K::kPairTables) {
        shared->x[r][32 * i + lane] = x[i];
      } else {
        const float other = exchange(x[i], pair_distance<K>());
        if (!(lane & pair_distance<K>())) {
          shared->q[r][16 * i + pair_index<K>(lane)] = half2(half(x[i]), half(other));
        }
      }
    }
    if (lane == 0) shared->factor[r] = factor;
  }
}

/// What a SIMD-group keeps of R rows.  x is in units of exp2(m), or, with pairs of values, of exp2(mv): mv is the
/// maximum of the scores with the values' scales in them, which keeps the weights in the range and precision of half.
template <int D, int R>
struct Softmax {
  float m[R], mv[R], sum[R];
  float x[8 * R * value_slices(D)];
};

/// The softmax goes on to the scores of a lane's token: puts its weights into shared memory and rescales the sums.
template <class V, int D, int R, class Shared>
void add_scores(Shared shared, thread Softmax<D, R>& softmax, const thread float* scores, float scale_v, ushort lane,
                ushort simdgroup) {
  const float log2_scale_v = V::kPairTables ? log2(scale_v) : 0.0f;
  typename RowVector<R>::type weights;
  TQ_UNROLL
  for (int r = 0; r < R; ++r) {
    const float score = scores[r], top = fmax(softmax.m[r], simd_max(score));
    const float weight = exp2_difference(score, top);
    float old = exp2_difference(softmax.m[r], top);
    softmax.m[r] = top;
    softmax.sum[r] = fma(softmax.sum[r], old, weight);
    // A hidden key may hold anything; 0 * NaN must not get through.
    const bool hidden = score == -INFINITY;
    if (V::kPairTables) {
      const float with_scale = hidden ? -INFINITY : score + log2_scale_v;
      const float top_v = fmax(softmax.mv[r], simd_max(with_scale));
      old = exp2_difference(softmax.mv[r], top_v);
      softmax.mv[r] = top_v;
      weights[r] = exp2_difference(with_scale, top_v);
    } else {
      weights[r] = hidden ? 0.0f : weight * scale_v;
    }
    TQ_UNROLL
    for (int s = 0; s < value_slices(D); ++s) {
      TQ_UNROLL
      for (int i = 0; i < 8; ++i) softmax.x[8 * (R * s + r) + i] *= old;
    }
  }
  shared->weights[simdgroup][lane] = weights;
}

/// Adds up the sums of all SIMD-groups, one after another, in memory for one.
template <class V, int D, int R, class Shared>
void add_simdgroups(Shared shared, thread Softmax<D, R>& softmax, ushort lane, ushort simdgroup) {
  constexpr int slices = value_slices(D), shares = 4 * (D / 32);
  TQ_UNROLL
  for (int r = 0; r < R; ++r) {
    softmax.sum[r] = simd_sum(softmax.sum[r]);
    if (lane == 0) {
      shared->m[simdgroup][r] = softmax.m[r];
      shared->sum[simdgroup][r] = softmax.sum[r];
    }
    for (ushort step = ushort(4 * lanes_per_token(D) / slices); step < 32; step = ushort(2 * step)) {
      TQ_UNROLL
      for (int i = 0; i < 8; ++i) softmax.x[8 * r + i] += exchange(softmax.x[8 * r + i], step);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int g = 0; g < metal_layout::kFewRowsSimdgroups; ++g) {
    if (g == simdgroup) {
      TQ_UNROLL
      for (int s = 0; s < slices; ++s) {
        const int share = lane + 32 * s;
        if (share >= shares) continue;
        TQ_UNROLL
        for (int r = 0; r < R; ++r) {
          float top = shared->m[0][r];
          for (int o = 1; o < metal_layout::kFewRowsSimdgroups; ++o) top = fmax(top, shared->m[o][r]);
          const float factor = exp2_difference(V::kPairTables ? softmax.mv[r] : softmax.m[r], top) *
                               level_step(V::kBits, V::kTrellis);
          TQ_UNROLL
          for (int i = 0; i < 8; ++i) {
            const int d = 8 * share + coordinate_of_sum<V>(i);
            shared->x[r][d] = (g == 0 ? 0.0f : shared->x[r][d]) + softmax.x[8 * (R * s + r) + i] * factor;
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

/// The kernel.  place.group: (row tile, split, batch * KV heads + KV head); the tiles that read the same codes start
/// side by side.
template <class K, class V, int D, int R, class Shared, class Query, class Keys, class Values, class Rules,
          class Partials>
void attend_few_rows(Shared shared, Query query, Keys keys, Values values, Rules rules, Partials out, Place place) {
  constexpr int lanes = lanes_per_token(D);
  static_assert(sizeof(FewRowsShared<K, V, D, R>) <= metal_layout::kThreadgroupBytes, "too much threadgroup memory");
  const auto params = rules.params;
  const ushort lane = place.lane, simdgroup = place.simdgroup;
  const int kv_heads = params[metal_layout::kKvHeads];
  const int tile = place.group.x, split = place.group.y, kv = place.group.z % kv_heads, b = place.group.z / kv_heads;
  const ushort thread_index = ushort(32 * simdgroup + lane);
  if (!K::kPairTables) fill_table<K, metal_layout::kFewRowsThreads>(shared->key_table + 0, thread_index);
  if (!V::kPairTables && !same_coding<K, V>()) {
    fill_table<V, metal_layout::kFewRowsThreads>(shared->value_table + 0, thread_index);
  }
  load_queries<K, D, R>(shared, query, params, rules.starts, tile * R, place);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  Row rows[R];
  TQ_UNROLL
  for (int r = 0; r < R; ++r) rows[r] = find_row(params, rules.starts, tile * R + r, kv, b);
  if (K::kPairTables) {
    fill_key_pairs<D, R>(shared, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  // Lanes without a group of their own have a query of zeros.
  half2 mine[16 * R];
  TQ_UNROLL
  for (int r = 0; r < R; ++r) {
    TQ_UNROLL
    for (int i = 0; i < 16; ++i) {
      const int group = lane % lanes;
      mine[16 * r + i] =
          !K::kPairTables && group < D / 32 ? shared->q[r][16 * group + i] : half2(half(0.0f), half(0.0f));
    }
  }
  const auto key_codes = codes_of_head(keys, b, kv), value_codes = codes_of_head(values, b, kv);
  const auto key_scales = scales_of_head(keys, b, kv), value_scales = scales_of_head(values, b, kv);
  const int2 range = split_range(params, rules.starts, tile * R, (tile + 1) * R, kv, b, split);

  Softmax<D, R> softmax;
  TQ_UNROLL
  for (int r = 0; r < R; ++r) {
    softmax.m[r] = softmax.mv[r] = -INFINITY;
    softmax.sum[r] = 0.0f;
  }
  TQ_UNROLL
  for (int i = 0; i < 8 * R * value_slices(D); ++i) softmax.x[i] = 0.0f;
  const int2 tokens = tokens_of_ring(rules, tile * R, (tile + 1) * R, kv, b);
  for (int block = range.x + metal_layout::kBlock * simdgroup; block < range.y; block += metal_layout::kFewRowsThreads) {
    if (!is_read(rules, tokens, block)) continue;
    float scores[R];
    if (K::kPairTables) {
      score_pairs<D, R>(shared, key_codes, block, range.y, scores, lane);
    } else {
      score_block<K, D, R>(shared, key_codes, block, range.y, mine, lane, simdgroup);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      TQ_UNROLL
      for (int r = 0; r < R; ++r) scores[r] = shared->scores[simdgroup][r * metal_layout::kBlock + lane];
    }
    const int t = min(block + lane, range.y - 1);
    const float scale_k = checked_scale(float(key_scales[t])), scale_v = checked_scale(float(value_scales[t]));
    TQ_UNROLL
    for (int r = 0; r < R; ++r) {
      const float score = scores[r] * (scale_k * shared->factor[r]);
      scores[r] = block + lane < range.y ? masked(score, rows[r], t, rules) : -INFINITY;
    }
    add_scores<V>(shared, softmax, scores, scale_v, lane, simdgroup);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const int count = min(range.y - block, int(metal_layout::kBlock));
    if (V::kPairTables) {
      add_value_pairs<D, R>(shared, value_codes, block, count, softmax.x, lane, simdgroup);
    } else {
      accumulate_values<K, V, D, R>(shared, value_codes, block, count, softmax.x, lane, simdgroup);
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  add_simdgroups<V>(shared, softmax, lane, simdgroup);
  for (int r = simdgroup; r < R; r += metal_layout::kFewRowsSimdgroups) {
    const Row row = find_row(params, rules.starts, tile * R + r, kv, b);
    if (row.query >= params[metal_layout::kQueryLen]) continue;
    float top = shared->m[0][r], total = 0.0f;
    for (int o = 1; o < metal_layout::kFewRowsSimdgroups; ++o) top = fmax(top, shared->m[o][r]);
    for (int o = 0; o < metal_layout::kFewRowsSimdgroups; ++o) {
      total += shared->sum[o][r] * exp2_difference(shared->m[o][r], top);
    }
    float y[D / 32];
    TQ_UNROLL
    for (int i = 0; i < D / 32; ++i) y[i] = shared->x[r][32 * i + lane];
    write_partial<D>(top, total, y, row, split, out, params, lane);
  }
}

}  // namespace turboquant
