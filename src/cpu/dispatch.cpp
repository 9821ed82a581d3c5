// Chooses the instruction set: the best one that this processor has, unless the caller forces another.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "backend.h"
#include "cpu/driver.h"
#include "cpu/kernels.h"

namespace turboquant {
namespace cpu {
namespace {

/// Those this build holds, best first.
constexpr const Kernels* kAll[] = {
#if defined(__x86_64__)
    &avx512_vbmi_kernels, &avx512_kernels, &avx_vnni_kernels, &avx2_kernels,
#elif defined(__aarch64__)
    &neon_kernels,
#endif
    &scalar_kernels,
};

const Kernels& best() {
  for (const Kernels* k : kAll) {
    if (k->runs_here()) return *k;
  }
  return scalar_kernels;
}

const Kernels& named(const std::string& operation, const std::string& name) {
  std::string names;
  for (const Kernels* k : kAll) {
    if (!k->runs_here()) continue;
    if (name == k->name) return *k;
    if (!names.empty()) names += ", ";
    names += k->name;
  }
  throw std::invalid_argument("[" + operation + "] instruction set must be one that runs here (" + names + "); got \"" +
                              name + "\"");
}

const Kernels& initial() {
  const char* name = std::getenv("TURBOQUANT_ISA");
  return name && *name ? named("TURBOQUANT_ISA", name) : best();
}

std::atomic<const Kernels*>& forced() {
  static std::atomic<const Kernels*> kernels = nullptr;
  return kernels;
}

}  // namespace

const Kernels& kernels() {
  if (const Kernels* k = forced()) return *k;
  static const Kernels& first = initial();
  return first;
}

const BackendTable table = {"cpu", encode, decode, attend, transform};

}  // namespace cpu

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : cpu::kAll) {
    if (k->runs_here()) names.push_back(k->name);
  }
  return names;
}

std::string current_isa() { return cpu::kernels().name; }

void force_isa(const std::string& name) { cpu::forced() = name.empty() ? nullptr : &cpu::named("force_isa", name); }

}  // namespace turboquant
