// Attention for few queries.  A threadgroup serves R rows of one KV head and one split of the keys; its SIMD-groups
// take blocks of 32 tokens in turn and keep their own softmax; at the end their results are added up.
//
// Scores and values of 3 and 4 bits: a byte, two codes, indexes a table of levels.
// Scores: eight lanes share a token (fewer for small D), a group of 32 coordinates each, so that a code is looked up
// once for R rows.  Values: four lanes share a group, eight coordinates each, so that R * 8 sums fit the registers.

namespace turboquant {

/// Lanes that share a token: the groups of a vector, rounded up to a power of two.
constexpr int lanes_per_token(int dim) { return dim <= 32 ? 1 : dim <= 64 ? 2 : dim <= 128 ? 4 : 8; }

/// A number for each of R rows, as one access to memory.
template <int R>
struct Rows {
  typedef float2 type;
  typedef half2 halves;
};
template <>
struct Rows<4> {
  typedef float4 type;
  typedef half4 halves;
};

/// With 2 bits: pairs of tokens whose values are added at a time; the sign bits of the two codes of a nibble.
enum Pairs { kPairs = 4, kBothSigns = 10 };

/// Threadgroup memory.
template <int KB, int VB, int D, int R>
struct DecodeShared {
  TQ_ARRAY(half2, key_table, KB == 2 ? 1 : 256);
  TQ_ARRAY(half2, value_table, VB == 2 ? 1 : 256);
  TQ_ARRAY2(typename Rows<R>::halves, key_pairs, KB == 2 ? D / 2 : 1, 16);
  TQ_ARRAY2(typename Rows<R>::halves, value_pairs, metal_layout::kDecodeSimdgroups, VB == 2 ? 16 * kPairs : 1);
  TQ_ARRAY2(half2, q, R, KB == 2 ? 1 : D / 2);
  TQ_ARRAY(float, factor, R);  // of a dot product with levels
  // Scores are written by several lanes a token, so they are no vectors: storing a component may store them all.
  TQ_ARRAY2(float, scores, metal_layout::kDecodeSimdgroups, KB == 2 ? 1 : R * metal_layout::kBlock);
  TQ_ARRAY2(typename Rows<R>::type, weights, metal_layout::kDecodeSimdgroups, metal_layout::kBlock);
  TQ_ARRAY2(float, m, metal_layout::kDecodeSimdgroups, R);
  TQ_ARRAY2(float, sum, metal_layout::kDecodeSimdgroups, R);
  TQ_ARRAY2(float, x, R, D);  // the queries for key_pairs, then the sums
};

/// Adds up R sums over the first `lanes` lanes of each aligned set, halving the rows a lane keeps while it can: this
/// lane ends with the rows from `row` on, in front.
template <int R, int LANES>
int fold(thread float* sums, ushort lane) {
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
template <int B, int D, int R, class Shared, class Codes>
void score_block(Shared shared, Codes codes, int block, int last, const thread half2* q, ushort lane,
                 ushort simdgroup) {
  constexpr int groups = D / 32, words = B * groups, lanes = lanes_per_token(D), tokens = 32 / lanes;
  constexpr int folded = lanes < R ? R / lanes : 1;
  const int group = min(int(lane) % lanes, groups - 1);
  auto its_group = codes + (long(block) * words + group * B);
  for (int t = lane / lanes; t < metal_layout::kBlock; t += tokens) {
    const int at = min(t, last - 1 - block) * words;
    uint packed[B];
    TQ_UNROLL
    for (int w = 0; w < B; ++w) packed[w] = its_group[at + w];
    float sums[R] = {};
    TQ_UNROLL
    for (int part = 0; part < 4; ++part) {
      const uint word = nibbles<B>(packed, part);
      TQ_UNROLL
      for (int j = 0; j < 4; ++j) {
        const half2 levels = shared->key_table[byte_of(word, j)];
        TQ_UNROLL
        for (int r = 0; r < R; ++r) {
          const half2 pair = q[16 * r + 4 * part + j];
          sums[r] = fma(float(pair.x), float(levels.x), fma(float(pair.y), float(levels.y), sums[r]));
        }
      }
    }
    const int row = fold<R, lanes>(sums, lane);
    if (lane % lanes < R) {  // lanes beyond hold what these hold
      TQ_UNROLL
      for (int i = 0; i < folded; ++i) shared->scores[simdgroup][(row + i) * metal_layout::kBlock + t] = sums[i];
    }
  }
}

/// Adds weights[token][row] times the levels of `count` tokens from `block` on; 3 or 4 bits.
template <int B, int D, int R, class Shared, class Codes>
void add_values(Shared shared, Codes codes, int block, int count, thread float* x, ushort lane, ushort simdgroup) {
  constexpr int groups = D / 32, words = B * groups, lanes = 4 * lanes_per_token(D), tokens = 32 / lanes;
  const int group = min(int(lane) % lanes / 4, groups - 1), part = lane % 4;
  const uint spare_mask = part < 3 ? 0x11111111u << part : 0u;
  auto its_word = codes + (long(block) * words + group * B + min(part, B - 1));
  // As many times for all lanes; none beyond the last token if a SIMD-group takes one at a time.
  for (int begin = 0; begin < count; begin += tokens) {
    const int t = begin + lane / lanes;
    uint word = its_word[(tokens == 1 ? begin : min(t, count - 1)) * words];
    if (B == 3) {
      // The fourth lane of a quad gathers its codes from the spare bits of the words the other three hold.
      uint spare = word >> (3 - part) & spare_mask;
      spare |= simd_shuffle_xor(spare, 1);
      spare |= simd_shuffle_xor(spare, 2);
      word = select(word, spare, part == 3);
    }
    const typename Rows<R>::type weights = shared->weights[simdgroup][t];
    TQ_UNROLL
    for (int j = 0; j < 4; ++j) {
      const half2 levels = shared->value_table[byte_of(word, j)];
      TQ_UNROLL
      for (int r = 0; r < R; ++r) {
        x[8 * r + 2 * j] = fma(weights[r], float(levels.x), x[8 * r + 2 * j]);
        x[8 * r + 2 * j + 1] = fma(weights[r], float(levels.y), x[8 * r + 2 * j + 1]);
      }
    }
  }
}

/// Tables of the dot products of 2-bit keys: for each pair of coordinates that share a nibble, and each nibble, the
/// R queries times the two levels.  The nibble with both signs turned has the negative.
template <int D, int R, class Shared>
void fill_key_pairs(Shared shared, ushort thread_index) {
  for (int i = thread_index; i < 4 * D; i += metal_layout::kDecodeThreads) {
    const int pair = i / 8, nibble = i % 8, coordinate = pair / 16 * 32 + pair % 16;
    const float low = float(level(2, nibble & 3)), high = float(level(2, nibble >> 2));
    typename Rows<R>::halves dots, negative;
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
      const typename Rows<R>::halves dots = shared->key_pairs[8 * w + j][nibble_of(word, j)];
      TQ_UNROLL
      for (int r = 0; r < R; ++r) sums[r] += float(dots[r]);
    }
  }
}

/// add_values for 2 bits, by pairs of tokens: a table of 16 entries holds what each pair of codes adds to R rows.
/// Weights are at most 1.
template <int D, int R, class Shared, class Codes>
void add_value_pairs(Shared shared, Codes codes, int block, int count, thread float* x, ushort lane, ushort simdgroup) {
  constexpr int groups = D / 32, words = 2 * groups, lanes = 4 * lanes_per_token(D), pairs = 32 / lanes;
  const int group = min(int(lane) % lanes / 4, groups - 1), part = lane % 4;
  const int word = 2 * group + (part & 1), shift = part & 2;
  const int nibble = lane % 8, pair = lane / 8;
  const float first_level = float(level(2, nibble & 3)), second_level = float(level(2, nibble >> 2));
  static_assert(8 * kPairs == 32, "a lane makes one entry and its negative");
  for (int begin = 0; begin < metal_layout::kBlock; begin += 2 * kPairs) {
    const typename Rows<R>::type a = shared->weights[simdgroup][begin + 2 * pair],
                                 b = shared->weights[simdgroup][begin + 2 * pair + 1];
    typename Rows<R>::halves sums, negative;
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
      const uint a = codes[long(block + min(t, count - 1)) * words + word];
      const uint b = codes[long(block + min(t + 1, count - 1)) * words + word];
      const uint both = (a >> shift & 0x33333333u) | (b >> shift & 0x33333333u) << 2;
      TQ_UNROLL
      for (int j = 0; j < 8; ++j) {
        const typename Rows<R>::halves sums = shared->value_pairs[simdgroup][16 * i + nibble_of(both, j)];
        TQ_UNROLL
        for (int r = 0; r < R; ++r) x[8 * r + j] += float(sums[r]);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

/// The kernel.  place.group: (row tile, split, batch * KV heads + KV head); the tiles that read the same codes start
/// side by side.
template <int KB, int VB, int D, int R, class Shared, class Query, class Keys, class Values, class Rules,
          class Partials>
void attend_decode(Shared shared, Query query, Keys keys, Values values, Rules rules, Partials out, Place place) {
  constexpr int registers = D / 32, groups = D / 32, lanes = lanes_per_token(D);
  static_assert(sizeof(DecodeShared<KB, VB, D, R>) <= metal_layout::kThreadgroupBytes, "too much threadgroup memory");
  const auto params = rules.params;
  const ushort lane = place.lane, simdgroup = place.simdgroup;
  const int kv_heads = params[metal_layout::kKvHeads];
  const int tile = place.group.x, split = place.group.y, kv = place.group.z % kv_heads, b = place.group.z / kv_heads;
  const ushort thread_index = ushort(32 * simdgroup + lane);
  if (KB != 2) fill_table<KB, metal_layout::kDecodeThreads>(shared->key_table + 0, thread_index);
  if (VB != 2) fill_table<VB, metal_layout::kDecodeThreads>(shared->value_table + 0, thread_index);
  for (int r = simdgroup; r < R; r += metal_layout::kDecodeSimdgroups) {
    const Row row = find_row(params, rules.starts, tile * R + r, kv, b);
    float x[registers] = {};
    if (row.query < params[metal_layout::kQueryLen]) load_query<D>(x, query, row, params, lane);
    const float factor = normalise_query<KB, D>(x, params);
    TQ_UNROLL
    for (int i = 0; i < registers; ++i) {
      if (KB == 2) {
        shared->x[r][32 * i + lane] = x[i];
      } else {
        const float next = exchange(x[i], 1);
        if (lane % 2 == 0) shared->q[r][16 * i + lane / 2] = half2(half(x[i]), half(next));
      }
    }
    if (lane == 0) shared->factor[r] = factor;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  Row rows[R];
  TQ_UNROLL
  for (int r = 0; r < R; ++r) rows[r] = find_row(params, rules.starts, tile * R + r, kv, b);
  if (KB == 2) {
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
      mine[16 * r + i] = KB != 2 && group < groups ? shared->q[r][16 * group + i] : half2(half(0.0f), half(0.0f));
    }
  }
  const auto key_codes = codes_of_head(keys, b, kv), value_codes = codes_of_head(values, b, kv);
  const auto key_scales = scales_of_head(keys, b, kv), value_scales = scales_of_head(values, b, kv);
  const int2 range = split_range(params, rules.starts, tile * R, (tile + 1) * R, kv, b, split);

  // x is in units of exp2(m), or, with 2 bits, of exp2(mv): mv is the maximum of the scores with the values' scales in
  // them, which keeps the weights in the range and precision of half.
  float m[R], mv[R], sum[R];
  float x[8 * R] = {};
  TQ_UNROLL
  for (int r = 0; r < R; ++r) {
    m[r] = mv[r] = -INFINITY;
    sum[r] = 0.0f;
  }
  for (int block = range.x + metal_layout::kBlock * simdgroup; block < range.y; block += metal_layout::kDecodeThreads) {
    float scores[R];
    if (KB == 2) {
      score_pairs<D, R>(shared, key_codes, block, range.y, scores, lane);
    } else {
      score_block<KB, D, R>(shared, key_codes, block, range.y, mine, lane, simdgroup);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      TQ_UNROLL
      for (int r = 0; r < R; ++r) scores[r] = shared->scores[simdgroup][r * metal_layout::kBlock + lane];
    }
    const int t = min(block + lane, range.y - 1);
    const float scale_k = checked_scale(float(key_scales[t]));
    const float scale_v = checked_scale(float(value_scales[t]));
    const float log2_scale_v = VB == 2 ? log2(scale_v) : 0.0f;
    typename Rows<R>::type weights;
    TQ_UNROLL
    for (int r = 0; r < R; ++r) {
      float score = scores[r] * (scale_k * shared->factor[r]);
      score = block + lane < range.y ? masked(score, rows[r], t, rules) : -INFINITY;
      const float top = fmax(m[r], simd_max(score));
      const float weight = exp2_difference(score, top), old = exp2_difference(m[r], top);
      m[r] = top;
      sum[r] = fma(sum[r], old, weight);
      // A hidden key may hold anything; 0 * NaN must not get through.
      const bool hidden = score == -INFINITY;
      if (VB == 2) {
        const float with_scale = hidden ? -INFINITY : score + log2_scale_v;
        const float top_v = fmax(mv[r], simd_max(with_scale)), old_v = exp2_difference(mv[r], top_v);
        mv[r] = top_v;
        TQ_UNROLL
        for (int i = 0; i < 8; ++i) x[8 * r + i] *= old_v;
        weights[r] = exp2_difference(with_scale, top_v);
      } else {
        TQ_UNROLL
        for (int i = 0; i < 8; ++i) x[8 * r + i] *= old;
        weights[r] = hidden ? 0.0f : weight * scale_v;
      }
    }
    shared->weights[simdgroup][lane] = weights;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const int count = min(range.y - block, int(metal_layout::kBlock));
    if (VB == 2) {
      add_value_pairs<D, R>(shared, value_codes, block, count, x, lane, simdgroup);
    } else {
      add_values<VB, D, R>(shared, value_codes, block, count, x, lane, simdgroup);
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  TQ_UNROLL
  for (int r = 0; r < R; ++r) {
    sum[r] = simd_sum(sum[r]);
    if (lane == 0) {
      shared->m[simdgroup][r] = m[r];
      shared->sum[simdgroup][r] = sum[r];
    }
    for (ushort step = ushort(4 * lanes); step < 32; step = ushort(2 * step)) {
      TQ_UNROLL
      for (int i = 0; i < 8; ++i) x[8 * r + i] += exchange(x[8 * r + i], step);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int s = 0; s < metal_layout::kDecodeSimdgroups; ++s) {  // one after another, in memory for one
    if (s == simdgroup && lane < 4 * groups) {
      TQ_UNROLL
      for (int r = 0; r < R; ++r) {
        float top = shared->m[0][r];
        for (int o = 1; o < metal_layout::kDecodeSimdgroups; ++o) top = fmax(top, shared->m[o][r]);
        const float factor = exp2_difference(VB == 2 ? mv[r] : m[r], top) * level_step(VB);
        TQ_UNROLL
        for (int i = 0; i < 8; ++i) {
          const int d = 8 * lane + i;
          shared->x[r][d] = (s == 0 ? 0.0f : shared->x[r][d]) + x[8 * r + i] * factor;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int r = simdgroup; r < R; r += metal_layout::kDecodeSimdgroups) {
    const Row row = find_row(params, rules.starts, tile * R + r, kv, b);
    if (row.query >= params[metal_layout::kQueryLen]) continue;
    float top = shared->m[0][r], total = 0.0f;
    for (int o = 1; o < metal_layout::kDecodeSimdgroups; ++o) top = fmax(top, shared->m[o][r]);
    for (int o = 0; o < metal_layout::kDecodeSimdgroups; ++o) {
      total += shared->sum[o][r] * exp2_difference(shared->m[o][r], top);
    }
    float y[registers];
    TQ_UNROLL
    for (int i = 0; i < registers; ++i) y[i] = shared->x[r][32 * i + lane];
    write_partial<D>(top, total, y, row, split, out, params, lane);
  }
}

}  // namespace turboquant
