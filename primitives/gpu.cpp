// Which GPU backend serves the operations.
#include "primitives/gpu.h"

#include <mlx/backend/cuda/cuda.h>

#include <stdexcept>

#include "primitives/cuda.h"

namespace turboquant::ops {
namespace {

/// Throws unless the CUDA backend can run; it is the only one so far.
void require_cuda(const char* op) {
  std::string why;
  if (!gpu_supported(&why)) {
    throw std::runtime_error(std::string("[") + op + "] no kernels for this GPU (" + why +
                             "); run on the CPU: mx.set_default_device(mx.cpu)");
  }
}

}  // namespace

bool gpu_supported(std::string* why) {
  if (!mx::cu::is_available()) {
    if (why) *why = "MLX finds no NVIDIA GPU, and other GPUs have no kernels in this build";
    return false;
  }
  const auto& info = mx::device_info(mx::Device::gpu);
  const auto major = info.find("compute_capability_major");
  if (major != info.end() && std::get<size_t>(major->second) < 8) {
    if (why) {
      *why = "the CUDA kernels need compute capability 8.0 or newer; this GPU has " +
             std::to_string(std::get<size_t>(major->second)) + ".x";
    }
    return false;
  }
  if (why) *why = "CUDA";
  return true;
}

std::vector<PackedArrays> encode_gpu(const std::vector<mx::array>& sides, const std::vector<int>& bits, uint64_t seed,
                                     const std::vector<std::optional<mx::array>>& centres, mx::Stream stream) {
  require_cuda("encode");
  return cuda_backend::encode(sides, bits, seed, centres, stream);
}

mx::array decode_gpu(const PackedArrays& packed, int bits, uint64_t seed, mx::Dtype dtype,
                     const std::optional<mx::array>& centre, mx::Stream stream) {
  require_cuda("decode");
  return cuda_backend::decode(packed, bits, seed, dtype, centre, stream);
}

mx::array attention_gpu(const mx::array& q, const PackedArrays& keys, const PackedArrays& values,
                        const AttentionOptions& options, mx::Stream stream) {
  require_cuda("attention");
  return cuda_backend::attention(q, keys, values, options, stream);
}

std::string attention_route_gpu(int query_len, int) {
  return gpu_supported() ? cuda_backend::route(query_len) : "none";
}

}  // namespace turboquant::ops
