// The interface of ../jit.h without a GPU: a kernel's text is compiled as C++ and run by the emulator.
#include "../jit.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>

#include "runtime.h"

// The few functions of CUDA's runtime that the tests call; device memory is the host's.
extern "C" {
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaMalloc(void** p, size_t bytes) { return *p = std::malloc(bytes), cudaSuccess; }
cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }
cudaError_t cudaMemset(void* p, int value, size_t bytes) { return std::memset(p, value, bytes), cudaSuccess; }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "error"; }
}

namespace turboquant::jit {
namespace {

using Run = void (*)(void* const* arguments);
struct Loaded {
  Run run;
  uint32_t *block_dim, *grid_dim, *current_block;
};

/// A folder of this process's own.
const std::filesystem::path& folder() {
  static const struct Folder {
    std::filesystem::path path;
    Folder() {
      std::string name = (std::filesystem::temp_directory_path() / "turboquant-emulated-XXXXXX").string();
      if (!mkdtemp(name.data())) throw std::runtime_error("no folder can be made as " + name);
      path = name;
    }
    ~Folder() {
      std::error_code ignored;
      std::filesystem::remove_all(path, ignored);
    }
  } own;
  return own.path;
}

/// Compiles a text, once.
const Loaded* load(const std::string& source) {
  static std::mutex mutex;
  static std::map<std::string, Loaded> known;
  static int compiled = 0;
  std::string stem;
  {
    const std::lock_guard lock(mutex);
    if (const auto found = known.find(source); found != known.end()) return &found->second;
    stem = (folder() / std::to_string(compiled++)).string();
  }
  std::ofstream(stem + ".cpp") << source;
  const std::string command =
      TURBOQUANT_EMULATOR_COMPILER " -o " + stem + ".so " + stem + ".cpp > " + stem + ".log 2>&1";
  if (std::system(command.c_str()) != 0) {
    std::ifstream log(stem + ".log");
    throw std::runtime_error("kernel does not compile: " + command + "\n" +
                             std::string(std::istreambuf_iterator<char>(log), {}));
  }
  void* handle = dlopen((stem + ".so").c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(dlerror());
  const auto symbol = [&](const char* name) { return dlsym(handle, name); };
  const Loaded found{reinterpret_cast<Run>(symbol("emulated_run")), static_cast<uint32_t*>(symbol("emulated_block")),
                     static_cast<uint32_t*>(symbol("emulated_grid")), static_cast<uint32_t*>(symbol("emulated_at"))};
  const std::lock_guard lock(mutex);
  return &known.try_emplace(source, found).first->second;
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + " failed");
}

std::string whole_source(const cuda::Kernel& kernel, const std::vector<Array>& inputs,
                         const std::vector<Array>& outputs) {
  // Shared memory whose size the launch tells is the emulator's.
  std::string body = kernel.source;
  const std::string word = "extern __shared__";
  if (const size_t at = body.find(word); at != std::string::npos) {
    const size_t name = body.rfind(' ', body.find("[];", at)) + 1, end = body.find("[];", at);
    body.replace(at, end + 3 - at,
                 "auto* " + body.substr(name, end - name) + " = emulator::dynamic_shared<" +
                     (body.find("unsigned char", at) < end ? "unsigned char" : "unsigned") + ">();");
  }
  return "#include \"cuda_on_cpu.h\"\n" + std::string(cuda::source_text(kernel.header)) +
         "namespace mlx::core::cu {\nvoid " + function_name(kernel) + "(" + parameters(kernel, inputs, outputs) +
         ") {\n" + body + "}\n}\nextern \"C\" void emulated_run(void* const* arguments) {\n" +
         "  emulator::enter(mlx::core::cu::" + function_name(kernel) + ", arguments);\n}\n";
}

cuda::Device current_device() { return {8, 232448}; }

Launch::Launch(const cuda::Kernel& kernel, const std::vector<Array>& inputs, const std::vector<Array>& outputs)
    : function_(load(whole_source(kernel, inputs, outputs))),
      dimensions_(dimensions(kernel)),
      shared_bytes_(kernel.shared_bytes),
      arguments_(argument_bytes(kernel, inputs, outputs)) {}

void Launch::operator()(cudaStream_t) const {
  static std::mutex mutex;  // the emulator runs one grid at a time
  const std::lock_guard lock(mutex);
  const Loaded& loaded = *static_cast<const Loaded*>(function_);
  std::vector<void*> pointers;
  for (const auto& x : arguments_) pointers.push_back(const_cast<uint8_t*>(x.data()));
  const auto [grid, block] = dimensions_;
  loaded.block_dim[0] = block.x, loaded.grid_dim[0] = grid.x;
  loaded.current_block[0] = ~0u;
  const int all[3] = {int(grid.x * block.x), int(grid.y * block.y), 1}, of_block[3] = {int(block.x), int(block.y), 1};
  emulator::run_grid(loaded.run, pointers.data(), all, of_block);
}

}  // namespace turboquant::jit
