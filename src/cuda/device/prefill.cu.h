// Attention of many query rows: tiles of packed keys and values are expanded to fp16 in shared memory (levels are small
// integers, so exactly) and multiplied on the tensor cores; scales are applied to scores and weights.
//
// A block's warps form WM x WN: WM blocks of 16 query rows, whose tokens WN warps divide.  With few blocks of rows the
// cache is split as in decoding and `merge` ends the work; with many, a block goes through all tokens and writes
// output.
#pragma once

#include "cuda/device/merge.cu.h"
#include "cuda/device/tiles.cu.h"

namespace turboquant::cuda {

constexpr int kPrefillTile = 64;  // tokens that a block expands at a time

__device__ inline unsigned pack_halves(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return reinterpret_cast<const unsigned&>(h);
}

/// Four levels as fp16, from what Lookup gives.
template <int CODING>
__device__ void levels_as_halves(unsigned bytes, unsigned (&out)[2]) {
  // 128 + level, as integers between 1024 and 2048 are spaced by 1 in fp16
  if constexpr (!Lookup<CODING>::kUnsigned) bytes ^= 0x80808080u;
  const __half2 bias = __float2half2_rn(1024 + 128);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned raised = prmt(bytes, 0x64646464u, i ? 0x4342 : 0x4140);
    const __half2 h = __hsub2(reinterpret_cast<const __half2&>(raised), bias);
    out[i] = reinterpret_cast<const unsigned&>(h);
  }
}

template <int D, int KEYS, int VALUES, class T, MaskType MASK, class MaskT, int WM, int WN, bool COPIES>
struct Prefill {
  static constexpr int kRows = 16 * WM, kWarps = WM * WN, kThreads = 32 * kWarps;
  static constexpr int kTokens = kPrefillTile / WN;  // of a tile that a warp multiplies
  static constexpr int kStride = D + 8;              // of rows in shared memory: eight rows of a matrix use all banks
  using Keys = PackedTile<KEYS, D, false>;
  using Values = PackedTile<VALUES, D, false>;
  static constexpr int kPart = Keys::size + Values::size + 32;  // words of 32 packed tokens

  struct Shared {
    union {
      struct {
        alignas(16) __half q[kRows][kStride], keys[kPrefillTile][kStride], values[kPrefillTile][kStride];
      };
      float result[kRows][D + 4];
    };
    alignas(16) unsigned packed[2][2][kPart];  // two stages of two times 32 tokens
    float2 token_scales[kPrefillTile];         // of keys and values
    float q_scale[kRows];
    float2 sums[WN][kRows];
  };

  const AttentionArgs& a;
  Shared& shared;
  int lane = threadIdx.x & 31, warp = warp_index(), g = lane / 4, t = lane % 4, m = warp % WM, n = warp / WM;

  int b, kv_head, first_row;
  Range row_range[2];  // what this thread's rows, g and g + 8 of its warp's 16, see of the tiles in hand
  int row_query[2], row_head[2];
  float out[D / 8][4];
  float top[2], sum[2];

  __device__ Prefill(const AttentionArgs& args, Shared& memory) : a(args), shared(memory) {}

  /// All of the tokens that a segment sees, to the output.
  __device__ void run_whole(int segment) {
    const int row_blocks = (a.rows() + kRows - 1) / kRows;
    // Later rows see more keys under a causal mask; the longest runs go first.
    const int local = segment % (a.kv_heads * row_blocks);
    begin(segment / (a.kv_heads * row_blocks), local % a.kv_heads, row_blocks - 1 - local / a.kv_heads);
    const int last_row = min(first_row + kRows, a.rows()) - 1;
    const int from = coded_keys(a, b, first_row / a.group()).first / kPrefillTile;
    const int to = (coded_keys(a, b, last_row / a.group()).last + kPrefillTile - 1) / kPrefillTile;
    scan(from, to);
    if constexpr (COPIES) scan_copies();
    gather();
    for (int i = warp; i < kRows && first_row + i < a.rows(); i += kWarps) {
      const int row = first_row + i;
      float v[1][8] = {};
      if (lane < D / 8) load8(&shared.result[i][8 * lane], v[0]);
      finish_row<D, D, T>(a, b, kv_head * a.group() + row % a.group(), row / a.group(), v, shared.sums[0][i].y,
                          shared.sums[0][i].x);
    }
  }

