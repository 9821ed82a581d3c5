// From words of codes to pairs of levels, for every width and kind of code.
//
// Nibbles index tables in threadgroup memory: a byte of a word of nibbles, two codes, an entry of two levels.  Scalar
// codes of 2 to 4 bits need one table.  In the four words of a group of trellis codes the bits of a nibble lie in a
// different order each, so that no bit has to move across its nibble; there is a table for each.  Codes of 8 bits are
// levels already.

#pragma once

#include "metal/device/common.metal"

namespace turboquant {

/// How a side is coded: 2, 3, 4 or 8 bits, scalar (CODE 0) or trellis codes (1).
template <int BITS, int CODE>
struct Coding {
  static constant constexpr int kBits = BITS;  // and words of a group
  static constant constexpr bool kTrellis = CODE == 1;
  static constant constexpr bool kPairTables = BITS == 2 && CODE == 0;  // few_rows_pairs.metal is for these
  static constant constexpr int kTables = BITS == 8 ? 0 : CODE == 1 ? 4 : 1;  // of 256 entries
  static constant constexpr int kWords = BITS == 8 ? 8 : 4;  // of a group once unpacked
  static constant constexpr int kPairs = 16 / kWords;  // of levels in such a word
};

/// Entries of a table in threadgroup memory, which cannot be empty.
template <class K>
constexpr int table_size() {
  return K::kTables > 0 ? 256 * K::kTables : 1;
}

template <class K, class V>
constexpr bool same_coding() {
  return K::kBits == V::kBits && K::kTrellis == V::kTrellis;
}

/// The level of a nibble of word `word` of a group.  Bits that are not its code's do not matter.
template <class K>
int nibble_level(int word, int nibble) {
  if (!K::kTrellis) return level(K::kBits, nibble & ((1 << K::kBits) - 1));
  const int z = (word < 2 ? nibble : nibble >> 2) & 3, w = (word < 2 ? nibble >> 2 : nibble) & 3;
  const int z1 = z >> (word & 1) & 1, z0 = z >> (1 - (word & 1)) & 1;
  return trellis_level(K::kBits, 4 * (K::kBits == 2 ? w >> (word & 1) & 1 : w) + 2 * z1 + z0);
}

/// Tables of the levels of two codes for every byte of nibbles.
template <class K, int THREADS, class Table>
void fill_table(Table table, ushort thread_index) {
  for (int i = thread_index; i < 256 * K::kTables; i += THREADS) {
    table[i] = half2(half(float(nibble_level<K>(i >> 8, i & 15))), half(float(nibble_level<K>(i >> 8, i >> 4 & 15))));
  }
}

/// Byte j of a word, in one instruction.
inline int byte_of(uint word, int j) {
  if (j == 0) return int(word & 255u);
  if (j == 3) return int(word >> 24);
  return int(extract_bits(word, 8u * j, 8u));
}

/// Nibble j of a word, in one instruction.
inline int nibble_of(uint word, int j) {
  if (j == 0) return int(word & 15u);
  if (j == 7) return int(word >> 28);
  return int(extract_bits(word, 4u * j, 4u));
}

/// Levels of two coordinates.
struct Pair {
  float x, y;
};

/// Pair j of an unpacked word.  Eight bits: the byte with its sign turned is the mantissa of a half from 1024 on.
template <class K, class Table>
Pair level_pair(Table table, uint word, int j) {
  if (K::kTables == 0) {
    const half2 biased = as_type<half2>(((j == 0 ? word : word >> 8) & 0x00ff00ffu) ^ 0x64806480u);
    return {float(biased.x) - 1152.0f, float(biased.y) - 1152.0f};
  }
  const half2 levels = table[byte_of(word, j)];
  return {float(levels.x), float(levels.y)};
}

/// Where the table of word `word` of a group begins.
template <class K>
constexpr int table_of(int word) {
  return K::kTrellis ? 256 * word : 0;
}

/// A pair's second coordinate is so much further on than its first.
template <class K>
constexpr ushort pair_distance() {
  return K::kTables == 0 ? 2 : 1;
}

/// The pair of a group that starts with coordinate i, and the coordinate that pair i starts with.
template <class K>
constexpr int pair_index(int i) {
  return K::kTables == 0 ? i / 4 * 2 + i % 2 : i / 2;
}
template <class K>
constexpr int pair_start(int i) {
  return K::kTables == 0 ? i / 2 * 4 + i % 2 : 2 * i;
}

/// The coordinate that is number i when those of pairs follow each other.
template <class K>
constexpr int coordinate_of_sum(int i) {
  return pair_start<K>(i / 2) + i % 2 * pair_distance<K>();
}

/// Words of a group, from the words that are stored, `packed`; for attention's keys a lane holds them all.
template <class K>
struct Group;
template <>
struct Group<Coding<4, 0>> {
  static void unpack(const thread uint* packed, thread uint* words) {
    TQ_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = packed[i];
  }
};
template <>
struct Group<Coding<3, 0>> {
  static void unpack(const thread uint* packed, thread uint* words) {
    TQ_UNROLL
    for (int i = 0; i < 3; ++i) words[i] = packed[i];
    words[3] = (packed[0] >> 3 & 0x11111111u) | (packed[1] >> 2 & 0x22222222u) | (packed[2] >> 1 & 0x44444444u);
  }
};
template <>
struct Group<Coding<2, 0>> {
  static void unpack(const thread uint* packed, thread uint* words) {
    TQ_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = packed[i & 1] >> (i & 2);
  }
};
template <>
struct Group<Coding<8, 0>> {
  static void unpack(const thread uint* packed, thread uint* words) {
    TQ_UNROLL
    for (int i = 0; i < 8; ++i) words[i] = packed[i];
  }
};
template <int BITS>
struct Group<Coding<BITS, 1>> {
  /// Bit t of p02 is z1 of step t if t is even, else z0 of step t - 1; bit t of p13 is z1 of step t if t is odd, else
  /// z0 of step t + 1.  So each pair of bits is z of a step, and halves of nibbles with z and with w change places
  /// between a word and the word two further on.
  static void unpack(const thread uint* packed, thread uint* words) {
    const uint a = packed[0], b = packed[BITS - 2], u = packed[BITS - 1];
    const uint u1 = rotate(u, 1u), u3 = rotate(u, 3u);
    const uint p02 = ((u ^ u1) & 0x55555555u) ^ u3, p13 = ((u ^ u3) & 0xaaaaaaaau) ^ u1;
    const uint change02 = (a ^ p02) & 0xccccccccu, change13 = (b ^ p13) & 0xccccccccu;
    words[0] = change02 ^ p02;
    words[1] = change13 ^ p13;
    words[2] = change02 ^ a;
    words[3] = change13 ^ b;
  }
};

/// The quarter `part` of a group, eight coordinates, which is a lane's share of attention's values: 4 / kPairs words.
/// Neighbouring lanes take neighbouring parts, and their stored words come from one group.
template <class K>
struct Quarter;
template <>
struct Quarter<Coding<4, 0>> {
  ushort part;
  template <class Codes>
  void unpack(Codes group, thread uint* words) const {
    words[0] = group[part];
  }
};
template <>
struct Quarter<Coding<2, 0>> {
  ushort part;
  template <class Codes>
  void unpack(Codes group, thread uint* words) const {
    words[0] = group[part & 1] >> (part & 2);
  }
};
template <>
struct Quarter<Coding<3, 0>> {
  ushort part;
  template <class Codes>
  void unpack(Codes group, thread uint* words) const {
    // The fourth lane gathers its codes from the spare bits of the words that the other three hold.
    const uint spare_mask = part < 3 ? 0x11111111u << part : 0u;
    const uint word = group[min(int(part), 2)];
    uint spare = word >> (3 - part) & spare_mask;
    spare |= simd_shuffle_xor(spare, 1);
    spare |= simd_shuffle_xor(spare, 2);
    words[0] = select(word, spare, part == 3);
  }
};
template <>
struct Quarter<Coding<8, 0>> {
  ushort part;
  template <class Codes>
  void unpack(Codes group, thread uint* words) const {
    words[0] = group[2 * part];
    words[1] = group[2 * part + 1];
  }
};
template <int BITS>
struct Quarter<Coding<BITS, 1>> {
  ushort part;
  /// As Group has it, of one word.
  template <class Codes>
  void unpack(Codes group, thread uint* words) const {
    const uint own = group[BITS == 2 ? 0 : part & 1], u = group[BITS - 1];
    const uint near = rotate(u, part & 1 ? 3u : 1u), far = rotate(u, part & 1 ? 1u : 3u);
    const uint z = ((u ^ near) & (part & 1 ? 0xaaaaaaaau : 0x55555555u)) ^ far;
    words[0] = z ^ ((own ^ z) & (part < 2 ? 0xccccccccu : 0x33333333u));
  }
};

}  // namespace turboquant
