// Placeholder wiring: the reference kernels stand in until the SIMD kernels land.
#include <stdexcept>

#include "backend.h"
#include "reference/codec.h"

namespace turboquant {
namespace cpu {
const BackendTable table = {"cpu", reference::encode, reference::decode, reference::attend};
}
std::vector<std::string> available_isas() { return {"scalar"}; }
std::string current_isa() { return "scalar"; }
void force_isa(const std::string& name) {
  if (!name.empty() && name != "scalar") throw std::invalid_argument("[force_isa] unknown instruction set: " + name);
}
int num_threads() { return 1; }
void set_num_threads(int) {}
}  // namespace turboquant
