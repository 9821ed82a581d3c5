// The operations on Apple GPUs; gpu.h says what each does.
#pragma once

#include "turboquant/mlx/ops.h"

namespace turboquant::ops::metal_backend {

std::vector<PackedArrays> encode(const std::vector<mx::array>& sides, const std::vector<Coding>& codings,
                                 mx::Stream stream);

mx::array decode(const PackedArrays& packed, const Coding& coding, mx::Dtype dtype, mx::Stream stream);

mx::array attention(const mx::array& q, const PackedArrays& keys, const PackedArrays& values,
                    const AttentionOptions& options, mx::Stream stream);

}  // namespace turboquant::ops::metal_backend
