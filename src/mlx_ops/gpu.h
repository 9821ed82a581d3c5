// The operations on a GPU: graphs of MLX's custom kernels, compiled by MLX at run time from the sources in src/cuda and
// src/metal.  Arguments reach these functions checked and complete.
#pragma once

#include "turboquant/mlx/ops.h"

namespace turboquant::ops {

/// Whether a GPU backend of this library can serve this device; `why` says what is missing.
bool gpu_supported(std::string* why = nullptr);

/// The largest head dimension that this GPU's kernels have, and whether values may have another than keys.
int most_head_dim_gpu();
bool has_value_dims_gpu();

/// As `encode_kv`, for two sides of one shape; with no values, one side is encoded.
std::vector<PackedArrays> encode_gpu(const std::vector<mx::array>& sides, const std::vector<Coding>& codings,
                                     mx::Stream stream);

/// Whether append_gpu exists for this GPU.  Its two sides must have one head dimension.
bool appends_in_place_gpu();
/// As append_kv.
mx::array append_gpu(const std::vector<mx::array>& sides, const std::vector<Coding>& codings, const AppendBuffers& to,
                     const mx::array& before, mx::Stream stream);

/// Whether transform_gpu exists for this GPU.
bool transforms_gpu();
/// As `transform`, for few vectors a matrix.
mx::array transform_gpu(const mx::array& x, const mx::array& matrix, const std::optional<mx::array>& centre,
                        mx::Stream stream);

mx::array decode_gpu(const PackedArrays& packed, const Coding& coding, mx::Dtype dtype, mx::Stream stream);

/// Whether attention_gpu reads exact copies (AttentionOptions::exact) on this GPU.
bool reads_exact_copies_gpu();

mx::array attention_gpu(const mx::array& q, const PackedArrays& keys, const PackedArrays& values,
                        const AttentionOptions& options, mx::Stream stream);

}  // namespace turboquant::ops
