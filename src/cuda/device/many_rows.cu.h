// Attention of some query rows (up to 32 of a KV head) over a packed cache, on int8 tensor cores.
//
// A block takes all rows of a KV head, so that codes are read and unpacked once.  Its warps work in rounds: each scores
// sixteen tokens against all rows and transposes their values' codes; weights and codes then pass through shared
// memory, for in the second product each warp takes 16 or 32 coordinates of all tokens.  Everything that passes is
// double-buffered, so a round needs one barrier.  Numbers are as in few_rows.cu.h: queries and weights as high and low
// bytes, sums as integers relative to a power of two, here one for each row of the block.
#pragma once

#include "cuda/device/int8.cu.h"
#include "cuda/device/passed_values.cu.h"

namespace turboquant::cuda {

/// With EXACT it reads exact copies instead (ExactTiles of schedule.cu.h).
template <int D, int DV, int KEYS, int VALUES, class T, MaskType MASK, class MaskT, int GROUPS, int WARPS, int STAGES,
          bool EXACT = false>
struct ManyRows {
  static constexpr int kRows = 8 * GROUPS, kTokens = 16;
  static constexpr int kSteps = WARPS * kTokens / kTile;  // products of 32 tokens in a round
  using Keys = PackedTile<KEYS, D, false, kTokens>;
  using Values = PackedTile<VALUES, DV, true, kTokens>;
  using Copies = typename CopiesOf<Keys, Values, kTokens, STAGES, EXACT>::type;
  using KeyShare = Share<D, 4>;
  // Of the codes' bits in nibbles; four were not faster.  Threads that take different words of a group need one order.
  static constexpr int kOrders = KeyShare::parts == 1 ? 2 : 1;
  using Passed = PassedValues<DV, VALUES, WARPS, kOrders>;
  static constexpr int kKeySteps = KeyShare::per_thread * KeyShare::words;
  // Where a warp sums more groups, the sums take the queries' registers.
  static constexpr int kRoom = Passed::kGroups > 1 ? 1 : (WARPS == 8 ? 12 : 8) / GROUPS;
  static constexpr int kHeld = kRoom < kKeySteps ? kRoom : kKeySteps;  // steps whose q stays in registers
  static constexpr int kEach = (kRows + WARPS - 1) / WARPS;            // queries that a warp prepares
  using Levels = LevelTables<KEYS, VALUES, kOrders>;
  using KeyTable = LevelTable<KEYS, kOrders>;
  static constexpr bool kBiased = Passed::kBias != 0;            // values' bytes
  static constexpr int kSets = Passed::kSets * Passed::kGroups;  // of 16 coordinates, that a warp sums
  static constexpr int kQuerySets = Lanes<D>::sets;
  static constexpr int kStageWords = Copies::kWords;
  static constexpr float kWeightOne = 65280;  // 255 * 256: the fixed-point weight of 1
  static_assert(kRows < WARPS || kRows % WARPS == 0, "warps prepare as many queries each");

  struct Shared {
    alignas(16) unsigned ring[WARPS][STAGES][kStageWords];
    uint4 q[GROUPS][kKeySteps][32];  // as the products take them: high and low bytes of four coordinates, twice
    Passed values[2];
    uint4 weights[2][kSteps][GROUPS][32];  // of [32 tokens][rows][lane]: of four tokens, high and low bytes, twice
    float4 token_scales[WARPS][kTokens];   // of keys; of values, times kWeightOne; the latter's logarithm
    float q_scale[kRows];
    int q_offset[kRows][2];  // what the unsigned bytes of some keys add to the products
    Range range[kRows];
    Range range_of_first[EXACT ? kRows : 1];  // of exact copies `range` is that of the ring
    int top[2][kRows];                        // as `ordered`; proposed for even and for odd rounds
    float2 sums[WARPS][kRows];
    typename Levels::Stored levels;
  };

  const AttentionArgs& a;
  Shared& shared;
  int lane = threadIdx.x & 31, warp = warp_index(), g = lane / 4, t = lane % 4;

  Levels levels;

