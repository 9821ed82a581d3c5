// Attention for many rows.  A threadgroup serves 32 rows of one KV head; each of its four SIMD-groups owns eight, with
// their queries and sums in matrix fragments.  Blocks of 32 keys, then values, are unpacked to half levels (exact) in
// threadgroup memory.  The workspace is that memory alone, whatever the lengths.
//
// Key scales multiply the scores.  Value scales multiply the weights before these are rounded to half, with a
// maximum of their own (mv, over s + log2 scale), so that neither large nor tiny scales lose precision.

#pragma once

#include "metal/device/attention.metal"

namespace turboquant {

/// Row pitches in threadgroup memory; padded, so that the rows of a fragment start in different banks.
constexpr int tile_pitch(int dim) { return dim + 8; }
enum Pitch { kScorePitch = metal_layout::kBlock + 4, kWeightPitch = metal_layout::kBlock + 8 };

/// Entries of a table: one for each pair of scalar codes, or for each single trellis code, whose pairs would take 4 KiB.
template <class K>
constexpr int prefill_table_size() {
  return K::kTrellis ? 64 : table_size<K>();
}
template <class K, class Table>
void fill_prefill_table(Table table, ushort thread_index) {
  if (!K::kTrellis) {
    fill_table<K, metal_layout::kThreads>(table, thread_index);
  } else if (thread_index < 64) {
    const half level = half(float(nibble_level<K>(thread_index / 16, thread_index % 16)));
    table[thread_index] = half2(level, level);
  }
}

/// Threadgroup memory.
template <class K, class V, int D>
struct PrefillShared {
  TQ_ARRAY(half2, key_table, prefill_table_size<K>());
  TQ_ARRAY(half2, value_table, prefill_table_size<V>());
  TQ_ARRAY(half, tile, metal_layout::kBlock * (D + 8));  // queries, keys or values
  TQ_ARRAY2(float, scores, metal_layout::kSimdgroups, 8 * kScorePitch);
  TQ_ARRAY2(half, weights, metal_layout::kSimdgroups, 8 * kWeightPitch);
  TQ_ARRAY2(float, diagonal, metal_layout::kSimdgroups, 64);
  TQ_ARRAY(float, key_scale, metal_layout::kBlock);
  TQ_ARRAY(float, log2_value_scale, metal_layout::kBlock);
};

/// Unpacks 32 tokens from `block` on into the tile; rows beyond the last repeat it.
template <class K, int D, class Table, class Tile, class Codes>
void unpack_tile(Table table, Tile tile, Codes codes, int block, int last, ushort thread_index) {
  constexpr int groups = D / 32;
  for (int i = thread_index; i < metal_layout::kBlock * groups; i += metal_layout::kThreads) {
    const int t = i / groups, group = i % groups;
    const long at = (long(min(block + t, last - 1)) * groups + group) * K::kBits;
    uint packed[K::kBits], words[K::kWords];
    TQ_UNROLL
    for (int w = 0; w < K::kBits; ++w) packed[w] = codes[at + w];
    Group<K>::unpack(packed, words);
    auto row = tile + (t * tile_pitch(D) + 32 * group);
    if (K::kTrellis) {
      TQ_UNROLL
      for (int i = 0; i < 32; ++i) {
        const half2 level = table[16 * (i / 8) + nibble_of(words[i / 8], i % 8)];
        row[i] = level.x;
      }
      continue;
    }
    TQ_UNROLL
    for (int i = 0; i < 16; ++i) {
      const int word = i / K::kPairs, first = pair_start<K>(i);
      const Pair levels = level_pair<K>(table, words[word], i % K::kPairs);
      row[first] = half(levels.x);
      row[first + pair_distance<K>()] = half(levels.y);
    }
  }
}

/// The softmax of a row: the largest score, the largest score plus log2 of its value's scale, the sum of exponentials.
struct PrefillSoftmax {
  float m, mv, sum;
};

/// Where rows end.  With FINISH there is one split, and x is the output.
template <bool FINISH>
struct PrefillEnd {
  template <class T, int D, class Ending, class Out, class Params>
  static void row(PrefillSoftmax softmax, thread float* x, Row row, int, Ending ending, Out out, Params params,
                  ushort lane) {
    finish_row<T, D>(softmax.m, softmax.sum, x, row, ending, out.x, params, lane);
  }
};
template <>
struct PrefillEnd<false> {
  template <class T, int D, class Ending, class Out, class Params>
  static void row(PrefillSoftmax softmax, thread float* x, Row row, int split, Ending, Out out, Params params,
                  ushort lane) {
    write_partial<D>(softmax.m, softmax.sum, x, row, split, out, params, lane);
  }
};

/// Halves that hold a number of a query.
template <class T>
constexpr int query_parts() {
  return sizeof(T) == 4 ? 2 : 1;
}

/// Eight rows of queries from `its_row` on, rotated and scaled, as fragments; `tile` is used on the way.  A query in
/// single precision is kept as the sum of two halves, `parts`; one in half precision is not worth more than one.  Returns
/// what turns dot products of row lane / 4 into scores.
template <class T, class K, int D, class Tile, class Rules, class Ending>
float load_queries(thread simdgroup_half8x8* query, Tile tile, int its_row, Rules rules, Ending ending, Place place) {
  constexpr int registers = D / 32, fragments = D / 8, pitch = tile_pitch(D), parts = query_parts<T>();
  const ushort lane = place.lane;
  const int kv = place.group.y, b = place.group.z / rules.params[metal_layout::kSplits];
  float factor = 0.0f;
  TQ_UNROLL
  for (int part = 0; part < parts; ++part) {
    TQ_UNROLL
    for (int i = 0; i < 8; ++i) {
      const Row row = find_row(rules.params, rules.starts, its_row + i, kv, b);
      float x[registers] = {};
      if (row.query < rules.params[metal_layout::kQueryLen]) load_query<D>(x, ending.query, row, rules.params, lane);
      const float its_factor = normalise_query<K, D>(x, rules.params);
      if (i == lane / 4) factor = its_factor;
      TQ_UNROLL
      for (int k = 0; k < registers; ++k) {
        const half rounded = half(x[k]);
        tile[(8 * place.simdgroup + i) * pitch + 32 * k + lane] = part ? half(x[k] - float(rounded)) : rounded;
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    TQ_UNROLL
    for (int i = 0; i < fragments; ++i) {
      simdgroup_load(query[part * fragments + i], tile + (8 * place.simdgroup * pitch + 8 * i), pitch);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  return factor;
}

/// Dot products of eight rows with the 32 keys of the tile, to scores[row][key].
template <int PARTS, int D, class Tile, class Scores>
void score_tile(const thread simdgroup_half8x8* query, Tile tile, Scores scores) {
  constexpr int fragments = D / 8, pitch = tile_pitch(D);
  TQ_UNROLL
  for (int k = 0; k < 4; ++k) {
    simdgroup_float8x8 dots = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    TQ_UNROLL
    for (int i = 0; i < fragments; ++i) {
      simdgroup_half8x8 keys;
      simdgroup_load(keys, tile + (8 * k * pitch + 8 * i), pitch, ulong2(0, 0), true);
      TQ_UNROLL
      for (int part = 0; part < PARTS; ++part) {
        simdgroup_multiply_accumulate(dots, query[part * fragments + i], keys, dots);
      }
    }
    simdgroup_store(dots, scores + 8 * k, kScorePitch);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

/// The scores of a block, times `factor`, to weights for the values.  Lane l keeps the softmax of row l / 4, and takes
/// keys 8 (l % 4) to 8 (l % 4) + 7.  Returns what the sums so far must be multiplied by.
template <class Shared, class Rules>
float softmax_block(thread PrefillSoftmax& softmax, Shared shared, float factor, int block, int last, Row row, Rules rules,
                  Place place) {
  const int r = place.lane / 4, column = 8 * (place.lane % 4);
  auto scores = shared->scores[place.simdgroup] + (r * kScorePitch + column);
  auto weights = shared->weights[place.simdgroup] + (r * kWeightPitch + column);
  float s[8];
  float top = softmax.m, top_v = softmax.mv;
  TQ_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int key = block + column + i;
    const float dot = scores[i] * (factor * shared->key_scale[column + i]);
    s[i] = key < last ? masked(dot, row, key, rules) : -INFINITY;
    top = fmax(top, s[i]);
    top_v = fmax(top_v, s[i] == -INFINITY ? -INFINITY : s[i] + shared->log2_value_scale[column + i]);
  }
  for (ushort step = 1; step < 4; step = ushort(2 * step)) {
    top = fmax(top, exchange(top, step));
    top_v = fmax(top_v, exchange(top_v, step));
  }
  softmax.sum *= exp2_difference(softmax.m, top);
  TQ_UNROLL
  for (int i = 0; i < 8; ++i) {
    const float with_scale = s[i] == -INFINITY ? -INFINITY : s[i] + shared->log2_value_scale[column + i];
    softmax.sum += exp2_difference(s[i], top);
    // NaN and infinity must not enter a fragment, where they would reach other rows: the sum takes them instead.
    const bool fits = with_scale < INFINITY;
    if (!fits) softmax.sum = not_a_number();
    weights[i] = half(fits ? exp2_difference(with_scale, top_v) : 0.0f);
  }
  const float old = softmax.mv == top_v ? 1.0f : exp2_difference(softmax.mv, top_v);
  softmax.m = top;
  softmax.mv = top_v;
  return old;
}

/// Multiplies each row of the sums by what its lanes hold: a product with a diagonal matrix.
template <int D, class Diagonal>
void rescale(thread simdgroup_float8x8* sums, float old, Diagonal diagonal, ushort lane) {
  if (lane % 4 == 0) diagonal[9 * (lane / 4)] = old;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (simd_any(old != 1.0f)) {
    simdgroup_float8x8 factors;
    simdgroup_load(factors, diagonal, 8);
    TQ_UNROLL
    for (int i = 0; i < D / 8; ++i) {
      simdgroup_float8x8 rescaled;
      simdgroup_multiply(rescaled, factors, sums[i]);
      sums[i] = rescaled;
    }
  }
}

/// Adds the tile's 32 values, multiplied by the weights, to the sums.
template <int D, class Tile, class Weights>
void accumulate_tile(thread simdgroup_float8x8* sums, Tile tile, Weights weights) {
  TQ_UNROLL
  for (int k = 0; k < 4; ++k) {
    simdgroup_half8x8 part;
    simdgroup_load(part, weights + 8 * k, kWeightPitch);
    TQ_UNROLL
    for (int i = 0; i < D / 8; ++i) {
      simdgroup_half8x8 values;
      simdgroup_load(values, tile + (8 * k * tile_pitch(D) + 8 * i), tile_pitch(D));
      simdgroup_multiply_accumulate(sums[i], part, values, sums[i]);
    }
  }
}

/// The sums of the rows from `its_row` on to results or partial results: four rows at a time from fragments to
/// registers, 32 columns after 32 columns.
template <class T, class V, int D, bool FINISH, class Scores, class Rules, class Ending, class Out>
void end_rows(const thread simdgroup_float8x8* sums, PrefillSoftmax softmax, Scores scores, int its_row, Rules rules,
              Ending ending, Out out, Place place) {
  constexpr int registers = D / 32;
  const auto params = rules.params;
  const ushort lane = place.lane;
  const int splits = params[metal_layout::kSplits];
  const int kv = place.group.y, b = place.group.z / splits, split = place.group.z % splits;
  TQ_UNROLL
  for (int half_tile = 0; half_tile < 2; ++half_tile) {
    float x[4][registers];
    TQ_UNROLL
    for (int k = 0; k < registers; ++k) {
      simdgroup_barrier(mem_flags::mem_threadgroup);
      TQ_UNROLL
      for (int i = 0; i < 4; ++i) simdgroup_store(sums[4 * k + i], scores + 8 * i, kScorePitch);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      TQ_UNROLL
      for (int i = 0; i < 4; ++i) x[i][k] = scores[(4 * half_tile + i) * kScorePitch + lane];
    }
    TQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int index = 4 * half_tile + i;
      const PrefillSoftmax of_row = {simd_shuffle(softmax.m, ushort(4 * index)),
                                     simd_shuffle(softmax.mv, ushort(4 * index)),
                                     simd_shuffle(softmax.sum, ushort(4 * index))};
      const Row row = find_row(params, rules.starts, its_row + index, kv, b);
      if (row.query >= params[metal_layout::kQueryLen]) continue;
      const float unit_of_sums = exp2_difference(of_row.mv, of_row.m) * level_step(V::kBits, V::kTrellis);
      TQ_UNROLL
      for (int k = 0; k < registers; ++k) x[i][k] *= unit_of_sums;
      PrefillEnd<FINISH>::template row<T, D>(of_row, x[i], row, split, ending, out, params, lane);
    }
  }
}

/// The kernel.  place.group: (row tile, KV head, batch * splits + split).
template <class T, class K, class V, int D, bool FINISH, class Shared, class Keys, class Values, class Rules,
          class Ending, class Out>
void attend_prefill(Shared shared, Keys keys, Values values, Rules rules, Ending ending, Out out, Place place) {
  constexpr int fragments = D / 8, parts = query_parts<T>();
  static_assert(sizeof(PrefillShared<K, V, D>) <= metal_layout::kThreadgroupBytes, "too much threadgroup memory");
  const auto params = rules.params;
  const ushort lane = place.lane, simdgroup = place.simdgroup;
  const int splits = params[metal_layout::kSplits];
  const int first_row = place.group.x * metal_layout::kTileRows, kv = place.group.y;
  const int b = place.group.z / splits, split = place.group.z % splits;
  const ushort thread_index = ushort(32 * simdgroup + lane);
  const int its_row = first_row + 8 * simdgroup;  // of this SIMD-group
  auto tile = shared->tile + 0;
  auto scores = shared->scores[simdgroup] + 0;
  auto diagonal = shared->diagonal[simdgroup] + 0;
  fill_prefill_table<K>(shared->key_table + 0, thread_index);
  fill_prefill_table<V>(shared->value_table + 0, thread_index);
  diagonal[lane] = 0.0f;
  diagonal[lane + 32] = 0.0f;

  simdgroup_half8x8 query[parts * fragments];
  const float factor = load_queries<T, K, D>(query, tile, its_row, rules, ending, place);
  simdgroup_float8x8 sums[fragments];
  TQ_UNROLL
  for (int i = 0; i < fragments; ++i) sums[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  const Row row = find_row(params, rules.starts, its_row + lane / 4, kv, b);
  const int2 range = split_range(params, rules.starts, first_row, first_row + metal_layout::kTileRows, kv, b, split);
  const auto key_codes = codes_of_head(keys, b, kv), value_codes = codes_of_head(values, b, kv);
  const auto key_scales = scales_of_head(keys, b, kv), value_scales = scales_of_head(values, b, kv);

  PrefillSoftmax softmax = {-INFINITY, -INFINITY, 0.0f};
  const int2 tokens = tokens_of_ring(rules, first_row, first_row + metal_layout::kTileRows, kv, b);
  for (int block = range.x; block < range.y; block += metal_layout::kBlock) {
    if (!is_read(rules, tokens, block)) continue;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    unpack_tile<K, D>(shared->key_table + 0, tile, key_codes, block, range.y, thread_index);
    if (thread_index < metal_layout::kBlock) {
      const int t = min(block + int(thread_index), range.y - 1);
      const float scale = float(value_scales[t]);
      shared->key_scale[thread_index] = checked_scale(float(key_scales[t]));
      shared->log2_value_scale[thread_index] = log2(checked_scale(scale));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    score_tile<parts, D>(query, tile, scores);
    rescale<D>(sums, softmax_block(softmax, shared, factor, block, range.y, row, rules, place), diagonal, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    unpack_tile<V, D>(shared->value_table + 0, tile, value_codes, block, range.y, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    accumulate_tile<D>(sums, tile, shared->weights[simdgroup] + 0);
  }

  for (ushort step = 1; step < 4; step = ushort(2 * step)) softmax.sum += exchange(softmax.sum, step);
  end_rows<T, V, D, FINISH>(sums, softmax, scores, its_row, rules, ending, out, place);
}

}  // namespace turboquant
