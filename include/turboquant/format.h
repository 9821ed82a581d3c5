// This header defines the packed format, version 2: where each bit of a vector's codes lies, and what the codes mean.
//
// This header is compiled as C++, as CUDA (NVRTC included) and as Metal, so it holds only constexpr
// functions of plain integers: no standard headers, no arrays, no templates.  docs/format.md explains it.
//
// A vector of D numbers (D a multiple of 32) becomes D/32 groups of 32 codes; a group of b-bit codes is b words.  The
// decoded coordinate in the rotated basis is  scale * level / 2^fraction_bits,  with one fp16 scale a vector.
//
// Scalar codes (all that version 1 had): each coordinate by itself.
//   8 bits: a code is the level, a byte in two's complement; coordinate 4w + j is byte j of word w.
//   4 bits: coordinate 8w + j is nibble j of word w.
//   3 bits: coordinates 0..23 as above, in the low three bits of each nibble of the first three words;
//           bit i of the code of coordinate 24 + j is bit 3 of nibble j of word i.
//   2 bits: coordinate 8w + j is the low half, coordinate 16 + 8w + j the high half, of nibble j of word w.
// At 2 to 4 bits a code is sign and magnitude: its top bit is the sign, the rest indexes an int8 level.
//
// Trellis codes (2 and 3 bits; Marcellin and Fischer 1990, with a code of Ungerboeck 1982): a coordinate's bits are u
// and b - 1 more, w, and its level depends on the u of three coordinates before it, in an order of 32 steps that is a
// circle:
//   z1 = u[t] ^ u[t-1] ^ u[t-3],   z0 = u[t-2],   index = 4w + 2 z1 + z0   of 2^(b+1) levels in rising order.
// Coordinate 8k + j is step 4j + k.  The last word of a group, U, has u of step t at bit t.  Before it:
//   3 bits: words A and B; in nibble j the high half of A is w of k = 0, the low half of k = 2; B likewise 1 and 3.
//   2 bits: word W; bit 4j + (k ^ 2) is w of k.
// docs/format.md says why: with words rotated and merged under masks, nibbles index tables of 16 levels.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define TQ_FN __host__ __device__ inline constexpr
#else
#define TQ_FN inline constexpr
#endif

#define TQ_FORMAT_VERSION 2

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

/// The signed int8 level of a scalar code.
TQ_FN int level(int bits, int code) {
  if (bits == 8) return code < 128 ? code : code - 256;
  return (code >> (bits - 1)) ? -magnitude(bits, code & (magnitudes(bits) - 1)) : magnitude(bits, code);
}

/// How many integer levels make one standard deviation of a rotated coordinate; `code` is 0 for scalar codes, 1 for
/// trellis codes.  8 bits have no such constant: there the largest coordinate of a vector has level 127.
TQ_FN float unit(int bits, int code = 0) {
  return code ? (bits == 2 ? 25.374f : 44.829f) : bits == 2 ? 6.62f : bits == 3 ? 40.906f : 38.143f;
}

/// Twice the decision threshold between magnitudes m and m + 1, in integer levels: |r| * 2 * unit >= this means above.
TQ_FN int double_threshold(int bits, int m) { return magnitude(bits, m) + magnitude(bits, m + 1); }

/// Levels are fixed-point numbers with this many fraction bits, so that a stored scale is close to the vector's RMS
/// and stays in fp16's normal range wherever an fp16 cache would.
TQ_FN int fraction_bits(int bits, int code = 0) { return bits == 2 ? (code ? 4 : 3) : 5; }

/// The largest scale that is stored: fp16's largest number.  Greater ones saturate to it, so that a finite vector never
/// decodes to infinity or NaN.
TQ_FN float largest_scale() { return 65504.0f; }

/// Value of one integer level under a scale of 1.
TQ_FN float level_step(int bits, int code = 0) { return bits == 2 ? (code ? 0.0625f : 0.125f) : 0.03125f; }

