// The memory that a tile works in, and its queries prepared for integer products.
#pragma once

#include "cpu/simd/hadamard.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/unpack.h"

namespace turboquant::cpu {
namespace {

constexpr float kLargest = 32512;  // 127 * 256: the high byte stays below 128 after rounding
constexpr float kHidden = -__builtin_inff();
constexpr int kBlockQuads = kBlock / 4;

/// How the vectors of keys or of values are laid out.
template <class S>
struct Layout {
  bool bytes;
  int planes, positions;
  int64_t quad_bytes;  // of the planes of four tokens

  Layout(Kind kind, int dim)
      : bytes(is_bytes(kind)),
        planes(cpu::planes<S>(bytes, dim)),
        positions(cpu::positions<S>(bytes, dim)),
        quad_bytes(int64_t(planes) * S::bytes) {}
};

/// Where things lie in the workspace.
template <class S>
struct Workspace {
  Layout<S> key, value;
  uint8_t *keys, *values;             // planes of a block: [kBlockQuads, planes]
  uint32_t* padded;                   // the packed rows of a block
  uint8_t* queries;                   // [rows, positions of keys, 2 vectors]
  float* acc;                         // [rows, positions of values, lanes]
  float* scores;                      // [rows, kBlock]
  uint32_t* weights;                  // [rows, 2 * kBlockQuads]
  float *factor, *step;               // [rows] of the block: what scales the old accumulator, a unit of weight
  float* query_step;                  // [rows] a unit of integer query, times the scale of scores
  int32_t *query_bias, *weight_bias;  // [rows] what undoes level_offset
  size_t bytes;

  Workspace(std::byte* base, const Tile& tile)
      : key(tile.keys.kind, tile.keys.dim), value(tile.values.kind, tile.values.dim) {
    const int rows = tile.rows;
    size_t at = 0;
    auto take = [&]<class T>(T*& p, size_t count) {
      p = base ? reinterpret_cast<T*>(base + at) : nullptr;  // without a base only the size is asked for
      at += (count * sizeof(T) + 63) / 64 * 64;
    };
    const size_t key_bytes = size_t(kBlockQuads) * key.quad_bytes, value_bytes = size_t(kBlockQuads) * value.quad_bytes;
    take(keys, S::interleaves || key_bytes > value_bytes ? key_bytes : value_bytes);
    values = keys;
    if (S::interleaves) take(values, value_bytes);
    const int key_words = words_per_vector(tile.keys.kind.bits, tile.keys.dim);
    const int value_words = words_per_vector(tile.values.kind.bits, tile.values.dim);
    take(padded, size_t(kBlock) * (key_words > value_words ? key_words : value_words) + 4);
    take(queries, size_t(rows) * key.positions * 2 * S::bytes);
    take(acc, size_t(rows) * value.positions * S::bytes / 4);
    take(scores, size_t(rows) * kBlock);
    take(weights, size_t(rows) * 2 * kBlockQuads);
    take(factor, rows);
    take(step, rows);
    take(query_step, rows);
    take(query_bias, rows);
    take(weight_bias, rows);
    bytes = at;
  }
};

/// S::prepare takes the quads of positions of nibbles; this moves quads of neighbours there.
inline void quads_of_bytes(int32_t x[32]) {
  int32_t moved[32];
  for (int i = 0; i < 32; ++i) moved[i / 8 * 8 + i % 4 * 2 + i / 4 % 2] = x[i];
  __builtin_memcpy(x, moved, sizeof moved);
}

/// Rotates and rounds the query of a row, and lays it out by position.
template <class S>
void prepare_query(const Tile& tile, int row, const Workspace<S>& w) {
  using F = Vec<float, S::bytes>;
  using I32 = Vec<int32_t, S::bytes>;
  constexpr int lanes = S::bytes / 4;
  const int dim = tile.keys.dim;
  alignas(64) float x[kMaxDim];
  alignas(64) int32_t rounded[kMaxDim + 96] = {};  // groups beyond dim (of a vector's last chunks) stay 0
  F largest = {}, poison = {};
  for (int i = 0; i < dim; i += lanes) {
    store(x + i, load_floats<F>(tile.q[row], tile.q_dtype, i) * load<F>(tile.signs + i));
  }
  hadamard<F>(x, dim);
  for (int i = 0; i < dim; i += lanes) {
    const F v = absolute(load<F>(x + i));
    largest = larger(v, largest);
    poison += v - v;  // NaN if v is not finite
  }
  const float top = reduce(largest, [](F a, F b) { return larger(a, b); });
  const float bad = reduce(poison, [](F a, F b) { return a + b; });
  const bool usable = top > 1e-30f && bad == 0;
  const float inverse = usable ? kLargest / top : 0;
  w.query_step[row] = (usable ? top / kLargest : bad) * tile.scale * step_of(tile.keys.kind) * 1.44269504f;
  int32_t sum = 0;
  if (usable) {
    I32 total = {};
    for (int i = 0; i < dim; i += lanes) {
      const F v = load<F>(x + i) * inverse;
      const F magic = splat<F>(12582912.0f);  // rounds to the nearest integer
      const I32 r = __builtin_convertvector((v + magic) - magic, I32);
      store(rounded + i, r);
      total += r;
    }
    sum = reduce(total, [](I32 a, I32 b) { return a + b; });
  }
  w.query_bias[row] = -S::level_offset * sum;
  const int pos = w.key.positions, unit = w.key.bytes ? 4 : 8;  // positions of a group, or of half a group of bytes
  const int groups = (pos * kChunks<S> + 7) / 8;
  if (w.key.bytes) {
    for (int g = 0; g < groups; ++g) quads_of_bytes(rounded + 32 * g);
  }
  uint32_t* out = reinterpret_cast<uint32_t*>(w.queries + size_t(row) * pos * 2 * S::bytes);
  alignas(64) uint32_t a[kMaxDim / 4 + 24], b[kMaxDim / 4 + 24];  // by group and position within it
  for (int g = 0; g < groups; ++g) S::prepare(rounded + 32 * g, a + 8 * g, b + 8 * g);
  for (int p = 0; p < pos; ++p, out += 2 * lanes) {
    for (int c = 0; c < kChunks<S>; ++c) {  // a quad for each of the four tokens of a chunk
      const int at = unit * (p / unit * kChunks<S> + c) + p % unit;
      store(out + 4 * c, splat<Vec<uint32_t, 16>>(a[at]));
      store(out + lanes + 4 * c, splat<Vec<uint32_t, 16>>(b[at]));
    }
  }
}

}  // namespace
}  // namespace turboquant::cpu
