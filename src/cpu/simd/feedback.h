// The kernel of encode with error feedback.  It codes a vector block by block, 32 coordinates each; a few vectors at a
// time share each load of the matrix G.
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
inline void feed_back(const uint16_t* g, int dim, int columns, const float (*e)[kMaxDim], float (*out)[32]) {
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

/// Codes nearest to the 32 targets of a block and errors [32] of their levels against u; returns the levels' squares.
template <class F>
inline uint32_t code_block(Kind kind, const float* targets, const float* u, uint32_t* words, float* error) {
  constexpr int lanes = sizeof(F) / 4;
  if (kind.trellis) {
    alignas(64) float levels[32];
    const uint32_t square = Trellis<sizeof(F)>::code(kind.bits, targets, 32, words, levels);
    for (int i = 0; i < 32; i += lanes) store(error + i, load<F>(levels + i) - load<F>(u + i));
    return square;
  }
  alignas(64) uint8_t levels[32];
  const uint32_t square = quantize<F>(kind.bits, targets, 32, 2.0f, words, levels);
  for (int i = 0; i < 32; i += lanes) {
    const F size = __builtin_convertvector(load<Vec<uint8_t, lanes>>(levels + i), F);
    const F level = load<F>(targets + i) < F{} ? -size : size;
    store(error + i, level - load<F>(u + i));
  }
  return square;
}

/// How many levels a unit of a rotated vector x of length `norm` is.  Scalar codes are asked for by coding it without
/// feedback, to `words`.
template <class F>
inline float levels_per_unit(Kind kind, const float* x, int dim, float norm, uint32_t* words) {
  if (kind.trellis) return feedback_unit(kind.bits) * __builtin_sqrtf(float(dim)) / norm;
  alignas(64) uint8_t levels[kMaxDim];
  const uint32_t square = quantize<F>(kind.bits, x, dim, doubled_unit<F>(kind.bits, x, dim, norm), words, levels);
  return __builtin_sqrtf(float(square)) / norm;
}

/// Vectors [t, t + vectors).
template <class S, int vectors>
void encode_feedback_group(const EncodeVectors& p, int t) {
  using F = Vec<float, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  const int words = words_per_vector(p.kind.bits, p.dim);
  alignas(64) float u[vectors][kMaxDim], error[vectors][kMaxDim], feedback[vectors][32];
  float norm[vectors], back[vectors];
  uint32_t square[vectors];
  bool coded[vectors];
  for (int v = 0; v < vectors; ++v) {
    coded[v] = rotated_vector<S>(p, t + v, u[v], norm[v], back[v]);
    if (!coded[v]) {  // its neighbours must find numbers to multiply with
      for (int i = 0; i < p.dim; i += lanes) store(error[v] + i, F{});
      continue;
    }
    const float factor = levels_per_unit<F>(p.kind, u[v], p.dim, norm[v], p.codes + int64_t(t + v) * words);
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
      uint32_t* const codes = p.codes + int64_t(t + v) * words + block / 32 * p.kind.bits;
      square[v] += code_block<F>(p.kind, target, u[v] + block, codes, error[v] + block);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    if (coded[v]) p.scales[t + v] = stored_scale(p.kind, norm[v], square[v], back[v]);
  }
}

template <class S>
void encode_vectors_with_feedback(const EncodeVectors& p) {
  int t = 0;
  for (; t + 4 <= p.count; t += 4) encode_feedback_group<S, 4>(p, t);
  for (; t < p.count; ++t) encode_feedback_group<S, 1>(p, t);
}

}  // namespace
}  // namespace turboquant::cpu
