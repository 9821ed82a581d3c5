// Attention of a few query rows over a long packed cache, on int8 tensor cores: the kernel of token generation.
//
// A block handles four query rows of a KV head at a time; its warps are independent until the end of a segment, each
// with its own ring of 32-token tiles.  Queries and softmax weights are split into high and low int8 parts, which fill
// eight columns of an m16n8k32 product; keys and values are the bytes that the codebook lookup gives.  Scores come out
// with query row t and tokens g, g + 8, ... in each thread; two shuffles bring weights to where the product with the
// values takes them.
#pragma once

#include "cuda/device/int8.cu.h"

namespace turboquant::cuda {

/// With EXACT it reads exact copies instead (ExactTiles of schedule.cu.h).
template <int D, int KEYS, int VALUES, class T, MaskType MASK, class MaskT, int WARPS, int STAGES, bool EXACT = false>
struct FewRows {
  static constexpr int kRows = 4;
  using Keys = PackedTile<KEYS, D, false>;
  using Values = PackedTile<VALUES, D, true>;
  using Copies = typename CopiesOf<Keys, Values, kTile, STAGES, EXACT>::type;
  using KeyShare = Share<D, 4>;
  using ValueShare = Share<D, 8>;
  // Lanes that take different words of a group need the same order of bits in all.
  static constexpr int kOrders = KeyShare::parts == 1 && ValueShare::parts == 1 ? 4 : 1;
  using Levels = LevelTables<KEYS, VALUES, kOrders>;
  using KeyTable = LevelTable<KEYS, kOrders>;
  using ValueTable = LevelTable<VALUES, kOrders>;
  static constexpr int kKeySteps = KeyShare::per_thread * KeyShare::words;
  static constexpr int kValueTiles = 4 * ValueShare::words;  // of 16 coordinates
  static constexpr int kStageWords = Copies::kWords;
  static constexpr float kWeightOne = 65280;  // 255 * 256: the fixed-point weight of 1

  struct Shared {
    alignas(16) unsigned ring[WARPS][STAGES][kStageWords];
    float2 token_scales[WARPS][kTile];  // of keys; of values, times kWeightOne
    uint4 q[kRows][D / 8];  // eight coordinates: high and low parts of four, high and low parts of the other four
    float q_scale[kRows];
    int q_offset[kRows][2];  // what the unsigned bytes of some keys add to the products
    float2 sums[WARPS][kRows];
    typename Levels::Stored levels;
  };

  /// Where a warp's result for a row and coordinate lies in its part of the ring: lanes of different t write rows two
  /// apart and coordinates two apart, those of different g coordinates 32 apart, all to different banks.
  static constexpr int kResultRow = D / 32 * 36 + 1;
  static __device__ int result_at(int row, int coordinate) {
    return ((row & 1) * 2 + row / 2) * kResultRow + coordinate / 32 * 36 + coordinate % 32;
  }
  static_assert(STAGES * kStageWords >= kRows * kResultRow, "results reuse the ring");
  static constexpr int kEach = WARPS < kRows ? kRows / WARPS : 1;  // queries that a warp prepares
  static_assert(kEach * WARPS >= kRows, "warps prepare as many queries each");

  const AttentionArgs& a;
  Shared& shared;
  int lane = threadIdx.x & 31, warp = warp_index(), g = lane / 4, t = lane % 4;

  Levels levels;

  // Of the segment in hand.
  int b, kv_head, first_row;
  int row_query, row_head;  // of this thread's query row, t
  Range row_range;          // that it sees in the tile in hand, or in all
  int acc[kValueTiles][4];
  int weight_sum;  // of this thread's column, where values' bytes are unsigned
  float top, sum;  // exponent that weights are relative to, and their sum over this thread's tokens

  __device__ FewRows(const AttentionArgs& args, Shared& memory) : a(args), shared(memory) {}

  /// Starts the copy of a tile into a stage of the ring, if there is one; `copies` goes on to this warp's next.
  __device__ void start_copy(Copies& copies, int tile, int last, int stage) {
    if (tile < last) {
      copies.copy(a, b, kv_head, tile, shared.ring[warp][stage]);
      copies.advance(WARPS, stage);
    }
    commit_copies();
  }

