// Attention for few queries.  A threadgroup serves R rows of one KV head and one split of the keys; its SIMD-groups
// take blocks of 32 tokens in turn and keep their own softmax; at the end their results are added up.
//
// Scores: eight lanes share a token (fewer for small D), a group of 32 coordinates each, so that a code is looked up
// once for R rows.  Values: four lanes share a group, eight coordinates each, so that R * 8 sums fit the registers.

namespace turboquant {

/// Lanes that share a token: the groups of a vector, rounded up to a power of two.
constexpr int lanes_per_token(int dim) { return dim <= 32 ? 1 : dim <= 64 ? 2 : dim <= 128 ? 4 : 8; }

/// A number for each of R rows, as one access to memory.
template <int R>
struct Rows {
  typedef float2 type;
};
template <>
struct Rows<4> {
  typedef float4 type;
};

/// Threadgroup memory.
template <int D, int R>
struct DecodeShared {
  TQ_ARRAY(half2, key_table, 256);
  TQ_ARRAY(half2, value_table, 256);
  TQ_ARRAY2(half, q, R, D);
  TQ_ARRAY(float, factor, R);  // of a dot product with levels
  TQ_ARRAY2(typename Rows<R>::type, weights, metal_layout::kSimdgroups, metal_layout::kBlock);  // scores, then weights
  TQ_ARRAY2(float, m, metal_layout::kSimdgroups, R);
  TQ_ARRAY2(float, sum, metal_layout::kSimdgroups, R);
  TQ_ARRAY2(float, x, R, D);
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
        sums[i] = keep + simd_shuffle_xor(send, step);
      }
      row += upper ? rows : 0;
    } else {
      sums[0] += simd_shuffle_xor(sums[0], step);
    }
  }
  return row;
}

/// Dot products of the R queries with the levels of 32 tokens from `block` on, into weights[token][row].
template <int B, int D, int R, class Shared, class Codes>
void score_block(Shared shared, Codes codes, int block, int last, const thread half2* q, ushort lane,
                 ushort simdgroup) {
  constexpr int groups = D / 32, words = B * groups, lanes = lanes_per_token(D), tokens = 32 / lanes;
  constexpr int folded = lanes < R ? R / lanes : 1;
  const int group = min(int(lane) % lanes, groups - 1);
  for (int t = lane / lanes; t < metal_layout::kBlock; t += tokens) {
    const long at = long(min(block + t, last - 1)) * words + group * B;
    uint packed[B];
    TQ_UNROLL
    for (int w = 0; w < B; ++w) packed[w] = codes[at + w];
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
      for (int i = 0; i < folded; ++i) shared->weights[simdgroup][t][row + i] = sums[i];
    }
  }
}

