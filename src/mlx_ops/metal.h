// The operations on Apple GPUs; gpu.h says what each does.
#pragma once

#include "turboquant/mlx/ops.h"

namespace turboquant::ops::metal_backend {

std::vector<PackedArrays> encode(const std::vector<mx::array>& sides, const std::vector<Width>& widths, uint64_t seed,
                                 const std::vector<std::optional<mx::array>>& centres,
                                 const std::vector<std::optional<mx::array>>& feedback, mx::Stream stream);

mx::array decode(const PackedArrays& packed, Width width, uint64_t seed, mx::Dtype dtype,
                 const std::optional<mx::array>& centre, mx::Stream stream);

mx::array attention(const mx::array& q, const PackedArrays& keys, const PackedArrays& values,
                    const AttentionOptions& options, mx::Stream stream);

}  // namespace turboquant::ops::metal_backend