  /// Rotates a query row and splits it into int8 parts; one warp.
  __device__ void prepare_query(const Raw8<T> (&raw)[1], int row) {
    uint4 parts[1];
    float scale[1];
    int offset[1][2];
    split_queries<D, KEYS, T, 1>(a, raw, parts, scale, offset);
    if (lane < D / 8) shared.q[row][lane] = parts[0];
    if (lane == 0) {
      shared.q_scale[row] = scale[0];
      if constexpr (KeyTable::kBias) shared.q_offset[row][0] = offset[0][0], shared.q_offset[row][1] = offset[0][1];
    }
  }

  __device__ void segment(int batch_row, int local, int first_tile, int last_tile, int slot) {
    const int row_blocks = (a.rows() + kRows - 1) / kRows;
    b = batch_row, kv_head = local / row_blocks, first_row = local % row_blocks * kRows;
    const int row = min(first_row + t, a.rows() - 1);
    row_query = row / a.group(), row_head = kv_head * a.group() + row % a.group();
    row_range = coded_keys(a, b, row_query);

    // All addresses are made before the first branch: at a kernel's start each parameter is a miss of the constant
    // cache, and misses overlap only within a block of code.  The queries' load goes first, for the first product waits
    // for it; nothing here waits for it before the copies.
    const int mine = first_tile + warp;
    Copies copies(a, b, kv_head, mine, shared.ring[0][0]);
    const T* q_from[kEach];
    Raw8<T> q[kEach][1] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = first_row + WARPS * i + warp;
      q_from[i] = a.query_at<T>(b, kv_head * a.group() + row % a.group(), row / a.group(), 8 * lane);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = WARPS * i + warp;
      if (row < kRows && first_row + row < a.rows() && lane < D / 8) q[i][0].load(q_from[i], a.q_strides[3]);
    }
    start_copy(copies, mine, last_tile, 0);  // one: more would delay the queries
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (WARPS * i + warp < kRows) prepare_query(q[i], WARPS * i + warp);
    }
    if (threadIdx.x == 0) levels.store(shared.levels);
    __syncthreads();
    levels.load(shared.levels);
#pragma unroll
    for (int s = 1; s < STAGES - 1; ++s) start_copy(copies, mine + s * WARPS, last_tile, s);

    unsigned q_parts[kKeySteps][2];  // of row g / 2, high or low parts
    const KeyShare share(t);
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      const int i = step / KeyShare::words, at = share.coordinate(i, step % KeyShare::words);
      const uint4 x = share.has(i) ? shared.q[g / 2][at / 8] : make_uint4(0, 0, 0, 0);
      q_parts[step][0] = g & 1 ? x.y : x.x, q_parts[step][1] = g & 1 ? x.w : x.z;
    }
    const float q_scale = shared.q_scale[t];
    const int high_offset = KeyTable::kBias ? shared.q_offset[t][0] : 0;
    const int low_offset = KeyTable::kBias ? shared.q_offset[t][1] : 0;

#pragma unroll
    for (auto& x : acc) x[0] = x[1] = x[2] = x[3] = 0;
    weight_sum = 0, top = kEmptyTop, sum = 0;
    int filled = STAGES - 1, stage = 0;
