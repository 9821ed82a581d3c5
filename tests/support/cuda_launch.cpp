// What launching on a GPU and in the emulator share: kernels' signatures and arguments, and device memory.
#include <algorithm>

#include "support/cuda_jit.h"

namespace turboquant::jit {
namespace {

constexpr int kMaxNdim = 10;  // of MLX

bool mentions(const cuda::Kernel& kernel, const std::string& name) {
  return kernel.source.find(name) != std::string::npos;
}

template <class T>
std::vector<uint8_t> bytes_of(const T* data, size_t count) {
  const auto* from = reinterpret_cast<const uint8_t*>(data);
  return {from, from + count * sizeof(T)};
}

}  // namespace

Array::Array(void* data, std::string type, std::vector<int32_t> sizes)
    : data(data), type(std::move(type)), shape(std::move(sizes)), strides(shape.size()) {
  int64_t stride = 1;
  for (size_t i = shape.size(); i--;) {
    strides[i] = stride;
    stride *= shape[i];
  }
}

std::string type_name(Dtype dtype) {
  return dtype == Dtype::float32 ? "float" : dtype == Dtype::float16 ? "__half" : "__nv_bfloat16";
}

std::string function_name(const cuda::Kernel& kernel) { return "custom_kernel_" + kernel.name; }

std::string parameters(const cuda::Kernel& kernel, const std::vector<Array>& inputs,
                       const std::vector<Array>& outputs) {
  std::string text;
  const auto add = [&](const std::string& parameter) { text += (text.empty() ? "\n    " : ",\n    ") + parameter; };
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string& name = kernel.inputs[i];
    add("const " + inputs[i].type + "* " + name);
    if (mentions(kernel, name + "_shape")) add("const __grid_constant__ Shape " + name + "_shape");
    if (mentions(kernel, name + "_strides")) add("const __grid_constant__ Strides " + name + "_strides");
  }
  for (size_t i = 0; i < outputs.size(); ++i) add(outputs[i].type + "* " + kernel.outputs[i]);
  return text;
}

std::vector<std::vector<uint8_t>> argument_bytes(const cuda::Kernel& kernel, const std::vector<Array>& inputs,
                                                 const std::vector<Array>& outputs) {
  std::vector<std::vector<uint8_t>> bytes;
  for (size_t i = 0; i < inputs.size(); ++i) {
    bytes.push_back(bytes_of(&inputs[i].data, 1));
    std::vector<int32_t> shape(inputs[i].shape);
    std::vector<int64_t> strides(inputs[i].strides);
    shape.resize(kMaxNdim), strides.resize(kMaxNdim);
    if (mentions(kernel, kernel.inputs[i] + "_shape")) bytes.push_back(bytes_of(shape.data(), kMaxNdim));
    if (mentions(kernel, kernel.inputs[i] + "_strides")) bytes.push_back(bytes_of(strides.data(), kMaxNdim));
  }
  for (const Array& x : outputs) bytes.push_back(bytes_of(&x.data, 1));
  return bytes;
}

Dimensions dimensions(const cuda::Kernel& kernel) {
  unsigned grid[3], block[3];
  for (int i = 0; i < 3; ++i) {
    block[i] = std::min(kernel.block[i], kernel.grid[i]);
    grid[i] = (kernel.grid[i] + kernel.block[i] - 1) / kernel.block[i];
  }
  return {{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}};
}

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  check(cudaMalloc(&data_, bytes), "cudaMalloc");
  check(cudaMemset(data_, 0xff, bytes), "cudaMemset");  // NaN: an unwritten result must not pass
}

Memory::Memory(const void* host, size_t bytes) : Memory(bytes) {
  if (bytes == 0) return;
  check(cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
}

void Memory::download(void* host) const {
  check(cudaMemcpy(host, data_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
}

}  // namespace turboquant::jit
