// Attention of some query rows (5 to 32 of a KV head) over a long packed cache, on int8 tensor cores.
//
// A block takes all rows of a KV head, so that codes are read and unpacked once.  Its eight warps work in rounds of 128
// tokens: each scores sixteen of them against all rows and unpacks their values; weights and values then pass through
// shared memory, for in the second product each warp takes 16 or 32 coordinates of all tokens.  Everything that passes
// is double-buffered, so a round needs one barrier.  Numbers are as in decode.cu.h: queries and weights as high and low
// bytes, sums as integers relative to a power of two, here one for each row of the block.
#pragma once

#include "cuda/int8.cu.h"

namespace turboquant::cuda {

template <int D, int KEY_BITS, int VALUE_BITS, class T, MaskType MASK, class MaskT, int GROUPS, int STAGES>
struct ManyRows {
  static constexpr int kWarps = 8, kRows = 8 * GROUPS, kTokens = 16;
  static constexpr int kTiles = kWarps * kTokens / kTile;  // of a round
  using Keys = Rows<KEY_BITS, D, false, kTokens>;
  using Values = Rows<VALUE_BITS, D, true, kTokens>;
  using Source = TileSource<Keys, Values, kTokens>;
  using KeyShare = Share<D, 4>;
  using ValueShare = Share<D, 8>;
  static constexpr int kKeySteps = KeyShare::per_thread * KeyShare::words;
  static constexpr int kHeld = 16 / GROUPS < kKeySteps ? 16 / GROUPS : kKeySteps;  // steps whose q stays in registers
  static constexpr int kEighths = D > 128 ? 4 : 2;  // of coordinates, eight at a time, that a warp sums
  static constexpr int kStageWords = Keys::size + Values::size + kTokens;
  static constexpr int kValueStride = 8 * 32 + 4;  // of a group's values; neighbours start half of the banks apart
  static constexpr float kWeightOne = 65280;       // 255 * 256: the fixed-point weight of 1
  static_assert(STAGES >= 2);

  struct Shared {
    alignas(16) unsigned ring[kWarps][STAGES][kStageWords];
    uint4 q[GROUPS][kKeySteps][32];  // as the products take them: high and low bytes of four coordinates, twice
    // Of [32 tokens][16 of them][lane], the bytes of four tokens at coordinates l, 8 + l, 16 + l, 24 + l of a group.
    uint4 values[2][D / 32][kValueStride];
    uint4 weights[2][4][GROUPS][32];       // of [32 tokens][rows][lane]: of four tokens, high and low bytes, twice
    float4 token_scales[kWarps][kTokens];  // of keys; of values, times kWeightOne; the latter's logarithm
    float q_scale[kRows];
    int q_offset[kRows][2];  // what the unsigned bytes of 4-bit keys add to the products
    Range range[kRows];
    int top[2][kRows];  // as `ordered`; proposed for even and for odd rounds
    float2 sums[kWarps][kRows];
  };

  const AttentionArgs& a;
  Shared& shared;
  int lane = threadIdx.x & 31, warp = warp_index(), g = lane / 4, t = lane % 4;

  // Of the segment in hand.
  int b, kv_head, first_row, first_piece, last_piece;  // pieces: sixteen tokens
  int acc[GROUPS][kEighths][4];  // rows 8r + g, coordinates 2t and 2t + 1: by high, by low bytes of the weights
  unsigned q[kHeld][GROUPS][4];
  float s[GROUPS][4];              // scores of rows 8r + g
  float top[GROUPS], sum[GROUPS];  // exponents that weights are relative to; their sums over this thread's tokens

  __device__ ManyRows(const AttentionArgs& args, Shared& memory) : a(args), shared(memory) {}

  __device__ void run() {
    for_each_piece<kTile, kRows>(a, [this](int row, int local, int first_tile, int last_tile, int slot) {
      segment(row, local, first_tile, last_tile, slot);
    });
  }

  __device__ int query_of(int row) const { return min(first_row + row, a.rows() - 1) / a.group(); }
  __device__ int head_of(int row) const { return kv_head * a.group() + min(first_row + row, a.rows() - 1) % a.group(); }

  /// Integers that compare as the floats do, and back.
  static __device__ int ordered(float x) {
    const int i = __float_as_int(x);
    return i ^ (i >> 31 & 0x7fffffff);
  }
  static __device__ float from_ordered(int i) { return __int_as_float(i ^ (i >> 31 & 0x7fffffff)); }

