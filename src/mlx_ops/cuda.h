// The operations on NVIDIA GPUs; gpu.h says what each does.
#pragma once

#include "turboquant/mlx/ops.h"

namespace turboquant::ops::cuda_backend {

/// Where the kernels' sources lie as files (src/cuda/kernels of the build, or where they are installed).  Optional:
/// with it, launches cost less time on the host.  Not thread-safe: set it before the first operation.
void set_kernel_directory(const std::string& directory);

/// The CUDA version that the installed NVIDIA driver serves, as 1000 * major + 10 * minor; 0 without a driver.
int driver_version();

std::vector<PackedArrays> encode(const std::vector<mx::array>& sides, const std::vector<Coding>& codings,
                                 mx::Stream stream);

mx::array append(const std::vector<mx::array>& sides, const std::vector<Coding>& codings, const AppendBuffers& to,
                 const mx::array& before, mx::Stream stream);

/// As `transform`, for few vectors; matrix and centre are dense.
mx::array transform(const mx::array& x, const mx::array& matrix, const std::optional<mx::array>& centre,
                    mx::Stream stream);

mx::array decode(const PackedArrays& packed, const Coding& coding, mx::Dtype dtype, mx::Stream stream);

mx::array attention(const mx::array& q, const PackedArrays& keys, const PackedArrays& values,
                    const AttentionOptions& options, mx::Stream stream);

}  // namespace turboquant::ops::cuda_backend