/// Bit `bit` of the scalar code of coordinate `i` (0..31) of a group lies in this word of the group ...
TQ_FN int bit_word(int bits, int i, int bit) {
  return bits == 8 ? i / 4 : bits == 2 ? (i & 15) / 8 : i < 24 || bits == 4 ? i / 8 : bit;
}

/// ... at this position.
TQ_FN int bit_position(int bits, int i, int bit) {
  return bits == 8 ? 8 * (i & 3) + bit : 4 * (i & 7) + (bits == 2 ? 2 * (i / 16) + bit : i < 24 || bits == 4 ? bit : 3);
}

/// The int8 magnitude of index m < 2^bits of a trellis code: levels trained for N(0, 1) times `unit`, rounded to odd
/// numbers, so that (level + the largest) / 2 is a whole number of 7 bits.
TQ_FN int trellis_magnitude(int bits, int m) {
  return bits == 2 ? (0x2f1b0f05 >> (8 * m)) & 0xff                                // 5 15 27 47
                   : ((m < 4 ? 0x21170d05 : 0x6f4f3b2d) >> (8 * (m & 3))) & 0xff;  // 5 13 23 33 | 45 59 79 111
}

/// The level of index i < 2^(bits + 1) of a trellis code, in rising order: level(n - 1 - i) = -level(i).
TQ_FN int trellis_level(int bits, int i) {
  return i >= 1 << bits ? trellis_magnitude(bits, i - (1 << bits)) : -trellis_magnitude(bits, (1 << bits) - 1 - i);
}

/// `unit` of the targets that feedback moves: unit * sqrt(1 - distortion), because codes keep the vector's length.
TQ_FN float feedback_unit(int bits) { return bits == 2 ? 24.274f : 44.307f; }

/// No target of a search is beyond this many levels: what is, counts as this.  Costs of a search are then bounded.
TQ_FN int trellis_limit(int bits) { return 2 * trellis_magnitude(bits, (1 << bits) - 1); }

/// The step of coordinate i of a group, and the coordinate of a step.
TQ_FN int trellis_step(int i) { return 4 * (i & 7) + i / 8; }
TQ_FN int trellis_coordinate(int step) { return 8 * (step & 3) + step / 4; }

/// Bit `bit` of coordinate `i` (0..31) of a group of trellis codes lies in this word; bit 0 is u, the others are w.
TQ_FN int trellis_word(int bits, int i, int bit) { return bit == 0 ? bits - 1 : bits == 2 ? 0 : i / 8 & 1; }

/// ... at this position.
TQ_FN int trellis_position(int bits, int i, int bit) {
  return bit == 0 ? trellis_step(i) : bits == 2 ? 4 * (i & 7) + (i / 8 ^ 2) : 4 * (i & 7) + (i < 16 ? 2 : 0) + bit - 1;
}

/// z1 and z0 of all 32 steps of a group, from the word U.
TQ_FN unsigned trellis_z1(unsigned u) { return u ^ (u << 1 | u >> 31) ^ (u << 3 | u >> 29); }
TQ_FN unsigned trellis_z0(unsigned u) { return u << 2 | u >> 30; }

static_assert(words_per_vector(3, 256) == 24 && bytes_per_vector(3, 256) == 98, "TQ3 is 98 bytes per 256-vector");
static_assert(bytes_per_vector(4, 256) == 130 && bytes_per_vector(2, 256) == 66, "TQ4 is 130 bytes, TQ2 is 66");
static_assert(bytes_per_vector(8, 256) == 258, "a byte a coordinate");
static_assert(bit_word(3, 31, 2) == 2 && bit_position(3, 31, 2) == 31, "the last TQ3 bit is the top bit of word 2");
static_assert(trellis_word(3, 8, 2) == 1 && trellis_position(3, 8, 2) == 3, "w of coordinate 8 is high in word B");
static_assert(trellis_word(2, 31, 1) == 0 && trellis_position(2, 31, 1) == 29, "w of k = 3 is bit 1 of a nibble");
static_assert(trellis_level(3, 0) == -111 && trellis_level(3, 8) == 5 && trellis_level(2, 7) == 47, "rising levels");

}  // namespace turboquant
