// Tiles of packed rows: their layout in shared memory, and the copies that bring them there.
#pragma once

#include "cuda/device/codes.cu.h"
#include "cuda/device/schedule.cu.h"

namespace turboquant::cuda {

constexpr int kTile = 32;  // tokens

/// Packed vectors of a tile in shared memory.  Rows of a multiple of 32 words would put every token in the same banks,
/// so their 16-byte chunks are permuted: by the token for keys (lanes read tokens t and 7 - t), by pairs of chunks for
/// values.
template <int CODING, int D, bool VALUES, int TOKENS = kTile>
struct PackedTile {
  static constexpr int words = bits_of(CODING) * (D / 32), size = TOKENS * words;
  static constexpr bool permuted = words % 32 == 0;
  static __device__ int at(int token, int word) {
    if constexpr (!permuted) return token * words + word;
    return token * words + (word ^ (VALUES ? (token & 3) * 8 : (token & 7) * 4));
  }

  /// Starts the copy of a whole tile by one warp, of which every lane takes every 32nd chunk of 16 bytes.  `from` is
  /// this lane's first chunk, `to` the tile's place and 16 bytes a lane; both are 16-byte aligned.
  template <bool ONCE>
  static __device__ void copy_whole(unsigned to, const unsigned* from) {
    const int lane = threadIdx.x & 31, first = permuted ? at(lane * 4 / words, lane * 4 % words) : 4 * lane;
    if constexpr (permuted && words != 32) {
      copy_wide<0, ONCE>(to, from);
      return;
    }
    // Every chunk lies four tokens beyond the one before, which permutes keys' the other way.
    to += 4 * (first - 4 * lane);
    copy_chunks<0, ONCE>(to, permuted && !VALUES ? to + 4 * ((first ^ 16) - first) : to, from);
  }
  /// Of rows of 64 words and more, where a chunk is permuted otherwise than the one before.
  template <int CHUNK, bool ONCE>
  static __device__ void copy_wide(unsigned to, const unsigned* from) {
    if constexpr (128 * CHUNK < size) {
      const int lane = threadIdx.x & 31, word = 128 * CHUNK + 4 * lane;
      copy16<512 * CHUNK, ONCE>(to + 4 * (at(word / words, word % words) - word), from);
      copy_wide<CHUNK + 1, ONCE>(to, from);
    }
  }
  template <int CHUNK, bool ONCE>
  static __device__ void copy_chunks(unsigned even, unsigned odd, const unsigned* from) {
    if constexpr (128 * CHUNK < size) {
      if (128 * (CHUNK + 1) <= size || 4 * (threadIdx.x & 31) + 128 * CHUNK < size) {
        copy16<512 * CHUNK, ONCE>(even, from);
      }
      copy_chunks<CHUNK + 1, ONCE>(odd, even, from);
    }
  }

  /// Starts the copy of `tokens` (1 to TOKENS) rows by one warp; reads nothing beyond them.
  static __device__ void copy(unsigned* to, const unsigned* from, int tokens) {
    const unsigned base = unsigned(__cvta_generic_to_shared(to));
    if (tokens == TOKENS && aligned_to(from, 16)) {
      const int lane = threadIdx.x & 31;
      copy_whole<false>(base + 16 * lane, from + 4 * lane);
    } else {
#pragma unroll 1
      for (int word = threadIdx.x & 31; word < tokens * words; word += 32) {
        copy4(base + 4 * at(word / words, word % words), from + word);
      }
    }
  }

  /// N consecutive words of a row, from a multiple of N.
  template <int N>
  static __device__ void load(const unsigned* tile, int token, int word, unsigned (&out)[N]) {
    Reader<N>(tile, token, word).load(0, out);
  }

