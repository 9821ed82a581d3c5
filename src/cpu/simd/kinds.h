// Kinds of codes at compile time, and the levels that nibbles stand for.
#pragma once

#include "cpu/kernels.h"
#include "turboquant/format.h"

namespace turboquant::cpu {
namespace {

constexpr bool is_bytes(Kind kind) { return kind.bits == 8; }

/// Words of the least that is unpacked: a group, of bytes half a group.
constexpr int words_of_piece(Kind kind) { return is_bytes(kind) ? 4 : kind.bits; }

/// Value of one integer level under a scale of 1.
constexpr float step_of(Kind kind) { return level_step(kind.bits, kind.trellis); }

/// Calls f.operator()<kind>() with a kind known at run time.
template <class F>
inline decltype(auto) of_kind(Kind kind, F&& f) {
  if (kind.trellis) {
    return kind.bits == 2 ? f.template operator()<Kind{2, true}>() : f.template operator()<Kind{3, true}>();
  }
  switch (kind.bits) {
    case 2:
      return f.template operator()<Kind{2, false}>();
    case 3:
      return f.template operator()<Kind{3, false}>();
    case 4:
      return f.template operator()<Kind{4, false}>();
    default:
      return f.template operator()<Kind{8, false}>();
  }
}

/// The level of a nibble of plane k.  Of a scalar code the low `bits` bits count.  A trellis code's bits lie as they
/// fall when a group's words are merged (unpack_trellis): from high to low w w z0 z1, w w z1 z0, z0 z1 w w, z1 z0 w w
/// in planes 0 to 3; at 2 bits one w is another coordinate's.
constexpr int level_of_nibble(Kind kind, int k, int nibble) {
  if (!kind.trellis) return level(kind.bits, nibble & ((1 << kind.bits) - 1));
  const int w = k < 2 ? nibble >> 2 : nibble & 3, z = k < 2 ? nibble & 3 : nibble >> 2;
  const int own = kind.bits == 3 ? w : w >> (k & 1) & 1;
  const int z1 = k % 2 ? z >> 1 : z & 1, z0 = k % 2 ? z & 1 : z >> 1;
  return trellis_level(kind.bits, own * 4 + z1 * 2 + z0);
}

/// Levels by plane and nibble; of codes of 8 bits none.
struct LevelTables {
  int8_t at[4][16];
  constexpr LevelTables(Kind kind, int offset) : at() {
    for (int i = 0; i < 64 && !is_bytes(kind); ++i) {
      at[i / 16][i % 16] = int8_t(level_of_nibble(kind, i / 16, i % 16) + offset);
    }
  }
};

}  // namespace
}  // namespace turboquant::cpu
