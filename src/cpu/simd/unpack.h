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

#include "cpu/simd/simd.h"
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

/// The planes of `count` <= kChunks groups of four tokens, `stride` words apart.  E is uint32_t for keys, uint8_t for
/// values.  May read up to 16 bytes past the last group unless S masks its loads.
template <class S, int bits, class E>
inline void unpack_piece(const uint32_t* rows, int stride, int count, uint8_t* out) {
  using U32 = Vec<uint32_t, S::bytes>;
  U32 row[4], plane[4];
  for (int t = 0; t < 4; ++t) row[t] = S::template load_groups<bits>(rows + t * stride, count);
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

/// Where the pieces of a block lie: quad by quad, kChunks groups a piece.  Listed once, so that a step of unpacking has
/// no branches: those would cost the multiplications around it their registers.
template <class S>
struct Pieces {
  struct Piece {
    int from, ahead, count;  // words from the block's first; words to prefetch, relative to the same; groups
  };
  Piece at[kBlock / 4 * (8 / kChunks<S>)];
  int per_quad;

  Pieces(int bits, int dim) {
    const int stride = words_per_vector(bits, dim), groups = dim / 32;
    per_quad = (groups + kChunks<S> - 1) / kChunks<S>;
    const int share = 4 * stride / per_quad;
    for (int q = 0, i = 0; q < kBlock / 4; ++q) {
      for (int g = 0; g < groups; g += kChunks<S>, ++i) {
        const int ahead = (q * 4 + kAhead) * stride + share * (g / kChunks<S>);
        at[i] = {q * 4 * stride + g * bits, ahead, groups - g < kChunks<S> ? groups - g : kChunks<S>};
      }
    }
  }
  static constexpr int kAhead = 32;  // tokens
};

/// Unpacks a block of tokens piece by piece, to quads of planes.  Where S::interleaves, step() does that between the
/// multiplications of another block, which leave room for a piece in every 64 or so; out-of-order execution finds it
/// only within some hundred instructions.  Elsewhere, for want of registers, unpack() does it at once, and prefetch()
/// is called between the multiplications: hardware prefetchers do not bridge bursts.
template <class S, int bits, class E>
class Feed {
 public:
  /// Tokens [t, t + n) to `out`, for `calls` of prefetch().  A block that ends near the last row in memory goes by way
  /// of a copy to `padded`.
  Feed(const Pieces<S>& pieces, const Rows& rows, int dim, int t, int n, int kv_len, int calls, uint32_t* padded,
       uint8_t* out)
      : rows_(rows.codes + int64_t(t) * words_per_vector(bits, dim)),
        stride_(words_per_vector(bits, dim)),
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
  void step() {
    unpack(*piece_, out_);
    for (int i = 0; i < bits * kChunks<S>; i += 4) __builtin_prefetch(rows_ + piece_->ahead + 4 * i);
    out_ += 4 * S::bytes;
    ++piece_;
  }
  void unpack() {
    for (int i = 0; i < pieces_; ++i) unpack(piece_[i], out_ + i * 4 * S::bytes);
  }
  void prefetch() {
    for (const char* stop = at_ + share_ < end_ ? at_ + share_ : end_; at_ < stop; at_ += 64) __builtin_prefetch(at_);
  }

 private:
  void unpack(const typename Pieces<S>::Piece& p, uint8_t* out) {
    unpack_piece<S, bits, E>(rows_ + p.from, stride_, p.count, out);
  }

  const uint32_t* rows_;
  const int stride_;
  const typename Pieces<S>::Piece* piece_;
  const int pieces_;
  uint8_t* out_;
  const char *at_, *end_;  // still to be prefetched
  int share_;              // bytes a call
};

/// Levels of the two positions of a plane.
template <class S>
inline void look_up(typename S::Table table, const uint8_t* plane, typename S::Levels out[2]) {
  const auto nibbles = load<Vec<uint32_t, S::bytes>>(plane);
  out[0] = S::levels(S::lookup(table, as<Vec<uint8_t, S::bytes>>(nibbles)));
  out[1] = S::levels(S::lookup(table, as<Vec<uint8_t, S::bytes>>(nibbles >> 4)));
}

}  // namespace
}  // namespace turboquant::cpu