  /// The same for rows that lie a multiple of eight tokens further, at constant distances: addresses are made once.
  template <int N>
  struct Reader {
    static constexpr int width = words % 4 == 0 && N % 4 == 0 ? 4 : words % 2 == 0 && N % 2 == 0 ? 2 : 1;
    static constexpr int starts = permuted ? (N + 3) / 4 : 1;
    const unsigned* from[starts];
    Reader() = default;
    __device__ Reader(const unsigned* tile, int token, int word) {
#pragma unroll
      for (int i = 0; i < starts; ++i) from[i] = tile + at(token, word + 4 * i);
    }
    __device__ void load(int further, unsigned (&out)[N]) const {
#pragma unroll
      for (int i = 0; i < N; i += width) {
        const unsigned* p = from[permuted ? i / 4 : 0] + (permuted ? i % 4 : i) + further * words;
        if constexpr (width == 4) {
          const uint4 x = *reinterpret_cast<const uint4*>(p);
          out[i] = x.x, out[i + 1] = x.y, out[i + 2] = x.z, out[i + 3] = x.w;
        } else if constexpr (width == 2) {
          const uint2 x = *reinterpret_cast<const uint2*>(p);
          out[i] = x.x, out[i + 1] = x.y;
        } else {
          out[i] = *p;
        }
      }
    }
  };
};

/// Starts the copy of TOKENS key scales and as many value scales by one warp; only `tokens` of each exist.
template <int TOKENS = kTile>
__device__ void copy_scales(__half* to, const __half* keys, const __half* values, int tokens) {
  const int lane = threadIdx.x & 31;
  if (aligned_to(keys, 4) && aligned_to(values, 4)) {
    const int token = 2 * lane % TOKENS;
    const __half* from = (2 * lane < TOKENS ? keys : values) + token;
    if (lane >= TOKENS) {
      // has none
    } else if (token + 1 < tokens) {
      copy4(unsigned(__cvta_generic_to_shared(to + 2 * lane)), from);
    } else if (token < tokens) {
      to[2 * lane] = *from;  // a shorter copy4 would touch all four bytes all the same
    }
  } else if (lane < tokens) {
    to[lane] = keys[lane];
    to[TOKENS + lane] = values[lane];
  }
}

/// Where a warp copies its next tile of TOKENS tokens from, keys, values and scales, and the place in its ring of
/// STAGES that it copies them to; then its tile `step` further on, and the ring's next place.
template <class Keys, class Values, int TOKENS, int STAGES>
struct TileCopies {
  static constexpr int kWords = Keys::size + Values::size + TOKENS;  // of a place in the ring
  // What this lane copies: 16 bytes of codes, further chunks lie at constant distances; four bytes of scales, of keys
  // in the first half of the lanes that copy any.
  const unsigned *keys, *values;
  const __half* scales;
  bool aligned;  // for wide copies
  unsigned to;   // and 16 bytes a lane

  /// `rings`: those of all warps.
  __device__ TileCopies(const AttentionArgs& a, int b, int kv_head, int tile, const unsigned* rings) {
    const long long row = (long long)tile * TOKENS;
    const __half* key_scales =
        a.packed.key_scales + b * a.packed.key_scale_strides[0] + kv_head * a.packed.key_scale_strides[1] + row;
    const __half* value_scales =
        a.packed.value_scales + b * a.packed.value_scale_strides[0] + kv_head * a.packed.value_scale_strides[1] + row;
    const int lane = threadIdx.x & 31;
    keys = a.packed.key_codes + b * a.packed.key_code_strides[0] + kv_head * a.packed.key_code_strides[1] +
           row * Keys::words + 4 * lane;
    values = a.packed.value_codes + b * a.packed.value_code_strides[0] + kv_head * a.packed.value_code_strides[1] +
             row * Values::words + 4 * lane;
    scales = (lane < TOKENS / 2 ? key_scales : value_scales) + 2 * (lane % (TOKENS / 2));
    // Not by warp_index(): see copy16.
    to = unsigned(__cvta_generic_to_shared(rings)) + threadIdx.x / 32 * (STAGES * 4 * kWords) + 16 * lane;
    aligned =
        aligned_to(keys, 16) && aligned_to(values, 16) && aligned_to(key_scales, 4) && aligned_to(value_scales, 4);
  }

