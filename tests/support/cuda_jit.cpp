#include "support/cuda_jit.h"

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

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

std::string whole_source(const cuda::Kernel& kernel, const std::vector<Array>& inputs,
                         const std::vector<Array>& outputs) {
  std::ostringstream s;
  s << kPrelude << cuda::source_text(kernel.header) << cuda::before_kernel(kernel)
    << "namespace mlx::core::cu {\n__global__ void " << function_name(kernel) << "("
    << parameters(kernel, inputs, outputs) << ") {\n"
    << cuda::body(kernel) << "}\n}\n";
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
    : dimensions_(dimensions(kernel)),
      shared_bytes_(kernel.shared_bytes),
      arguments_(argument_bytes(kernel, inputs, outputs)) {
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
  function_ = (const void*)loaded[key];
  if (shared_bytes_ > 48000) {
    check(cudaFuncSetAttribute(function_, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes_),
          "cudaFuncSetAttribute");
  }
}

void Launch::operator()(cudaStream_t stream) const {
  std::vector<void*> pointers;
  for (const auto& x : arguments_) pointers.push_back(const_cast<uint8_t*>(x.data()));
  check(cudaLaunchKernel(function_, dimensions_.grid, dimensions_.block, pointers.data(), shared_bytes_, stream),
        "cudaLaunchKernel");
}

}  // namespace turboquant::jit
