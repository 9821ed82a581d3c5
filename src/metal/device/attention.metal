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

/// What decides which keys a row sees.  With COPIES keys are slots of the exact copies.
template <bool COPIES, class Params, class Starts, class Mask, class MaskStrides>
struct Rules {
  static constant constexpr bool kCopies = COPIES;
  Params params;
  Starts starts;
  Mask mask;
  MaskStrides mask_strides;
};
template <bool COPIES, class Params, class Starts, class Mask, class MaskStrides>
Rules<COPIES, Params, Starts, Mask, MaskStrides> rules_of(Params params, Starts starts, Mask mask,
                                                          MaskStrides mask_strides) {
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

/// A row of attention: where its query stands and which keys its rules let it see.  Of these the exact copies hold
/// those from `recent` on and those before `first_end`; a launch that reads codes leaves them out.
struct Row {
  int batch, head, query, first, last, recent, first_end;
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
  const int recent = params[metal_layout::kRecent], first = params[metal_layout::kFirst];
  row.recent = recent > 0 ? max(max(position - recent + 1, kv_len - params[metal_layout::kRing]), 0) : kv_len;
  row.first_end = first > 0 ? row.first + first : 0;
  row.last = (flags & metal_layout::kCausal) ? min(position + 1, kv_len) : kv_len;
  if (window > 0) row.first = max(row.first, position - window + 1);
  if (!(flags & metal_layout::kCopies)) {
    row.first = max(row.first, row.first_end);
    row.last = min(row.last, row.recent);
  }
  if (row.query >= query_len) row.last = row.first;
  row.last = max(row.first, row.last);
  return row;
}

/// The token whose copy is in a slot; negative when there is none yet.
template <class Params>
int token_of_slot(Params params, int first_token, int slot) {
  const int ring = params[metal_layout::kRing], newest = params[metal_layout::kKvLen] - 1;
  if (slot >= ring) return first_token + slot - ring;
  return newest - ((newest - slot) % ring + ring) % ring;
}

/// The tokens that any of rows [begin, end) reads from the ring.
template <class Rules>
int2 tokens_of_ring(Rules rules, int begin, int end, int kv, int b) {
  const int group = rules.params[metal_layout::kQueryHeads] / rules.params[metal_layout::kKvHeads];
  const int rows = rules.params[metal_layout::kQueryLen] * group;
  return int2(find_row(rules.params, rules.starts, begin, kv, b).recent,
              find_row(rules.params, rules.starts, min(end, rows) - 1, kv, b).last);
}

/// Whether a block of keys may hold some that are read.  A block of the ring holds tokens that follow each other, those
/// beyond the newest a ring earlier.
template <class Rules>
bool is_read(Rules rules, int2 tokens, int block) {
  const int ring = rules.params[metal_layout::kRing];
  if (!Rules::kCopies || block >= ring) return true;
  const int token = token_of_slot(rules.params, 0, block), before = token - ring;
  return (token < tokens.y && token + metal_layout::kBlock > tokens.x) ||
         (before < tokens.y && before + metal_layout::kBlock > tokens.x);
}

/// The keys of one split: the range that any of rows [begin, end) sees, or all slots of copies, cut into blocks, shared
/// out evenly.
template <class Params, class Starts>
int2 split_range(Params params, Starts starts, int begin, int end, int kv, int b, int split) {
  const int group = params[metal_layout::kQueryHeads] / params[metal_layout::kKvHeads];
  const int rows = params[metal_layout::kQueryLen] * group;
  const bool copies = params[metal_layout::kFlags] & metal_layout::kCopies;
  const int first = copies ? 0 : find_row(params, starts, begin, kv, b).first;
  const int last = copies ? params[metal_layout::kRing] + params[metal_layout::kFirst]
                          : find_row(params, starts, min(end, rows) - 1, kv, b).last;
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
  if (Rules::kCopies) {
    const bool of_ring = key < rules.params[metal_layout::kRing];
    key = token_of_slot(rules.params, row.first_end - rules.params[metal_layout::kFirst], key);
    // A token in both places is read from the ring.
    if (of_ring ? key < row.recent : key >= min(row.first_end, row.recent)) return -INFINITY;
  }
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

/// Where the first partial result of a row lies, of `splits`: in units of D numbers (x) and of kStats numbers.
template <class Params>
ulong partial_index(Params params, int splits, Row row) {
  const int heads = params[metal_layout::kQueryHeads], queries = params[metal_layout::kQueryLen];
  const int batch_row = (row.batch * heads + row.head) * queries + row.query;
  return ulong(batch_row) * splits;
}

/// Writes the partial result of a row.
template <int D, class Partials, class Params>
void write_partial(float m, float sum, const thread float* x, Row row, int split, Partials out, Params params,
                   ushort lane) {
  const ulong at = partial_index(params, params[metal_layout::kSplits], row) + split;
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

/// The largest score of a row's splits, from `first` on.
template <class Partials>
float largest_score(Partials in, ulong first, int splits, ushort lane) {
  float m = -INFINITY;
  for (int s = lane; s < splits; s += 32) {
    m = fmax(m, float(in.stats[(first + s) * metal_layout::kStats + metal_layout::kMaximum]));
  }
  return simd_max(m);
}

/// Adds a row's splits, from `first` on, in units of exp2(m).
template <int D, class Partials>
void add_splits(Partials in, ulong first, int splits, float m, thread float& sum, thread float* x, ushort lane) {
  for (int s = 0; s < splits; ++s) {
    const ulong its = (first + s) * metal_layout::kStats;
    const float factor = exp2_difference(in.stats[its + metal_layout::kMaximum], m);
    // A split whose scores are all NaN has m = -infinity, so factor 0, and a sum that is NaN, which stays NaN.
    sum += in.stats[its + metal_layout::kSum] * factor;
    const float unit_of_x = factor * in.stats[its + metal_layout::kLargest];
    TQ_UNROLL
    for (int r = 0; r < D / 32; ++r) x[r] = fma(unit_of_x, float(in.x[(first + s) * D + 32 * r + lane]), x[r]);
  }
}

/// The row of number `index`, which counts (batch, head, query).
template <class Params>
Row row_to_merge(Params params, int index) {
  const int heads = params[metal_layout::kQueryHeads], queries = params[metal_layout::kQueryLen];
  Row row;
  row.query = index % queries;
  row.head = index / queries % heads;
  row.batch = index / queries / heads;
  row.first = row.last = row.recent = row.first_end = 0;
  return row;
}

/// Merges the splits of one row: a SIMD-group a row.
template <class T, int D, class Partials, class Ending, class Out, class Params>
void merge_splits(Partials in, Ending ending, Out out, Params params, int index, ushort lane) {
  const Row row = row_to_merge(params, index);
  const int splits = params[metal_layout::kSplits];
  const ulong first = partial_index(params, splits, row);
  const float m = largest_score(in, first, splits, lane);
  float x[D / 32] = {};
  float sum = 0.0f;
  add_splits<D>(in, first, splits, m, sum, x, lane);
  finish_row<T, D>(m, sum, x, row, ending, out, params, lane);
}

/// The same with the splits of the launch that read the exact copies.
template <class T, int D, class Partials, class Ending, class Out, class Params>
void merge_with_copies(Partials in, Partials copies, Ending ending, Out out, Params params, int index, ushort lane) {
  const Row row = row_to_merge(params, index);
  const int splits = params[metal_layout::kSplits], copy_splits = params[metal_layout::kCopySplits];
  const ulong first = partial_index(params, splits, row), first_copy = partial_index(params, copy_splits, row);
  const float m = fmax(largest_score(in, first, splits, lane), largest_score(copies, first_copy, copy_splits, lane));
  float x[D / 32] = {};
  float sum = 0.0f;
  add_splits<D>(in, first, splits, m, sum, x, lane);
  add_splits<D>(copies, first_copy, copy_splits, m, sum, x, lane);
  finish_row<T, D>(m, sum, x, row, ending, out, params, lane);
}

}  // namespace turboquant
