// Which GPU backend serves the operations.
#include "primitives/gpu.h"

#include <stdexcept>

namespace turboquant::ops {
namespace {

[[noreturn]] void refuse(const char* op) {
  throw std::runtime_error(
      std::string("[") + op +
      "] this build has no kernels for this GPU; run the model on the CPU (mx.set_default_device)");
}

}  // namespace

bool gpu_supported(std::string* why) {
  if (why) *why = "no GPU kernels in this build";
  return false;
}

std::vector<PackedArrays> encode_gpu(const std::vector<mx::array>&, const std::vector<int>&, uint64_t,
                                     const std::vector<std::optional<mx::array>>&, mx::Stream) {
  refuse("encode");
}

mx::array decode_gpu(const PackedArrays&, int, uint64_t, mx::Dtype, const std::optional<mx::array>&, mx::Stream) {
  refuse("decode");
}

mx::array attention_gpu(const mx::array&, const PackedArrays&, const PackedArrays&, const AttentionOptions&,
                        mx::Stream) {
  refuse("attention");
}

std::string attention_route_gpu(int, int) { return "none"; }

}  // namespace turboquant::ops