  /// This block's splits of the cache, to partial results.
  __device__ void run_split() {
    const int row_blocks = (a.rows() + kRows - 1) / kRows;
    const auto read_codes = [&](int row, int local, int first_tile, int last_tile, int slot) {
      begin(row, local / row_blocks, local % row_blocks);
      scan(first_tile, last_tile);
      write(slot);
    };
    const auto read_copies = [&](int row, int local, int, int, int slot) {
      begin(row, local / row_blocks, local % row_blocks);
      prepare_queries();
      if constexpr (COPIES) scan_copies();
      write(slot);
    };
    for_each_split<kPrefillTile, kRows>(a, read_codes, read_copies);
  }

  /// Gathers and writes a partial result.
  __device__ void write(int slot) {
    gather();
    for (int i = threadIdx.x; i < kRows * D / 4; i += kThreads) {
      reinterpret_cast<float4*>(Partial<D, false>(a, (long long)slot * kRows + i / (D / 4)).row)[i % (D / 4)] =
          *reinterpret_cast<const float4*>(&shared.result[i / (D / 4)][i % (D / 4) * 4]);
    }
    for (int i = threadIdx.x; i < kRows; i += kThreads) {
      *Partial<D, false>(a, (long long)slot * kRows + i).sums() = shared.sums[0][i];
    }
    __syncthreads();
  }

