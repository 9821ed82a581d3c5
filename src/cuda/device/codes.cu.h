// Packed codes on CUDA: groups of 32 are unpacked to nibbles, and nibbles select bytes.
#pragma once

#include "cuda/device/codec.cu.h"

namespace turboquant::cuda {

/// How vectors are coded, as one template parameter: the bits of scalar codes, and trellis(bits) of trellis codes.
constexpr int trellis(int bits) { return bits + 16; }
constexpr bool is_trellis(int coding) { return coding >= 16; }
constexpr int bits_of(int coding) { return coding & 15; }
/// Value of an integer level, and levels of a standard deviation (format.h).
constexpr float step_of(int coding) { return level_step(bits_of(coding), is_trellis(coding)); }
constexpr float unit_of(int coding) { return unit(bits_of(coding), is_trellis(coding)); }

/// Four magnitudes of scalar codes as bytes, from the magnitude index m on.
TQ_FN unsigned magnitude_bytes(int bits, int m) {
  return unsigned(magnitude(bits, m)) | unsigned(magnitude(bits, m + 1)) << 8 |
         (bits == 2 ? 0u : unsigned(magnitude(bits, m + 2)) << 16 | unsigned(magnitude(bits, m + 3)) << 24);
}

/// Four signed levels of scalar codes as bytes, from code c on.
TQ_FN unsigned level_bytes(int bits, int c) {
  return unsigned(level(bits, c) & 0xff) | unsigned(level(bits, c + 1) & 0xff) << 8 |
         unsigned(level(bits, c + 2) & 0xff) << 16 | unsigned(level(bits, c + 3) & 0xff) << 24;
}

/// Four signed levels of trellis codes as bytes, from index i on.
TQ_FN unsigned trellis_bytes(int bits, int i) {
  return unsigned(trellis_level(bits, i) & 0xff) | unsigned(trellis_level(bits, i + 1) & 0xff) << 8 |
         unsigned(trellis_level(bits, i + 2) & 0xff) << 16 | unsigned(trellis_level(bits, i + 3) & 0xff) << 24;
}

/// Orders of the bits that index a level in a nibble.  Trellis codes of 3 bits come out of their words in four of
/// them, 0 to 3 for words 1, 3, 0 and 2 of a group; two more rotations leave the first two, and two more shifts the
/// first alone (Group).
///   0: w1 w0 z1 z0 (the index itself)   1: z1 z0 w1 w0   2: w1 w0 z0 z1   3: z0 z1 w1 w0
TQ_FN int nibble_order(int word, int orders) {
  return orders == 1 ? 0 : orders == 2 ? word / 2 : (0x1302 >> (4 * word)) & 15;
}
TQ_FN int index_of_nibble(int order, int n) {
  return order == 0   ? n
         : order == 1 ? (n & 3) << 2 | n >> 2
         : order == 2 ? (n & 12) | (n & 1) << 1 | (n >> 1 & 1)
                      : (n & 3) << 2 | (n >> 1 & 2) | n >> 3;
}

/// Trellis levels of 3 bits as bytes of seven bits, (level + the largest) / 2: of nibbles n, n + 1, ... or of n, n - 1,
/// ... in an order.
TQ_FN unsigned half_level(int order, int n) {
  return unsigned(trellis_level(3, index_of_nibble(order, n)) + trellis_level(3, 15)) / 2;
}
TQ_FN unsigned half_level_bytes(int order, int n, int step) {
  return half_level(order, n) | half_level(order, n + step) << 8 | half_level(order, n + 2 * step) << 16 |
         half_level(order, n + 3 * step) << 24;
}

/// Part of a codebook's table, and what is looked up in all of it.  Bytes stand for levels: byte * kStep - kBias.
///
/// `prmt` takes one constant, so that the compiler brings half of the table into a register anew for every lookup: a
/// tenth of the instructions of a loop over codes.  It does so wherever it can tell that the half is a constant.  Such
/// a loop therefore keeps the half in shared memory until a barrier has passed, and then in a register.
template <int CODING, int ORDERS = 1>
struct LevelTable {
  static constexpr int kStep = 1, kBias = CODING == 4 ? 128 : 0;
  static constexpr int kStored = 1;                              // words that are kept
  static constexpr unsigned kFirst = CODING == 8            ? 0  // bytes are levels
                                     : CODING == 4          ? magnitude_bytes(4, 0)
                                     : CODING == trellis(2) ? trellis_bytes(2, 0)
                                                            : level_bytes(CODING, 0);
  static constexpr unsigned kSecond = CODING == 4            ? magnitude_bytes(4, 4)
                                      : CODING == trellis(2) ? trellis_bytes(2, 4)
                                      : CODING == 3          ? level_bytes(3, 4)
                                                             : kFirst;
  unsigned first;

