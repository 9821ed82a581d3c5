// The text that MLX's metal_kernel makes of a kernel: rules of mlx/backend/common/metal_kernel.cpp (0.32), which
// tests/metal/signature_test.py compares with what MLX itself writes.
#pragma once

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "metal/plan.h"

namespace emulator {

/// An input array as far as a signature depends on it.
struct InputInfo {
  std::string type;  // as MLX writes it: float, float16_t, bfloat16_t, uint32_t, int32_t, bool
  int ndim = 1;
  size_t size = 8;
};

inline std::string type_name(turboquant::Dtype dtype) {
  return dtype == turboquant::Dtype::float16    ? "float16_t"
         : dtype == turboquant::Dtype::bfloat16 ? "bfloat16_t"
                                                : "float";
}

inline std::string template_list(const turboquant::metal::Kernel& k) {
  std::string list;
  for (const auto& a : k.template_args) {
    if (!list.empty()) list += ", ";
    list += a.kind == turboquant::metal::TemplateArg::Kind::dtype ? type_name(turboquant::Dtype(a.value))
                                                                  : std::to_string(a.value);
  }
  return list;
}

/// The name under which MLX compiles it.
inline std::string full_name(const turboquant::metal::Kernel& k, const std::vector<InputInfo>& inputs,
                             const std::vector<std::string>& output_types) {
  std::string name = "custom_kernel_", list = "<", hash;
  name.append(k.name);
  list.append(template_list(k)).append(">");
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i] == '<' || list[i] == '>') {
      hash += '_';
    } else if (list[i] == ',') {
      hash += '_';
      ++i;
    } else {
      hash += list[i];
    }
  }
  hash.pop_back();
  name.append("_").append(hash);
  for (const auto& in : inputs) {
    name.append("_").append(in.type).append(in.ndim == 0 ? "s" : in.size < 8 ? "c" : "");
  }
  for (const auto& type : output_types) name.append("_").append(type);
  return name;
}

/// What a buffer index holds.
struct BufferInfo {
  enum Kind { data, shape, strides, ndim, output } kind;
  int array;         // which input or output
  std::string type;  // of an element
};

/// Attributes that a body may name, with their types.
inline std::vector<std::pair<std::string, std::string>> attributes_of(const std::string& source) {
  static const std::vector<std::pair<std::string, std::string>> all = {
      {"dispatch_quadgroups_per_threadgroup", "uint"},
      {"dispatch_simdgroups_per_threadgroup", "uint"},
      {"dispatch_threads_per_threadgroup", "uint3"},
      {"grid_origin", "uint3"},
      {"grid_size", "uint3"},
      {"quadgroup_index_in_threadgroup", "uint"},
      {"quadgroups_per_threadgroup", "uint"},
      {"simdgroup_index_in_threadgroup", "uint"},
      {"simdgroups_per_threadgroup", "uint"},
      {"thread_execution_width", "uint"},
      {"thread_index_in_quadgroup", "uint"},
      {"thread_index_in_simdgroup", "uint"},
      {"thread_index_in_threadgroup", "uint"},
      {"thread_position_in_grid", "uint3"},
      {"thread_position_in_threadgroup", "uint3"},
      {"threadgroup_position_in_grid", "uint3"},
      {"threadgroups_per_grid", "uint3"},
      {"threads_per_grid", "uint3"},
      {"threads_per_simdgroup", "uint"},
      {"threads_per_threadgroup", "uint3"},
  };
  std::vector<std::pair<std::string, std::string>> found;
  for (const auto& a : all) {
    if (source.find(a.first) != std::string::npos) found.push_back(a);
  }
  return found;
}

inline std::vector<BufferInfo> buffers_of(const turboquant::metal::Kernel& k, const std::vector<InputInfo>& inputs,
                                          const std::vector<std::string>& output_types) {
  std::vector<BufferInfo> buffers;
  for (int i = 0; i < int(inputs.size()); ++i) {
    buffers.push_back({BufferInfo::data, i, inputs[i].type});
    const auto mentions = [&](const char* suffix) {
      return inputs[i].ndim > 0 && k.source.find(k.inputs[i] + suffix) != std::string::npos;
    };
    if (mentions("_shape")) buffers.push_back({BufferInfo::shape, i, "int"});
    if (mentions("_strides")) buffers.push_back({BufferInfo::strides, i, "int64_t"});
    if (mentions("_ndim")) buffers.push_back({BufferInfo::ndim, i, "int"});
  }
  for (int i = 0; i < int(output_types.size()); ++i) buffers.push_back({BufferInfo::output, i, output_types[i]});
  return buffers;
}

/// The kernel's template line, signature and body, as MLX appends them to the header.
inline std::string kernel_text(const turboquant::metal::Kernel& k, const std::vector<InputInfo>& inputs,
                               const std::vector<std::string>& output_types) {
  std::string text = "template <";
  for (size_t i = 0; i < k.template_args.size(); ++i) {
    using Kind = turboquant::metal::TemplateArg::Kind;
    const auto kind = k.template_args[i].kind;
    text += std::string(i ? ", " : "") +
            (kind == Kind::integer   ? "int "
             : kind == Kind::boolean ? "bool "
                                     : "typename ") +
            k.template_args[i].name;
  }
  text += ">\n[[kernel]] void " + full_name(k, inputs, output_types) + "(\n";
  const auto attributes = attributes_of(k.source);
  const auto buffers = buffers_of(k, inputs, output_types);
  for (size_t i = 0; i < buffers.size(); ++i) {
    const auto& b = buffers[i];
    const std::string at = " [[buffer(" + std::to_string(i) + ")]]";
    if (b.kind == BufferInfo::output) {
      text += "  device " + b.type + "* " + k.outputs[b.array].name + at;
    } else if (b.kind == BufferInfo::data) {
      const auto& in = inputs[b.array];
      text += std::string("  const ") + (in.size < 8 ? "constant " : "device ") + in.type +
              (in.ndim == 0 ? "& " : "* ") + k.inputs[b.array] + at;
    } else {
      text += "  const constant " + b.type + (b.kind == BufferInfo::ndim ? "& " : "* ") + k.inputs[b.array] +
              (b.kind == BufferInfo::shape     ? "_shape"
               : b.kind == BufferInfo::strides ? "_strides"
                                               : "_ndim") +
              at;
    }
    text += i + 1 < buffers.size() || !attributes.empty() ? ",\n" : ") {\n";
  }
  for (size_t i = 0; i < attributes.size(); ++i) {
    const auto& [name, type] = attributes[i];
    text += "  " + type + " " + name + " [[" + name + "]]" + (i + 1 < attributes.size() ? ",\n" : ") {\n");
  }
  return text + k.source + "\n}\n";
}

}  // namespace emulator
