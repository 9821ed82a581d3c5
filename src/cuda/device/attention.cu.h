// Shared by the attention kernels: their parameters, the keys that a query sees, masks, fast exponentials.
#pragma once

#include "cuda/device/codec.cu.h"

namespace turboquant::cuda {

/// Packed keys and values: [batch, kv_heads, rows, bits * D / 32] codes and [batch, kv_heads, rows] scales.
struct PackedCache {
  const unsigned *key_codes, *value_codes;
  const __half *key_scales, *value_scales;
  long long key_code_strides[2], value_code_strides[2];    // of batch and head, in words; rows are dense
  long long key_scale_strides[2], value_scale_strides[2];  // of batch and head, in elements
};

/// AttendParams of turboquant.h on the device.
struct AttentionArgs {
  int batch, query_heads, kv_heads, query_len, kv_len;
  float scale;
  unsigned long long seed;
  bool causal;
  int window;
  const void* q;                           // [batch, query_heads, query_len, D]
  long long q_strides[4];                  // in elements
  PackedCache packed;                      // of kv_len rows
  PackedCache exact;                       // copies of 8 bits, of ring + first rows (ExactTier of turboquant.h)
  int ring, recent, first;                 // what of these is read; `recent` and `first` are 0 without copies
  int exact_splits;                        // splits that a segment's copies are read in: schedule.cu.h
  const float *key_centre, *value_centre;  // [kv_heads, D] or null
  const int* starts;                       // [batch] or null
  const void* mask;                        // [batch, query_heads, query_len, kv_len]; bool or MaskT
  long long mask_strides[4];
  const float* sinks;  // [query_heads] or null
  float* partial;      // [slots, ROWS, partial_floats]: see schedule.cu.h and Partial
  bool even;           // how blocks divide the cache: schedule.cu.h
  void* out;           // [batch, query_heads, query_len, D], dense

  __device__ int group() const { return query_heads / kv_heads; }
  __device__ int rows() const { return group() * query_len; }  // query rows that read one KV head

  /// A query's coordinates from `first` on, q_strides[3] apart.
  template <class T>
  __device__ const T* query_at(int b, int head, int query, int first) const {
    return static_cast<const T*>(q) + b * q_strides[0] + head * q_strides[1] + query * q_strides[2] +
           first * q_strides[3];
  }
  /// Eight of them.
  template <class T>
  __device__ Raw8<T> load_query(int b, int head, int query, int first) const {
    Raw8<T> raw;
    raw.load(query_at<T>(b, head, query, first), q_strides[3]);
    return raw;
  }
};

/// A row of partial results: D coordinates, as floats or as halves, then the exponent of the largest weight and the sum
/// of weights, both floats.
template <int D, bool HALF>
struct Partial {
  static constexpr int coordinates = HALF ? D / 2 : D;  // in floats
  static constexpr int floats = coordinates + 4;        // keeps rows 16-byte aligned
  float* row;
  __device__ Partial(const AttentionArgs& a, long long number) : row(a.partial + number * floats) {}
  __device__ float2* sums() const { return reinterpret_cast<float2*>(row + coordinates); }
};

enum MaskType { kNoMask, kBooleanMask, kAdditiveMask };

/// Keys that a query may see by position: [first, last).
struct Range {
  int first, last;
};
__device__ inline Range visible_keys(const AttentionArgs& a, int b, int query) {
  const int position = a.kv_len - a.query_len + query;
  int first = a.starts ? max(a.starts[b], 0) : 0, last = a.kv_len;
  if (a.causal) last = min(last, position + 1);
  if (a.window > 0) first = max(first, position - a.window + 1);
  return {first, max(first, last)};
}

/// The first token that a query reads from the ring of exact copies: kv_len where there is none.
__device__ inline int ring_begin(const AttentionArgs& a, int query) {
  if (a.recent == 0) return a.kv_len;
  return max(max(a.kv_len - a.query_len + query - a.recent + 1, a.kv_len - a.ring), 0);
}

/// The same of the last query, the largest.
__device__ inline int last_ring_begin(const AttentionArgs& a) { return max(a.kv_len - a.recent, 0); }

/// The end of a row's first tokens that have exact copies.
__device__ inline int first_end(const AttentionArgs& a, int b) {
  return a.first == 0 ? 0 : (a.starts ? max(a.starts[b], 0) : 0) + a.first;
}

/// Of the keys that a query may see those that it reads from the codes.
__device__ inline Range coded_keys(const AttentionArgs& a, int b, int query) {
  const Range r = visible_keys(a, b, query);
  const int first = max(r.first, first_end(a, b));
  return {first, max(first, min(r.last, ring_begin(a, query)))};
}

/// Of these keys those that it reads from exact copies, of the ring or of the first tokens.
__device__ inline Range exact_keys(const AttentionArgs& a, int b, int query, bool of_ring) {
  const Range r = visible_keys(a, b, query);
  const int begin = ring_begin(a, query);
  if (of_ring) return {max(r.first, begin), r.last};
  return {r.first, min(min(r.last, begin), first_end(a, b))};
}

constexpr float kLog2E = 1.44269504088896340736f;
/// A query of smaller numbers is taken for zero, as its scores are: its inverse may be infinite.
constexpr float kLeastQuery = 1e-33f;
constexpr float kEmptyTop = -1e30f;  // the exponent of an empty sum; finite, so that differences are numbers

/// The term of the mask for one pair, in units of log2; minus infinity hides.
template <MaskType MASK, class MaskT>
__device__ float mask_term(const AttentionArgs& a, int b, int head, int query, int key) {
  if constexpr (MASK == kNoMask) return 0.f;
  const long long at =
      b * a.mask_strides[0] + head * a.mask_strides[1] + query * a.mask_strides[2] + key * a.mask_strides[3];
  if constexpr (MASK == kBooleanMask) {
    return static_cast<const unsigned char*>(a.mask)[at] ? 0.f : -__uint_as_float(0x7f800000);
  } else {
    return to_float(static_cast<const MaskT*>(a.mask)[at]) * kLog2E;
  }
}

}  // namespace turboquant::cuda
