// What both attention kernels share: which keys a row sees, and the end of a row.
//
// A row is one query of one head; the rows of a KV head are numbered query * group + head, so that rows that read the
// same keys are neighbours.  Scores are kept in base 2.  Partial results of a row are (m, sum, x): the largest score,
// sum exp2(s - m), and sum exp2(s - m) * value in the rotated basis.  In memory x is half, divided by its largest
// number: splits are averaged, so that their rounding is less than that of a 16-bit output.

#pragma once

#include "metal/device/common.metal"
#include "metal/device/unpack.metal"

namespace turboquant {

constexpr float log2_e() { return 1.44269504f; }

/// 2^(a - b), and 0 when a is minus infinity, whatever b is.
inline float exp2_difference(float a, float b) { return a == -INFINITY ? 0.0f : exp2(a - b); }

/// A scale; NaN if it is infinite, since a vector with such a scale decodes to NaN.
inline float checked_scale(float scale) { return isfinite(scale) ? scale : not_a_number(); }

/// Packed vectors [batch, KV heads, tokens], dense within a head.
template <class Codes, class CodeStrides, class Scales, class ScaleStrides>
struct Packed {
  Codes codes;
  CodeStrides code_strides;
  Scales scales;
  ScaleStrides scale_strides;
};
template <class Codes, class CodeStrides, class Scales, class ScaleStrides>
Packed<Codes, CodeStrides, Scales, ScaleStrides> packed(Codes codes, CodeStrides code_strides, Scales scales,
                                                        ScaleStrides scale_strides) {
  return {codes, code_strides, scales, scale_strides};
}

template <class Packed>
auto codes_of_head(Packed in, int b, int kv) {
  return in.codes + (b * in.code_strides[0] + kv * in.code_strides[1]);
}
template <class Packed>
auto scales_of_head(Packed in, int b, int kv) {
  return in.scales + (b * in.scale_strides[0] + kv * in.scale_strides[1]);
}

/// What decides which keys a row sees.
template <class Params, class Starts, class Mask, class MaskStrides>
struct Rules {
  Params params;
  Starts starts;
  Mask mask;
  MaskStrides mask_strides;
};
template <class Params, class Starts, class Mask, class MaskStrides>
Rules<Params, Starts, Mask, MaskStrides> rules_of(Params params, Starts starts, Mask mask, MaskStrides mask_strides) {
  return {params, starts, mask, mask_strides};
}

/// What the end of a row reads beside its sums.
template <class Query, class Sinks, class KeyCentre, class ValueCentre>
struct Ending {
  Query query;
  Sinks sinks;
  KeyCentre key_centre;
  ValueCentre value_centre;
};
template <class Query, class Sinks, class KeyCentre, class ValueCentre>
Ending<Query, Sinks, KeyCentre, ValueCentre> ending(Query query, Sinks sinks, KeyCentre key_centre,
                                                    ValueCentre value_centre) {
  return {query, sinks, key_centre, value_centre};
}

/// Partial results of all rows and splits.
template <class X, class Stats>
struct Partials {
  X x;
  Stats stats;
};
template <class X, class Stats>
Partials<X, Stats> partials(X x, Stats stats) {
  return {x, stats};
}

/// A row of attention: where its query stands and which keys its rules let it see.
struct Row {
  int batch, head, query, first, last;
};

/// Row `index` of KV head `kv`; one beyond the last sees nothing.
template <class Params, class Starts>
Row find_row(Params params, Starts starts, int index, int kv, int b) {
  const int kv_len = params[metal_layout::kKvLen], query_len = params[metal_layout::kQueryLen];
  const int group = params[metal_layout::kQueryHeads] / params[metal_layout::kKvHeads];
  const int flags = params[metal_layout::kFlags], window = params[metal_layout::kWindow];
  Row row;
  row.batch = b;
  row.query = index / group;
  row.head = kv * group + index % group;
  const int position = kv_len - query_len + row.query;
  row.first = (flags & metal_layout::kStarts) ? max(int(starts[b]), 0) : 0;
  row.last = (flags & metal_layout::kCausal) ? min(position + 1, kv_len) : kv_len;
  if (window > 0) row.first = max(row.first, position - window + 1);
  if (row.query >= query_len) row.last = row.first;
  row.last = max(row.first, row.last);
  return row;
}

/// The keys of one split: the range that any of rows [begin, end) sees, cut into blocks, shared out evenly.
template <class Params, class Starts>
int2 split_range(Params params, Starts starts, int begin, int end, int kv, int b, int split) {
  const int group = params[metal_layout::kQueryHeads] / params[metal_layout::kKvHeads];
  const int rows = params[metal_layout::kQueryLen] * group;
  const int first = find_row(params, starts, begin, kv, b).first;
  const int last = find_row(params, starts, min(end, rows) - 1, kv, b).last;
  const int base = first / metal_layout::kBlock,
            blocks = (max(last, first) + metal_layout::kBlock - 1) / metal_layout::kBlock - base;
  const int splits = params[metal_layout::kSplits], each = (blocks + splits - 1) / splits;
  return int2(max(first, (base + split * each) * metal_layout::kBlock),
              min(last, (base + (split + 1) * each) * metal_layout::kBlock));
}

/// The score of a key in base 2 after the mask; minus infinity when it is hidden.
template <class Rules>
float masked(float score, Row row, int key, Rules rules) {
  const int flags = rules.params[metal_layout::kFlags];
  if (key < row.first || key >= row.last) return -INFINITY;
  if (!(flags & (metal_layout::kBooleanMask | metal_layout::kAdditiveMask))) return score;
  const auto strides = rules.mask_strides;
  const float value =
      float(rules.mask[row.batch * strides[0] + row.head * strides[1] + row.query * strides[2] + key * strides[3]]);
  if (flags & metal_layout::kBooleanMask) return value == 0.0f ? -INFINITY : score;
  return value == -INFINITY ? -INFINITY : fma(value, log2_e(), score);
}

/// Loads a query and rotates it.
template <int D, class Query, class Params>
void load_query(thread float* x, Query query, Row row, Params params, ushort lane) {
  const auto strides = query.strides;
  const long at = row.batch * strides[0] + row.head * strides[1] + row.query * strides[2];
  TQ_UNROLL
  for (int r = 0; r < D / 32; ++r) x[r] = float(query.data[at + (32 * r + lane) * strides[3]]);
  rotate_vector<D>(x, params, lane);
}

/// Divides a rotated query by its largest coordinate, so that it fits half, and returns what its dot products with
/// levels must be multiplied by to be scores in base 2.
template <class K, int D, class Params>
float normalise_query(thread float* x, Params params) {
  float largest = 0.0f;
  TQ_UNROLL
  for (int r = 0; r < D / 32; ++r) largest = fmax(largest, fabs(x[r]));
  largest = simd_max(largest);
  // A query of subnormal numbers, whose inverse may be infinite, is zero: so are its scores.
  const float inverse = largest >= 1.17549435e-38f ? 1.0f / largest : 0.0f;
  TQ_UNROLL
  for (int r = 0; r < D / 32; ++r) x[r] *= inverse;
  return largest * as_type<float>(int(params[metal_layout::kScale])) *
         (log2_e() * level_step(K::kBits, K::kTrellis));
}

/// The end of a row: the sink, the division, the way back to the original basis, the centre.
template <class T, int D, class Ending, class Out, class Params>
void finish_row(float m, float sum, thread float* x, Row row, Ending ending, Out out, Params params, ushort lane) {
  const int flags = params[metal_layout::kFlags];
  const int group = params[metal_layout::kQueryHeads] / params[metal_layout::kKvHeads];
  const int centre = row.head / group * D;
  float total = sum, part = 1.0f;
  if (flags & metal_layout::kSinks) {
    // A centre on the keys shifts every score of the row; here it is taken from the sink instead.
    float shift = 0.0f;
    if (flags & metal_layout::kKeyCentre) {
      const auto strides = ending.query.strides;
      const long at = row.batch * strides[0] + row.head * strides[1] + row.query * strides[2];
      TQ_UNROLL
      for (int r = 0; r < D / 32; ++r) {
        const int i = 32 * r + lane;
        shift = fma(float(ending.query.data[at + i * strides[3]]), float(ending.key_centre[centre + i]), shift);
      }
      shift = simd_sum(shift) * as_type<float>(int(params[metal_layout::kScale]));
    }
    const float sink = (float(ending.sinks[row.head]) - shift) * log2_e();
    const float top = fmax(m, sink);
    part = exp2_difference(m, top);
    total = sum * part + exp2_difference(sink, top);
  }
  const float factor = total == 0.0f ? 0.0f : part / total;
  unrotate_vector<D>(x, params, lane);
  const ulong its_row = ulong(row.batch * params[metal_layout::kQueryHeads] + row.head);
  const ulong at = (its_row * params[metal_layout::kQueryLen] + row.query) * D;
  TQ_UNROLL
  for (int r = 0; r < D / 32; ++r) {
    const int i = 32 * r + lane;
    const float mean = (flags & metal_layout::kValueCentre) ? float(ending.value_centre[centre + i]) * sum : 0.0f;
    out[at + i] = to_output<T>((x[r] + mean) * factor);
  }
}

/// Where the partial result of a row lies: in units of D numbers (x) and of kStats numbers.
template <class Params>
ulong partial_index(Params params, int split, Row row) {
  const int heads = params[metal_layout::kQueryHeads], queries = params[metal_layout::kQueryLen];
  const int batch_row = (row.batch * heads + row.head) * queries + row.query;
  return ulong(batch_row) * params[metal_layout::kSplits] + split;
}

/// Writes the partial result of a row.
template <int D, class Partials, class Params>
void write_partial(float m, float sum, const thread float* x, Row row, int split, Partials out, Params params,
                   ushort lane) {
  const ulong at = partial_index(params, split, row);
  float largest = 0.0f;
  TQ_UNROLL
  for (int r = 0; r < D / 32; ++r) largest = fmax(largest, fabs(x[r]));
  largest = simd_max(largest);
  const float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
  TQ_UNROLL
  for (int r = 0; r < D / 32; ++r) out.x[at * D + 32 * r + lane] = half(x[r] * inverse);
  if (lane == 0) {
    out.stats[at * metal_layout::kStats + metal_layout::kMaximum] = m;
    out.stats[at * metal_layout::kStats + metal_layout::kSum] = sum;
    out.stats[at * metal_layout::kStats + metal_layout::kLargest] = largest;
  }
}

/// Merges the splits of one row: a SIMD-group a row.  `index` counts (batch, head, query).
template <class T, int D, class Partials, class Ending, class Out, class Params>
void merge_splits(Partials in, Ending ending, Out out, Params params, int index, ushort lane) {
  const int heads = params[metal_layout::kQueryHeads], queries = params[metal_layout::kQueryLen];
  const int splits = params[metal_layout::kSplits];
  Row row;
  row.query = index % queries;
  row.head = index / queries % heads;
  row.first = row.last = 0;
  row.batch = index / queries / heads;
  const ulong first = partial_index(params, 0, row);
  float m = -INFINITY;
  for (int s = lane; s < splits; s += 32) {
    m = fmax(m, float(in.stats[(first + s) * metal_layout::kStats + metal_layout::kMaximum]));
  }
  m = simd_max(m);
  float x[D / 32] = {};
  float sum = 0.0f;
  for (int s = 0; s < splits; ++s) {
    const ulong its = (first + s) * metal_layout::kStats;
    const float factor = exp2_difference(in.stats[its + metal_layout::kMaximum], m);
    // A split whose scores are all NaN has m = -infinity, so factor 0, and a sum that is NaN, which stays NaN.
    sum += in.stats[its + metal_layout::kSum] * factor;
    const float unit_of_x = factor * in.stats[its + metal_layout::kLargest];
    TQ_UNROLL
    for (int r = 0; r < D / 32; ++r) x[r] = fma(unit_of_x, float(in.x[(first + s) * D + 32 * r + lane]), x[r]);
  }
  finish_row<T, D>(m, sum, x, row, ending, out, params, lane);
}

}  // namespace turboquant
