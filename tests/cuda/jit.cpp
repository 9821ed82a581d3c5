#include "jit.h"

#include <nvrtc.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

namespace turboquant::jit {
namespace {

constexpr int kMaxNdim = 10;  // of MLX

/// What MLX puts before a kernel, as far as the kernels rely on it.
constexpr const char* kPrelude = R"(
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef unsigned char uint8_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
namespace mlx::core::cu {
struct Shape { int32_t v[10]; int32_t operator[](int i) const { return v[i]; } };
struct Strides { int64_t v[10]; int64_t operator[](int i) const { return v[i]; } };
}
)";

void nvrtc_check(nvrtcResult result, const char* what) {
  if (result != NVRTC_SUCCESS) throw std::runtime_error(std::string(what) + ": " + nvrtcGetErrorString(result));
}

std::string function_name(const cuda::Kernel& kernel) { return "custom_kernel_" + kernel.name; }

bool mentions(const cuda::Kernel& kernel, const std::string& name) {
  return kernel.source.find(name) != std::string::npos;
}

/// With an expression that names a kernel, as MLX asks for one, `lowered` gets its mangled name.
std::string run_compiler(const std::string& source, const std::string& architecture, const std::string& expression = "",
                         std::string* lowered = nullptr) {
  nvrtcProgram program;
  nvrtc_check(nvrtcCreateProgram(&program, source.c_str(), "kernel.cu", 0, nullptr, nullptr), "nvrtcCreateProgram");
  if (lowered) nvrtc_check(nvrtcAddNameExpression(program, expression.c_str()), "nvrtcAddNameExpression");
  const std::string arch = "--gpu-architecture=" + architecture, include = "--include-path=" TURBOQUANT_CUDA_INCLUDE;
  const char* options[] = {arch.c_str(), include.c_str(), "--device-as-default-execution-space"};
  const nvrtcResult result = nvrtcCompileProgram(program, 3, options);
  size_t size = 0;
  nvrtcGetProgramLogSize(program, &size);
  std::string log(size, 0), code;
  nvrtcGetProgramLog(program, log.data());
  if (result == NVRTC_SUCCESS) {
    nvrtc_check(nvrtcGetCUBINSize(program, &size), "nvrtcGetCUBINSize");
    code.resize(size);
    nvrtc_check(nvrtcGetCUBIN(program, code.data()), "nvrtcGetCUBIN");
    const char* name = nullptr;
    if (lowered) nvrtc_check(nvrtcGetLoweredName(program, expression.c_str(), &name), "nvrtcGetLoweredName");
    if (lowered) *lowered = name;
  }
  nvrtcDestroyProgram(&program);
  if (result != NVRTC_SUCCESS) throw std::runtime_error("kernel does not compile:\n" + log);
  return code;
}

template <class T>
std::vector<uint8_t> bytes_of(const T* data, size_t count) {
  const auto* from = reinterpret_cast<const uint8_t*>(data);
  return {from, from + count * sizeof(T)};
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

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

std::string whole_source(const cuda::Kernel& kernel, const std::vector<Array>& inputs,
                         const std::vector<Array>& outputs) {
  std::ostringstream s;
  s << kPrelude << cuda::source_text(kernel.header) << cuda::before_kernel(kernel)
    << "namespace mlx::core::cu {\n__global__ void " << function_name(kernel) << "(";
  const char* comma = "";
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string& name = kernel.inputs[i];
    s << comma << "\n    const " << inputs[i].type << "* " << name;
    comma = ",";
    if (mentions(kernel, name + "_shape")) s << ",\n    const __grid_constant__ Shape " << name << "_shape";
    if (mentions(kernel, name + "_strides")) s << ",\n    const __grid_constant__ Strides " << name << "_strides";
  }
  for (size_t i = 0; i < outputs.size(); ++i) s << ",\n    " << outputs[i].type << "* " << kernel.outputs[i];
  s << ") {\n" << cuda::body(kernel) << "}\n}\n";
  std::string text = s.str();
  // An unmangled name spares looking it up.
  const size_t at = text.find("__global__ void custom_kernel_");
  return text.insert(at, "extern \"C\" ");
}

std::string compile(const std::string& source, const std::string& architecture) {
  static std::mutex mutex;
  static std::map<size_t, std::string> known;
  const size_t key = std::hash<std::string>{}(architecture + source);
  {
    std::lock_guard lock(mutex);
    if (const auto found = known.find(key); found != known.end()) return found->second;
  }
  const char* folder = std::getenv("TURBOQUANT_CUBIN_CACHE");
  const auto path = std::filesystem::path(folder ? folder : "") / (std::to_string(key) + ".cubin");
  std::string code;
  if (std::ifstream file(path, std::ios::binary); folder && file) {
    code.assign(std::istreambuf_iterator<char>(file), {});
  } else {
    code = run_compiler(source, architecture);
    if (folder) {  // by another name first, since another thread or process may be about to read it
      static std::atomic<unsigned> written = 0;
      const auto name = path.string() + "." + std::to_string(getpid()) + "." + std::to_string(written++);
      std::ofstream(name, std::ios::binary) << code;
      std::filesystem::rename(name, path);
    }
  }
  std::lock_guard lock(mutex);
  return known[key] = code;
}

std::string name_as_mlx_does(const cuda::Kernel& kernel, std::string source, const std::string& architecture) {
  const std::string unmangled = "extern \"C\" ";
  source.erase(source.find(unmangled + "__global__"), unmangled.size());
  std::string name;
  run_compiler(source, architecture, "mlx::core::cu::" + function_name(kernel), &name);
  return name;
}

std::string current_architecture() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return "sm_" + std::to_string(major) + std::to_string(minor) + (major >= 9 ? "a" : "");
}