#pragma unroll 1
    for (int tile = mine; tile < last_tile; tile += WARPS) {
      __syncwarp();  // the stage that is filled next has been read by all
      if (STAGES > 1 || tile != mine) start_copy(copies, tile + (STAGES - 1) * WARPS, last_tile, filled);
      filled = filled == STAGES - 1 ? 0 : filled + 1;
      wait_copies<STAGES - 1>();
      __syncwarp();
      const unsigned* keys = shared.ring[warp][stage];
      const unsigned* values = keys + Keys::size;
      stage = stage == STAGES - 1 ? 0 : stage + 1;
      unpack_scales(reinterpret_cast<const __half*>(values + Values::size));

      int dots[2][4];
      const KeyReader reader(keys, g, share);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        dots[j][0] = dots[j][2] = high_offset, dots[j][1] = dots[j][3] = low_offset;
        multiply_keys(dots[j], reader, 16 * j, share, q_parts);
      }
      float s[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int dot = dots[i / 2][i % 2 * 2] * 256 + dots[i / 2][i % 2 * 2 + 1];
        s[i] = float(dot) * (token_scale(i).x * q_scale);
      }
      unsigned bytes[kValueTiles][4], weights[2];
      // Two warps a scheduler: before the branches of the softmax, so that they overlap its latencies.
      if constexpr (WARPS <= 8) unpack_values(values, bytes);
      apply_mask(s, first_token(copies, tile));
      softmax(s, weights);
      if constexpr (WARPS > 8) unpack_values(values, bytes);