  // Of the segment in hand.
  int b, kv_head, first_row, first_chunk, last_chunk;  // chunks: sixteen tokens
  int acc[GROUPS][2 * kSets][4];  // rows 8r + g, columns 2t and 2t + 1: by high, by low bytes of the weights
  unsigned q[kHeld][GROUPS][4];
  float s[GROUPS][4];              // scores of rows 8r + g
  float top[GROUPS], sum[GROUPS];  // exponents that weights are relative to; their sums over this thread's tokens
  float weight_sum[GROUPS];        // of the fixed-point weights, where values' bytes are biased

  __device__ ManyRows(const AttentionArgs& args, Shared& memory) : a(args), shared(memory) {}

  __device__ int query_of(int row) const { return min(first_row + row, a.rows() - 1) / a.group(); }
  __device__ int head_of(int row) const { return kv_head * a.group() + min(first_row + row, a.rows() - 1) % a.group(); }

  /// Integers that compare as the floats do, and back.
  static __device__ int ordered(float x) {
    const int i = __float_as_int(x);
    return i ^ (i >> 31 & 0x7fffffff);
  }
  static __device__ float from_ordered(int i) { return __int_as_float(i ^ (i >> 31 & 0x7fffffff)); }

  __device__ int chunk(int round) const { return first_chunk + WARPS * round + warp; }

  /// Starts the copy of this warp's chunk of a round; `copies` goes on to that of the next.
  __device__ void start_copy(Copies& copies, int round, int stage) {
    if (chunk(round) < last_chunk) {
      copies.copy(a, b, kv_head, chunk(round), shared.ring[warp][stage]);
      copies.advance(WARPS, stage);
    }
    commit_copies();
  }

  __device__ void segment(int batch_row, int local, int first_tile, int last_tile, int slot) {
    const int row_blocks = (a.rows() + kRows - 1) / kRows;
    b = batch_row, kv_head = local / row_blocks, first_row = local % row_blocks * kRows;
    first_chunk = first_tile * (kTile / kTokens), last_chunk = last_tile * (kTile / kTokens);
    const int rounds = (last_tile - first_tile + kSteps - 1) / kSteps;

    // All addresses before the first branch, then the queries, as in few_rows.cu.h.
    Copies copies(a, b, kv_head, chunk(0), shared.ring[0][0]);
    const T* q_from[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      q_from[i] = a.query_at<T>(b, head_of(WARPS * i + warp), query_of(WARPS * i + warp), 8 * lane);
    }
    Raw8<T> raw[kEach * kQuerySets] = {};  // rows warp, warp + WARPS, ...
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = WARPS * i + warp;
#pragma unroll
      for (int s = 0; s < kQuerySets; ++s) {
        if (row < kRows && first_row + row < a.rows() && lane + 32 * s < D / 8) {
          raw[i * kQuerySets + s].load(q_from[i] + 256 * s * a.q_strides[3], a.q_strides[3]);
        }
      }
    }
    start_copy(copies, 0, 0);
    prepare_queries(raw);
    if (threadIdx.x < kRows) {
      const int query = query_of(threadIdx.x);
      if constexpr (EXACT) {
        shared.range[threadIdx.x] = exact_keys(a, b, query, true);
        shared.range_of_first[threadIdx.x] = exact_keys(a, b, query, false);
      } else {
        shared.range[threadIdx.x] = coded_keys(a, b, query);
      }
      shared.top[0][threadIdx.x] = shared.top[1][threadIdx.x] = ordered(kEmptyTop);
    }
    if (threadIdx.x == 0) levels.store(shared.levels);
    __syncthreads();
    levels.load(shared.levels);
#pragma unroll
    for (int i = 1; i < STAGES; ++i) start_copy(copies, i, i);

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
      top[r] = kEmptyTop, sum[r] = weight_sum[r] = 0;
    }
#pragma unroll
    for (auto& row : acc) {
#pragma unroll
      for (auto& x : row) x[0] = x[1] = x[2] = x[3] = 0;
    }

