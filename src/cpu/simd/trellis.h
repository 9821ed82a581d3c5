// The exact search for a group's nearest path through the trellis (format.h), on 32-bit lanes.
//
// A lane is a state that the circle starts and ends in; eight of them, one or two vectors, hold one of the eight states
// of a step for all starts.  A lane's number is a cost, in eighths of a squared level at 3 bits and thirty-seconds at
// 2, above eight bits of history: from which of its two predecessors the better path came, step by step, i.e. the u of
// three steps before.  Costs of 32 steps stay below 2^23, since no target is beyond `trellis_limit`.  After every eight
// steps the history is stored and cleared; four lookups then give the u of all steps.
#pragma once

#include "cpu/simd/simd.h"
#include "turboquant/format.h"

namespace turboquant::cpu {
namespace {

/// A vector whose element i is f(i).
template <class V, class F>
constexpr V lanes_of(F f) {
  return [&]<int... I>(std::integer_sequence<int, I...>) { return V{f(I)...}; }
  (std::make_integer_sequence<int, sizeof(V) / 4>());
}

/// The search of an instruction set with vectors of `Bytes`.
template <int Bytes>
class Trellis {
  static constexpr int width = Bytes < 32 ? Bytes : 32, lanes = width / 4, parts = 8 / lanes;
  using I32 = Vec<int32_t, width>;
  using F32 = Vec<float, width>;

 public:
  /// Writes the codes nearest to the targets of a group, in levels, and their levels.
  template <int bits>
  static void code_group(const float* targets, uint32_t* words, float* levels) {
    Candidates c;
    find_candidates<bits>(targets, c);
    const uint32_t u = nearest_path(c), z1 = trellis_word_z1(u), z0 = u << 2 | u >> 30;
    I32 word[2] = {};
#pragma GCC unroll 8
    for (int i = 0; i < 32; i += lanes) {
      const int k = i / 8, j = i % 8;
      const I32 nibble = lanes_of<I32>([](int l) { return 4 * l; }) + 4 * j, bit = splat<I32>(1 << k) << nibble;
      const I32 is_z1 = (int32_t(z1) & bit) != 0, is_z0 = (int32_t(z0) & bit) != 0;
      const auto of = [&](int z) { return load<F32>(c.level[z] + i); };
      const F32 level = is_z1 ? (is_z0 ? of(3) : of(2)) : (is_z0 ? of(1) : of(0));
      store(levels + i, level);
      I32 w = {};
#pragma GCC unroll 4
      for (int n = 1; n < 1 << (bits - 1); ++n) w -= I32(level >= splat<F32>(float(trellis_level(bits, 4 * n))));
      word[bits == 3 ? k % 2 : 0] |= w << (bits == 3 ? (k < 2 ? 2 : 0) : k ^ 2) << nibble;
    }
    for (int i = 0; i + 1 < bits; ++i) words[i] = uint32_t(reduce(word[i], [](I32 a, I32 b) { return a | b; }));
    words[bits - 1] = u;
  }

  /// The same for `dim` targets; returns the sum of the levels' squares.  `levels` may be `targets`.
  static uint32_t code(int bits, const float* targets, int dim, uint32_t* words, float* levels) {
    F32 square = {};
    for (int i = 0; i < dim; i += 32) {
      (bits == 2 ? code_group<2> : code_group<3>)(targets + i, words + i / 32 * bits, levels + i);
      for (int k = 0; k < 32; k += lanes) {
        const F32 level = load<F32>(levels + i + k);
        square += level * level;
      }
    }
    return uint32_t(reduce(square, [](F32 a, F32 b) { return a + b; }));
  }

 private:
  /// Of a group's coordinates, by subset z1 * 2 + z0: the nearest level, and what it costs to take it.
  struct Candidates {
    alignas(64) float level[4][32];
    alignas(64) int32_t cost[4][32];      // above the history
    alignas(64) int32_t cost_one[4][32];  // the same with the history bit that the step sets
  };