/// Adds weights[token][row] times the levels of `count` tokens from `block` on.
template <int B, int D, int R, class Shared, class Codes>
void add_values(Shared shared, Codes codes, int block, int count, thread float* x, ushort lane, ushort simdgroup) {
  constexpr int groups = D / 32, words = B * groups, lanes = 4 * lanes_per_token(D), tokens = 32 / lanes;
  const int group = min(int(lane) % lanes / 4, groups - 1), part = lane % 4;
  const uint spare_mask = part < 3 ? 0x11111111u << part : 0u;
  for (int t = lane / lanes; t < metal_layout::kBlock; t += tokens) {
    const long at = long(block + min(t, count - 1)) * words + group * B;
    uint word;
    if (B == 4) {
      word = codes[at + part];
    } else if (B == 2) {
      word = codes[at + (part & 1)];
      word = word >> (part & 2);
    } else {
      // The fourth lane of a quad gathers its codes from the spare bits of the words the other three hold.
      word = codes[at + min(part, 2)];
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

/// The kernel.  position: (split, row tile * KV heads + KV head, batch).
template <int KB, int VB, int D, int R, class Shared, class Q, class QStrides, class KeyCodes, class KeyScales,
          class ValueCodes, class ValueScales, class CodeStrides, class ScaleStrides, class Starts, class Mask,
          class MaskStrides, class Partial, class Stats, class Params>
void attend_decode(Shared shared, Q q, QStrides q_strides, KeyCodes key_codes, CodeStrides key_codes_strides,
                   KeyScales key_scales, ScaleStrides key_scales_strides, ValueCodes value_codes,
                   CodeStrides value_codes_strides, ValueScales value_scales, ScaleStrides value_scales_strides,
                   Starts starts, Mask mask, MaskStrides mask_strides, Partial partial, Stats stats, Params params,
                   uint3 position, ushort lane, ushort simdgroup) {
  constexpr int registers = D / 32, groups = D / 32, lanes = lanes_per_token(D);
  static_assert(sizeof(DecodeShared<D, R>) <= metal_layout::kThreadgroupBytes, "too much threadgroup memory");
  const int kv_heads = params[metal_layout::kKvHeads];
  const int split = position.x, kv = position.y % kv_heads, tile = position.y / kv_heads, b = position.z;
  fill_table<KB>(shared->key_table + 0, ushort(32 * simdgroup + lane));
  fill_table<VB>(shared->value_table + 0, ushort(32 * simdgroup + lane));
  for (int r = simdgroup; r < R; r += metal_layout::kSimdgroups) {
    const Row row = find_row(params, starts, tile * R + r, kv, b);
    float x[registers] = {};
    if (row.query < params[metal_layout::kQueryLen]) load_query<D>(x, q, q_strides, row, b, params, lane);
    const float factor = normalise_query<KB, D>(x, params);
    TQ_UNROLL
    for (int i = 0; i < registers; ++i) shared->q[r][32 * i + lane] = half(x[i]);
    if (lane == 0) shared->factor[r] = factor;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  Row rows[R];
  TQ_UNROLL
  for (int r = 0; r < R; ++r) rows[r] = find_row(params, starts, tile * R + r, kv, b);
  // Lanes without a group of their own have a query of zeros.
  half2 mine[16 * R];
  TQ_UNROLL
  for (int r = 0; r < R; ++r) {
    TQ_UNROLL
    for (int i = 0; i < 16; ++i) {
      const int group = lane % lanes;
      mine[16 * r + i] = group < groups ? half2(shared->q[r][32 * group + 2 * i], shared->q[r][32 * group + 2 * i + 1])
                                        : half2(half(0.0f), half(0.0f));
    }
  }
  auto key_rows = key_codes + (b * key_codes_strides[0] + kv * key_codes_strides[1]);
  auto value_rows = value_codes + (b * value_codes_strides[0] + kv * value_codes_strides[1]);
  const long key_scale = b * key_scales_strides[0] + kv * key_scales_strides[1];
  const long value_scale = b * value_scales_strides[0] + kv * value_scales_strides[1];
  const int2 range = split_range(params, starts, tile * R, (tile + 1) * R, kv, b, split);

  float m[R], sum[R];
  float x[8 * R] = {};
  TQ_UNROLL
  for (int r = 0; r < R; ++r) {
    m[r] = -INFINITY;
    sum[r] = 0.0f;
  }
  for (int block = range.x + metal_layout::kBlock * simdgroup; block < range.y; block += metal_layout::kThreads) {
    score_block<KB, D, R>(shared, key_rows, block, range.y, mine, lane, simdgroup);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const int t = min(block + lane, range.y - 1);
    const float scale_k = checked_scale(float(key_scales[key_scale + t]));
    const float scale_v = checked_scale(float(value_scales[value_scale + t]));
    TQ_UNROLL
    for (int r = 0; r < R; ++r) {
      float score = shared->weights[simdgroup][lane][r] * (scale_k * shared->factor[r]);
      score = block + lane < range.y ? masked(score, rows[r], t, b, params, mask, mask_strides) : -INFINITY;
      const float top = fmax(m[r], simd_max(score));
      const float weight = exp2_difference(score, top), old = exp2_difference(m[r], top);
      m[r] = top;
      sum[r] = fma(sum[r], old, weight);
      TQ_UNROLL
      for (int i = 0; i < 8; ++i) x[8 * r + i] *= old;
      // A hidden key may hold anything; 0 * NaN must not get through.
      shared->weights[simdgroup][lane][r] = score == -INFINITY ? 0.0f : weight * scale_v;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    add_values<VB, D, R>(shared, value_rows, block, min(range.y - block, int(metal_layout::kBlock)), x, lane,
                         simdgroup);
    simdgroup_barrier(mem_flags::mem_threadgroup);
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
      for (int i = 0; i < 8; ++i) x[8 * r + i] += simd_shuffle_xor(x[8 * r + i], step);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int s = 0; s < metal_layout::kSimdgroups; ++s) {  // one after another, in memory for one
    if (s == simdgroup && lane < 4 * groups) {
      TQ_UNROLL
      for (int r = 0; r < R; ++r) {
        float top = shared->m[0][r];
        for (int o = 1; o < metal_layout::kSimdgroups; ++o) top = fmax(top, shared->m[o][r]);
        const float factor = exp2_difference(m[r], top) * level_step(VB);
        TQ_UNROLL
        for (int i = 0; i < 8; ++i) {
          const int d = 8 * lane + i;
          shared->x[r][d] = (s == 0 ? 0.0f : shared->x[r][d]) + x[8 * r + i] * factor;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int r = simdgroup; r < R; r += metal_layout::kSimdgroups) {
    const Row row = find_row(params, starts, tile * R + r, kv, b);
    if (row.query >= params[metal_layout::kQueryLen]) continue;
    float top = shared->m[0][r], total = 0.0f;
    for (int o = 1; o < metal_layout::kSimdgroups; ++o) top = fmax(top, shared->m[o][r]);
    for (int o = 0; o < metal_layout::kSimdgroups; ++o) {
      const float factor = exp2_difference(shared->m[o][r], top);
      total += factor == 0.0f ? shared->sum[o][r] * 0.0f : shared->sum[o][r] * factor;
    }
    float y[registers];
    TQ_UNROLL
    for (int i = 0; i < registers; ++i) y[i] = shared->x[r][32 * i + lane];
    write_partial<D>(top, total, y, row, b, split, partial, stats, params, lane);
  }
}

}  // namespace turboquant