#pragma unroll
      for (int i = 0; i < kValueTiles; ++i) {
        mma_int8<ValueTable::kBias != 0, true>(acc[i], bytes[i][0], bytes[i][1], bytes[i][2], bytes[i][3], weights[0],
                                               weights[1]);
      }
    }
    finish(slot, min(WARPS, last_tile - first_tile));
  }

  /// The first token of a tile.
  __device__ int first_token(const Copies& copies, int tile) {
    if constexpr (EXACT) {
      const ExactPlace<kTile> place(a, copies.tiles, tile);
      row_range = exact_keys(a, b, row_query, place.of_ring);
      return place.key;
    }
    return tile * kTile;
  }

  /// The token of this thread's i-th score within a tile.
  __device__ int token(int i) const { return 8 * i + g; }
  __device__ float2 token_scale(int i) const { return shared.token_scales[warp][token(i)]; }

  /// Hides scores and adds the mask's terms; `key` is the tile's first.
  __device__ void apply_mask(float (&s)[4], int key) const {
    if constexpr (MASK == kNoMask) {
      if (__all_sync(~0u, key >= row_range.first && key + kTile <= row_range.last)) return;
    }
    const float hidden = -__uint_as_float(0x7f800000);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = key + token(i);
      float term = hidden;
      if (at >= row_range.first && at < row_range.last) term = mask_term<MASK, MaskT>(a, b, row_head, row_query, at);
      s[i] = term == hidden ? hidden : s[i] + term;
    }
  }

  /// Each lane converts one token's scales.  A value scale that is no number poisons the key's, so that it reaches the
  /// sum of weights wherever the token is visible.  Of tokens beyond the last, scales are what shared memory held
  /// before: infinities of either sign must go, for not even a weight of 0 makes a number of them.
  __device__ void unpack_scales(const __half* scales) {
    float key = __half2float(scales[lane]), value = __half2float(scales[32 + lane]) * kWeightOne;
    if (!(fabsf(value) < __uint_as_float(0x7f800000))) key = __uint_as_float(0x7fc00000), value = 0;
    shared.token_scales[warp][lane] = make_float2(key, value);
    __syncwarp();
  }

  /// The packed words of a thread's groups of a key, and of those of keys eight tokens further.
  struct KeyReader {
    static constexpr int n = KeyShare::per_thread;
    static constexpr bool whole = KeyShare::groups == 4 * n;  // then they are consecutive words
    static constexpr int readers = whole ? 1 : n, words = n * bits_of(KEYS) / readers;
    typename Keys::template Reader<words> of[readers];
    __device__ KeyReader(const unsigned* keys, int token, const KeyShare& share) {
#pragma unroll
      for (int i = 0; i < readers; ++i) of[i] = {keys, token, (whole ? share.group : share.clamped(i)) * bits_of(KEYS)};
    }
    __device__ void load(int further, unsigned (&packed)[n][bits_of(KEYS)]) const {
#pragma unroll
      for (int i = 0; i < readers; ++i) {
        unsigned x[words];
        of[i].load(further, x);
#pragma unroll
        for (int k = 0; k < words; ++k) packed[i + k / bits_of(KEYS)][k % bits_of(KEYS)] = x[k];
      }
    }
  };

  /// Products of the keys of sixteen tokens with four query rows, high and low parts; this thread brings the keys of
  /// two, eight apart.
  __device__ void multiply_keys(int (&dots)[4], const KeyReader& keys, int further, const KeyShare& share,
                                const unsigned (&q)[kKeySteps][2]) const {
    constexpr int n = KeyShare::per_thread;
    unsigned packed[2][n][bits_of(KEYS)];
#pragma unroll
    for (int k = 0; k < 2; ++k) keys.load(further + 8 * k, packed[k]);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const Group<KEYS, kOrders> groups[2] = {Group<KEYS, kOrders>(packed[0][i]), Group<KEYS, kOrders>(packed[1][i])};
#pragma unroll
      for (int w = 0; w < KeyShare::words; ++w) {
        unsigned bytes[2][2];  // [four coordinates][token]
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const unsigned x = share.pick(groups[k].word, w) & groups[k].mask;
          if constexpr (KEYS == 8) {
            bytes[0][k] = x, bytes[1][k] = share.pick(groups[k].more, w);
          } else {
            bytes[0][k] = levels.keys(x, w), bytes[1][k] = levels.keys(x >> 16, w);
          }
        }
        const auto& f = q[i * KeyShare::words + w];
        mma_int8<KeyTable::kBias != 0, false>(dots, bytes[0][0], bytes[0][1], bytes[1][0], bytes[1][1], f[0], f[1]);
      }
    }
  }

  /// Weights exp2(s - top) times the value scale as bytes, of row g & 3: the high part in threads of g < 4, else the
  /// low part, of tokens t + 8 k and t + 4 + 8 k, k < 4.
  __device__ void softmax(const float (&s)[4], unsigned (&weights)[2]) {
    constexpr float shift = 8388608.f;  // 2^23: adding it leaves a rounded integer in the low bits
    float fixed[4], tile_sum;
    bool fresh = __all_sync(~0u, top == kEmptyTop);  // no weights yet, so nothing to compare with or rescale
#pragma unroll 1
    for (bool raised = false;; raised = true) {
      if (!fresh || raised) {
        float largest = 0;
        tile_sum = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float p = exp2_fast(s[i] - top);
          tile_sum += p;
          fixed[i] = fmaf(p, token_scale(i).y, shift);
          largest = fmaxf(largest, fixed[i]);
        }
        // The exponent is an integer that moves only when a weight no longer fits; where values are 0 it may lag by 43.
        if (raised || !__any_sync(~0u, largest > shift + 65535 || tile_sum > 8e12f)) break;
      }
      float up = kEmptyTop;
#pragma unroll
      for (int i = 0; i < 4; ++i) up = fmaxf(up, s[i] + fmaxf(log2_fast(token_scale(i).y * (1 / kWeightOne)), -40.f));
#pragma unroll
      for (int step = 4; step < 32; step *= 2) up = fmaxf(up, __shfl_xor_sync(~0u, up, step));
      up = fmaxf(top, ceilf(up));
      if (!fresh) rescale(up);
      top = up;
    }
    sum += tile_sum;
    // A thread has four tokens of row t, and the product takes those of row g & 3.  Lanes of g < 4 have the first
    // tokens that others need, so each shuffle brings one half of the lanes high parts and the other half low ones.
    unsigned bytes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned pick = (g < 4) == (i == 0) ? 0x51 : 0x40;
      bytes[i] = prmt(prmt(__float_as_uint(fixed[0]), __float_as_uint(fixed[1]), pick),
                      prmt(__float_as_uint(fixed[2]), __float_as_uint(fixed[3]), pick), 0x5410);
    }
    const int from = 4 * t + (g & 3) + (g & 4) * 4;
    bytes[0] = __shfl_sync(~0u, bytes[0], from), bytes[1] = __shfl_sync(~0u, bytes[1], from ^ 16);
    weights[0] = g < 4 ? bytes[0] : bytes[1], weights[1] = g < 4 ? bytes[1] : bytes[0];
    if constexpr (ValueTable::kBias) {
      weight_sum = int(__dp4a(weights[0], 0x01010101u, __dp4a(weights[1], 0x01010101u, unsigned(weight_sum))));
    }
  }

  /// Turns sums of unsigned bytes into sums of levels.
  __device__ void to_levels() {
    if constexpr (ValueTable::kBias) {
      constexpr int bias = ValueTable::kBias, step = ValueTable::kStep;
      weight_sum += __shfl_xor_sync(~0u, weight_sum, 1);
      weight_sum += __shfl_xor_sync(~0u, weight_sum, 2);
      const int even = bias * __shfl_sync(~0u, weight_sum, 8 * t), odd = bias * __shfl_sync(~0u, weight_sum, 8 * t + 4);
#pragma unroll
      for (auto& x : acc) {
        x[0] = step * x[0] - even, x[1] = step * x[1] - odd;
        x[2] = step * x[2] - even, x[3] = step * x[3] - odd;
      }
      weight_sum = 0;
    }
  }

  /// Makes the sums relative to a larger exponent.
  __device__ void rescale(float new_top) {
    const float down = top - new_top;
    const int bits = int(fminf(-down, 31.f)) + ValueTable::kStep - 1;  // sums count steps, and after to_levels levels
    sum *= exp2_fast(down);
    to_levels();
    const auto shift = [](int x, int bits) { return bits > 29 ? 0 : (x + (1 << bits >> 1)) >> bits; };
    const int even = __shfl_sync(~0u, bits, 2 * t & 3), odd = __shfl_sync(~0u, bits, (2 * t & 3) + 1);
#pragma unroll
    for (auto& x : acc) {
      x[0] = shift(x[0], even), x[1] = shift(x[1], odd);
      x[2] = shift(x[2], even), x[3] = shift(x[3], odd);
    }
  }

  /// A tile's values as the products take them: of each 16 coordinates, four registers of four tokens' bytes.
  __device__ void unpack_values(const unsigned* values, unsigned (&bytes)[kValueTiles][4]) const {
    constexpr int kBits = bits_of(VALUES);
    const ValueShare share(g);
    const typename Values::template Reader<kBits> readers[2] = {{values, t, share.clamped(0) * kBits},
                                                                {values, t + 4, share.clamped(0) * kBits}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned nibbles[ValueShare::words][4], more[ValueShare::words][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unsigned packed[kBits];
        readers[half].load(8 * i, packed);
        const Group<VALUES, kOrders> group(packed);
#pragma unroll
        for (int w = 0; w < ValueShare::words; ++w) {
          nibbles[w][i] = share.pick(group.word, w);
          if constexpr (VALUES == 8) more[w][i] = share.pick(group.more, w);
        }
      }
#pragma unroll
      for (int w = 0; w < ValueShare::words; ++w) {
        if constexpr (VALUES == 8) {
          unsigned first[4], last[4];
          transpose_bytes(nibbles[w], first), transpose_bytes(more[w], last);
#pragma unroll
          for (int k = 0; k < 4; ++k) {  // in the order of transpose_codes
            const auto& from = k % 2 ? last : first;
            bytes[4 * w + k][2 * half] = from[k / 2], bytes[4 * w + k][2 * half + 1] = from[k / 2 + 2];
          }
          continue;
        }
        unsigned selectors[4];
        transpose_codes<VALUES>(nibbles[w], selectors);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          bytes[4 * w + k][2 * half] = levels.values()(selectors[k], w);
          bytes[4 * w + k][2 * half + 1] = levels.values()(selectors[k] >> 16, w);
        }
      }
    }
  }

  /// Merges the first `active` warps of the block, the others had no tile, and writes the segment's partial result.
  __device__ void finish(int slot, int active) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    to_levels();
    if (g == 0) shared.sums[warp][t] = make_float2(top, sum);
    wait_copies<0>();
    __syncthreads();
    float* out = reinterpret_cast<float*>(shared.ring[warp]);
    const int rows[2] = {2 * t & 3, (2 * t & 3) + 1};  // this thread's columns: high parts for t < 2, else low parts
    float factor[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float most = kEmptyTop;
      for (int w = 0; w < WARPS; ++w) most = fmaxf(most, shared.sums[w][rows[k]].x);
      factor[k] = exp2_fast(shared.sums[warp][rows[k]].x - most) * (t < 2 ? 256 : 1) * step_of(VALUES) / kWeightOne;
    }
    const ValueShare share(g);
    if (warp < active) {
      // High and low parts meet: threads of t < 2 end up with the first coordinate of both rows, the rest with the
      // second.
#pragma unroll
      for (int m = 0; m < kValueTiles; ++m) {
        const int coordinate = share.coordinate(0, m / 4) + (m % 2 * 4 + m % 4 / 2) + (t < 2 ? 0 : 2);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float first = float(acc[m][k]) * factor[k], second = float(acc[m][2 + k]) * factor[k];
          const float total = (t < 2 ? first : second) + __shfl_xor_sync(~0u, t < 2 ? second : first, 2);
          if (share.has(0)) out[result_at(rows[k], coordinate)] = total;
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < D; i += 32 * WARPS) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        float x = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
          if (w < active) x += reinterpret_cast<const float*>(shared.ring[w])[result_at(row, i)];
        }
        Partial<D, false>(a, (long long)slot * kRows + row).row[i] = x;
      }
    }
    if constexpr (WARPS > 8) {
      if (warp < kRows) {
        const float2 s = lane < WARPS ? shared.sums[lane % WARPS][warp] : make_float2(kEmptyTop, 0);
        float most = s.x;
        for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        float all = exp2_fast(s.x - most) * s.y;
        for (int step = 16; step; step /= 2) all += __shfl_xor_sync(~0u, all, step);
        if (lane == 0) *Partial<D, false>(a, (long long)slot * kRows + warp).sums() = make_float2(most, all);
      }
    } else if (warp == WARPS - 1) {  // a lane for each warp and row
      const int row = lane / WARPS;
      const float2 s = row < kRows ? shared.sums[lane % WARPS][row] : make_float2(kEmptyTop, 0);
      float most = s.x;
      for (int step = 1; step < WARPS; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
      float all = exp2_fast(s.x - most) * s.y;
      for (int step = 1; step < WARPS; step *= 2) all += __shfl_xor_sync(~0u, all, step);
      if (row < kRows && lane % WARPS == 0) {
        *Partial<D, false>(a, (long long)slot * kRows + row).sums() = make_float2(most, all);
      }
    }
    __syncthreads();
  }
};