  static __device__ unsigned stored(int) { return kFirst; }
  template <class Load>
  __device__ void load(const Load& from) {
    first = from(0);
  }

  /// Turns the low four nibbles (codes; anything above 2- and 3-bit codes masked away) into four bytes.  Widths 2 and 3
  /// give signed levels.  Width 4 gives 128 + level unsigned: prmt's sign mode makes the positive magnitudes of one
  /// lookup and the negative ones of another 0, and the difference cannot borrow.
  __device__ unsigned operator()(unsigned codes, int = 0) const { return in_order(codes, 0); }
  __device__ unsigned in_order(unsigned codes, int) const {
    const unsigned found = prmt(first, kSecond, codes);
    return CODING != 4 ? found : found - prmt(first, kSecond, codes ^ 0x8888) + 0x80808080u;
  }
};

/// The same for trellis codes of 3 bits.  A lookup of eight levels gives 0 for a nibble that means the other eight
/// (prmt's sign mode again), so the sum of two lookups, of a nibble and of its complement, is the level.
///
/// On Hopper logic, shifts, additions and prmt share one pipe, which bounds these kernels, and multiplications have
/// another.  So complement and sum are written as products with numbers that the compiler does not know.
template <int ORDERS>
struct LevelTable<trellis(3), ORDERS> {
  static constexpr int kStep = 2, kBias = trellis_level(3, 15);
  static constexpr int kStored = 2 * ORDERS + 2;
  unsigned low[ORDERS], high[ORDERS];  // of the first four nibbles of an order, and of the last four backwards
  unsigned one, minus_one;

  static __device__ unsigned stored(int i) {
    return i < ORDERS        ? half_level_bytes(i, 0, 1)
           : i < 2 * ORDERS  ? half_level_bytes(i - ORDERS, 15, -1)
           : i == 2 * ORDERS ? 1u
                             : ~0u;
  }
  template <class Load>
  __device__ void load(const Load& from) {
#pragma unroll
    for (int i = 0; i < ORDERS; ++i) low[i] = from(i), high[i] = from(ORDERS + i);
    one = from(2 * ORDERS), minus_one = from(2 * ORDERS + 1);
  }

  /// Turns the low four nibbles of a group's word (Group) into four bytes.
  __device__ unsigned operator()(unsigned nibbles, int word = 0) const {
    return in_order(nibbles, nibble_order(word, ORDERS));
  }
  __device__ unsigned in_order(unsigned nibbles, int order) const {
    const unsigned found = prmt(low[order], half_level_bytes(order, 4, 1), nibbles);
    return found * one + prmt(high[order], half_level_bytes(order, 11, -1), nibbles * minus_one + minus_one);
  }
};

/// Turns the low four codes (of trellis codes indices, order 0) into bytes: 128 + level of 4-bit codes and of trellis
/// codes of 3 bits (kUnsigned), else signed levels.
template <int CODING>
struct Lookup {
  static constexpr bool kUnsigned = CODING == 4 || CODING == trellis(3);
  static __device__ unsigned bytes(unsigned codes) {
    if constexpr (CODING == trellis(3)) {
      const unsigned negative = prmt(magnitudes_down(7), magnitudes_down(3), codes);
      return prmt(trellis_bytes(3, 8), trellis_bytes(3, 12), codes ^ 0x8888) - negative + 0x80808080u;
    } else {
      return LevelTable<CODING>{LevelTable<CODING>::kFirst}(codes);
    }
  }
  /// Of a word's eight coordinates the first or last four.
  template <class Words>
  static __device__ unsigned bytes(const Words& group, int word, int half) {
    if constexpr (CODING == 8) {
      return half ? group.more[word] : group.word[word];
    } else {
      return bytes(group.clean(word) >> (16 * half));
    }
  }
  /// The level of byte i of these.
  static __device__ int level(unsigned bytes, int i) {
    const unsigned byte = bytes >> (8 * i) & 255;
    return kUnsigned ? int(byte) - 128 : int((signed char)byte);
  }