  /// Takes up a block of query rows.
  __device__ void begin(int batch_row, int head, int row_block) {
    b = batch_row, kv_head = head, first_row = row_block * kRows;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int row = min(first_row + 16 * m + g + 8 * k, a.rows() - 1);
      row_query[k] = row / a.group(), row_head[k] = kv_head * a.group() + row % a.group();
      top[k] = kEmptyTop, sum[k] = 0;
    }
#pragma unroll
    for (auto& x : out) x[0] = x[1] = x[2] = x[3] = 0;
  }

  /// Rotates the block's queries into shared memory, each divided by its largest coordinate.
  __device__ void prepare_queries() {
    constexpr int each = kRows / kWarps, batch = each < 4 ? each : 4;
#pragma unroll 1
    for (int i = 0; i < each; i += batch) {
      Raw8<T> raw[batch] = {};
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int row = first_row + warp * each + i + k;
        if (row < a.rows() && lane < D / 8) {
          raw[k] = a.load_query<T>(b, kv_head * a.group() + row % a.group(), row / a.group(), 8 * lane);
        }
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        float v[8], largest = 0;
        raw[k].to_floats(v);
        apply_signs(v, a.seed, lane < D / 8 ? lane : 0, rsqrtf(float(Lanes<D>::power)));
        hadamard<D>(v);
        bool bad = false;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (lane >= D / 8) v[j] = 0;
          largest = fmaxf(largest, fabsf(v[j]));
          bad = bad || v[j] != v[j];
        }
        for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
        bad = __any_sync(~0u, bad);
        const float factor = largest >= kLeastQuery ? 1 / largest : 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] *= factor;
        if (lane < D / 8) store8(&shared.q[warp * each + i + k][8 * lane], v);
        if (lane == 0) {
          shared.q_scale[warp * each + i + k] =
              bad ? __uint_as_float(0x7fc00000) : largest * step_of(KEYS) * a.scale * kLog2E;
        }
      }
    }
  }

  /// Starts the copies of a tile's packed rows: a warp takes the keys or the values of 32 tokens.
  __device__ void start_copy(int tile, int last) {
    if (tile < last) {
      for (int task = warp; task < 6; task += kWarps) {
        const int part = task & 1, tokens = min(32, a.kv_len - tile * kPrefillTile - 32 * part);
        const long long row = (long long)tile * kPrefillTile + 32 * part;
        unsigned* to = shared.packed[tile & 1][part];
        if (tokens <= 0) continue;
        if (task < 2) {
          Keys::copy(to,
                     a.packed.key_codes + b * a.packed.key_code_strides[0] + kv_head * a.packed.key_code_strides[1] +
                         row * Keys::words,
                     tokens);
        } else if (task < 4) {
          Values::copy(to + Keys::size,
                       a.packed.value_codes + b * a.packed.value_code_strides[0] +
                           kv_head * a.packed.value_code_strides[1] + row * Values::words,
                       tokens);
        } else {
          copy_scales(
              reinterpret_cast<__half*>(to + Keys::size + Values::size),
              a.packed.key_scales + b * a.packed.key_scale_strides[0] + kv_head * a.packed.key_scale_strides[1] + row,
              a.packed.value_scales + b * a.packed.value_scale_strides[0] + kv_head * a.packed.value_scale_strides[1] +
                  row,
              tokens);
        }
      }
    }
    commit_copies();
  }

  /// Expands one side of a tile: a thread takes groups of 32 coordinates, neighbours those of one token, since so
  /// packed words come from different banks; that expanded ones also go to different banks, each pair of neighbours
  /// starts with another of its four words.
  template <class Packed, int CODING>
  __device__ void expand(const unsigned* packed_tile, __half (&to)[kPrefillTile][kStride]) {
    constexpr int groups = D / 32;
#pragma unroll 2
    for (int i = threadIdx.x; i < kPrefillTile * groups; i += kThreads) {
      const int token = i / groups, group = i % groups, turn = group / 2 % 4;
      unsigned packed[bits_of(CODING)];
      Packed::load(packed_tile + token / 32 * kPart, token % 32, group * bits_of(CODING), packed);
      const Group<CODING> codes(packed);
      // Word (w + turn) % 4.
      const auto turned = [turn](const unsigned(&x)[4], int w) {
        const unsigned half[4] = {turn & 2 ? x[2] : x[0], turn & 2 ? x[3] : x[1], turn & 2 ? x[0] : x[2],
                                  turn & 2 ? x[1] : x[3]};
        return turn & 1 ? half[(w + 1) % 4] : half[w];
      };
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const unsigned word = turned(codes.word, w) & codes.mask;
        unsigned low[2], high[2];
        if constexpr (CODING == 8) {
          levels_as_halves<8>(word, low);
          levels_as_halves<8>(turned(codes.more, w), high);
        } else {
          levels_as_halves<CODING>(Lookup<CODING>::bytes(word), low);
          levels_as_halves<CODING>(Lookup<CODING>::bytes(word >> 16), high);
        }
        *reinterpret_cast<uint4*>(&to[token][32 * group + 8 * ((w + turn) % 4)]) =
            make_uint4(low[0], low[1], high[0], high[1]);
      }
    }
  }

  /// Expands one side of `tokens` exact copies, zeros behind them, as `expand` does.
  template <class Slot>
  __device__ void expand_copies(const unsigned* codes, const long long (&strides)[2], const Slot& slot, int tokens,
                                __half (&to)[kPrefillTile][kStride]) {
    constexpr int groups = D / 32, words = D / 4;
    const unsigned* from = codes + b * strides[0] + kv_head * strides[1];
    const bool aligned = aligned_to(from, 16);
#pragma unroll 2
    for (int i = threadIdx.x; i < kPrefillTile * groups; i += kThreads) {
      const int token = i / groups, group = i % groups;
      uint4 packed[2] = {};
      if (token < tokens) {
        const unsigned* p = from + (long long)slot(token) * words + 8 * group;
        if (aligned) {
          packed[0] = reinterpret_cast<const uint4*>(p)[0], packed[1] = reinterpret_cast<const uint4*>(p)[1];
        } else {
          packed[0] = make_uint4(p[0], p[1], p[2], p[3]), packed[1] = make_uint4(p[4], p[5], p[6], p[7]);
        }
      }
      const unsigned pairs[4][2] = {{packed[0].x, packed[0].y},
                                    {packed[0].z, packed[0].w},
                                    {packed[1].x, packed[1].y},
                                    {packed[1].z, packed[1].w}};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        unsigned low[2], high[2];
        levels_as_halves<8>(pairs[w][0], low);
        levels_as_halves<8>(pairs[w][1], high);
        *reinterpret_cast<uint4*>(&to[token][32 * group + 8 * w]) = make_uint4(low[0], low[1], high[0], high[1]);
      }
    }
  }

  /// Goes through tiles [first, last) of the segment.
  __device__ void scan(int first, int last) {
#pragma unroll
    for (int k = 0; k < 2; ++k) row_range[k] = coded_keys(a, b, row_query[k]);
    start_copy(first, last);
    prepare_queries();
#pragma unroll 1
    for (int tile = first; tile < last; ++tile) {
      start_copy(tile + 1, last);
      wait_copies<1>();
      __syncthreads();  // the copies of all have landed, and all have done with the last tile
      const unsigned* packed = shared.packed[tile & 1][0];
      expand<Keys, KEYS>(packed, shared.keys);
      expand<Values, VALUES>(packed + Keys::size, shared.values);
      if (threadIdx.x < kPrefillTile) {
        const unsigned* part = packed + threadIdx.x / 32 * kPart + Keys::size + Values::size;
        const __half* scales = reinterpret_cast<const __half*>(part) + threadIdx.x % 32;
        shared.token_scales[threadIdx.x] = checked(make_float2(__half2float(scales[0]), __half2float(scales[32])));
      }
      __syncthreads();
      multiply(tile * kPrefillTile);
    }
    wait_copies<0>();
  }

  /// Goes through the exact copies that some row of the block may read, after the queries were prepared.  They are few,
  /// so nothing is copied ahead.
  __device__ void scan_copies() {
    const int last_row = min(first_row + kRows, a.rows()) - 1;
    const int last = visible_keys(a, b, last_row / a.group()).last, start = a.starts ? max(a.starts[b], 0) : 0;
#pragma unroll 1
    for (int of_ring = 0; of_ring < 2; ++of_ring) {
#pragma unroll
      for (int k = 0; k < 2; ++k) row_range[k] = exact_keys(a, b, row_query[k], of_ring);
      const int begin = of_ring ? ring_begin(a, first_row / a.group()) / kPrefillTile * kPrefillTile : start;
      const int end = of_ring ? last : min(last, start + a.first);
#pragma unroll 1
      for (int key = begin; key < end; key += kPrefillTile) {
        __syncthreads();  // all have done with the last tile
        const auto slot = [&](int token) { return of_ring ? (key + token) % a.ring : a.ring + key - start + token; };
        expand_copies(a.exact.key_codes, a.exact.key_code_strides, slot, end - key, shared.keys);
        expand_copies(a.exact.value_codes, a.exact.value_code_strides, slot, end - key, shared.values);
        if (const int token = threadIdx.x; token < kPrefillTile) {
          float2 scales = make_float2(0, 0);
          if (token < end - key) {
            const PackedCache& c = a.exact;
            scales.x =
                __half2float(c.key_scales[b * c.key_scale_strides[0] + kv_head * c.key_scale_strides[1] + slot(token)]);
            scales.y = __half2float(
                c.value_scales[b * c.value_scale_strides[0] + kv_head * c.value_scale_strides[1] + slot(token)]);
          }
          scales = checked(scales);
          // The other tiles' levels have other steps.
          scales.x *= step_of(8) / step_of(KEYS), scales.y *= step_of(8) / step_of(VALUES);
          shared.token_scales[token] = scales;
        }
        __syncthreads();
        multiply(key);
      }
    }
  }

  /// A token's scales; as in decoding, that of a value spoils the weight if it is no number.
  static __device__ float2 checked(float2 scales) {
    if (fabsf(scales.y) < __uint_as_float(0x7f800000)) return scales;
    return make_float2(__uint_as_float(0x7fc00000), 0);
  }

  /// Scores and values of a tile whose first token is `key`.
  __device__ void multiply(int key) {
    // Two sets of sums where there are few, for products of one set wait for each other.
    constexpr int sets = kTokens <= 32 ? 2 : 1;
    float s[kTokens / 8][4], more[kTokens / 8][4];
#pragma unroll
    for (auto& x : s) x[0] = x[1] = x[2] = x[3] = 0;
#pragma unroll
    for (auto& x : more) x[0] = x[1] = x[2] = x[3] = 0;
    const int matrix = lane / 8, row = lane % 8;
    const __half* q = &shared.q[16 * m + matrix % 2 * 8 + row][matrix / 2 * 8];
    const __half* keys = &shared.keys[kTokens * n + matrix / 2 * 8 + row][matrix % 2 * 8];
    const __half* values = &shared.values[kTokens * n + matrix % 2 * 8 + row][matrix / 2 * 8];
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      unsigned x[4];
      load_matrices(x, q + k);
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j) {
        unsigned y[4];
        load_matrices(y, keys + 16 * j * kStride + k);
        auto& into = sets == 2 && k / 16 % 2 ? more : s;
        mma_half(into[2 * j], x, y[0], y[1]);
        mma_half(into[2 * j + 1], x, y[2], y[3]);
      }
    }
    if constexpr (sets == 2) {
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] += more[j][i];
      }
    }
    scale_scores(s, key + kTokens * n);
    softmax(s);
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j) {
      const unsigned x[4] = {pack_halves(s[2 * j][0], s[2 * j][1]), pack_halves(s[2 * j][2], s[2 * j][3]),
                             pack_halves(s[2 * j + 1][0], s[2 * j + 1][1]),
                             pack_halves(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
      for (int d = 0; d < D; d += 16) {
        unsigned y[4];
        load_transposed(y, values + 16 * j * kStride + d);
        mma_half(out[d / 8], x, y[0], y[1]);
        mma_half(out[d / 8 + 1], x, y[2], y[3]);
      }
    }
  }

  /// The scales of this thread's token e (0 or 1) of the j-th eight.
  __device__ float2 token_scale(int j, int e) const { return shared.token_scales[kTokens * n + 8 * j + 2 * t + e]; }

  /// Products to scores in units of log2, with the mask.
  __device__ void scale_scores(float (&s)[kTokens / 8][4], int key) const {
    const float q_scale[2] = {shared.q_scale[16 * m + g], shared.q_scale[16 * m + g + 8]};
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] *= q_scale[i / 2] * token_scale(j, i % 2).x;
    }
    if constexpr (MASK == kNoMask) {
      const bool sees_all = key >= max(row_range[0].first, row_range[1].first) &&
                            key + kTokens <= min(row_range[0].last, row_range[1].last);
      if (__all_sync(~0u, sees_all)) return;
    }
    const float hidden = -__uint_as_float(0x7f800000);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = key + 8 * j + 2 * t + i % 2;
        float term = hidden;
        if (at >= row_range[i / 2].first && at < row_range[i / 2].last) {
          term = mask_term<MASK, MaskT>(a, b, row_head[i / 2], row_query[i / 2], at);
        }
        s[j][i] = term == hidden ? hidden : s[j][i] + term;
      }
    }
  }

  /// Scores to weights exp2(s - top) times the value scale.  The exponent moves only when a weight nears fp16's limit.
  __device__ void softmax(float (&s)[kTokens / 8][4]) {
    float tile_sum[2], w[kTokens / 8][4];
#pragma unroll 1
    for (int pass = 0;; ++pass) {
      float largest = 0;
      tile_sum[0] = tile_sum[1] = 0;
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float p = exp2_fast(s[j][i] - top[i / 2]);
          tile_sum[i / 2] += p;
          w[j][i] = p * token_scale(j, i % 2).y;
          largest = fmaxf(largest, w[j][i]);
        }
      }
      if (pass || !__any_sync(~0u, largest > 1024 || tile_sum[0] > 8e12f || tile_sum[1] > 8e12f)) break;
      float up[2] = {kEmptyTop, kEmptyTop};
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          up[i / 2] = fmaxf(up[i / 2], s[j][i] + fmaxf(log2_fast(token_scale(j, i % 2).y), -40.f));
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        up[k] = fmaxf(up[k], __shfl_xor_sync(~0u, up[k], 1));
        up[k] = fmaxf(top[k], ceilf(fmaxf(up[k], __shfl_xor_sync(~0u, up[k], 2))));
        const float down = exp2_fast(top[k] - up[k]);
        top[k] = up[k];
        sum[k] *= down;