  /// Starts the copy of `tile`, where this stands, into `place` of the ring (keys, values, scales).
  __device__ void copy(const AttentionArgs& a, int b, int kv_head, int tile, unsigned* place) const {
    const int lane = threadIdx.x & 31, tokens = a.kv_len - tile * TOKENS;
    if (aligned && tokens >= TOKENS) {
      Keys::template copy_whole<true>(to, keys);
      Values::template copy_whole<true>(to + 4 * Keys::size, values);
      if (TOKENS == 32 || lane < TOKENS) copy4(to + 4 * (Keys::size + Values::size) - 12 * lane, scales);
    } else if (tokens > 0) {
      const TileCopies here(a, b, kv_head, tile, place);
      Keys::copy(place, here.keys - 4 * lane, min(TOKENS, tokens));
      Values::copy(place + Keys::size, here.values - 4 * lane, min(TOKENS, tokens));
      const __half* key_scales =
          a.packed.key_scales + b * a.packed.key_scale_strides[0] + kv_head * a.packed.key_scale_strides[1];
      const __half* value_scales =
          a.packed.value_scales + b * a.packed.value_scale_strides[0] + kv_head * a.packed.value_scale_strides[1];
      copy_scales<TOKENS>(reinterpret_cast<__half*>(place + Keys::size + Values::size),
                          key_scales + (long long)tile * TOKENS, value_scales + (long long)tile * TOKENS,
                          min(TOKENS, tokens));
    }
  }

  /// `stage`: of the place that has been copied to.
  __device__ void advance(int step, int stage) {
    keys += step * Keys::size, values += step * Values::size, scales += step * TOKENS;
    to += stage == STAGES - 1 ? -(STAGES - 1) * 4 * kWords : 4 * kWords;
  }
};

/// The same of exact copies: tiles are places of ExactTiles, of TOKENS each.
template <class Keys, class Values, int TOKENS>
struct ExactCopies {
  static constexpr int kWords = Keys::size + Values::size + TOKENS;
  ExactTiles tiles;
  const unsigned *keys, *values;
  const __half *key_scales, *value_scales;
  __device__ ExactCopies(const AttentionArgs& a, int b, int kv_head, int, const unsigned*) : tiles(a, b) {
    const PackedCache& c = a.exact;
    keys = c.key_codes + b * c.key_code_strides[0] + kv_head * c.key_code_strides[1];
    values = c.value_codes + b * c.value_code_strides[0] + kv_head * c.value_code_strides[1];
    key_scales = c.key_scales + b * c.key_scale_strides[0] + kv_head * c.key_scale_strides[1];
    value_scales = c.value_scales + b * c.value_scale_strides[0] + kv_head * c.value_scale_strides[1];
  }

  __device__ void copy(const AttentionArgs& a, int b, int kv_head, int tile, unsigned* place) const {
    const ExactPlace<TOKENS> from(a, tiles, tile);
    if (from.tokens <= 0) return;
    const long long row = from.slot;
    Keys::copy(place, keys + row * Keys::words, from.tokens);
    Values::copy(place + Keys::size, values + row * Values::words, from.tokens);
    copy_scales<TOKENS>(reinterpret_cast<__half*>(place + Keys::size + Values::size), key_scales + row,
                        value_scales + row, from.tokens);
  }
  __device__ void advance(int, int) {}
};

/// TileCopies or ExactCopies.
template <class Keys, class Values, int TOKENS, int STAGES, bool EXACT>
struct CopiesOf {
  using type = TileCopies<Keys, Values, TOKENS, STAGES>;
};
template <class Keys, class Values, int TOKENS, int STAGES>
struct CopiesOf<Keys, Values, TOKENS, STAGES, true> {
  using type = ExactCopies<Keys, Values, TOKENS>;
};

}  // namespace turboquant::cuda
