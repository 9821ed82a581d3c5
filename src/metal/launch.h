// How the arrays of an operation are bound to its kernels: once, for the MLX layer and for the emulator of the tests.
//
// A Launcher has
//   Array                                                              its kind of array, copied by reference
//   int dim(const Array&, int axis)                                    a size
//   Array params(const Params&)                                        an int32 array [kParamCount]
//   std::vector<Array> run(const Kernel&, const std::vector<Array>&)   launches; makes and returns the outputs
// An input that is absent is bound to `params`: kernels never touch it then, and MLX wants an array.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "metal/plan.h"

namespace turboquant::metal {

/// An operation's arrays by the names of kernel inputs.
template <class Array>
using Named = std::map<std::string, Array>;

template <class Launcher, class Array>
std::vector<Array> run_bound(Launcher& launcher, const Kernel& kernel, const Named<Array>& arrays) {
  std::vector<Array> inputs;
  for (const auto& name : kernel.inputs) inputs.push_back(arrays.at(name));
  return launcher.run(kernel, inputs);
}

/// Encodes one or two sides [batch, heads, tokens, head_dim] of one shape and dtype, any strides; centres
/// [heads, head_dim] and feedback [heads, head_dim, head_dim], float16, of each side, both row-contiguous.  Returns
/// codes and scales of each.
template <class Launcher, class Array = typename Launcher::Array>
std::vector<Array> launch_encode(Launcher& launcher, const std::vector<Array>& sides,
                                 const std::vector<Coding>& codings, const std::vector<std::optional<Array>>& centres,
                                 const std::vector<std::optional<Array>>& feedback, uint64_t seed) {
  const auto& x = sides[0];
  EncodeShape shape{launcher.dim(x, 0), launcher.dim(x, 1), launcher.dim(x, 2), launcher.dim(x, 3), codings, {}, seed};
  for (const auto& centre : centres) shape.centred.push_back(centre.has_value());
  for (const auto& f : feedback) shape.feedback.push_back(f.has_value());
  const Array params = launcher.params(encode_params(shape));
  Named<Array> arrays{{"params", params},
                      {"x", x},
                      {"x_centre", centres[0].value_or(params)},
                      {"x_feedback", feedback[0].value_or(params)}};
  if (sides.size() == 2) {
    arrays.emplace("y", sides[1]);
    arrays.emplace("y_centre", centres[1].value_or(params));
    arrays.emplace("y_feedback", feedback[1].value_or(params));
  }
  return run_bound(launcher, encode_kernel(shape), arrays);
}

/// Decodes codes [batch, heads, tokens, words] and scales [batch, heads, tokens], both dense.
template <class Launcher, class Array = typename Launcher::Array>
Array launch_decode(Launcher& launcher, const Array& codes, const Array& scales, const std::optional<Array>& centre,
                    Coding coding, uint64_t seed, Dtype dtype) {
  const EncodeShape shape{launcher.dim(codes, 0),
                          launcher.dim(codes, 1),
                          launcher.dim(codes, 2),
                          launcher.dim(codes, 3) / coding.bits * group_size(),
                          {coding},
                          {centre.has_value()},
                          seed};
  const Array params = launcher.params(encode_params(shape));
  return run_bound<Launcher, Array>(
      launcher, decode_kernel(shape, dtype),
      {{"codes", codes}, {"scales", scales}, {"centre", centre.value_or(params)}, {"params", params}})[0];
}

/// Arrays of attention: q [batch, query_heads, query_len, head_dim] and mask [batch, query_heads, query_len, kv_len]
/// of any strides; packed keys and values dense within a head; starts [batch], int32; sinks [query_heads] and centres
/// [kv_heads, head_dim], float32.
template <class Array>
struct AttentionArrays {
  Array q, key_codes, key_scales, value_codes, value_scales;
  std::optional<Array> starts, mask, sinks, key_centre, value_centre;
  // Exact copies [batch, kv_heads, ring + first], dense within a head; all four or none.
  std::optional<Array> exact_key_codes = {}, exact_key_scales = {}, exact_value_codes = {}, exact_value_scales = {};
};

/// Attention; `shape` needs what the arrays do not tell (of exact copies `recent` and `first`): kv_len, codings, dtype,
/// rules, kind of mask.
template <class Launcher, class Array = typename Launcher::Array>
Array launch_attention(Launcher& launcher, AttentionShape shape, const AttentionArrays<Array>& a) {
  shape.batch = launcher.dim(a.q, 0);
  shape.query_heads = launcher.dim(a.q, 1);
  shape.query_len = launcher.dim(a.q, 2);
  shape.head_dim = launcher.dim(a.q, 3);
  shape.kv_heads = launcher.dim(a.key_codes, 1);
  shape.starts = a.starts.has_value();
  shape.sinks = a.sinks.has_value();
  shape.key_centre = a.key_centre.has_value();
  shape.value_centre = a.value_centre.has_value();
  if (a.exact_key_codes) {
    shape.ring = launcher.dim(*a.exact_key_codes, 2) - shape.first;
  } else {
    shape.recent = shape.first = 0;
  }
  const auto plan = plan_attention(shape);
  const Array params = launcher.params(plan.params);
  Named<Array> arrays{{"q", a.q},
                      {"key_codes", a.key_codes},
                      {"key_scales", a.key_scales},
                      {"value_codes", a.value_codes},
                      {"value_scales", a.value_scales},
                      {"starts", a.starts.value_or(params)},
                      {"mask", a.mask.value_or(params)},
                      {"sinks", a.sinks.value_or(params)},
                      {"key_centre", a.key_centre.value_or(params)},
                      {"value_centre", a.value_centre.value_or(params)},
                      {"params", params}};
  const auto out = run_bound(launcher, plan.attend, arrays);
  if (!plan.merged) return out[0];
  arrays.emplace("partial", out[0]);
  arrays.emplace("stats", out[1]);
  if (plan.copies) {
    Named<Array> copies = arrays;
    copies.insert_or_assign("key_codes", *a.exact_key_codes);
    copies.insert_or_assign("key_scales", *a.exact_key_scales);
    copies.insert_or_assign("value_codes", *a.exact_value_codes);
    copies.insert_or_assign("value_scales", *a.exact_value_scales);
    copies.insert_or_assign("params", launcher.params(plan.copy_params));
    const auto of_copies = run_bound(launcher, plan.attend_copies, copies);
    arrays.emplace("copy_partial", of_copies[0]);
    arrays.emplace("copy_stats", of_copies[1]);
  }
  return run_bound(launcher, plan.merge, arrays)[0];
}

}  // namespace turboquant::metal
