// Unpacks codes to planes, four tokens at a time.  A plane holds levels, or the indices that look levels up.
//
// Codes of 2 to 4 bits become four planes of nibbles per group of 32 coordinates: plane w holds coordinates 8w .. 8w +
// 7 of the group (format.h), each in a nibble that indexes the levels of plane w (LevelTables).  Codes of 8 bits are
// levels: four planes of bytes per half group, plane w with coordinates 4w .. 4w + 3.  The planes of a quad of tokens
// are transposed to what the quad dot product wants in a 32-bit lane once a lookup has turned nibbles to bytes: for
// keys four coordinates of one token, for values one coordinate of four tokens.  A position is one vector of levels:
// plane w and nibble h of `chunks` groups, or a plane of bytes of `chunks` half groups.  In its 128-bit chunk c,
// element k (of tokens t) belongs to coordinate(bytes, position, c, k):
//   keys:   byte 4t + k,   values:   byte 4k + t.
#pragma once

#include "cpu/simd/kinds.h"
#include "cpu/simd/simd.h"
#include "turboquant/format.h"

namespace turboquant::cpu {
namespace {

template <class S>
constexpr int kChunks = S::bytes / 16;

/// Planes of a vector, four for each kChunks of its groups or half groups.
template <class S>
constexpr int planes(bool bytes, int dim) {
  return (dim / (bytes ? 16 : 32) + kChunks<S> - 1) / kChunks<S> * 4;
}
template <class S>
constexpr int positions(bool bytes, int dim) {
  return planes<S>(bytes, dim) * (bytes ? 1 : 2);
}

template <class S>
constexpr int coordinate(bool bytes, int position, int chunk, int k) {
  return bytes ? 16 * (position / 4 * kChunks<S> + chunk) + position % 4 * 4 + k
               : 32 * (position / 8 * kChunks<S> + chunk) + 8 * (position % 8 / 2) + 2 * k + position % 2;
}

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

/// Bits of a where `mask` has ones, bits of b elsewhere.
template <class S, class V>
inline V merge(uint32_t mask, V a, V b) {
  if constexpr (requires { S::merge(mask, a, b); }) {
    return S::merge(mask, a, b);
  } else {
    return ((a ^ b) & mask) ^ b;
  }
}
template <class S, class V>
inline V exclusive_or(V a, V b, V c) {
  if constexpr (requires { S::exclusive_or(a, b, c); }) {
    return S::exclusive_or(a, b, c);
  } else {
    return a ^ b ^ c;
  }
}

/// Words of trellis codes to nibbles, word by word of a lane (docs/format.md): a, b and u become the four planes.
template <class S, class V>
inline void unpack_trellis(V a, V b, V u, V plane[4]) {
  const V r1 = u << 1 | u >> 31, r3 = u << 3 | u >> 29, z1 = exclusive_or<S>(u, r1, r3);
  const V even = merge<S>(0x55555555u, z1, r3), odd = merge<S>(0xaaaaaaaau, z1, r1);
  plane[0] = merge<S>(0xccccccccu, a, even);
  plane[1] = merge<S>(0xccccccccu, b, odd);
  plane[2] = merge<S>(0xccccccccu, even, a);
  plane[3] = merge<S>(0xccccccccu, odd, b);
}

/// Each 128-bit chunk as a 4 x 4 matrix of bytes, transposed.
template <class V>
inline V transpose_bytes(V v) {
  using U8 = Vec<uint8_t, sizeof(V)>;
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    return as<V>(__builtin_shufflevector(as<U8>(v), as<U8>(v), (I / 16 * 16 + I % 4 * 4 + I % 16 / 4)...));
  }
  (std::make_integer_sequence<int, sizeof(V)>());
}

/// The planes of `count` <= kChunks groups (of bytes: half groups) of four tokens, `stride` words apart.  E is uint32_t
/// for keys, uint8_t for values.  May read up to 16 bytes past the last group unless S masks its loads.
template <class S, Kind kind, class E>
inline void unpack_piece(const uint32_t* rows, int stride, int count, uint8_t* out) {
  using U32 = Vec<uint32_t, S::bytes>;
  constexpr int words = words_of_piece(kind);
  U32 row[4], plane[4];
  for (int t = 0; t < 4; ++t) row[t] = S::template load_groups<words>(rows + t * stride, count);
  if constexpr (kind.trellis) {  // rotations are of whole words: bytes of values are sorted afterwards
    transpose<uint32_t, words>(row, plane);
    unpack_trellis<S>(plane[0], kind.bits == 3 ? plane[1] : plane[0], plane[kind.bits - 1], plane);
    if constexpr (sizeof(E) == 1) {
      for (int w = 0; w < 4; ++w) plane[w] = transpose_bytes(plane[w]);
    }
  } else {
    transpose<E, words>(row, plane);
  }
  if constexpr (kind.bits == 8) {  // signed to what S multiplies
    for (int w = 0; w < 4; ++w) plane[w] ^= S::level_offset * 0x01010101u;
  } else if constexpr (kind == Kind{3, false}) {  // the spare bits of planes 0 to 2 are the fourth plane
    plane[3] = (plane[0] >> 3 & 0x11111111u) | (plane[1] >> 2 & 0x22222222u) | (plane[2] >> 1 & 0x44444444u);
  } else if constexpr (kind == Kind{2, false}) {  // the other halves of the nibbles
    plane[2] = plane[0] >> 2;
    plane[3] = plane[1] >> 2;
  }
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) store(out + w * S::bytes, plane[w]);
}

