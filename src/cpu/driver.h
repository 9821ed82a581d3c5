// Shared by attention.cpp and codec.cpp, which divide the CPU's work into tasks.
#pragma once

#include "cpu/kernels.h"
#include "tensor.h"
#include "turboquant/rotation.h"

namespace turboquant::cpu {

void encode(const EncodeParams& params);
void decode(const DecodeParams& params);
void attend(const AttendParams& params);
void transform(const TransformParams& params);

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline void fill_signs(uint64_t seed, int dim, float* signs) {
  for (int i = 0; i < dim; ++i) signs[i] = is_negative(seed, i) ? -1.0f : 1.0f;
}

template <class P>
Kind kind_of(const P& packed) {
  return {packed.bits, packed.code == Code::trellis};
}

inline PackedHead packed_head(const Packed& packed, int head_dim, int b, int h) {
  return {packed.codes ? row_codes(packed, head_dim, b, h, 0) : nullptr,
          packed.scales ? &row_scale(packed, b, h, 0) : nullptr, head_dim, kind_of(packed)};
}

}  // namespace turboquant::cpu
