// The packed format, version 1: the one truth about how codes lie in memory.
//
// This header is compiled as C++, as CUDA (NVRTC included) and as Metal, so it holds only constexpr
// functions of plain integers: no standard headers, no arrays, no templates.  docs/format.md explains it.
//
// A vector of D numbers (D a multiple of 32) becomes D/32 groups of 32 codes; a group of b-bit codes is b words:
//   4 bits: coordinate 8w + j is nibble j of word w.
//   3 bits: coordinates 0..23 as above, in the low three bits of each nibble of the first three words;
//           bit i of the code of coordinate 24 + j is bit 3 of nibble j of word i.
//   2 bits: coordinate 8w + j is the low half, coordinate 16 + 8w + j the high half, of nibble j of word w.
// A code is sign and magnitude: its top bit is the sign, the rest indexes an int8 level.  The decoded coordinate in
// the rotated basis is  scale * level / 2^fraction_bits,  with one fp16 scale a vector.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define TQ_FN __host__ __device__ inline constexpr
#else
#define TQ_FN inline constexpr
#endif

#define TQ_FORMAT_VERSION 1

namespace turboquant {

/// Coordinates in a group; a group of b-bit codes takes b 32-bit words.
TQ_FN int group_size() { return 32; }

/// Words of codes in a vector of `dim` coordinates.
TQ_FN int words_per_vector(int bits, int dim) { return bits * (dim / 32); }

/// Bytes of a stored vector: its codes and its fp16 scale.  98 for 3 bits and dim 256.
TQ_FN int bytes_per_vector(int bits, int dim) { return 4 * words_per_vector(bits, dim) + 2; }

/// Magnitudes in a codebook of this width.
TQ_FN int magnitudes(int bits) { return 1 << (bits - 1); }

/// The int8 magnitude of index m: Lloyd-Max levels of N(0, 1) times `unit(bits)`, rounded (docs/format.md).
TQ_FN int magnitude(int bits, int m) {
  return bits == 2   ? (m ? 10 : 3)
         : bits == 3 ? (0x58371f0a >> (8 * m)) & 0xff                                // 10 31 55 88
                     : ((m < 4 ? 0x24190f05 : 0x684f3e30) >> (8 * (m & 3))) & 0xff;  // 5 15 25 36 | 48 62 79 104
}

/// The signed int8 level of a code.
TQ_FN int level(int bits, int code) {
  return (code >> (bits - 1)) ? -magnitude(bits, code & (magnitudes(bits) - 1)) : magnitude(bits, code);
}

/// How many integer levels make one standard deviation of a rotated coordinate.
TQ_FN float unit(int bits) { return bits == 2 ? 6.62f : bits == 3 ? 40.906f : 38.143f; }

/// Twice the decision threshold between magnitudes m and m + 1, in integer levels: |r| * 2 * unit >= this means above.
TQ_FN int double_threshold(int bits, int m) { return magnitude(bits, m) + magnitude(bits, m + 1); }

/// Levels are fixed-point numbers with this many fraction bits, so that a stored scale is close to the vector's RMS
/// and stays in fp16's normal range wherever an fp16 cache would.
TQ_FN int fraction_bits(int bits) { return bits == 2 ? 3 : 5; }

/// Value of one integer level under a scale of 1.
TQ_FN float level_step(int bits) { return bits == 2 ? 0.125f : 0.03125f; }

/// Bit `bit` of the code of coordinate `i` (0..31) of a group lies in this word of the group ...
TQ_FN int bit_word(int bits, int i, int bit) { return bits == 2 ? (i & 15) / 8 : i < 24 || bits == 4 ? i / 8 : bit; }

/// ... at this position.
TQ_FN int bit_position(int bits, int i, int bit) {
  return 4 * (i & 7) + (bits == 2 ? 2 * (i / 16) + bit : i < 24 || bits == 4 ? bit : 3);
}

static_assert(words_per_vector(3, 256) == 24 && bytes_per_vector(3, 256) == 98, "TQ3 is 98 bytes per 256-vector");
static_assert(bytes_per_vector(4, 256) == 130 && bytes_per_vector(2, 256) == 66, "TQ4 is 130 bytes, TQ2 is 66");
static_assert(bit_word(3, 31, 2) == 2 && bit_position(3, 31, 2) == 31, "the last TQ3 bit is the top bit of word 2");

}  // namespace turboquant
