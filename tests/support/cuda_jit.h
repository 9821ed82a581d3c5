// Compiles and launches the kernels of src/cuda/kernels.h as MLX's cuda_kernel does: the same signature around the same
// text, compiled by NVRTC.  Compilation needs no GPU.  emulator/ has the same interface and needs none at all.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace turboquant::jit {

/// An array argument: a device pointer, C type, sizes and strides (in elements).
struct Array {
  void* data = nullptr;
  std::string type = "float";
  std::vector<int32_t> shape;
  std::vector<int64_t> strides;

  /// Dense.
  Array(void* data, std::string type, std::vector<int32_t> shape);
  Array(void* data, std::string type, std::vector<int32_t> shape, std::vector<int64_t> strides)
      : data(data), type(std::move(type)), shape(std::move(shape)), strides(std::move(strides)) {}
  /// What a kernel that ignores this argument gets.
  Array() : Array(nullptr, "float", {1}) {}
};

std::string type_name(Dtype dtype);

/// "custom_kernel_NAME", as MLX names it.
std::string function_name(const cuda::Kernel& kernel);
/// A kernel's parameter list as MLX writes it: sizes and strides follow the inputs whose body mentions them.
std::string parameters(const cuda::Kernel& kernel, const std::vector<Array>& inputs, const std::vector<Array>& outputs);
/// The bytes of the arguments in that order.
std::vector<std::vector<uint8_t>> argument_bytes(const cuda::Kernel& kernel, const std::vector<Array>& inputs,
                                                 const std::vector<Array>& outputs);
/// Blocks and threads of a block.
struct Dimensions {
  dim3 grid, block;
};
Dimensions dimensions(const cuda::Kernel& kernel);

/// The whole translation unit of a kernel, whose function is `function`.
std::string whole_source(const cuda::Kernel& kernel, const std::vector<Array>& inputs,
                         const std::vector<Array>& outputs);

/// Machine code for an architecture ("sm_90a"); throws std::runtime_error with the compiler's log.  Kept in memory, and
/// in the folder TURBOQUANT_CUBIN_CACHE if that is set.
std::string compile(const std::string& source, const std::string& architecture);

/// Compiles the text that `whole_source` gave, without its C linkage, and returns the mangled name of the kernel that
/// an expression finds, which is how MLX gets at it.
std::string name_as_mlx_does(const cuda::Kernel& kernel, std::string source, const std::string& architecture);

/// "sm_90a" for the current device.
std::string current_architecture();
/// Limits of the current device.
cuda::Device current_device();

/// A kernel ready to launch with fixed arguments.
class Launch {
 public:
  Launch(const cuda::Kernel& kernel, const std::vector<Array>& inputs, const std::vector<Array>& outputs);
  void operator()(cudaStream_t stream = nullptr) const;

 private:
  const void* function_;
  Dimensions dimensions_;
  int shared_bytes_;
  std::vector<std::vector<uint8_t>> arguments_;
};

/// Throws with the error's name.
void check(cudaError_t error, const char* what);

/// Device memory that is freed with it.
class Memory {
 public:
  explicit Memory(size_t bytes = 0);
  Memory(const void* host, size_t bytes);
  Memory(Memory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Memory() {
    if (data_) cudaFree(data_);
  }
  void* get() const { return data_; }
  size_t size() const { return bytes_; }
  void download(void* host) const;

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace turboquant::jit
