// What the attention kernels share: their parameters, the division of the cache among blocks, and the copies of packed
// rows into shared memory.
#pragma once

#include "cuda/codec.cu.h"

namespace turboquant::cuda {

constexpr int kTile = 32;  // tokens a warp handles at a time

/// AttendParams of turboquant.h on the device.
struct AttentionArgs {
  int batch, query_heads, kv_heads, query_len, kv_len;
  float scale;
  unsigned long long seed;
  bool causal;
  int window;
  const void* q;                                           // [batch, query_heads, query_len, D]
  long long q_strides[4];                                  // in elements
  const unsigned *key_codes, *value_codes;                 // [batch, kv_heads, kv_len, bits * D / 32]
  const __half *key_scales, *value_scales;                 // [batch, kv_heads, kv_len]
  long long key_code_strides[2], value_code_strides[2];    // of batch and head, in words; rows are dense
  long long key_scale_strides[2], value_scale_strides[2];  // of batch and head, in elements
  const float *key_centre, *value_centre;                  // [kv_heads, D] or null
  const int* starts;                                       // [batch] or null
  const void* mask;                                        // [batch, query_heads, query_len, kv_len]; bool or MaskT
  long long mask_strides[4];
  const float* sinks;  // [query_heads] or null
  float* partial;      // [slots, ROWS, D + 4]: see Schedule and partial_row
  void* out;           // [batch, query_heads, query_len, D], dense

  /// A row of partial results: D coordinates, then the exponent of the largest weight and the sum of weights.
  template <int D>
  __device__ float* partial_row(long long row) const {
    return partial + row * (D + 4);
  }

  __device__ int group() const { return query_heads / kv_heads; }
  __device__ int rows() const { return group() * query_len; }  // query rows that read one KV head

  /// Eight coordinates of a query, from `first` on.
  template <class T>
  __device__ Raw8<T> load_query(int b, int head, int query, int first) const {
    Raw8<T> raw;
    raw.load(
        static_cast<const T*>(q) + b * q_strides[0] + head * q_strides[1] + query * q_strides[2] + first * q_strides[3],
        q_strides[3]);
    return raw;
  }
};

enum MaskType { kNoMask, kBooleanMask, kAdditiveMask };

/// Keys that a query may see by position: [first, last).
struct Range {
  int first, last;
};
__device__ inline Range visible_keys(const AttentionArgs& a, int b, int query) {
  const int position = a.kv_len - a.query_len + query;
  int first = a.starts ? max(a.starts[b], 0) : 0, last = a.kv_len;
  if (a.causal) last = min(last, position + 1);
  if (a.window > 0) first = max(first, position - a.window + 1);
  return {first, max(first, last)};
}

/// How decoding divides the cache: a segment is one KV head of one batch row, read for one block of ROWS query rows;
/// the tiles of all segments, in order, are dealt to the blocks in equal contiguous runs, so ragged batches stay
/// balanced. A block leaves one partial result per segment that it touches, at slot = block + segment, which is unique.
template <int TILE>
struct Schedule {
  int blocks, segments_per_row;  // of the batch
  unsigned total;                // tiles

  /// Tiles of a segment of batch row b: its first and its count.
  static __device__ Range tiles(const AttentionArgs& a, int b) {
    const int first = visible_keys(a, b, 0).first / TILE, last = (a.kv_len + TILE - 1) / TILE;
    return {first, max(first, last)};
  }
  __device__ Schedule(const AttentionArgs& a, int rows_per_block, int launched) {
    segments_per_row = a.kv_heads * ((a.rows() + rows_per_block - 1) / rows_per_block);
    total = 0;
    for (int b = 0; b < a.batch; ++b) {
      const Range r = tiles(a, b);
      total += unsigned(r.last - r.first) * segments_per_row;
    }
    blocks = min(unsigned(launched), max(total, 1u));
  }
  /// First tile of a block's run.
  __device__ unsigned begin(int block) const { return scaled(block, total, 0, blocks); }
  /// The block whose run holds a tile.
  __device__ int block_of(unsigned tile) const { return int(scaled(tile + 1, blocks, 1, total)); }

 private:
  /// (a b - c) / d; 64-bit division is slow, and seldom needed.
  static __device__ unsigned scaled(unsigned a, unsigned b, unsigned c, unsigned d) {
    if (__umulhi(a, b) == 0) return (a * b - c) / d;
    return unsigned(((unsigned long long)a * b - c) / d);
  }
};

/// Copies into shared memory without passing registers.
__device__ inline void copy16(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copy4(unsigned to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/// Packed rows of a tile in shared memory.  Rows of 32 words would put every token in the same banks, so their 16-byte
/// chunks are permuted: by the token for keys (lanes read tokens t and 7 - t), by pairs of chunks for values.
template <int BITS, int D, bool VALUES, int TOKENS = kTile>
struct Rows {
  static constexpr int words = BITS * (D / 32), size = TOKENS * words;
  static constexpr bool permuted = words == 32;
  static __device__ int at(int token, int word) {
    if constexpr (!permuted) return token * words + word;
    return token * words + (word ^ (VALUES ? (token & 3) * 8 : (token & 7) * 4));
  }

  /// A lane's share of copying a whole tile is every 32nd chunk of 16 bytes: its i-th goes 512 bytes after the one
  /// before, but for the permutation.
  static constexpr int chunks = (size + 127) / 128;
  static __device__ int lane_word() { return at((threadIdx.x & 31) * 4 / words, (threadIdx.x & 31) * 4 % words); }
  static __device__ int chunk_word(int lane_word, int i) {
    return (permuted && !VALUES && i % 2 ? lane_word ^ 16 : lane_word) + 128 * i;  // four tokens further
  }

  /// Starts the copy of a whole tile by one warp; `from` is 16-byte aligned and, as `to`, that of lane 0.
  static __device__ void copy_whole(unsigned to, const unsigned* from) {
    const int lane = threadIdx.x & 31, first = permuted ? lane_word() : 4 * lane;
    from += 4 * lane;
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      if (size % 128 == 0 || 4 * lane + 128 * i < size) copy16(to + 4 * chunk_word(first, i), from + 128 * i);
    }
  }

  /// Starts the copy of `tokens` (1 to TOKENS) rows by one warp; reads nothing beyond them.
  static __device__ void copy(unsigned* to, const unsigned* from, int tokens) {
    const unsigned base = unsigned(__cvta_generic_to_shared(to));
    if (tokens == TOKENS && aligned_to(from, 16)) {
      copy_whole(base, from);
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

/// Starts the copy of TOKENS key scales and as many value scales, of which `tokens` exist, by one warp.
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

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kNothing = -1e30f;  // the exponent of an empty sum; finite, so that differences are numbers

/// The term of the mask for one pair, in units of log2; minus infinity hides.
template <MaskType MASK, class MaskT>
__device__ float mask_term(const AttentionArgs& a, int b, int head, int query, int key) {
  if constexpr (MASK == kNoMask) return 0.f;
  const long long at =
      b * a.mask_strides[0] + head * a.mask_strides[1] + query * a.mask_strides[2] + key * a.mask_strides[3];
  if constexpr (MASK == kBooleanMask) {
    return static_cast<const unsigned char*>(a.mask)[at] ? 0.f : -__uint_as_float(0x7f800000);
  } else {
    return to_float(static_cast<const MaskT*>(a.mask)[at]) * kLog2E;
  }
}

}  // namespace turboquant::cuda