  __device__ int piece(int round) const { return first_piece + kWarps * round + warp; }

  /// Starts the copy of this warp's piece of a round; `from` goes on to that of the next.
  __device__ void start_copy(Source& from, int round, int stage) {
    if (piece(round) < last_piece) {
      from.copy(a, b, kv_head, piece(round), shared.ring[warp][stage]);
      from.advance(kWarps);
    }
    commit_copies();
  }

  __device__ void segment(int batch_row, int local, int first_tile, int last_tile, int slot) {
    const int row_blocks = (a.rows() + kRows - 1) / kRows;
    b = batch_row, kv_head = local / row_blocks, first_row = local % row_blocks * kRows;
    first_piece = first_tile * (kTile / kTokens), last_piece = last_tile * (kTile / kTokens);
    const int rounds = (last_tile - first_tile + kTiles - 1) / kTiles;

    // All addresses before the first branch, then the queries, as in decode.cu.h.
    Source from(a, b, kv_head, piece(0));
    const T* q_from[GROUPS];
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      q_from[r] = a.query_at<T>(b, head_of(8 * r + warp), query_of(8 * r + warp), 8 * lane);
    }
    Raw8<T> raw[GROUPS] = {};  // rows warp, warp + 8, ...
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      if (first_row + 8 * r + warp < a.rows() && lane < D / 8) raw[r].load(q_from[r], a.q_strides[3]);
    }
    start_copy(from, 0, 0);
    prepare_queries(raw);
    if (threadIdx.x < kRows) {
      shared.range[threadIdx.x] = visible_keys(a, b, query_of(threadIdx.x));
      shared.top[0][threadIdx.x] = shared.top[1][threadIdx.x] = ordered(kNothing);
    }
    __syncthreads();
#pragma unroll
    for (int i = 1; i < STAGES - 1; ++i) start_copy(from, i, i);

#pragma unroll
    for (int step = 0; step < kHeld; ++step) {
#pragma unroll
      for (int r = 0; r < GROUPS; ++r) {
        const uint4 x = shared.q[r][step][lane];
        q[step][r][0] = x.x, q[step][r][1] = x.y, q[step][r][2] = x.z, q[step][r][3] = x.w;
      }
    }
    Range sees{0, 0x7fffffff};  // what every row of this thread sees
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      const Range x = shared.range[8 * r + g];
      sees.first = max(sees.first, x.first), sees.last = min(sees.last, x.last);
      top[r] = kNothing, sum[r] = 0;
    }
#pragma unroll
    for (auto& row : acc) {
#pragma unroll
      for (auto& x : row) x[0] = x[1] = x[2] = x[3] = 0;
    }

    int stage = STAGES - 1, next = 0;  // of round i and the one after