 private:
  static constexpr __device__ unsigned magnitudes_down(int m) {
    return unsigned(trellis_magnitude(3, m)) | unsigned(trellis_magnitude(3, m - 1)) << 8 |
           unsigned(trellis_magnitude(3, m - 2)) << 16 | unsigned(trellis_magnitude(3, m - 3)) << 24;
  }
};

/// The tables of a loop over keys and values, which share registers when they are the same.
template <int KEYS, int VALUES, int ORDERS = 1>
struct LevelTables {
  LevelTable<KEYS, ORDERS> keys;
  LevelTable<VALUES, ORDERS> other;
  __device__ LevelTable<VALUES, ORDERS> values() const {
    if constexpr (KEYS == VALUES) return keys;
    return other;
  }
  /// One thread stores, and after a barrier all load: of two copies, for the compiler would keep what all threads load
  /// from one place in a uniform register, which prmt does not take either.
  using Stored = unsigned[LevelTable<KEYS, ORDERS>::kStored + LevelTable<VALUES, ORDERS>::kStored][2];
  static __device__ void store(Stored& to) {
    constexpr int keys = LevelTable<KEYS, ORDERS>::kStored, values = LevelTable<VALUES, ORDERS>::kStored;
#pragma unroll
    for (int i = 0; i < keys; ++i) to[i][0] = to[i][1] = LevelTable<KEYS, ORDERS>::stored(i);
#pragma unroll
    for (int i = 0; i < values; ++i) to[keys + i][0] = to[keys + i][1] = LevelTable<VALUES, ORDERS>::stored(i);
  }
  __device__ void load(const Stored& from) {
    keys.load([&](int i) { return from[i][threadIdx.x & 1]; });
    other.load([&](int i) { return from[LevelTable<KEYS, ORDERS>::kStored + i][threadIdx.x & 1]; });
  }
};

__device__ inline unsigned rotate_left(unsigned x, int by) { return x << by | x >> (32 - by); }

/// The nibble words of a group (word w holds the codes of coordinates 8w .. 8w + 7), from its packed words.  Words
/// whose unused bits may be set: `clean` masks them.  Of trellis codes a nibble has the bits of an index, in an order.
template <int CODING, int ORDERS = 1>
struct Group {
  static constexpr int bits = bits_of(CODING);
  static constexpr unsigned mask = CODING == 3 || CODING == trellis(2) ? 0x77777777u : CODING == 2 ? 0x33333333u : ~0u;
  unsigned word[4];
  unsigned more[CODING == 8 ? 4 : 1];  // at 8 bits `word` and this have the bytes of four coordinates each
  __device__ explicit Group(const unsigned (&packed)[bits]) {
    if constexpr (is_trellis(CODING)) {
      unpack_trellis(packed);
    } else if constexpr (bits == 8) {
#pragma unroll
      for (int w = 0; w < 4; ++w) word[w] = packed[2 * w], more[w] = packed[2 * w + 1];
    } else if constexpr (bits == 4) {
#pragma unroll
      for (int w = 0; w < 4; ++w) word[w] = packed[w];
    } else if constexpr (bits == 3) {
#pragma unroll
      for (int w = 0; w < 3; ++w) word[w] = packed[w];
      word[3] = (packed[0] >> 3 & 0x11111111u) | (packed[1] >> 2 & 0x22222222u) | (packed[2] >> 1 & 0x44444444u);
    } else {
#pragma unroll
      for (int w = 0; w < 2; ++w) word[w] = packed[w], word[w + 2] = packed[w] >> 2;
    }
  }
  __device__ unsigned clean(int w) const { return word[w] & mask; }

 private:
  /// z1 and z0 of words 0 and 2, and of words 1 and 3, come together, each pair in its half of the nibbles: z0 is the u
  /// of two steps before, so rotating u by one more or one less than z1's terms puts the two side by side.
  __device__ void unpack_trellis(const unsigned (&packed)[bits]) {
    constexpr unsigned even_bits = 0x55555555u, low_halves = 0x33333333u;
    const unsigned u = packed[bits - 1], one = rotate_left(u, 1), three = rotate_left(u, 3), z1 = u ^ one ^ three;
    const unsigned odd = merge_bits<even_bits>(one, z1);  // z1 z0
    unsigned even;
    if constexpr (ORDERS == 4 && bits == 3) {
      even = merge_bits<even_bits>(z1, three);  // z0 z1
    } else {
      even = merge_bits<even_bits>(rotate_left(u, 2), rotate_left(z1, 1));
    }
    if constexpr (bits == 3) {
      const unsigned a = packed[0], b = packed[1];
      word[0] = merge_bits<low_halves>(even, a), word[1] = merge_bits<low_halves>(odd, b);
      if constexpr (ORDERS == 1) {
        word[2] = merge_bits<low_halves>(even >> 2, a << 2), word[3] = merge_bits<low_halves>(odd >> 2, b << 2);
      } else {
        word[2] = merge_bits<low_halves>(a, even), word[3] = merge_bits<low_halves>(b, odd);
      }
    } else {
      const unsigned w = packed[0];  // bit k ^ 2 of a nibble is that of word k
      word[0] = merge_bits<low_halves>(even, w), word[1] = merge_bits<low_halves>(odd, w >> 1);
      word[2] = merge_bits<low_halves>(even >> 2, w << 2), word[3] = merge_bits<low_halves>(odd >> 2, w << 1);
    }
  }
};

}  // namespace turboquant::cuda
