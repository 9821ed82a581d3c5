// `attend` and `encode` on a GPU, for host parameters: uploads, launches, downloads.
#pragma once

#include <optional>

#include "support/cuda_jit.h"

namespace turboquant::jit {

/// The kernels of an attention call and their arguments, on device pointers.  With null pointers it is still complete
/// enough to be compiled.
struct AttentionCall {
  std::vector<cuda::Kernel> kernels;
  std::vector<std::vector<Array>> inputs, outputs;
  std::vector<Memory> workspace;
};

/// Builds it for parameters whose pointers lie on the device; q and out are dense, packed rows start at batch and head
/// strides.  `allocate` is false where there is no GPU; a plan may be forced.
AttentionCall attention_call(const AttendParams& p, const cuda::Device& device, bool allocate = true,
                             const cuda::AttentionPlan* forced = nullptr);

using Planner = cuda::AttentionPlan (*)(const cuda::AttentionShape&, const cuda::Device&);

/// Host pointers in, host results out.
void attend_on_gpu(const AttendParams& p, Planner planner);
inline void attend_on_gpu(const AttendParams& p) { attend_on_gpu(p, cuda::plan_attention); }
void encode_on_gpu(const EncodeParams& keys, const EncodeParams* values);
void decode_on_gpu(const DecodeParams& p);

}  // namespace turboquant::jit