#pragma unroll
        for (auto& x : out) x[2 * k] *= down, x[2 * k + 1] *= down;
      }
    }
    sum[0] += tile_sum[0], sum[1] += tile_sum[1];
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = w[j][i];
    }
  }

  /// Merges the warps that divided the tokens: rows in shared.result, sums in shared.sums[0].
  __device__ void gather() {
    __syncthreads();  // the tiles' memory becomes the result's
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      sum[k] += __shfl_xor_sync(~0u, sum[k], 1);
      sum[k] += __shfl_xor_sync(~0u, sum[k], 2);
      if (t == 0) shared.sums[n][16 * m + g + 8 * k] = make_float2(top[k], sum[k]);
    }
    __syncthreads();
    float factor[2], most[2], total[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int row = 16 * m + g + 8 * k;
      most[k] = kEmptyTop, total[k] = 0;
      for (int w = 0; w < WN; ++w) most[k] = fmaxf(most[k], shared.sums[w][row].x);
      for (int w = 0; w < WN; ++w) total[k] += exp2_fast(shared.sums[w][row].x - most[k]) * shared.sums[w][row].y;
      factor[k] = exp2_fast(top[k] - most[k]) * step_of(VALUES);
    }
#pragma unroll 1
    for (int w = 0; w < WN; ++w) {
      if (w == n) {
#pragma unroll
        for (int i = 0; i < D / 4; ++i) {
          const int k = i % 2;
          float2& to = *reinterpret_cast<float2*>(&shared.result[16 * m + g + 8 * k][i / 2 * 8 + 2 * t]);
          const float2 old = w ? to : make_float2(0, 0);
          to = make_float2(old.x + factor[k] * out[i / 2][2 * k], old.y + factor[k] * out[i / 2][2 * k + 1]);
        }
      }
      __syncthreads();
    }
    if (n == 0 && t == 0) {
#pragma unroll
      for (int k = 0; k < 2; ++k) shared.sums[0][16 * m + g + 8 * k] = make_float2(most[k], total[k]);
    }
    __syncthreads();
  }
};

/// Entry for generated code: types from pointers, shared memory as the bytes that were planned.
template <int D, int KEYS, int VALUES, MaskType MASK, int SHARED_BYTES, bool COPIES, int WM, int WN, bool SPLIT,
          class T, class MaskT>
__device__ void run_prefill(const AttentionArgs& a, const T*, const MaskT*, unsigned char* shared) {
  using Kernel = Prefill<D, KEYS, VALUES, T, MASK, MaskT, WM, WN, COPIES>;
  static_assert(sizeof(typename Kernel::Shared) <= SHARED_BYTES, "plan.h counts too little shared memory");
  Kernel kernel(a, *reinterpret_cast<typename Kernel::Shared*>(shared));
  if constexpr (SPLIT) {
    kernel.run_split();
  } else {
    kernel.run_whole(blockIdx.x);
  }
}

}  // namespace turboquant::cuda
