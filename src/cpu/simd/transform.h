// Vectors times a matrix, a few at a time that share each load of it.
//
// A number of the result is summed over the rows of the matrix in their order, however many vectors go together: it
// does not depend on the others.
#pragma once

#include "cpu/simd/simd.h"

namespace turboquant::cpu {
namespace {

constexpr int kLargestDim = 512;

/// out[v][j] = sum over i of x[v][i] * matrix[i * dim + j], for `columns` registers of j.
template <class F, int vectors, int columns>
inline void transform_columns(const float (*x)[kLargestDim], const float* matrix, int dim, float* const* out) {
  constexpr int lanes = sizeof(F) / 4;
  F sum[vectors * columns] = {};
  for (int i = 0; i < dim; ++i) {
    const float* row = matrix + int64_t(i) * dim;
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      const F weights = load<F>(row + c * lanes);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[v * columns + c] += splat<F>(x[v][i]) * weights;
    }
  }
  for (int v = 0; v < vectors; ++v) {
    for (int c = 0; c < columns; ++c) store(out[v] + c * lanes, sum[v * columns + c]);
  }
}

/// Vectors [t, t + vectors).
template <class S, int vectors>
void transform_group(const TransformVectors& p, int t) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  alignas(64) float x[vectors][kLargestDim];
  for (int v = 0; v < vectors; ++v) {
    const char* row = static_cast<const char*>(p.x) + (t + v) * p.stride * (p.dtype == Dtype::float32 ? 4 : 2);
    for (int i = 0; i < p.dim; i += lanes) {
      F number = load_floats<F>(row, p.dtype, i);
      if (p.centre) number -= load<F>(p.centre + i);
      store(x[v] + i, number);
    }
  }
  // One vector takes more columns at a time, so that its sums do not wait for each other.
  constexpr int columns = vectors == 1 ? 32 / lanes : 2;
  for (int j = 0; j < p.dim; j += columns * lanes) {
    float* out[vectors];
    for (int v = 0; v < vectors; ++v) out[v] = p.out + (t + v) * p.out_stride + j;
    transform_columns<F, vectors, columns>(x, p.matrix + j, p.dim, out);
  }
}

template <class S>
void transform_vectors(const TransformVectors& p) {
  int t = 0;
  for (; t + 4 <= p.count; t += 4) transform_group<S, 4>(p, t);
  for (; t < p.count; ++t) transform_group<S, 1>(p, t);
}

}  // namespace
}  // namespace turboquant::cpu
