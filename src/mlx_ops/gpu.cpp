// Chooses the GPU backend, CUDA or Metal, or says why there is none.
#include "mlx_ops/gpu.h"

#include <mlx/backend/cuda/cuda.h>
#include <mlx/backend/gpu/device_info.h>
#include <mlx/backend/metal/metal.h>

#include <stdexcept>
#include <utility>

#include "mlx_ops/cuda.h"
#include "mlx_ops/metal.h"

namespace turboquant::ops {
namespace {

/// MLX has one GPU backend at most.
bool on_metal() { return mx::metal::is_available(); }

/// Whether a backend can run, and which, or what is missing.
std::pair<bool, std::string> find_support() {
  if (on_metal()) return {true, "Metal"};
  const int driver = cuda_backend::driver_version();
  const std::string needs = driver ? "the NVIDIA driver here is for CUDA " + std::to_string(driver / 1000) + "." +
                                         std::to_string(driver % 1000 / 10) + ", mlx[cuda13] needs 13.0 or newer"
                                   : "";
  if (!mx::cu::is_available()) {
    return {false, "MLX finds neither an Apple nor an NVIDIA GPU" + (driver ? "; " + needs : "")};
  }
  // MLX's CUDA build says that it is available on machines without a GPU, too.
  if (mx::gpu::device_count() == 0) {
    return {false, "MLX's CUDA build finds no GPU; " + (driver ? needs : "there is no NVIDIA driver (libcuda.so.1)")};
  }
  const auto& info = mx::device_info(mx::Device::gpu);
  const auto major = info.find("compute_capability_major");
  if (major != info.end() && std::get<size_t>(major->second) < 8) {
    return {false, "the CUDA kernels need compute capability 8.0 or newer; this GPU has " +
                       std::to_string(std::get<size_t>(major->second)) + ".x"};
  }
  return {true, "CUDA"};
}

/// The same, found once: every operation asks, and MLX looks up the free memory to tell about a device.
const std::pair<bool, std::string>& support() {
  static const auto found = find_support();
  return found;
}

/// Throws unless a backend can run.
void require_gpu(const char* op) {
  if (const auto& [ok, why] = support(); !ok) {
    throw std::runtime_error(std::string("[") + op + "] no kernels for this GPU (" + why +
                             "); run on the CPU: mx.set_default_device(mx.cpu)");
  }
}

}  // namespace

bool gpu_supported(std::string* why) {
  const auto& [ok, reason] = support();
  if (why) *why = reason;
  return ok;
}

int most_head_dim_gpu() { return 512; }

bool has_value_dims_gpu() { return !on_metal(); }

std::vector<PackedArrays> encode_gpu(const std::vector<mx::array>& sides, const std::vector<Coding>& codings,
                                     mx::Stream stream) {
  require_gpu("encode");
  if (on_metal()) return metal_backend::encode(sides, codings, stream);
  return cuda_backend::encode(sides, codings, stream);
}

bool appends_in_place_gpu() { return !on_metal() && gpu_supported(); }

mx::array append_gpu(const std::vector<mx::array>& sides, const std::vector<Coding>& codings, const AppendBuffers& to,
                     const mx::array& before, mx::Stream stream) {
  require_gpu("append");
  return cuda_backend::append(sides, codings, to, before, stream);
}

bool transforms_gpu() { return !on_metal() && gpu_supported(); }

mx::array transform_gpu(const mx::array& x, const mx::array& matrix, const std::optional<mx::array>& centre,
                        mx::Stream stream) {
  return cuda_backend::transform(x, matrix, centre, stream);
}

mx::array decode_gpu(const PackedArrays& packed, const Coding& coding, mx::Dtype dtype, mx::Stream stream) {
  require_gpu("decode");
  if (on_metal()) return metal_backend::decode(packed, coding, dtype, stream);
  return cuda_backend::decode(packed, coding, dtype, stream);
}

bool reads_exact_copies_gpu() { return gpu_supported(); }

mx::array attention_gpu(const mx::array& q, const PackedArrays& keys, const PackedArrays& values,
                        const AttentionOptions& options, mx::Stream stream) {
  require_gpu("attention");
  if (on_metal()) return metal_backend::attention(q, keys, values, options, stream);
  return cuda_backend::attention(q, keys, values, options, stream);
}

}  // namespace turboquant::ops
