// What the binding files share: mlx-lm's masks and lists of arrays, as C++ values.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "turboquant/mlx/mask.h"
#include "turboquant/mlx/store.h"

using Array = std::optional<mlx::core::array>;
using PythonMask = std::variant<std::monostate, std::string, mlx::core::array>;

/// "scalar" or "trellis"; `op` names who asks.
inline turboquant::Code code_from(const char* op, const std::string& name) {
  if (name == "scalar") return turboquant::Code::scalar;
  if (name == "trellis") return turboquant::Code::trellis;
  throw std::invalid_argument(std::string("[") + op + "] code must be \"scalar\" or \"trellis\"; got \"" + name + "\"");
}

/// None, "causal", or an array.
inline turboquant::ops::Mask mask_from(const PythonMask& mask) {
  if (const auto* array = std::get_if<mlx::core::array>(&mask)) return {false, *array};
  const auto* mode = std::get_if<std::string>(&mask);
  if (mode && *mode != "causal") {
    throw std::invalid_argument("[attention] mask must be None, \"causal\" or an array; got \"" + *mode + "\"");
  }
  return {mode != nullptr, std::nullopt};
}

inline PythonMask mask_to(const turboquant::ops::Mask& mask) {
  if (mask.array) return *mask.array;
  if (mask.causal) return std::string("causal");
  return std::monostate{};
}

/// Adds the caches and their views to the module.
void bind_caches(nanobind::module_& m);
