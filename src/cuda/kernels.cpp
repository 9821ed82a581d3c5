// Builds the bodies of the kernels.  Sizes that select code are constants in the text; sizes that vary from call to
// call (tokens, strides) come from the arrays, so that one compilation serves a growing cache.
#include "cuda/kernels.h"

#include <bit>
#include <sstream>

namespace turboquant::cuda {
namespace {

const char* truth(bool x) { return x ? "true" : "false"; }

std::string hex(uint64_t x) {
  std::ostringstream s;
  s << "0x" << std::hex << x;
  return s.str();
}

/// An optional input as a typed pointer, or null.
std::string optional(bool given, const char* type, const std::string& name) {
  return given ? "reinterpret_cast<const " + std::string(type) + "*>(" + name + ")" : "nullptr";
}

/// A call of F<D, BITS, T>(args, blockIdx.x) with T from the pointer `typed_by`.
std::string codec_call(const char* function, int head_dim, int bits, const std::string& typed_by) {
  std::ostringstream s;
  s << "  turboquant::cuda::" << function << "<" << head_dim << ", " << bits << ">(a, " << typed_by
    << ", blockIdx.x);\n";
  return s.str();
}

constexpr int kCodecWarps = 8;

int codec_blocks(int head_dim, int64_t vectors) {
  const int per_block = kCodecWarps * (32 / (head_dim / 8));
  return int((vectors + per_block - 1) / per_block);
}

/// Fills AttentionArgs `a` with what every attention kernel has.
std::string attention_args(const AttentionShape& shape, const AttentionSettings& s) {
  std::ostringstream o;
  o << "  turboquant::cuda::AttentionArgs a = {};\n"
       "  a.batch = q_shape[0], a.query_heads = "
    << shape.query_heads << ", a.kv_heads = " << shape.kv_heads
    << ";\n"
       "  a.query_len = ";
  if (shape.query_len <= 8) {
    o << shape.query_len;  // few values, and divisions by it disappear
  } else {
    o << "q_shape[2]";
  }
  o << ", a.kv_len = key_scales_shape[2];\n"
       "  a.scale = __uint_as_float("
    << hex(std::bit_cast<uint32_t>(s.scale))
    << "u);\n"
       "  a.seed = "
    << hex(s.seed)
    << "ull;\n"
       "  a.causal = "
    << truth(s.causal) << ", a.window = " << s.window
    << ";\n"
       "  a.q = q;\n"
       "  for (int i = 0; i < 4; ++i) a.q_strides[i] = q_strides[i];\n"
       "  a.starts = "
    << optional(s.starts, "int", "starts") << ";\n";
  return o.str();
}

std::string cache_args(const AttentionSettings& s) {
  std::string o;
  for (const char* side : {"key", "value"}) {
    for (const char* part : {"code", "scale"}) {
      const std::string name = std::string(side) + "_" + part;
      o += "  a." + name + "s = " + name + "s;\n";
      o += "  a." + name + "_strides[0] = " + name + "s_strides[0], a." + name + "_strides[1] = " + name +
           "s_strides[1];\n";
    }
  }
  if (s.mask != MaskKind::none)
    o += "  a.mask = mask;\n  for (int i = 0; i < 4; ++i) a.mask_strides[i] = mask_strides[i];\n";
  return o;
}

std::string row_args(const AttentionSettings& s) {
  return "  a.sinks = " + optional(s.sinks, "float", "sinks") +
         ";\n  a.key_centre = " + optional(s.key_centre, "float", "key_centre") +
         ";\n  a.value_centre = " + optional(s.value_centre, "float", "value_centre") + ";\n";
}

const char* mask_name(MaskKind kind) {
  return kind == MaskKind::none      ? "turboquant::cuda::kNoMask"
         : kind == MaskKind::boolean ? "turboquant::cuda::kBooleanMask"
                                     : "turboquant::cuda::kAdditiveMask";
}

}  // namespace

Kernel encode_kernel(const std::vector<EncodeSide>& sides, int head_dim, uint64_t seed, int64_t vectors) {
  Kernel k;
  k.name = "tq_encode";
  k.header = Source::encode;
  for (size_t i = 0; i < sides.size(); ++i) {
    const std::string n = std::to_string(i);
    k.inputs.insert(k.inputs.end(), {"x" + n, "centre" + n});
    k.outputs.insert(k.outputs.end(), {"codes" + n, "scales" + n});
    k.name += "_" + std::to_string(sides[i].bits);
    k.source += (i ? "  else {\n" : "  if (blockIdx.y == 0) {\n") +
                std::string("  turboquant::cuda::EncodeArgs a = {};\n") + "  a.batch = x" + n +
                "_shape[0], a.heads = x" + n + "_shape[1], a.tokens = x" + n + "_shape[2];\n" +
                "  a.seed = " + hex(seed) + "ull;\n  a.x = x" + n + ";\n" +
                "  for (int i = 0; i < 4; ++i) a.x_strides[i] = x" + n + "_strides[i];\n" +
                "  a.centre = " + optional(sides[i].centred, "float", "centre" + n) + ";\n" + "  a.codes = codes" + n +
                ", a.scales = scales" + n + ";\n" + codec_call("encode_as", head_dim, sides[i].bits, "x" + n) + "  }\n";
  }
  k.block = {32 * kCodecWarps, 1, 1};
  k.grid = {codec_blocks(head_dim, vectors) * k.block[0], int(sides.size()), 1};
  return k;
}

Kernel decode_kernel(int bits, bool centred, int head_dim, uint64_t seed, int64_t vectors) {
  Kernel k;
  k.name = "tq_expand_" + std::to_string(bits);
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
      optional(centred, "float", "centre") +
      ";\n"
      "  a.out = x;\n" +
      codec_call("decode_as", head_dim, bits, "x");
  k.block = {32 * kCodecWarps, 1, 1};
  k.grid = {codec_blocks(head_dim, vectors) * k.block[0], 1, 1};
  return k;
}

namespace {

/// The call of the device function that a plan names, after AttentionArgs `a` has been filled.
std::string attention_call(const AttentionShape& shape, const AttentionSettings& settings, const AttentionPlan& plan) {
  std::ostringstream o;
  const bool decode = plan.method == AttentionPlan::decode;
  o << "  extern __shared__ __align__(16) unsigned char tq_shared[];\n"
    << "  turboquant::cuda::" << (decode ? "run_decode" : "run_prefill") << "<" << shape.head_dim << ", "
    << shape.key_bits << ", " << shape.value_bits << ", " << mask_name(settings.mask) << ", " << plan.shared_bytes
    << ", ";
  if (decode) {
    o << plan.warps << ", " << plan.stages;
  } else {
    o << plan.row_warps << ", " << plan.token_warps << ", " << truth(plan.method == AttentionPlan::split);
  }
  o << ">(a, q, " << (settings.mask == MaskKind::additive ? "mask" : "q") << ", tq_shared);\n";
  return o.str();
}

/// What `partial` and `whole` have in common.
Kernel scanning_kernel(const char* name, const AttentionShape& shape, const AttentionPlan& plan) {
  Kernel k;
  k.name = name + std::to_string(shape.key_bits) + std::to_string(shape.value_bits);
  k.header = plan.method == AttentionPlan::decode ? Source::decode : Source::prefill;
  k.inputs = {"q", "key_codes", "key_scales", "value_codes", "value_scales", "starts", "mask"};
  const int warps = plan.method == AttentionPlan::decode ? plan.warps : plan.row_warps * plan.token_warps;
  k.block = {32 * warps, 1, 1};
  k.grid = {plan.blocks * k.block[0], 1, 1};
  k.shared_bytes = plan.shared_bytes;
  return k;
}

}  // namespace

Kernel partial_kernel(const AttentionShape& shape, const AttentionSettings& settings, const AttentionPlan& plan) {
  Kernel k = scanning_kernel(plan.method == AttentionPlan::decode ? "tq_decode_" : "tq_rows_", shape, plan);
  k.outputs = {"partial", "partial_sums"};
  k.source = attention_args(shape, settings) + cache_args(settings) +
             "  a.partial = partial, a.partial_sums = reinterpret_cast<float2*>(partial_sums);\n" +
             attention_call(shape, settings, plan);
  return k;
}

Kernel whole_kernel(const AttentionShape& shape, const AttentionSettings& settings, const AttentionPlan& plan) {
  Kernel k = scanning_kernel("tq_prefill_", shape, plan);
  k.inputs.insert(k.inputs.end(), {"sinks", "key_centre", "value_centre"});
  k.outputs = {"out"};
  k.source = attention_args(shape, settings) + cache_args(settings) + row_args(settings) + "  a.out = out;\n" +
             attention_call(shape, settings, plan);
  return k;
}

Kernel merge_kernel(const AttentionShape& shape, const AttentionSettings& settings, const AttentionPlan& plan) {
  Kernel k;
  k.name = "tq_merge";
  k.header = Source::merge;
  k.inputs = {"q", "key_scales", "partial", "partial_sums", "starts", "sinks", "key_centre", "value_centre"};
  k.outputs = {"out"};
  std::ostringstream o;
  o << attention_args(shape, settings) << row_args(settings)
    << "  a.partial = const_cast<float*>(partial);\n"
       "  a.partial_sums = reinterpret_cast<float2*>(const_cast<float*>(partial_sums));\n"
       "  a.out = out;\n"
       "  __shared__ __align__(16) float shared[turboquant::cuda::merge_shared_floats<"
    << shape.head_dim << ">()];\n  turboquant::cuda::merge_as<" << shape.head_dim << ", " << plan.rows << ", "
    << (plan.method == AttentionPlan::decode ? 32 : 64) << ">(a, q, blockIdx.x, partial_shape[0], shared);\n";
  k.source = o.str();
  k.block = {256, 1, 1};
  k.grid = {256 * shape.batch * shape.query_heads * shape.query_len, 1, 1};
  return k;
}

}  // namespace turboquant::cuda
