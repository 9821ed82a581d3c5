// Which GPU backend serves the operations.
#include "primitives/gpu.h"

#include <mlx/backend/cuda/cuda.h>
#include <mlx/backend/metal/metal.h>

#include <stdexcept>

#include "primitives/cuda.h"
#include "primitives/metal.h"

namespace turboquant::ops {
namespace {

/// MLX has one GPU backend at most.
bool on_metal() { return mx::metal::is_available(); }

/// Throws unless a backend can run.
void require_gpu(const char* op) {
  std::string why;
  if (!gpu_supported(&why)) {
    throw std::runtime_error(std::string("[") + op + "] no kernels for this GPU (" + why +
                             "); run on the CPU: mx.set_default_device(mx.cpu)");
  }
}

}  // namespace

bool gpu_supported(std::string* why) {
  if (on_metal()) {
    if (why) *why = "Metal";
    return true;
  }
  if (!mx::cu::is_available()) {
    if (why) *why = "MLX finds neither an Apple nor an NVIDIA GPU";
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
                                     const std::vector<std::optional<mx::array>>& centres,
                                     const std::vector<std::optional<mx::array>>& feedback, mx::Stream stream) {
  require_gpu("encode");
  if (on_metal()) return metal_backend::encode(sides, bits, seed, centres, feedback, stream);
  return cuda_backend::encode(sides, bits, seed, centres, feedback, stream);
}

bool appends_in_place_gpu() {
  static const bool cuda = !on_metal() && gpu_supported();
  return cuda;
}

mx::array append_gpu(const std::vector<mx::array>& sides, const std::vector<int>& bits, uint64_t seed,
                     const std::vector<std::optional<mx::array>>& centres,
                     const std::vector<std::optional<mx::array>>& feedback, const std::vector<PackedArrays>& to,
                     const mx::array& before, mx::Stream stream) {
  require_gpu("append");
  return cuda_backend::append(sides, bits, seed, centres, feedback, to, before, stream);
}

mx::array decode_gpu(const PackedArrays& packed, int bits, uint64_t seed, mx::Dtype dtype,
                     const std::optional<mx::array>& centre, mx::Stream stream) {
  require_gpu("decode");
  if (on_metal()) return metal_backend::decode(packed, bits, seed, dtype, centre, stream);
  return cuda_backend::decode(packed, bits, seed, dtype, centre, stream);
}

mx::array attention_gpu(const mx::array& q, const PackedArrays& keys, const PackedArrays& values,
                        const AttentionOptions& options, mx::Stream stream) {
  require_gpu("attention");
  if (on_metal()) return metal_backend::attention(q, keys, values, options, stream);
  return cuda_backend::attention(q, keys, values, options, stream);
}

}  // namespace turboquant::ops
