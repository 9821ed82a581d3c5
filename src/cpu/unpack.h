// Packed rows to planes of nibbles, four tokens at a time.
//
// Every width becomes four planes of nibbles per group of 32 coordinates: plane w holds coordinates 8w .. 8w + 7 of the
// group (format.h), each in the low bits of its nibble; what is above them is anything.  The planes of a quad of tokens
// are transposed to what the quad dot product wants in a 32-bit lane once a lookup has turned nibbles to bytes: for
// keys four coordinates of one token, for values one coordinate of four tokens.  A position is one vector of levels:
// plane w and nibble h of `chunks` groups.  In its 128-bit chunk c, element k (of tokens t) belongs to
// coordinate(position, c, k):
//   keys:   byte 4t + k,   values:   byte 4k + t.
#pragma once

#include "cpu/simd.h"
#include "turboquant/format.h"

namespace turboquant::cpu {
namespace {

template <class S>
constexpr int kChunks = S::bytes / 16;

template <class S>
constexpr int positions(int dim) {
  return (dim / 32 + kChunks<S> - 1) / kChunks<S> * 8;
}

template <class S>
constexpr int coordinate(int position, int chunk, int k) {
  return 32 * (position / 8 * kChunks<S> + chunk) + 8 * (position % 8 / 2) + 2 * k + position % 2;
}

/// Levels by nibble, of which the low `bits` bits count.
struct LevelTable {
  int8_t at[16];
  constexpr LevelTable(int bits, int offset) : at() {
    for (int i = 0; i < 16; ++i) at[i] = int8_t(level(bits, i & ((1 << bits) - 1)) + offset);
  }
};

/// Four 128-bit-chunked rows of elements E, transposed: plane w holds word w of each chunk, the rows' elements in turn.
template <class E, int planes, class V>
inline void transpose(const V row[4], V plane[4]) {
  using E2 = std::conditional_t<sizeof(E) == 1, uint16_t, uint64_t>;
  const V ab = interleave<E, false>(row[0], row[1]), cd = interleave<E, false>(row[2], row[3]);
  plane[0] = interleave<E2, false>(ab, cd);
  plane[1] = interleave<E2, true>(ab, cd);
  if constexpr (planes > 2) {
    const V ab2 = interleave<E, true>(row[0], row[1]), cd2 = interleave<E, true>(row[2], row[3]);
    plane[2] = interleave<E2, false>(ab2, cd2);
    if constexpr (planes > 3) plane[3] = interleave<E2, true>(ab2, cd2);
  }
}

/// The planes of four tokens.  E is uint32_t for keys, uint8_t for values.  May read up to 16 bytes past the last row
/// unless S masks its loads.
template <class S, int bits, class E>
void unpack_quad(const uint32_t* rows, int dim, uint8_t* out) {
  using U32 = Vec<uint32_t, S::bytes>;
  const int groups = dim / 32, row_words = bits * groups;
  for (int g = 0; g < groups; g += kChunks<S>, out += 4 * S::bytes) {
    const int count = groups - g < kChunks<S> ? groups - g : kChunks<S>;
    U32 row[4], plane[4];
    for (int t = 0; t < 4; ++t) row[t] = S::template load_groups<bits>(rows + t * row_words + g * bits, count);
    transpose<E, bits>(row, plane);
    if constexpr (bits == 3) {  // the spare bits of planes 0 to 2 are the fourth plane
      plane[3] = (plane[0] >> 3 & 0x11111111u) | (plane[1] >> 2 & 0x22222222u) | (plane[2] >> 1 & 0x44444444u);
    } else if constexpr (bits == 2) {  // the other halves of the nibbles
      plane[2] = plane[0] >> 2;
      plane[3] = plane[1] >> 2;
    }
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) store(out + w * S::bytes, plane[w]);
  }
}

/// The planes of tokens [t, t + n) to out, quad by quad.  The last quad in memory goes by way of a padded copy.
template <class S, int bits, class E>
void unpack(const uint32_t* codes, int dim, int t, int n, int kv_len, uint8_t* out) {
  const int row_words = words_per_vector(bits, dim), quad_bytes = positions<S>(dim) / 2 * S::bytes;
  int i = 0;
  for (; i < n && t + i + 4 < kv_len; i += 4, out += quad_bytes) {
    unpack_quad<S, bits, E>(codes + int64_t(t + i) * row_words, dim, out);
  }
  if (i < n) {
    uint32_t padded[4 * 32 + 4] = {};
    const int rest = n - i < 4 ? n - i : 4;
    __builtin_memcpy(padded, codes + int64_t(t + i) * row_words, size_t(rest) * row_words * 4);
    unpack_quad<S, bits, E>(padded, dim, out);
  }
}

template <class S, class E>
void unpack(int bits, const uint32_t* codes, int dim, int t, int n, int kv_len, uint8_t* out) {
  (bits == 2 ? unpack<S, 2, E> : bits == 3 ? unpack<S, 3, E> : unpack<S, 4, E>)(codes, dim, t, n, kv_len, out);
}

/// Levels of the two positions of a plane.
template <class S>
inline void look_up(typename S::Table table, const uint8_t* plane, typename S::Levels out[2]) {
  const auto nibbles = load<Vec<uint32_t, S::bytes>>(plane);
  out[0] = S::levels(S::lookup(table, as<Vec<uint8_t, S::bytes>>(nibbles)));
  out[1] = S::levels(S::lookup(table, as<Vec<uint8_t, S::bytes>>(nibbles >> 4)));
}

}  // namespace
}  // namespace turboquant::cpu
