// Merges the partial results of blocks into output rows: the last kernel of an attention that was divided.
#pragma once

#include "cuda/device/schedule.cu.h"

namespace turboquant::cuda {

/// Ends a query row in one warp: v is the sum of weighted values (eight rotated coordinates a lane and set) and `sum`
/// that of the weights, both relative to 2^top.  Adds the sink, normalises, rotates back, adds the centre and writes.
/// Keys have DK coordinates, values D.
template <int DK, int D, class T>
__device__ void finish_row(const AttentionArgs& a, int b, int head, int query, float (&v)[Lanes<D>::sets][8], float sum,
                           float top) {
  const int lane = threadIdx.x & 31, kv_head = head / a.group();
  const float seen = sum;
  float factor = 1;
  if (a.sinks) {
    float shift = 0;  // the keys' centre moves every score but the sink's
    if (a.key_centre) {
      for (int eighth = lane; eighth < DK / 8; eighth += 32) {
        float q[8];
        a.load_query<T>(b, head, query, 8 * eighth).to_floats(q);
#pragma unroll
        for (int j = 0; j < 8; ++j) shift += q[j] * a.key_centre[kv_head * DK + 8 * eighth + j];
      }
      for (int step = 16; step; step /= 2) shift += __shfl_xor_sync(~0u, shift, step);
    }
    const float sink = (a.sinks[head] - shift * a.scale) * kLog2E, most = fmaxf(top, sink);
    factor = exp2_fast(top - most);
    sum = sum * factor + exp2_fast(sink - most);
  }
  const float norm = sum == 0 ? 0.f : factor / sum;
  hadamard<D>(v);
  const long long row = ((long long)b * a.query_heads + head) * a.query_len + query;
#pragma unroll
  for (int s = 0; s < Lanes<D>::sets; ++s) {
    const int eighth = lane + 32 * s;
    const bool has = eighth < D / 8;
    apply_signs(v[s], a.seed, has ? eighth : 0, norm * rsqrtf(float(Lanes<D>::power)));
    if (!has) continue;
    if (a.value_centre) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[s][j] += seen * norm * a.value_centre[kv_head * D + 8 * eighth + j];
    }
    store8(static_cast<T*>(a.out) + row * D + 8 * eighth, v[s]);
  }
}

template <bool HALF>
struct Coordinate {
  using type = float;
};
template <>
struct Coordinate<true> {
  using type = __half;
};

/// Adds a warp's share of partial results to a row: v, `sum` and `top` as in finish_row.  They are those of every
/// eighth of `slots` from `first` on, of row `row` of ROWS; five of them at a time, so that their loads
/// overlap.
template <int D, int ROWS, bool HALF>
__device__ void add_partials(const AttentionArgs& a, int row, const PartialSlots& slots, int first,
                             float (&v)[Lanes<D>::sets][8], float& sum, float& top) {
  constexpr int kSets = Lanes<D>::sets;
  constexpr int step = 8, batch = 5;
  using Coordinates = typename Coordinate<HALF>::type;
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int i = first; i < slots.size(); i += batch * step) {
    float2 sums[batch];
    Raw8<Coordinates> raw[batch][kSets] = {};
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      sums[k] = make_float2(kEmptyTop, 0);
      if (i + k * step >= slots.size()) continue;
      const Partial<D, HALF> partial(a, (long long)slots[i + k * step] * ROWS + row);
      sums[k] = *partial.sums();
      const void* from = __builtin_assume_aligned(partial.row, 16);
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        if (lane + 32 * s < D / 8) raw[k][s].load(static_cast<const Coordinates*>(from) + 8 * (lane + 32 * s));
      }
    }
    const float old = top;
#pragma unroll
    for (int k = 0; k < batch; ++k) top = fmaxf(top, sums[k].x);
    const float keep = exp2_fast(old - top);
    sum *= keep;
#pragma unroll
    for (auto& set : v) {
#pragma unroll
      for (float& y : set) y *= keep;
    }
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const float weight = exp2_fast(sums[k].x - top);
      sum += weight * sums[k].y;
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        float x[8];
        raw[k][s].to_floats(x);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[s][j] += weight * x[j];
      }
    }
  }
}

/// Shared memory of `merge`: [8 warps][D], an exponent and a sum per warp.
template <int D>
__host__ __device__ constexpr int merge_shared_floats() {
  return 8 * D + 16;
}

/// Merges the partial results of one query row, adds the sink, rotates back and writes.  256 threads; `row` counts
/// [batch, query_heads, query_len], `slots` the partial results there are room for.
template <int DK, int D, int ROWS, int TILE, bool HALF, class T>
__device__ void merge(const AttentionArgs& a, int row, int slots, float* shared) {
  const int lane = threadIdx.x & 31, warp = warp_index();
  const int query = row % a.query_len, head = row / a.query_len % a.query_heads, b = row / a.query_len / a.query_heads;
  const int kv_head = head / a.group(), in_group = query * a.group() + head % a.group();

  const int segment = kv_head * ((a.rows() + ROWS - 1) / ROWS) + in_group / ROWS;
  const PartialSlots partials = partial_slots<TILE, ROWS>(a, b, segment, slots);
  float top = kEmptyTop, sum = 0, v[Lanes<D>::sets][8] = {};
  add_partials<D, ROWS, HALF>(a, in_group % ROWS, partials, warp, v, sum, top);
#pragma unroll
  for (int s = 0; s < Lanes<D>::sets; ++s) {
    if (lane + 32 * s < D / 8) store8(shared + warp * D + 8 * (lane + 32 * s), v[s]);
  }
  if (lane == 0) shared[8 * D + warp] = top, shared[8 * D + 8 + warp] = sum;
  __syncthreads();
  if (warp) return;
  // One lane a warp for the exponents, then all lanes for the coordinates.
  float factor = lane < 8 ? shared[8 * D + lane] : kEmptyTop;
  sum = lane < 8 ? shared[8 * D + 8 + lane] : 0;
  top = factor;
  for (int step = 4; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  top = __shfl_sync(~0u, top, 0);
  factor = exp2_fast(factor - top);
  sum *= factor;
  for (int step = 4; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  sum = __shfl_sync(~0u, sum, 0);
#pragma unroll
  for (auto& set : v) {
#pragma unroll
    for (float& y : set) y = 0;
  }
#pragma unroll
  for (int w = 0; w < 8; ++w) {
    const float weight = __shfl_sync(~0u, factor, w);
#pragma unroll
    for (int s = 0; s < Lanes<D>::sets; ++s) {
      const bool has = lane + 32 * s < D / 8;
      float x[8];
      load8(shared + w * D + (has ? 8 * (lane + 32 * s) : 0), x);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[s][j] += has ? weight * x[j] : 0.f;
    }
  }
  finish_row<DK, D, T>(a, b, head, query, v, sum, top);
}

/// `merge` with T from a pointer, for generated code.
template <int DK, int D, int ROWS, int TILE, bool HALF, class T>
__device__ void merge_as(const AttentionArgs& a, const T*, int row, int slots, float* shared) {
  merge<DK, D, ROWS, TILE, HALF, T>(a, row, slots, shared);
}

}  // namespace turboquant::cuda
