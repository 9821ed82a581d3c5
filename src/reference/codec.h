// Decodes one vector in double; the reference attention reads keys and values with it.
#pragma once

#include "turboquant/turboquant.h"

namespace turboquant::reference {

/// How vectors are coded.
struct Coding {
  int bits;
  Code code;
  uint64_t seed;  // of the signs
};

/// Writes the codes of x (dim numbers) and returns the fp16 bits of its scale.  `feedback`: [dim, dim] or null.
uint16_t encode_vector(const double* x, int dim, const Coding& coding, const uint16_t* feedback, uint32_t* words);

/// Writes dim numbers, in the original basis, without any centre.
void decode_vector(const uint32_t* words, uint16_t scale, int dim, const Coding& coding, double* x);

void encode(const EncodeParams& params);
void decode(const DecodeParams& params);
void attend(const AttendParams& params);
void transform(const TransformParams& params);

}  // namespace turboquant::reference