/// Entry for generated code: types from pointers, shared memory as the bytes that were planned.
template <int D, int KEYS, int VALUES, MaskType MASK, int SHARED_BYTES, bool COPIES, int WARPS, int STAGES, class T,
          class MaskT>
__device__ void run_few_rows(const AttentionArgs& a, const T*, const MaskT*, unsigned char* shared) {
  using Kernel = FewRows<D, KEYS, VALUES, T, MASK, MaskT, WARPS, STAGES>;
  static_assert(sizeof(typename Kernel::Shared) <= SHARED_BYTES, "plan.h counts too little shared memory");
  const auto read_codes = [&](int row, int local, int first_tile, int last_tile, int slot) {
    Kernel kernel(a, *reinterpret_cast<typename Kernel::Shared*>(shared));
    kernel.segment(row, local, first_tile, last_tile, slot);
  };
  const auto read_copies = [&](int row, int local, int first_tile, int last_tile, int slot) {
    if constexpr (COPIES) {
      using Exact = FewRows<D, 8, 8, T, MASK, MaskT, WARPS, 1, true>;
      static_assert(sizeof(typename Exact::Shared) <= SHARED_BYTES, "plan.h counts too little shared memory");
      Exact kernel(a, *reinterpret_cast<typename Exact::Shared*>(shared));
      kernel.segment(row, local, first_tile, last_tile, slot);
    }
  };
  for_each_split<kTile, Kernel::kRows>(a, read_codes, read_copies);
}

}  // namespace turboquant::cuda