/// Where the pieces of a block lie: quad by quad, kChunks groups a piece.  Listed once, so that a step of unpacking has
/// no branches: those would cost the multiplications around it their registers.
template <class S>
struct Pieces {
  struct Piece {
    int from, ahead, count;  // words from the block's first; words to prefetch, relative to the same; groups
  };
  Piece at[kBlock / 4 * (kMaxDim / 16 / kChunks<S>)];
  int per_quad;

  Pieces(Kind kind, int dim) {
    const int stride = words_per_vector(kind.bits, dim), groups = dim / (is_bytes(kind) ? 16 : 32);
    per_quad = (groups + kChunks<S> - 1) / kChunks<S>;
    const int share = 4 * stride / per_quad;
    for (int q = 0, i = 0; q < kBlock / 4; ++q) {
      for (int g = 0; g < groups; g += kChunks<S>, ++i) {
        const int ahead = (q * 4 + kAhead) * stride + share * (g / kChunks<S>);
        const int from = q * 4 * stride + g * words_of_piece(kind);
        at[i] = {from, ahead, groups - g < kChunks<S> ? groups - g : kChunks<S>};
      }
    }
  }
  static constexpr int kAhead = 32;  // tokens
};

/// Unpacks a block of tokens piece by piece, to quads of planes.  Where S::interleaves, step() does that between the
/// multiplications of another block, which leave room for a piece in every 64 or so; out-of-order execution finds it
/// only within some hundred instructions.  Elsewhere, for want of registers, unpack() does it at once, and prefetch()
/// is called between the multiplications: hardware prefetchers do not bridge bursts.
template <class S, class E>
class Feed {
 public:
  /// Tokens [t, t + n) to `out`, for `calls` of prefetch().  A block that ends near the last row in memory goes by way
  /// of a copy to `padded`.
  Feed(const Pieces<S>& pieces, const PackedHead& rows, int t, int n, int kv_len, int calls, uint32_t* padded,
       uint8_t* out)
      : rows_(rows.codes + int64_t(t) * words_per_vector(rows.kind.bits, rows.dim)),
        kind_(rows.kind),
        stride_(words_per_vector(rows.kind.bits, rows.dim)),
        piece_(pieces.at),
        pieces_(n > 0 ? (n + 3) / 4 * pieces.per_quad : 0),
        out_(out) {
    if (t + kBlock >= kv_len) {
      __builtin_memcpy(padded, rows_, size_t(kv_len - t) * stride_ * 4);
      rows_ = padded;
    }
    at_ = reinterpret_cast<const char*>(rows_);
    end_ = at_ + 4 * n * stride_;
    share_ = (4 * n * stride_ / calls + 63) / 64 * 64;
    for (int i = 0; i < n; i += 32) __builtin_prefetch(rows.scales + t + i);
  }

  /// Unpacks the next piece.
  template <Kind kind>
  void step() {
    unpack_piece<S, kind, E>(rows_ + piece_->from, stride_, piece_->count, out_);
    for (int i = 0; i < words_of_piece(kind) * kChunks<S>; i += 4) __builtin_prefetch(rows_ + piece_->ahead + 4 * i);
    out_ += 4 * S::bytes;
    ++piece_;
  }
  void unpack() {
    of_kind(kind_, [&]<Kind kind>() {
      for (int i = 0; i < pieces_; ++i) {
        unpack_piece<S, kind, E>(rows_ + piece_[i].from, stride_, piece_[i].count, out_ + i * 4 * S::bytes);
      }
    });
  }
  void prefetch() {
    for (const char* stop = at_ + share_ < end_ ? at_ + share_ : end_; at_ < stop; at_ += 64) __builtin_prefetch(at_);
  }

 private:
  const uint32_t* rows_;
  const Kind kind_;
  const int stride_;
  const typename Pieces<S>::Piece* piece_;
  const int pieces_;
  uint8_t* out_;
  const char *at_, *end_;  // still to be prefetched
  int share_;              // bytes a call
};

/// Levels of the two positions of a plane of nibbles, or of the positions of `count` planes of bytes.
template <class S, bool bytes, int count>
inline void look_up(const typename S::Table& table, const uint8_t* plane, typename S::Levels* out) {
  using U8 = Vec<uint8_t, S::bytes>;
  if constexpr (bytes) {
    for (int i = 0; i < count; ++i) out[i] = S::levels(load<U8>(plane + i * S::bytes));
  } else {
    static_assert(count == 2);
    const auto nibbles = load<Vec<uint32_t, S::bytes>>(plane);
    out[0] = S::levels(S::lookup(table, as<U8>(nibbles)));
    out[1] = S::levels(S::lookup(table, as<U8>(nibbles >> 4)));
  }
}

}  // namespace
}  // namespace turboquant::cpu