#pragma unroll 1
    for (int i = -1;; ++i) {
      if (i == rounds) {
        if (rounds > 0) multiply_values(i + 1 & 1, [](int) {});
        break;
      }
      if (i >= 0) {
        // Weights and values of this round are made while the tensor cores multiply those of the last.
        int down[GROUPS];
        float scales[4];
        ValueUnpacker unpacker(*this, shared.ring[warp][stage] + Keys::size, i & 1);
        load_value_scales(scales);
        const auto between = [&](int k) {
          if (k < GROUPS) write_weights(k, i & 1, scales, down[k < GROUPS ? k : 0]);
          k < 2 ? unpacker.transpose(k) : unpacker.store(k - 2);
        };
        if (i > 0) {
          multiply_values(i + 1 & 1, between);
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) between(k);
        }
        rescale(down);
        __syncwarp();
        start_copy(from, i + STAGES - 1, stage ? stage - 1 : STAGES - 1);
      }
      if (i + 1 < rounds) {
        wait_copies<STAGES - 2>();
        __syncwarp();
        score(shared.ring[warp][next], i + 1, sees);
      }
      stage = next, next = next == STAGES - 1 ? 0 : next + 1;
      __syncthreads();  // weights and values of round i are there, and the exponents of round i + 1
    }
    finish(slot);
  }

  /// Rotates rows 8r + warp and splits them into int8 parts, in the order of the products.
  __device__ void prepare_queries(const Raw8<T> (&raw)[GROUPS]) {
    uint4 parts[GROUPS];
    float scale[GROUPS];
    int offset[GROUPS][2];
    split_queries<D, KEY_BITS>(a, raw, parts, scale, offset);
    const int group = lane / 4, part = lane % 4 / KeyShare::words;
    const int step = group % KeyShare::per_thread * KeyShare::words + lane % KeyShare::words;
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      if (lane < 4 * kKeySteps) {
        shared.q[r][step][4 * warp + group / KeyShare::per_thread + KeyShare::padded * part] = parts[r];
      }
      if (lane == 0) {
        shared.q_scale[8 * r + warp] = scale[r];
        if constexpr (KEY_BITS == 4) {
          shared.q_offset[8 * r + warp][0] = offset[r][0], shared.q_offset[8 * r + warp][1] = offset[r][1];
        }
      }
    }
  }

  /// The token of this thread's i-th score within its warp's sixteen.
  __device__ int token(int i) const { return 8 * (i / 2) + (i % 2 ? 7 - t : t); }

  /// Scores of a round, and larger exponents for the rows that need them.
  __device__ void score(const unsigned* keys, int round, const Range& sees) {
    const float hidden = -__uint_as_float(0x7f800000);
    const int key = piece(round) * kTokens;
    if (piece(round) >= last_piece || key >= a.kv_len) {
#pragma unroll
      for (int r = 0; r < GROUPS; ++r) s[r][0] = s[r][1] = s[r][2] = s[r][3] = hidden;
      if (lane < kTokens) shared.token_scales[warp][lane] = make_float4(0, 0, 0, 0);  // no NaN for the weights of 0
      __syncwarp();
      return;
    }
    unpack_scales(reinterpret_cast<const __half*>(keys + Keys::size + Values::size));
    int dots[2][GROUPS][4];
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      int high = 0, low = 0;
      if constexpr (KEY_BITS == 4) high = shared.q_offset[8 * r + g][0], low = shared.q_offset[8 * r + g][1];
#pragma unroll
      for (int j = 0; j < 2; ++j) dots[j][r][0] = dots[j][r][1] = high, dots[j][r][2] = dots[j][r][3] = low;
    }
    multiply_keys(dots, keys);
    float4 scales[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) scales[i] = shared.token_scales[warp][token(i)];
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      const float q_scale = shared.q_scale[8 * r + g];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int dot = dots[i / 2][r][i % 2] * 256 + dots[i / 2][r][2 + i % 2];
        s[r][i] = float(dot) * (scales[i].x * q_scale);
      }
    }
    if (MASK != kNoMask || !__all_sync(~0u, key >= sees.first && key + kTokens <= sees.last)) {
#pragma unroll
      for (int r = 0; r < GROUPS; ++r) {
        const Range range = shared.range[8 * r + g];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = key + token(i);
          float term = hidden;
          if (at >= range.first && at < range.last) {
            term = mask_term<MASK, MaskT>(a, b, head_of(8 * r + g), query_of(8 * r + g), at);
          }
          s[r][i] = term == hidden ? hidden : s[r][i] + term;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      float up = s[r][0] + scales[0].z;
#pragma unroll
      for (int i = 1; i < 4; ++i) up = fmaxf(up, s[r][i] + scales[i].z);
      // One more than needed, for some row of a block would need it soon.
      if (up > top[r]) atomicMax(&shared.top[round & 1][8 * r + g], ordered(ceilf(up) + 1));
    }
  }

  /// Each lane converts one token's scales.  A value scale that is no number poisons the key's, so that it reaches the
  /// sum of weights wherever the token is visible.
  __device__ void unpack_scales(const __half* scales) {
    if (lane < kTokens) {
      float key = __half2float(scales[lane]), value = __half2float(scales[kTokens + lane]);
      if (!(value < __uint_as_float(0x7f800000))) key = __uint_as_float(0x7fc00000), value = 0;
      shared.token_scales[warp][lane] = make_float4(key, value * kWeightOne, fmaxf(log2_fast(value), -40.f), 0);
    }
    __syncwarp();
  }

  /// Products of all rows, high and low, with the keys of this warp's tokens.
  __device__ void multiply_keys(int (&dots)[2][GROUPS][4], const unsigned* keys) const {
    constexpr int n = KeyShare::per_thread;
    const KeyShare share(t);
    unsigned packed[2][n][KEY_BITS];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = 8 * j + (g & 1 ? 7 - g / 2 : g / 2);
      if constexpr (KeyShare::groups == 4 * n) {
        unsigned words[n * KEY_BITS];
        Keys::load(keys, at, share.group * KEY_BITS, words);
#pragma unroll
        for (int k = 0; k < n * KEY_BITS; ++k) packed[j][k / KEY_BITS][k % KEY_BITS] = words[k];
      } else {
#pragma unroll
        for (int i = 0; i < n; ++i) Keys::load(keys, at, share.clamped(i) * KEY_BITS, packed[j][i]);
      }
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const Group<KEY_BITS> groups[2] = {Group<KEY_BITS>(packed[0][i]), Group<KEY_BITS>(packed[1][i])};
#pragma unroll
      for (int w = 0; w < KeyShare::words; ++w) {
        const int step = i * KeyShare::words + w;
        unsigned bytes[2][2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const unsigned x = share.pick(groups[j].word, w) & groups[j].mask;
          bytes[j][0] = lookup<KEY_BITS>(x), bytes[j][1] = lookup<KEY_BITS>(x >> 16);
        }
#pragma unroll
        for (int r = 0; r < GROUPS; ++r) {
          uint4 f;
          if (step < kHeld) {
            const auto& held = q[step < kHeld ? step : 0][r];
            f = make_uint4(held[0], held[1], held[2], held[3]);
          } else {
            f = shared.q[r][step][lane];
          }
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            mma_int8<false, KEY_BITS == 4>(dots[j][r], f.x, f.y, f.z, f.w, bytes[j][0], bytes[j][1]);
          }
        }
      }
    }
  }

  __device__ void load_value_scales(float (&scales)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) scales[i] = shared.token_scales[warp][token(i)].y;
  }

  /// Weights exp2(s - top) times the value scale as bytes; `down` tells by how many bits the exponent rose.
  __device__ void write_weights(int r, int parity, const float (&scales)[4], int& down) {
    constexpr float shift = 8388608.f;  // 2^23: adding it leaves a rounded integer in the low bits
    const float now = fmaxf(top[r], from_ordered(shared.top[parity][8 * r + g])), change = top[r] - now;
    down = int(fminf(-change, 31.f));
    float fixed[4], all = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float p = exp2_fast(s[r][i] - now);
      all += p;
      fixed[i] = fmaf(p, scales[i], shift);
    }
    sum[r] = fmaf(sum[r], exp2_fast(change), all);
    top[r] = now;
    const auto bytes = [&](unsigned pick) {
      return prmt(prmt(__float_as_uint(fixed[0]), __float_as_uint(fixed[1]), pick),
                  prmt(__float_as_uint(fixed[2]), __float_as_uint(fixed[3]), pick), 0x5410);
    };
    reinterpret_cast<uint2*>(&shared.weights[parity][warp / 2][r][lane])[warp % 2] =
        make_uint2(bytes(0x51), bytes(0x40));
  }

  /// Makes the sums relative to larger exponents.
  __device__ void rescale(const int (&down)[GROUPS]) {
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      if (!__any_sync(~0u, down[r])) continue;
      const int bits = down[r], half = 1 << bits >> 1, kept = bits > 29 ? 0 : -1;
#pragma unroll
      for (auto& x : acc[r]) {
#pragma unroll
        for (int& n : x) n = (n + half) >> bits & kept;
      }
    }
  }

  /// The levels of the low four nibbles as bytes 128 + level.
  static __device__ unsigned raised_lookup(unsigned codes) {
    if constexpr (VALUE_BITS == 4) return lookup<4>(codes);
    constexpr unsigned low = level_bytes(VALUE_BITS, 0), high = VALUE_BITS == 3 ? level_bytes(3, 4) : low;
    return prmt(low ^ 0x80808080u, high ^ 0x80808080u, codes);
  }

  /// Unpacks the values of this warp's tokens for all warps, in steps between which there is room for other work.
  struct ValueUnpacker {
    static constexpr int words = ValueShare::words;
    const ValueShare share;
    unsigned nibbles[words][4], selectors[words][4];
    unsigned* to;
    __device__ ValueUnpacker(const ManyRows& rows, const unsigned* values, int parity) : share(rows.g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unsigned packed[VALUE_BITS];
        Values::load(values, rows.token(i), share.clamped(0) * VALUE_BITS, packed);
        const Group<VALUE_BITS> group(packed);
#pragma unroll
        for (int w = 0; w < words; ++w) nibbles[w][i] = share.pick(group.word, w);
      }
      to = reinterpret_cast<unsigned*>(&rows.shared.values[parity][share.group][32 * rows.warp + rows.t]) +
           share.part * words;
    }
    /// Half of the words, of one all.
    __device__ void transpose(int half) {
#pragma unroll
      for (int w = 0; w < words; ++w) {
        if (w / ((words + 1) / 2) == half) transpose_codes<VALUE_BITS>(nibbles[w], selectors[w]);
      }
    }
    /// Half of the coordinates.
    __device__ void store(int half) {
      if (!share.has(0)) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = 4 * half + i, coordinate = k / 2 % 2 * 4 + k / 4 + k % 2 * 2;
        unsigned out[words];
#pragma unroll
        for (int w = 0; w < words; ++w) out[w] = raised_lookup(selectors[w][k / 2] >> (k % 2 * 16));
        unsigned* at = to + 16 * coordinate;
        if constexpr (words == 4) {
          *reinterpret_cast<uint4*>(at) = make_uint4(out[0], out[1], out[2], out[3]);
        } else if constexpr (words == 2) {
          *reinterpret_cast<uint2*>(at) = make_uint2(out[0], out[1]);
        } else {
          *at = out[0];
        }
      }
    }
  };

  /// Adds a round's weighted values to the sums of this warp's coordinates; calls between(k) after each quarter.
  template <class Between>
  __device__ void multiply_values(int parity, const Between& between) {
    // Where a head has fewer coordinates than the warps could take, some repeat the last ones' work for nothing.
    const int first = min(kEighths * warp, D / 8 - kEighths);
    const uint4* values = &shared.values[parity][first / 4][lane];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      unsigned bytes[kEighths][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4* from = values + 64 * k + 32 * half;
        if constexpr (kEighths == 4) {
          const uint4 x = *from;
          bytes[0][half] = x.x, bytes[1][half] = x.y;
          bytes[kEighths - 2][half] = x.z, bytes[kEighths - 1][half] = x.w;
        } else {
          const uint2 x = reinterpret_cast<const uint2*>(from)[first / 2 % 2];
          bytes[0][half] = x.x, bytes[1][half] = x.y;
        }
      }
#pragma unroll
      for (auto& x : bytes) x[0] ^= 0x80808080u, x[1] ^= 0x80808080u;  // to signed; this also spares copies into pairs
#pragma unroll
      for (int r = 0; r < GROUPS; ++r) {
        const uint4 w = shared.weights[parity][k][r][lane];
#pragma unroll
        for (int n = 0; n < kEighths; ++n) {
          mma_int8<true, false>(acc[r][n], w.x, w.y, w.z, w.w, bytes[n][0], bytes[n][1]);
        }
      }
      between(k);
    }
  }

  /// Writes the segment's partial result.
  __device__ void finish(int slot) {
    wait_copies<0>();
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
      if (t == 0) shared.sums[warp][8 * r + g] = make_float2(top[r], sum[r]);
    }
    const int first = kEighths * warp, rows = min(kRows, a.rows() - first_row);
    constexpr float factor = level_step(VALUE_BITS) / kWeightOne;
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      if (first >= D / 8 || 8 * r + g >= rows) continue;
      float* to = a.partial_row<D>((long long)slot * kRows + 8 * r + g) + 8 * first + 2 * t;