    // Half of the warps multiply the values of the last round first and half of them last, so that the tensor cores
    // work for some while others look up codes and weigh.
    const bool late = warp >= WARPS / 2;
    int stage = 0, next = 0;  // of round i and the one after
#pragma unroll 1
    for (int i = -1; i < rounds; ++i) {
      if (!late && i > 0) multiply_values(i + 1 & 1);
      int down[GROUPS];
      if (i >= 0) {
        float scales[4];
        typename Passed::Words nibbles;
        load_values(shared.ring[warp][stage] + Keys::size, g, nibbles);
        load_value_scales(scales);
#pragma unroll
        for (int r = 0; r < GROUPS; ++r) write_weights(r, i & 1, scales, down[r]);
#pragma unroll
        for (int k = 0; k < 2; ++k) shared.values[i & 1].store(k, warp, g, t, nibbles);
#pragma unroll
        for (int more = 8; more < 8 * Passed::kHalves; more += 8) {
          load_values(shared.ring[warp][stage] + Keys::size, g + more, nibbles);
#pragma unroll
          for (int k = 0; k < 2; ++k) shared.values[i & 1].store(k, warp, g + more, t, nibbles);
        }
        __syncwarp();
        start_copy(copies, i + STAGES, stage);  // where this round's values have just been read
      }
      if (i + 1 < rounds) {
        wait_copies<STAGES - 1>();
        __syncwarp();
        score(shared.ring[warp][next], i + 1, copies, sees);
      }
      if (late && i > 0) multiply_values(i + 1 & 1);
      if (i >= 0) rescale(down);
      stage = next, next = next == STAGES - 1 ? 0 : next + 1;
      __syncthreads();  // weights and values of round i are there, and the exponents of round i + 1
    }
    if (rounds > 0) multiply_values(rounds + 1 & 1);
    finish(slot);
  }

  /// Rotates rows warp, warp + WARPS, ... and splits them into int8 parts, in the order of the products.
  __device__ void prepare_queries(const Raw8<T> (&raw)[kEach * kQuerySets]) {
    if (warp >= kRows) return;
    uint4 parts[kEach * kQuerySets];
    float scale[kEach];
    int offset[kEach][2];
    split_queries<D, KEYS, T, kEach>(a, raw, parts, scale, offset);
    const int part = lane % 4 / KeyShare::words;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = WARPS * i + warp;
#pragma unroll
      for (int s = 0; s < kQuerySets; ++s) {
        const int group = lane / 4 + 8 * s;
        const int step = group % KeyShare::per_thread * KeyShare::words + lane % KeyShare::words;
        if (lane + 32 * s < 4 * kKeySteps) {
          shared.q[row / 8][step][4 * (row % 8) + group / KeyShare::per_thread + KeyShare::padded * part] =
              parts[i * kQuerySets + s];
        }
      }
      if (lane == 0) {
        shared.q_scale[row] = scale[i];
        if constexpr (KeyTable::kBias) shared.q_offset[row][0] = offset[i][0], shared.q_offset[row][1] = offset[i][1];
      }
    }
  }

  /// The token of this thread's i-th score within its warp's sixteen.
  __device__ int token(int i) const { return 8 * (i / 2) + (i % 2 ? 7 - t : t); }

  /// Scores of a round, and larger exponents for the rows that need them.
  __device__ void score(const unsigned* keys, int round, const Copies& copies, const Range& sees) {
    const float hidden = -__uint_as_float(0x7f800000);
    int key = chunk(round) * kTokens, tokens = a.kv_len - key;
    const Range* ranges = shared.range;
    if constexpr (EXACT) {
      const ExactPlace<kTokens> place(a, copies.tiles, chunk(round));
      key = place.key, tokens = place.tokens;
      if (!place.of_ring) ranges = shared.range_of_first;
    }
    if (chunk(round) >= last_chunk || tokens <= 0) {
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
      if constexpr (KeyTable::kBias) high = shared.q_offset[8 * r + g][0], low = shared.q_offset[8 * r + g][1];
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
    if (MASK != kNoMask || EXACT || !__all_sync(~0u, key >= sees.first && key + kTokens <= sees.last)) {
#pragma unroll
      for (int r = 0; r < GROUPS; ++r) {
        const Range range = ranges[8 * r + g];
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
  /// sum of weights wherever the token is visible.  Of tokens beyond the last, scales are what shared memory held
  /// before: infinities of either sign must go, for not even a weight of 0 makes a number of them.
  __device__ void unpack_scales(const __half* scales) {
    if (lane < kTokens) {
      float key = __half2float(scales[lane]), value = __half2float(scales[kTokens + lane]);
      if (!(fabsf(value) < __uint_as_float(0x7f800000))) key = __uint_as_float(0x7fc00000), value = 0;
      shared.token_scales[warp][lane] = make_float4(key, value * kWeightOne, fmaxf(log2_fast(value), -40.f), 0);
    }
    __syncwarp();
  }

  /// Products of all rows, high and low, with the keys of this warp's tokens.
  __device__ void multiply_keys(int (&dots)[2][GROUPS][4], const unsigned* keys) const {
    constexpr int n = KeyShare::per_thread, kBits = bits_of(KEYS);
    const KeyShare share(t);
    unsigned packed[2][n][kBits];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = 8 * j + (g & 1 ? 7 - g / 2 : g / 2);
      if constexpr (KeyShare::groups == 4 * n) {
        unsigned words[n * kBits];
        Keys::load(keys, at, share.group * kBits, words);
#pragma unroll
        for (int k = 0; k < n * kBits; ++k) packed[j][k / kBits][k % kBits] = words[k];
      } else {
#pragma unroll
        for (int i = 0; i < n; ++i) Keys::load(keys, at, share.clamped(i) * kBits, packed[j][i]);
      }
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const Group<KEYS, kOrders> groups[2] = {Group<KEYS, kOrders>(packed[0][i]), Group<KEYS, kOrders>(packed[1][i])};
#pragma unroll
      for (int w = 0; w < KeyShare::words; ++w) {
        const int step = i * KeyShare::words + w;
        unsigned bytes[2][2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const unsigned x = share.pick(groups[j].word, w) & groups[j].mask;
          if constexpr (KEYS == 8) {
            bytes[j][0] = x, bytes[j][1] = share.pick(groups[j].more, w);
          } else {
            bytes[j][0] = levels.keys(x, w), bytes[j][1] = levels.keys(x >> 16, w);
          }
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
            mma_int8<false, KeyTable::kBias != 0>(dots[j][r], f.x, f.y, f.z, f.w, bytes[j][0], bytes[j][1]);
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
    if constexpr (kBiased) {
      // Exactly: beside 2^23 a sum of two would lose a bit.
      const float of_four = (fixed[0] - shift) + (fixed[1] - shift) + ((fixed[2] - shift) + (fixed[3] - shift));
      weight_sum[r] = fmaf(weight_sum[r], exp2_fast(change), of_four);
    }
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

  /// The nibble words [word][token] of a group of 32 coordinates, if there is one, of four of this warp's tokens.
  __device__ void load_values(const unsigned* values, int group, typename Passed::Words& nibbles) const {
    if (group >= DV / 32) group = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned packed[bits_of(VALUES)];
      Values::load(values, token(i), group * bits_of(VALUES), packed);
      const Group<VALUES, Passed::kOrders> unpacked(packed);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        nibbles.of[0][w][i] = unpacked.word[w];
        if constexpr (VALUES == 8) nibbles.of[Passed::kPlanes - 1][w][i] = unpacked.more[w];
      }
    }
  }

  /// Adds a round's weighted values to the sums of this warp's coordinates.
  __device__ void multiply_values(int parity) {
    typename Passed::Reader readers[Passed::kGroups];
#pragma unroll
    for (int j = 0; j < Passed::kGroups; ++j) readers[j] = shared.values[parity].reader(warp, j, g, t, levels.values());
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int j = 0; j < Passed::kGroups; ++j) {
        unsigned bytes[2 * Passed::kSets][2];
        readers[j].load(k, bytes);
#pragma unroll
        for (int r = 0; r < GROUPS; ++r) {
          const uint4 w = shared.weights[parity][k][r][lane];
#pragma unroll
          for (int n = 0; n < 2 * Passed::kSets; ++n) {
            auto& into = acc[r][2 * Passed::kSets * j + n];
            mma_int8<true, kBiased>(into, w.x, w.y, w.z, w.w, bytes[n][0], bytes[n][1]);
          }
        }
      }
    }
  }

  /// The block's sums of weights in every thread; the rings are free.
  __device__ void sum_weights() {
    float* to = reinterpret_cast<float*>(shared.ring[warp]);
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      weight_sum[r] += __shfl_xor_sync(~0u, weight_sum[r], 1);
      weight_sum[r] += __shfl_xor_sync(~0u, weight_sum[r], 2);
      if (t == 0) to[8 * r + g] = weight_sum[r];
      weight_sum[r] = 0;
    }
    __syncthreads();
    for (int w = 0; w < WARPS; ++w) {
#pragma unroll
      for (int r = 0; r < GROUPS; ++r) weight_sum[r] += reinterpret_cast<const float*>(shared.ring[w])[8 * r + g];
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
    if constexpr (kBiased) sum_weights();
    const int rows = min(kRows, a.rows() - first_row), odd = t & 1;
    // Weights are at most 1 and levels at most 3.25, so with this many bits taken off the sums fit a half; its
    // precision does not depend on them.
    const int bits = 13 - (32 - __clz(max(last_chunk - first_chunk, 1) * kTokens - 1));
    const float power = __uint_as_float(unsigned(127 + bits) << 23), factor = power * (step_of(VALUES) / kWeightOne);
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
#pragma unroll
      for (int i = 0; i < kSets; ++i) {
        // Of eight coordinates, threads of even t have the even ones and their neighbours the odd; each gives half
        // away.
        float x[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const auto& sums = acc[r][2 * i + k % 2];
          x[k] = float(sums[k / 2]) * 256 + float(sums[2 + k / 2]);  // coordinates odd + 0, 2, 4, 6
          if constexpr (kBiased) x[k] = x[k] * Passed::kStep - Passed::kBias * weight_sum[r];
          x[k] *= factor;
        }
        const float low = __shfl_xor_sync(~0u, odd ? x[0] : x[2], 1), high = __shfl_xor_sync(~0u, odd ? x[1] : x[3], 1);
        const int set = Passed::first_set(warp, i / Passed::kSets) + i % Passed::kSets,
                  first = 16 * set + 8 * (t / 2) + 4 * odd;
        if (8 * r + g < rows) {
          auto* to = reinterpret_cast<__half2*>(Partial<DV, true>(a, (long long)slot * kRows + 8 * r + g).row);
          const __half2 pairs[2] = {odd ? __floats2half2_rn(low, x[2]) : __floats2half2_rn(x[0], low),
                                    odd ? __floats2half2_rn(high, x[3]) : __floats2half2_rn(x[1], high)};
          *reinterpret_cast<uint2*>(to + first / 2) = reinterpret_cast<const uint2&>(pairs);
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < rows) {
      float all = 0;
      for (int w = 0; w < WARPS; ++w) all += shared.sums[w][threadIdx.x].y;
      *Partial<DV, true>(a, (long long)slot * kRows + threadIdx.x).sums() =
          make_float2(shared.sums[0][threadIdx.x].x - bits, all * power);
    }
    __syncthreads();
  }
};

/// Entry for generated code: types from pointers, shared memory as the bytes that were planned.
template <int D, int DV, int KEYS, int VALUES, MaskType MASK, int SHARED_BYTES, bool COPIES, int ROWS, int WARPS,
          int STAGES, class T, class MaskT>
__device__ void run_many_rows(const AttentionArgs& a, const T*, const MaskT*, unsigned char* shared) {
  using Kernel = ManyRows<D, DV, KEYS, VALUES, T, MASK, MaskT, ROWS / 8, WARPS, STAGES>;
  static_assert(sizeof(typename Kernel::Shared) <= SHARED_BYTES, "plan.h counts too little shared memory");
  const auto read_codes = [&](int row, int local, int first_tile, int last_tile, int slot) {
    Kernel kernel(a, *reinterpret_cast<typename Kernel::Shared*>(shared));
    kernel.segment(row, local, first_tile, last_tile, slot);
  };
  const auto read_copies = [&](int row, int local, int first_tile, int last_tile, int slot) {
    if constexpr (COPIES) {
      using Exact = ManyRows<D, DV, 8, 8, T, MASK, MaskT, ROWS / 8, WARPS, 1, true>;
      static_assert(sizeof(typename Exact::Shared) <= SHARED_BYTES, "plan.h counts too little shared memory");
      Exact kernel(a, *reinterpret_cast<typename Exact::Shared*>(shared));
      kernel.segment(row, local, first_tile, last_tile, slot);
    }
  };
  for_each_split<kTile, ROWS>(a, read_codes, read_copies);
}

}  // namespace turboquant::cuda