cuda::Device current_device() {
  int device = 0;
  cuda::Device limits;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return limits;
}

Launch::Launch(const cuda::Kernel& kernel, const std::vector<Array>& inputs, const std::vector<Array>& outputs)
    : shared_bytes_(kernel.shared_bytes) {
  static const std::string architecture = current_architecture();
  static std::mutex mutex;
  static std::map<size_t, cudaKernel_t> loaded;
  const std::string source = whole_source(kernel, inputs, outputs);
  const size_t key = std::hash<std::string>{}(source);
  const std::string code = compile(source, architecture);
  std::lock_guard lock(mutex);
  if (!loaded.count(key)) {
    cudaLibrary_t library;
    check(cudaLibraryLoadData(&library, code.data(), nullptr, nullptr, 0, nullptr, nullptr, 0), "cudaLibraryLoadData");
    check(cudaLibraryGetKernel(&loaded[key], library, function_name(kernel).c_str()), "cudaLibraryGetKernel");
  }
  function_ = loaded[key];
  if (shared_bytes_ > 48000) {
    check(cudaFuncSetAttribute((const void*)function_, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes_),
          "cudaFuncSetAttribute");
  }
  for (int i = 0; i < 3; ++i) {
    const int block = std::min(kernel.block[i], kernel.grid[i]),
              grid = (kernel.grid[i] + kernel.block[i] - 1) / kernel.block[i];
    (i == 0 ? block_.x : i == 1 ? block_.y : block_.z) = block;
    (i == 0 ? grid_.x : i == 1 ? grid_.y : grid_.z) = grid;
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    arguments_.push_back(bytes_of(&inputs[i].data, 1));
    std::vector<int32_t> shape(inputs[i].shape);
    std::vector<int64_t> strides(inputs[i].strides);
    shape.resize(kMaxNdim), strides.resize(kMaxNdim);
    if (mentions(kernel, kernel.inputs[i] + "_shape")) arguments_.push_back(bytes_of(shape.data(), kMaxNdim));
    if (mentions(kernel, kernel.inputs[i] + "_strides")) arguments_.push_back(bytes_of(strides.data(), kMaxNdim));
  }
  for (const Array& x : outputs) arguments_.push_back(bytes_of(&x.data, 1));
}

void Launch::operator()(cudaStream_t stream) const {
  std::vector<void*> pointers;
  for (const auto& x : arguments_) pointers.push_back(const_cast<uint8_t*>(x.data()));
  check(cudaLaunchKernel((const void*)function_, grid_, block_, pointers.data(), shared_bytes_, stream),
        "cudaLaunchKernel");
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
