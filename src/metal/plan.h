// The Metal kernels as MLX's metal_kernel launches them: text, names of inputs and outputs, template arguments, grid.
// launch.h binds arrays to them, for the MLX layer and for the tests, which run the same text in an emulator.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "metal/layout.h"
#include "turboquant/turboquant.h"

namespace turboquant::metal {

/// The kernels' common text (metal_kernel's `header`): format.h, layout.h, common.metal, and the kernel's own files.
enum class Source { codec, few_rows, prefill };
std::string_view source_text(Source source);

/// A template argument: an integer, a boolean or a dtype.
struct TemplateArg {
  enum class Kind { integer, boolean, dtype };
  std::string name;
  Kind kind;
  int value;  // of Dtype, if it is one
};

/// Element types of outputs.
enum class Type { float32, float16, bfloat16, uint32 };
Type type_of(Dtype dtype);

/// An output, row-contiguous.
struct Output {
  std::string name;
  Type type;
  std::vector<int> shape;
};

/// Arguments of metal_kernel and of the function it returns.  ensure_row_contiguous is false for all.
struct Kernel {
  std::string name;
  Source header;
  std::vector<std::string> inputs;  // in order
  std::vector<Output> outputs;      // in order
  std::string source;               // the body
  std::vector<TemplateArg> template_args;
  std::array<int, 3> grid{1, 1, 1};  // in threads, multiples of the threadgroup
  std::array<int, 3> threadgroup{metal_layout::kThreads, 1, 1};
};

/// The contents of `params`, an int32 array; signs of `seed` for all kernels.
using Params = std::array<int32_t, metal_layout::kParamCount>;

/// How a side is coded.
struct Coding {
  int bits;
  Code code;
  Coding(int bits = 3, Code code = Code::scalar) : bits(bits), code(code) {}
};

/// Encoding of one or two sides [batch, heads, tokens, head_dim].
/// Inputs: x, x_centre (, y, y_centre), params; where any side has feedback that does something, x, x_centre,
/// x_feedback (, y, y_centre, y_feedback), params.  Outputs: x_codes, x_scales (, y_codes, y_scales).
struct EncodeShape {
  int batch, heads, tokens, head_dim;
  std::vector<Coding> codings;  // of each side
  std::vector<bool> centred;    // of each side; absent centres are replaced by `params`
  uint64_t seed = 0;
  std::vector<bool> feedback = {};  // of each side, as centres; empty: of none
};
Kernel encode_kernel(const EncodeShape& shape);
Params encode_params(const EncodeShape& shape);

/// Decoding; everything dense.  Inputs: codes, scales, centre (or `params`), params.  Output: out of `dtype`.
Kernel decode_kernel(const EncodeShape& shape, Dtype dtype);

/// What an attention launch depends on.
struct AttentionShape {
  int batch, query_heads, kv_heads, query_len, kv_len, head_dim;
  Coding keys, values;
  Dtype dtype;  // of q and out
  float scale = 1;
  uint64_t seed = 0;
  bool causal = false;
  int window = 0;
  MaskKind mask = MaskKind::none;
  bool starts = false, sinks = false, key_centre = false, value_centre = false;
  int splits = 0;  // of the keys; 0: chosen
  // Exact copies (ExactTier): how they are coded, slots of the ring, and what of it is read; 0: none.
  Coding exact = 8;
  int ring = 0, recent = 0, first = 0;
};

/// How attention is launched: `attend`, and `merge` after it when there are partial results.
/// attend's inputs: q, key_codes, key_scales, value_codes, value_scales, starts, mask, for prefill also sinks,
/// key_centre, value_centre, and params; an absent one is replaced by `params`.  Packed vectors must be dense within a
/// head; q and mask may have any strides.
/// Its outputs: partial [batch, query_heads, query_len, splits, head_dim], float16, and stats [..., splits, 3],
/// float32; or out alone (q's shape and dtype) when there is nothing to merge. merge's inputs: q, partial, stats,
/// sinks, key_centre, value_centre, params.  Its output: out.
/// With exact copies `attend_copies` is launched too: attend's inputs, but codes and scales of the copies, and
/// copy_params; attend then leaves out the tokens that are read from copies, has partial results, and merge takes those
/// of both: q, partial, stats, copy_partial, copy_stats, sinks, ...
struct AttentionPlan {
  bool few_rows;  // the kernel
  int splits;
  bool merged, copies;
  Kernel attend, attend_copies, merge;
  Params params, copy_params;
};
AttentionPlan plan_attention(const AttentionShape& shape);

/// Which kernel plan_attention chooses for these sizes, as inspect shows it.
const char* kernel_name(int query_heads, int kv_heads, int query_len, int head_dim);

}  // namespace turboquant::metal
