// Reads and writes single numbers of any storage type, and finds the place of a vector, a scale, a mask element.
#pragma once

#include "turboquant/half.h"
#include "turboquant/turboquant.h"

namespace turboquant {

inline float load_number(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::float16:
      return half_to_float(static_cast<const uint16_t*>(data)[i]);
    case Dtype::bfloat16:
      return bfloat_to_float(static_cast<const uint16_t*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

inline void store_number(void* data, Dtype dtype, int64_t i, float value) {
  switch (dtype) {
    case Dtype::float16:
      static_cast<uint16_t*>(data)[i] = float_to_half_saturated(value);
      break;
    case Dtype::bfloat16:
      static_cast<uint16_t*>(data)[i] = float_to_bfloat(value);
      break;
    default:
      static_cast<float*>(data)[i] = value;
  }
}

/// First element of row (b, h, t).
template <class Pointer>
int64_t row_offset(const BasicTensor<Pointer>& x, int b, int h, int t) {
  return b * x.batch_stride + h * x.head_stride + t * x.token_stride;
}

/// First word of the codes of vector (b, h, t).
template <class P>
auto row_codes(const P& packed, int head_dim, int b, int h, int t) {
  return packed.codes + b * packed.codes_batch_stride + h * packed.codes_head_stride +
         int64_t(t) * words_per_vector(packed.bits, head_dim);
}

/// Scale of vector (b, h, t).
template <class P>
auto& row_scale(const P& packed, int b, int h, int t) {
  return packed.scales[b * packed.scales_batch_stride + h * packed.scales_head_stride + t];
}

/// Keys that query i of row b may see by position alone: [first, last).
struct KeyRange {
  int first, last;
};
inline KeyRange visible_keys(const AttendParams& p, int b, int i) {
  const int position = p.kv_len - p.query_len + i;
  int first = p.starts ? p.starts[b] : 0, last = p.kv_len;
  if (p.causal && position + 1 < last) last = position + 1;
  if (p.window > 0 && position - p.window + 1 > first) first = position - p.window + 1;
  if (first < 0) first = 0;
  return {first, last < first ? first : last};
}

/// Which keys query i of row b reads from the exact copies: those before `first_end`, and from `recent_begin` on.
struct ExactRange {
  int first_end, recent_begin;
};
inline ExactRange exact_keys(const AttendParams& p, int b, int i) {
  const ExactTier& e = p.exact;
  const int position = p.kv_len - p.query_len + i;
  ExactRange range{0, p.kv_len};
  if (e.first > 0) range.first_end = (p.starts && p.starts[b] > 0 ? p.starts[b] : 0) + e.first;
  if (e.recent > 0) range.recent_begin = position - e.recent + 1;
  if (range.recent_begin < p.kv_len - e.ring && e.recent > 0) range.recent_begin = p.kv_len - e.ring;
  if (range.recent_begin < 0) range.recent_begin = 0;
  return range;
}

/// Where mask element (b, h, i, key) lies.
inline int64_t mask_offset(const AttendParams& p, int b, int h, int i, int64_t key) {
  return b * p.mask_strides[0] + h * p.mask_strides[1] + i * p.mask_strides[2] + key * p.mask_strides[3];
}

}  // namespace turboquant
