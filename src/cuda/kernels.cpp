// Builds the bodies of the kernels.  Sizes that select code are constants in the text; sizes that vary from call to
// call (tokens, strides) come from the arrays, so that one compilation serves a growing cache.
#include "cuda/kernels.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <type_traits>

namespace turboquant::cuda {
namespace {

const char* truth(bool x) { return x ? "true" : "false"; }

/// `__global__` as CUDA's headers define it.
constexpr const char* kGlobal = "#undef __global__\n#define __global__ __attribute__((global))";

/// Builds text.  A stream would format numbers by the process's locale, and a locale may group digits.
class Text {
 public:
  template <class T>
  Text& operator<<(const T& x) {
    if constexpr (std::is_integral_v<T>) {
      text_ += std::to_string(x);
    } else {
      text_ += x;
    }
    return *this;
  }
  const std::string& str() const { return text_; }

 private:
  std::string text_;
};

std::string hex(uint64_t x) {
  char digits[17];
  return {"0x" + std::string(digits, std::to_chars(digits, digits + 16, x, 16).ptr)};
}

/// An optional input as a typed pointer, or null.
std::string optional(bool given, const char* type, const std::string& name) {
  return given ? "reinterpret_cast<const " + std::string(type) + "*>(" + name + ")" : "nullptr";
}

/// A side's codes as the kernels' templates take them (codes.cu.h), and in a kernel's name.
std::string coding(int bits, Code code) {
  const std::string digits = std::to_string(bits);
  return code == Code::trellis ? "turboquant::cuda::trellis(" + digits + ")" : digits;
}
std::string coding_name(int bits, Code code) { return std::to_string(bits) + (code == Code::trellis ? "t" : ""); }

constexpr int kCodecWarps = 8, kFeedbackTokens = 32;  // of a block of the encoder (feedback.cu.h)

bool any_trellis(const std::vector<EncodeSide>& sides) {
  return std::any_of(sides.begin(), sides.end(), [](const EncodeSide& s) { return s.code == Code::trellis; });
}

/// What a side needs in a kernel that searches a trellis.
int trellis_shared_bytes(const EncodeSide& side) {
  return side.feedback ? kTrellisFeedbackSharedBytes : kTrellisSharedBytes;
}

/// A call of F<D, CODING, T>(args, blockIdx.x) with T from the pointer `typed_by`.
std::string decode_call(int head_dim, const EncodeSide& side, const std::string& typed_by) {
  Text s;
  s << "  turboquant::cuda::decode_as<" << head_dim << ", " << coding(side.bits, side.code) << ">(a, " << typed_by
    << ", blockIdx.x);\n";
  return s.str();
}

/// The same of the encoder; with feedback it is told the tokens of a block too.
std::string encode_call(int head_dim, const EncodeSide& side, const std::string& typed_by, bool beside_trellis) {
  const char* function = beside_trellis  ? "encode_beside_trellis_as"
                         : side.feedback ? "encode_feedback_as"
                                         : "encode_as";
  Text s;
  s << "  turboquant::cuda::" << function << "<" << head_dim << ", " << coding(side.bits, side.code);
  if (beside_trellis) {
    s << ", " << (side.feedback ? kFeedbackTokens : 0) << ", " << trellis_shared_bytes(side);
  } else if (side.feedback) {
    s << ", " << kFeedbackTokens;
  }
  s << ">(a, " << typed_by << ", blockIdx.x" << (beside_trellis ? ", tq_shared" : "") << ");\n";
  return s.str();
}

int codec_blocks(int head_dim, int64_t vectors) {
  const int per_block = kCodecWarps * std::max(1, 32 / (head_dim / 8));
  return int((vectors + per_block - 1) / per_block);
}

/// Fills AttentionArgs `a` with what every attention kernel has.
std::string attention_args(const AttentionShape& shape, const AttentionSettings& s, const AttentionPlan& plan) {
  Text o;
  o << "  turboquant::cuda::AttentionArgs a = {};\n"
       "  a.even = "
    << truth(plan.splits > 0)
    << ";\n"
       "  a.batch = "
    << (shape.batch == 1 ? "1" : "q_shape[0]")  // one row spares the loops over rows
    << ", a.query_heads = " << shape.query_heads << ", a.kv_heads = " << shape.kv_heads
    << ";\n"
       "  a.query_len = ";
  if (shape.query_len <= 8) {
    o << shape.query_len;  // few values, and divisions by it disappear
  } else {
    o << "q_shape[2]";
  }
  o << ", a.kv_len = written_shape[0] - 1;\n"
       "  a.scale = __uint_as_float("
    << hex(std::bit_cast<uint32_t>(s.scale))
    << "u);\n"
       "  a.seed = "
    << hex(s.seed)
    << "ull;\n"
       "  a.causal = "
    << truth(s.causal) << ", a.window = " << s.window
    << ";\n"
       "  a.recent = "
    << shape.recent << ", a.first = " << shape.first << ", a.exact_splits = " << plan.exact_splits << ";\n";
  o << "  a.q = q;\n"
       "  for (int i = 0; i < 4; ++i) a.q_strides[i] = q_strides[i];\n"
       "  a.starts = "
    << optional(s.starts, "int", "starts") << ";\n";
  return o.str();
}

/// Fills PackedCache `to` with inputs called as its members, after `prefix`.
std::string packed_args(const std::string& to, const std::string& prefix) {
  std::string o;
  for (const char* side : {"key", "value"}) {
    for (const char* part : {"code", "scale"}) {
      const std::string name = std::string(side) + "_" + part, input = prefix + name + "s";
      o += "  " + to + "." + name + "s = " + input + ";\n";
      o += "  " + to + "." + name + "_strides[0] = " + input + "_strides[0], " + to + "." + name +
           "_strides[1] = " + input + "_strides[1];\n";
    }
  }
  return o;
}

std::string cache_args(const AttentionShape& shape, const AttentionSettings& s) {
  std::string o = packed_args("a.packed", "");
  if (shape.copies()) o += packed_args("a.exact", "exact_") + "  a.ring = exact_key_scales_shape[2] - a.first;\n";
  if (s.mask != MaskKind::none)
    o += "  a.mask = mask;\n  for (int i = 0; i < 4; ++i) a.mask_strides[i] = mask_strides[i];\n";
  return o;
}

std::string row_args(const AttentionSettings& s) {
  Text o;
  o << "  a.sinks = " << optional(s.sinks, "float", "sinks")
    << ";\n  a.key_centre = " << optional(s.key_centre, "float", "key_centre")
    << ";\n  a.value_centre = " << optional(s.value_centre, "float", "value_centre") << ";\n";
  return o.str();
}

const char* mask_name(MaskKind kind) {
  return kind == MaskKind::none      ? "turboquant::cuda::kNoMask"
         : kind == MaskKind::boolean ? "turboquant::cuda::kBooleanMask"
                                     : "turboquant::cuda::kAdditiveMask";
}

}  // namespace

std::string before_kernel(const Kernel& k) {
  if (k.max_threads == 0) return "";
  return std::string(kGlobal) + " __launch_bounds__(" + std::to_string(k.max_threads) + ")\n";
}

std::string body(const Kernel& k) { return (k.max_threads ? std::string(kGlobal) + "\n" : "") + k.source; }

namespace {

void set_extent(Kernel& k, const Extent& extent) { k.grid = extent.grid, k.block = extent.block; }

/// Gives a kernel that searches a trellis its memory.
void share_memory(Kernel& k, const std::vector<EncodeSide>& sides) {
  if (!any_trellis(sides)) return;
  for (const EncodeSide& side : sides) k.shared_bytes = std::max(k.shared_bytes, trellis_shared_bytes(side));
  k.source = "  extern __shared__ __align__(16) unsigned char tq_shared[];\n";
}

/// Body of a side's encoding; `place` fills where it writes.
std::string encode_side(const std::vector<EncodeSide>& sides, int i, int head_dim, uint64_t seed,
                        const std::string& place) {
  const EncodeSide& side = sides[size_t(i)];
  const std::string n = std::to_string(i % 2);  // exact copies follow, of the same vectors
  Text o;
  o << "  if (blockIdx.y == " << i << ") {\n  turboquant::cuda::EncodeArgs a = {};\n"
    << "  a.batch = x" << n << "_shape[0], a.heads = x" << n << "_shape[1], a.tokens = x" << n << "_shape[2];\n"
    << "  a.seed = " << hex(seed) << "ull;\n  a.x = x" << n << ";\n"
    << "  for (int i = 0; i < 4; ++i) a.x_strides[i] = x" << n << "_strides[i];\n"
    << "  a.centre = " << optional(side.centred, "float", "centre" + n) << ";\n"
    << "  a.feedback = " << optional(side.feedback, "__half", "feedback" + n) << ";\n"
    << place << encode_call(head_dim, side, "x" + n, any_trellis(sides)) << "  }\n";
  return o.str();
}

}  // namespace

Extent encode_extent(const std::vector<EncodeSide>& sides, int head_dim, int64_t rows, int tokens) {
  int64_t blocks = 0;
  for (const EncodeSide& side : sides) {
    const int64_t of_side = side.feedback ? rows * ((tokens + kFeedbackTokens - 1) / kFeedbackTokens)
                                          : codec_blocks(head_dim, rows * tokens);
    blocks = std::max(blocks, of_side);
  }
  return {{int(blocks) * 32 * kCodecWarps, int(sides.size()), 1}, {32 * kCodecWarps, 1, 1}};
}

Extent decode_extent(int head_dim, int64_t vectors) {
  return {{codec_blocks(head_dim, vectors) * 32 * kCodecWarps, 1, 1}, {32 * kCodecWarps, 1, 1}};
}

Kernel encode_kernel(const std::vector<EncodeSide>& sides, int head_dim, uint64_t seed, int64_t rows, int tokens) {
  Kernel k;
  k.name = "tq_encode";
  k.header = Source::encode;
  share_memory(k, sides);
  for (size_t i = 0; i < sides.size(); ++i) {
    const std::string n = std::to_string(i);
    k.inputs.insert(k.inputs.end(), {"x" + n, "centre" + n, "feedback" + n});
    k.outputs.insert(k.outputs.end(), {"codes" + n, "scales" + n});
    k.name += "_" + coding_name(sides[i].bits, sides[i].code) + (sides[i].feedback ? "f" : "");
    Text place;
    place << "  a.codes = codes" << i << ", a.scales = scales" << i << ";\n"
          << "  a.scale_strides[1] = a.tokens, a.scale_strides[0] = (long long)a.heads * a.tokens;\n"
          << "  for (int i = 0; i < 2; ++i) a.code_strides[i] = " << words_per_vector(sides[i].bits, head_dim)
          << " * a.scale_strides[i];\n";
    k.source += encode_side(sides, int(i), head_dim, seed, place.str());
  }
  set_extent(k, encode_extent(sides, head_dim, rows, tokens));
  return k;
}

std::vector<EncodeSide> append_sides(std::vector<EncodeSide> sides, bool copies) {
  if (copies) {
    for (int i : {0, 1}) sides.push_back({8, sides[size_t(i)].centred});
  }
  return sides;
}

Kernel append_kernel(const std::vector<EncodeSide>& of_codes, int head_dim, uint64_t seed, int64_t rows, int tokens,
                     int first) {
  Kernel k;
  k.name = "tq_append";
  k.header = Source::encode;
  k.outputs = {"written"};
  const auto sides = append_sides(of_codes, first >= 0);
  share_memory(k, sides);
  for (size_t i = 0; i < sides.size(); ++i) {
    const std::string n = std::to_string(i);
    if (i < of_codes.size()) k.inputs.insert(k.inputs.end(), {"x" + n, "centre" + n, "feedback" + n});
    k.inputs.insert(k.inputs.end(), {"codes" + n, "scales" + n});
    k.name += "_" + coding_name(sides[i].bits, sides[i].code) + (sides[i].feedback ? "f" : "");
    Text place;
    if (i < of_codes.size()) {
      place << "  const long long at = before_shape[0] - 1;\n"
            << "  a.codes = const_cast<unsigned*>(codes" << i << ") + at * "
            << words_per_vector(sides[i].bits, head_dim) << ";\n  a.scales = const_cast<__half*>(scales" << i
            << ") + at;\n";
    } else {
      place << "  a.at = before_shape[0] - 1, a.ring = scales" << i << "_shape[2] - " << first << ";\n"
            << "  a.codes = const_cast<unsigned*>(codes" << i << "), a.scales = const_cast<__half*>(scales" << i
            << ");\n";
    }
    place << "  for (int i = 0; i < 2; ++i)\n"
          << "    a.code_strides[i] = codes" << i << "_strides[i], a.scale_strides[i] = scales" << i
          << "_strides[i];\n";
    k.source += encode_side(sides, int(i), head_dim, seed, place.str());
  }
  k.inputs.push_back("before");
  set_extent(k, encode_extent(sides, head_dim, rows, tokens));
  return k;
}

Extent transform_extent(int head_dim, int matrices) { return {{matrices * (head_dim / 32) * 256, 1, 1}, {256, 1, 1}}; }

Kernel transform_kernel(int head_dim, int matrices, bool centred) {
  Kernel k;
  k.name = "tq_transform";
  k.header = Source::transform;
  k.inputs = {"x", "matrix", "centre"};
  k.outputs = {"y"};
  k.source =
      "  turboquant::cuda::TransformArgs a = {};\n"
      "  a.batch = x_shape[0], a.heads = x_shape[1], a.tokens = x_shape[2], a.matrices = matrix_shape[0];\n"
      "  a.x = x;\n  for (int i = 0; i < 4; ++i) a.x_strides[i] = x_strides[i];\n"
      "  a.matrix = matrix, a.centre = " +
      optional(centred, "float", "centre") + ";\n  a.out = y;\n  turboquant::cuda::transform_as<" +
      std::to_string(head_dim) + ">(a, x, blockIdx.x);\n";
  set_extent(k, transform_extent(head_dim, matrices));
  return k;
}

Kernel decode_kernel(const EncodeSide& side, int head_dim, uint64_t seed, int64_t vectors) {
  Kernel k;
  k.name = "tq_expand_" + coding_name(side.bits, side.code);
  k.header = Source::encode;
  k.inputs = {"codes", "scales", "centre"};
  k.outputs = {"x"};
  k.source =
      "  turboquant::cuda::DecodeArgs a = {};\n"
      "  a.batch = scales_shape[0], a.heads = scales_shape[1], a.tokens = scales_shape[2];\n"
      "  a.seed = " +
      hex(seed) +
      "ull;\n"
      "  a.codes = codes, a.scales = scales;\n"
      "  for (int i = 0; i < 2; ++i) a.code_strides[i] = codes_strides[i], a.scale_strides[i] = scales_strides[i];\n"
      "  a.centre = " +
      optional(side.centred, "float", "centre") +
      ";\n"
      "  a.out = x;\n" +
      decode_call(head_dim, side, "x");
  set_extent(k, decode_extent(head_dim, vectors));
  return k;
}

namespace {

/// The call of the device function that a plan names, after AttentionArgs `a` has been filled.
std::string attention_call(const AttentionShape& shape, const AttentionSettings& settings, const AttentionPlan& plan) {
  Text o;
  const char* function = plan.method == AttentionPlan::few_rows    ? "run_few_rows"
                         : plan.method == AttentionPlan::many_rows ? "run_many_rows"
                                                                   : "run_prefill";
  o << "  extern __shared__ __align__(16) unsigned char tq_shared[];\n"
    << "  turboquant::cuda::" << function << "<" << shape.head_dim << ", ";
  if (plan.method == AttentionPlan::many_rows) o << shape.value_dim() << ", ";
  o << coding(shape.key_bits, shape.key_code) << ", " << coding(shape.value_bits, shape.value_code) << ", "
    << mask_name(settings.mask) << ", " << plan.shared_bytes << ", " << truth(shape.copies()) << ", ";
  if (plan.method == AttentionPlan::few_rows) {
    o << plan.warps << ", " << plan.stages;
  } else if (plan.method == AttentionPlan::many_rows) {
    o << plan.rows << ", " << plan.warps << ", " << plan.stages;
  } else {
    o << plan.row_warps << ", " << plan.token_warps << ", " << truth(plan.method == AttentionPlan::split);
  }
  o << ">(a, q, " << (settings.mask == MaskKind::additive ? "mask" : "q") << ", tq_shared);\n";
  return o.str();
}

/// What `partial` and `whole` have in common.
Kernel scanning_kernel(const char* name, const AttentionShape& shape, const AttentionPlan& plan) {
  Kernel k;
  k.name = name + coding_name(shape.key_bits, shape.key_code) + coding_name(shape.value_bits, shape.value_code);
  k.header = plan.method == AttentionPlan::few_rows    ? Source::few_rows
             : plan.method == AttentionPlan::many_rows ? Source::many_rows
                                                       : Source::prefill;
  k.inputs = {"q", "key_codes", "key_scales", "value_codes", "value_scales", "written", "starts", "mask"};
  if (shape.copies()) {
    k.inputs.insert(k.inputs.end(), {"exact_key_codes", "exact_key_scales", "exact_value_codes", "exact_value_scales"});
  }
  set_extent(k, scan_extent(plan));
  k.shared_bytes = plan.shared_bytes;
  if (k.block[0] > 256) k.max_threads = k.block[0];  // others may have all registers that a thread can
  return k;
}

}  // namespace

Extent scan_extent(const AttentionPlan& plan) {
  const int threads = 32 * (plan.int8() ? plan.warps : plan.row_warps * plan.token_warps);
  const int columns = plan.splits ? plan.blocks / plan.splits : 1;
  return {{plan.blocks / columns * threads, columns, 1}, {threads, 1, 1}};
}

Extent merge_extent(const AttentionShape& shape) {
  return {{256 * shape.batch * shape.query_heads * shape.query_len, 1, 1}, {256, 1, 1}};
}

Kernel partial_kernel(const AttentionShape& shape, const AttentionSettings& settings, const AttentionPlan& plan) {
  Kernel k = scanning_kernel(plan.method == AttentionPlan::few_rows    ? "tq_few_rows_"
                             : plan.method == AttentionPlan::many_rows ? "tq_many_rows_"
                                                                       : "tq_split_",
                             shape, plan);
  k.outputs = {"partial"};
  k.source = attention_args(shape, settings, plan) + cache_args(shape, settings) + "  a.partial = partial;\n" +
             attention_call(shape, settings, plan);
  return k;
}

Kernel whole_kernel(const AttentionShape& shape, const AttentionSettings& settings, const AttentionPlan& plan) {
  Kernel k = scanning_kernel("tq_prefill_", shape, plan);
  k.inputs.insert(k.inputs.end(), {"sinks", "key_centre", "value_centre"});
  k.outputs = {"out"};
  k.source = attention_args(shape, settings, plan) + cache_args(shape, settings) + row_args(settings) +
             "  a.out = out;\n" + attention_call(shape, settings, plan);
  return k;
}

Kernel merge_kernel(const AttentionShape& shape, const AttentionSettings& settings, const AttentionPlan& plan) {
  Kernel k;
  k.name = "tq_merge";
  k.header = Source::merge;
  k.inputs = {"q", "written", "partial", "starts", "sinks", "key_centre", "value_centre"};
  k.outputs = {"out"};
  Text o;
  o << attention_args(shape, settings, plan) << row_args(settings)
    << "  a.partial = const_cast<float*>(partial);\n"
       "  a.out = out;\n"
       "  __shared__ __align__(16) float shared[turboquant::cuda::merge_shared_floats<"
    << shape.value_dim() << ">()];\n  turboquant::cuda::merge_as<" << shape.head_dim << ", " << shape.value_dim()
    << ", " << plan.rows << ", " << (plan.int8() ? 32 : 64) << ", " << truth(plan.half_partials())
    << ">(a, q, blockIdx.x, partial_shape[0], shared);\n";
  k.source = o.str();
  set_extent(k, merge_extent(shape));
  return k;
}

}  // namespace turboquant::cuda
