// Encoding with error feedback: block after block of 32 coordinates, a few rows at a time that share each load of G.
//
// A row's arithmetic is the same however many rows are coded together, so its codes do not depend on its neighbours.
#pragma once

#include "cpu/simd/codec.h"

namespace turboquant::cpu {
namespace {

/// Numbers of float16 as a vector; an instruction set with a conversion of its own has `load_halves`.
template <class S>
inline Vec<float, S::bytes> load_feedback(const uint16_t* p) {
  if constexpr (requires { S::load_halves(p); }) {
    return S::load_halves(p);
  } else {
    return load_floats<Vec<float, S::bytes>>(p, Dtype::float16, 0);
  }
}

/// out[v][i] = sum over j < columns of g[i * dim + j] * e[v][j], for 32 rows i of G.
template <class S, int vectors, int rows>
inline void feed_back(const uint16_t* g, int dim, int columns, const float (*e)[256], float (*out)[32]) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  for (int i = 0; i < 32; i += rows) {
    F sum[rows * vectors] = {};
    for (int j = 0; j < columns; j += lanes) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const F weights = load_feedback<S>(g + (i + r) * dim + j);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[r * vectors + v] += weights * load<F>(e[v] + j);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < vectors; ++v) {
        out[v][i + r] = reduce(sum[r * vectors + v], [](F a, F b) { return a + b; });
      }
    }
  }
}

/// Rows [t, t + vectors).
template <class S, int vectors>
void encode_feedback_group(const EncodeRows& p, int t) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  const int words = words_per_vector(p.bits, p.dim);
  alignas(64) float u[vectors][256], error[vectors][256], feedback[vectors][32];
  alignas(64) uint8_t levels[256];
  float norm[vectors], back[vectors];
  uint32_t square[vectors];
  bool coded[vectors];
  for (int v = 0; v < vectors; ++v) {
    coded[v] = rotated_row<S>(p, t + v, u[v], norm[v], back[v]);
    if (!coded[v]) {  // its neighbours must find numbers to multiply with
      for (int i = 0; i < p.dim; i += lanes) store(error[v] + i, F{});
      continue;
    }
    const float doubled = 2 * unit(p.bits) * __builtin_sqrtf(float(p.dim)) / norm[v];
    square[v] = quantize<F>(p.bits, u[v], p.dim, doubled, p.codes + int64_t(t + v) * words, levels);
    const float factor = __builtin_sqrtf(float(square[v])) / norm[v];
    for (int i = 0; i < p.dim; i += lanes) store(u[v] + i, load<F>(u[v] + i) * factor);
    square[v] = 0;
  }
  for (int block = 0; block < p.dim; block += 32) {
    if (block > 0) feed_back<S, vectors, 8 / vectors>(p.feedback + block * p.dim, p.dim, block, error, feedback);
    for (int v = 0; v < vectors; ++v) {
      if (!coded[v]) continue;
      alignas(64) float target[32];
      for (int i = 0; i < 32; i += lanes) {
        const F x = load<F>(u[v] + block + i);
        store(target + i, block > 0 ? x - load<F>(feedback[v] + i) : x);
      }
      uint32_t* const codes = p.codes + int64_t(t + v) * words + block / 32 * p.bits;
      square[v] += quantize<F>(p.bits, target, 32, 2.0f, codes, levels);
      for (int i = 0; i < 32; i += lanes) {
        const F size = __builtin_convertvector(load<Vec<uint8_t, lanes>>(levels + i), F);
        const F level = load<F>(target + i) < F{} ? -size : size;
        store(error[v] + block + i, level - load<F>(u[v] + block + i));
      }
    }
  }
  for (int v = 0; v < vectors; ++v) {
    if (coded[v]) p.scales[t + v] = stored_scale(p.bits, norm[v], square[v], back[v]);
  }
}

template <class S>
void encode_feedback_rows(const EncodeRows& p) {
  int t = 0;
  for (; t + 4 <= p.count; t += 4) encode_feedback_group<S, 4>(p, t);
  for (; t < p.count; ++t) encode_feedback_group<S, 1>(p, t);
}

}  // namespace
}  // namespace turboquant::cpu