  static uint32_t trellis_word_z1(uint32_t u) { return u ^ (u << 1 | u >> 31) ^ (u << 3 | u >> 29); }

  static I32 smaller(I32 a, I32 b) { return a < b ? a : b; }

  template <int bits>
  static void find_candidates(const float* targets, Candidates& c) {
    constexpr float limit = float(trellis_limit(bits)), per_square = bits == 2 ? 32 : 8;
#pragma GCC unroll 8
    for (int i = 0; i < 32; i += lanes) {
      // Coordinate 8k + j is step 4j + k, the (4 (j % 2) + k)-th of its stage of eight.
      const I32 bit = lanes_of<I32>([](int l) { return l % 2 ? 16 : 1; }) << (i / 8);
      F32 x = load<F32>(targets + i);
      x = x < splat<F32>(limit) ? x : splat<F32>(limit);
      x = x > splat<F32>(-limit) ? x : splat<F32>(-limit);
#pragma GCC unroll 4
      for (int z = 0; z < 4; ++z) {
        F32 level = splat<F32>(float(trellis_level(bits, z)));
#pragma GCC unroll 4
        for (int w = 1; w < 1 << (bits - 1); ++w) {
          const int above = trellis_level(bits, 4 * w + z), below = trellis_level(bits, 4 * w + z - 4);
          level = x >= splat<F32>(0.5f * float(above + below)) ? splat<F32>(float(above)) : level;
        }
        const F32 off = x - level;
        const I32 cost = __builtin_convertvector(off * off * per_square + 0.5f, I32) << 8;
        store(c.level[z] + i, level);
        store(c.cost[z] + i, cost);
        store(c.cost_one[z] + i, cost | bit);
      }
    }
  }

  /// The word U of the nearest path.
  static uint32_t nearest_path(const Candidates& c) {
    constexpr int32_t never = 1 << 29;  // above what three steps cost; after three, every state has been reached
    I32 state[8][parts];
    alignas(64) int32_t history[4][8][8];  // [stage of eight steps, state, start]
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) {
#pragma GCC unroll 2
      for (int h = 0; h < parts; ++h) {
        state[s][h] = splat<I32>(never);
        if (s / lanes == h) state[s][h][s % lanes] = 0;
      }
    }
    for (int stage = 0; stage < 4; ++stage) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const int at = i % 4 * 8 + 2 * stage + i / 4;  // the coordinate of step 8 * stage + i
        I32 next[8][parts];
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {  // states p and p + 4, of u three steps before 0 and 1, lead to 2p and 2p + 1
          const int z0 = p >> 1, same = (p & 1) * 2 + z0, other = 2 - (p & 1) * 2 + z0;
#pragma GCC unroll 2
          for (int h = 0; h < parts; ++h) {
            const I32 zero = state[p][h], one = state[p + 4][h];
            next[2 * p][h] = smaller(zero + c.cost[same][at], one + c.cost_one[other][at]);
            next[2 * p + 1][h] = smaller(zero + c.cost[other][at], one + c.cost_one[same][at]);
          }
        }
        __builtin_memcpy(state, next, sizeof state);
      }
#pragma GCC unroll 8
      for (int s = 0; s < 8; ++s) {
#pragma GCC unroll 2
        for (int h = 0; h < parts; ++h) {
          store(history[stage][s] + h * lanes, state[s][h]);
          state[s][h] &= ~0xff;
        }
      }
    }
    int start = 0;
    for (int s = 1; s < 8; ++s) start = history[3][s][s] < history[3][start][start] ? s : start;
    constexpr uint8_t reversed[8] = {0, 4, 2, 6, 1, 5, 3, 7};
    uint32_t us = 0;  // bit i: u of step i - 3
    for (int stage = 3, s = start; stage >= 0; --stage) {
      const uint32_t bits = uint32_t(history[stage][s][start]) & 0xff;
      us |= bits << (8 * stage);
      s = reversed[bits & 7];
    }
    return us >> 3 | us << 29;
  }
};

}  // namespace
}  // namespace turboquant::cpu
