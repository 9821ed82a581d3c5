// The interface of ../jit.h without a GPU: a kernel's text is compiled as C++ and run by the emulator.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>

#include "runtime.h"
#include "support/cuda_jit.h"

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

/// What `make` gives for a key, made once however many threads ask.
template <class T>
class Once {
 public:
  const T& operator()(const std::string& key, const std::function<T()>& make) {
    std::packaged_task<T()> task;
    std::shared_future<T> made;
    {
      const std::lock_guard lock(mutex_);
      const auto [at, is_new] = known_.try_emplace(key);
      if (is_new) {
        task = std::packaged_task<T()>(make);
        at->second = task.get_future().share();
      }
      made = at->second;
    }
    if (task.valid()) task();
    return made.get();  // of the state that the map's future shares
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::shared_future<T>> known_;
};

/// A new file's path without its extension.
std::string new_stem() {
  static std::atomic<int> count = 0;
  return (folder() / std::to_string(count++)).string();
}

void run_compiler(const std::string& stem, const std::string& arguments) {
  const std::string command = TURBOQUANT_EMULATOR_COMPILER " " + arguments + " > " + stem + ".log 2>&1";
  if (std::system(command.c_str()) == 0) return;
  std::ifstream log(stem + ".log");
  throw std::runtime_error("kernel does not compile: " + command + "\n" +
                           std::string(std::istreambuf_iterator<char>(log), {}));
}

/// A kernel's text: what many kernels begin with, and the rest.
struct Text {
  std::string header, rest;
};

/// The path of a header whose compiled form lies beside it.  Compilers take longer to read a header than to compile a
/// kernel.
std::string precompile(const std::string& header) {
  const std::string stem = new_stem();
  std::ofstream(stem + ".h") << header;
  run_compiler(stem, "-x c++-header -o " + stem + ".h.gch " + stem + ".h");
  return stem + ".h";
}

Loaded compile(const Text& text) {
  static Once<std::string> headers;
  const std::string header = headers(text.header, [&] { return precompile(text.header); });
  const std::string stem = new_stem();
  // Lines count on, since the emulator tells barriers apart by their lines.
  std::ofstream(stem + ".cpp") << "#line " << std::count(text.header.begin(), text.header.end(), '\n') + 1 << "\n"
                               << text.rest;
  run_compiler(stem, "-include " + header + " -o " + stem + ".so " + stem + ".cpp");
  void* handle = dlopen((stem + ".so").c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(dlerror());
  const auto symbol = [&](const char* name) { return dlsym(handle, name); };
  return {reinterpret_cast<Run>(symbol("emulated_run")), static_cast<uint32_t*>(symbol("emulated_block")),
          static_cast<uint32_t*>(symbol("emulated_grid")), static_cast<uint32_t*>(symbol("emulated_at"))};
}

const Loaded* load(const Text& text) {
  static Once<Loaded> kernels;
  return &kernels(text.header + text.rest, [&] { return compile(text); });
}

Text text_of(const cuda::Kernel& kernel, const std::vector<Array>& inputs, const std::vector<Array>& outputs) {
  // Shared memory whose size the launch tells is the emulator's.
  std::string body = kernel.source;
  const std::string word = "extern __shared__";
  if (const size_t at = body.find(word); at != std::string::npos) {
    const size_t name = body.rfind(' ', body.find("[];", at)) + 1, end = body.find("[];", at);
    body.replace(at, end + 3 - at,
                 "auto* " + body.substr(name, end - name) + " = emulator::dynamic_shared<" +
                     (body.find("unsigned char", at) < end ? "unsigned char" : "unsigned") + ">();");
  }
  return {"#include \"cuda_on_cpu.h\"\n" + std::string(cuda::source_text(kernel.header)),
          "namespace mlx::core::cu {\nvoid " + function_name(kernel) + "(" + parameters(kernel, inputs, outputs) +
              ") {\n" + body + "}\n}\nextern \"C\" void emulated_run(void* const* arguments) {\n" +
              "  emulator::enter(mlx::core::cu::" + function_name(kernel) + ", arguments);\n}\n"};
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + " failed");
}

cuda::Device current_device() { return {8, 232448}; }

Launch::Launch(const cuda::Kernel& kernel, const std::vector<Array>& inputs, const std::vector<Array>& outputs)
    : function_(load(text_of(kernel, inputs, outputs))),
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
