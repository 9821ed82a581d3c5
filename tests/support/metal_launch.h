// Runs plans in the emulator: arrays as MLX would bind them, in memory whose end is guarded.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "emulator/signature.h"
#include "metal/plan.h"
#include "runtime.h"

namespace emulator {

/// Bytes that end where readable memory ends (or at a redzone, under AddressSanitizer), filled with NaN.
class Guarded {
 public:
  explicit Guarded(size_t bytes);
  Guarded(const void* from, size_t bytes) : Guarded(bytes) {
    if (data_ && bytes) std::memcpy(data_, from, bytes);
  }
  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::shared_ptr<void> memory_;
  void* data_ = nullptr;
  size_t size_ = 0;
};

/// An array: a view into guarded memory.
struct Array {
  std::string type;
  std::vector<int> shape;
  std::vector<int64_t> strides;
  Guarded memory;
};

/// Size of an element in bytes.
size_t size_of(const std::string& type);

/// A row-contiguous array; copies `from` unless it is null.
Array dense(const std::string& type, std::vector<int> shape, const void* from);

/// Launches a kernel; outputs must be made with the right shapes.
void launch(const turboquant::metal::Kernel& kernel, const std::vector<Array>& inputs,
            const std::vector<Array>& outputs);

/// Every kernel whose launches are recorded instead of run, for the generator.
struct Recorded {
  turboquant::metal::Kernel kernel;
  std::vector<InputInfo> inputs;
  std::vector<std::string> outputs;
};
extern std::vector<Recorded>* recorder;

/// The operations of the library, on the emulator.  Only rows that exist are bound: reading beyond them is caught.
void encode(const std::vector<turboquant::EncodeParams>& sides);
void decode(const turboquant::DecodeParams& params);
/// splits 0: as the plan chooses.
void attend(const turboquant::AttendParams& params, int splits = 0);

}  // namespace emulator