#pragma unroll
      for (int n = 0; n < kEighths; ++n) {
        const auto& x = acc[r][n];
        *reinterpret_cast<float2*>(to + 8 * n) =
            make_float2((float(x[0]) * 256 + float(x[2])) * factor, (float(x[1]) * 256 + float(x[3])) * factor);
      }
    }
    __syncthreads();
    if (threadIdx.x < rows) {
      float all = 0;
      for (int w = 0; w < kWarps; ++w) all += shared.sums[w][threadIdx.x].y;
      *reinterpret_cast<float2*>(a.partial_row<D>((long long)slot * kRows + threadIdx.x) + D) =
          make_float2(shared.sums[0][threadIdx.x].x, all);
    }
    __syncthreads();
  }
};

/// Entry for generated code: types from pointers, shared memory as the bytes that were planned.
template <int D, int KEY_BITS, int VALUE_BITS, MaskType MASK, int SHARED_BYTES, int ROWS, int STAGES, class T,
          class MaskT>
__device__ void run_rows(const AttentionArgs& a, const T*, const MaskT*, unsigned char* shared) {
  using Kernel = ManyRows<D, KEY_BITS, VALUE_BITS, T, MASK, MaskT, ROWS / 8, STAGES>;
  static_assert(sizeof(typename Kernel::Shared) <= SHARED_BYTES, "plan.h counts too little shared memory");
  Kernel kernel(a, *reinterpret_cast<typename Kernel::Shared*>(shared));
  kernel.run();
}

}  // namespace turboquant::cuda
