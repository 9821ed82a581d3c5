// Fills the table of kernels (kernels.h) of one instruction set.
#pragma once

#include "cpu/simd/attention.h"
#include "cpu/simd/codec.h"
#include "cpu/simd/feedback.h"
#include "cpu/simd/transform.h"

namespace turboquant::cpu {
namespace {

template <class S>
constexpr Kernels make_kernels(const char* name, bool (*runs_here)()) {
  return {name,
          runs_here,
          workspace_bytes<S>,
          attend_tile<S>,
          encode_vectors<S>,
          encode_vectors_with_feedback<S>,
          decode_vectors<S>,
          transform_vectors<S>,
          hadamard<Vec<float, S::bytes>>};
}

}  // namespace
}  // namespace turboquant::cpu
