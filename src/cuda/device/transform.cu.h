// The kernel of `transform` for few vectors: (x - c) W, as in TransformParams of turboquant.h.
//
// A block computes 32 columns of the products of one matrix, with eight vectors at a time: its warps divide the
// matrix's rows.  A vector's sums run in one order whatever else is in the call.
#pragma once

#include "cuda/device/codec.cu.h"

namespace turboquant::cuda {

struct TransformArgs {
  int batch, heads, tokens, matrices;
  const void* x;           // [batch, heads, tokens, D]
  long long x_strides[4];  // in elements
  const float* centre;     // [matrices, D] or null
  const float* matrix;     // [matrices, D, D], dense
  float* out;              // [batch, heads, tokens, D], dense
};

template <int D>
struct TransformMemory {
  static constexpr int kWarps = 8, kVectors = 8;
  alignas(16) float x[kVectors][D];
  float sums[kWarps][kVectors][32];
};

template <int D, class T>
__device__ void transform(const TransformArgs& a, int block, TransformMemory<D>& memory) {
  constexpr int kWarps = TransformMemory<D>::kWarps, kVectors = TransformMemory<D>::kVectors, kRows = D / kWarps;
  const int lane = threadIdx.x & 31, warp = warp_index();
  const int matrix = block / (D / 32), column = block % (D / 32) * 32 + lane;
  const int group = a.heads / a.matrices, count = a.batch * group * a.tokens;
  const float* w = a.matrix + ((long long)matrix * D + warp * kRows) * D + column;
  for (int first = 0; first < count; first += kVectors) {
    const auto place = [&](int i, int& b, int& h, int& t) {
      t = (first + i) % a.tokens, h = matrix * group + (first + i) / a.tokens % group,
      b = (first + i) / a.tokens / group;
    };
    for (int i = threadIdx.x; i < kVectors * D; i += 32 * kWarps) {
      float value = 0;
      if (first + i / D < count) {
        int b, h, t;
        place(i / D, b, h, t);
        value = to_float(static_cast<const T*>(
            a.x)[b * a.x_strides[0] + h * a.x_strides[1] + t * a.x_strides[2] + i % D * a.x_strides[3]]);
        if (a.centre) value -= a.centre[matrix * D + i % D];
      }
      memory.x[i / D][i % D] = value;
    }
    __syncthreads();
    float sum[kVectors] = {};
#pragma unroll 4
    for (int k = 0; k < kRows; k += 4) {
      float of[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) of[j] = w[(long long)(k + j) * D];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const float4 x = *reinterpret_cast<const float4*>(&memory.x[i][warp * kRows + k]);
        sum[i] = fmaf(x.x, of[0], fmaf(x.y, of[1], fmaf(x.z, of[2], fmaf(x.w, of[3], sum[i]))));
      }
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) memory.sums[warp][i][lane] = sum[i];
    __syncthreads();
    if (first + warp < count) {  // a warp a vector
      float all = 0;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) all += memory.sums[k][warp][lane];
      int b, h, t;
      place(warp, b, h, t);
      a.out[(((long long)b * a.heads + h) * a.tokens + t) * D + column] = all;
    }
    __syncthreads();
  }
}

/// The same with T from a pointer, for generated code.
template <int D, class T>
__device__ void transform_as(const TransformArgs& a, const T*, int block) {
  __shared__ TransformMemory<D> memory;
  transform<D, T>(a, block, memory);
}

}  // namespace turboquant::cuda
