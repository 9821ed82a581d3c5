// Launch plans of the Metal kernels, and their bodies.
#include "metal/plan.h"

#include <algorithm>
#include <bit>

#include "turboquant/rotation.h"

namespace turboquant::metal {
namespace {

using namespace metal_layout;

using Kind = TemplateArg::Kind;

// Queries and rows (query, head) of a KV head up to which the kernel without matrix fragments is used, in tiles of four
// rows; docs/metal.md has the reasons.
constexpr int kDecodeQueries = 8, kDecodeRows = 32;

// SIMD-groups wanted: sixteen for each of the 40 cores of the largest GPUs, while a split keeps at least two blocks for
// each of its SIMD-groups.  Fewer, longer splits write fewer partial results.
constexpr int kSimdgroupsWanted = 640, kMostSplits = 128;

bool is_decode(int group, int query_len) { return query_len <= kDecodeQueries && group * query_len <= kDecodeRows; }

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

Params base_params(uint64_t seed) {
  Params p{};
  for (int w = 0; w < 8; ++w) p[kSigns + w] = int32_t(sign_word(seed, w));
  return p;
}

constexpr char kEncodeOne[] = R"(
  const uint v = threadgroup_position_in_grid.x * 4 + simdgroup_index_in_threadgroup;
  if (int(v) >= params[turboquant::metal_layout::kVectors]) return;
  const int flags = params[turboquant::metal_layout::kFlags];
  turboquant::encode_vector<XB, D>(x, x_strides, x_centre, flags & turboquant::metal_layout::kCentre, x_codes, x_scales,
                                   params, v, ushort(thread_index_in_simdgroup));
)";
constexpr char kEncodeTwo[] = R"(
  const uint v = threadgroup_position_in_grid.x * 4 + simdgroup_index_in_threadgroup;
  if (int(v) >= params[turboquant::metal_layout::kVectors]) return;
  const int flags = params[turboquant::metal_layout::kFlags];
  if (threadgroup_position_in_grid.y == 0) {
    turboquant::encode_vector<XB, D>(x, x_strides, x_centre, flags & turboquant::metal_layout::kCentre, x_codes,
                                     x_scales, params, v, ushort(thread_index_in_simdgroup));
  } else {
    turboquant::encode_vector<YB, D>(y, y_strides, y_centre, flags & turboquant::metal_layout::kSecondCentre, y_codes,
                                     y_scales, params, v, ushort(thread_index_in_simdgroup));
  }
)";
constexpr char kEncodeOneFeedback[] = R"(
  const uint v = threadgroup_position_in_grid.x * 4 + simdgroup_index_in_threadgroup;
  if (int(v) >= params[turboquant::metal_layout::kVectors]) return;
  const int flags = params[turboquant::metal_layout::kFlags];
  turboquant::encode_with_feedback<XB, D>(x, x_strides, x_centre, flags & turboquant::metal_layout::kCentre, x_feedback,
                                          flags & turboquant::metal_layout::kFeedback, x_codes, x_scales, params, v,
                                          ushort(thread_index_in_simdgroup));
)";
constexpr char kEncodeTwoFeedback[] = R"(
  const uint v = threadgroup_position_in_grid.x * 4 + simdgroup_index_in_threadgroup;
  if (int(v) >= params[turboquant::metal_layout::kVectors]) return;
  const int flags = params[turboquant::metal_layout::kFlags];
  if (threadgroup_position_in_grid.y == 0) {
    turboquant::encode_with_feedback<XB, D>(x, x_strides, x_centre, flags & turboquant::metal_layout::kCentre,
                                            x_feedback, flags & turboquant::metal_layout::kFeedback, x_codes, x_scales,
                                            params, v, ushort(thread_index_in_simdgroup));
  } else {
    turboquant::encode_with_feedback<YB, D>(y, y_strides, y_centre, flags & turboquant::metal_layout::kSecondCentre,
                                            y_feedback, flags & turboquant::metal_layout::kSecondFeedback, y_codes,
                                            y_scales, params, v, ushort(thread_index_in_simdgroup));
  }
)";
constexpr char kDecode[] = R"(
  const uint v = threadgroup_position_in_grid.x * 4 + simdgroup_index_in_threadgroup;
  if (int(v) >= params[turboquant::metal_layout::kVectors]) return;
  turboquant::decode_vector<T, B, D>(codes, scales, centre, out, params, v, ushort(thread_index_in_simdgroup));
)";
constexpr char kAttendDecode[] = R"(
  threadgroup turboquant::DecodeShared<KB, VB, D, R> shared;
  turboquant::attend_decode<KB, VB, D, R>(&shared, q, q_strides, key_codes, key_codes_strides, key_scales,
      key_scales_strides, value_codes, value_codes_strides, value_scales, value_scales_strides, starts, mask,
      mask_strides, partial, stats, params, threadgroup_position_in_grid, ushort(thread_index_in_simdgroup),
      ushort(simdgroup_index_in_threadgroup));
)";
constexpr char kAttendPrefill[] = R"(
  threadgroup turboquant::PrefillShared<D> shared;
  turboquant::attend_prefill<T, KB, VB, D, FINISH>(&shared, q, q_strides, key_codes, key_codes_strides, key_scales,
      key_scales_strides, value_codes, value_codes_strides, value_scales, value_scales_strides, starts, mask,
      mask_strides, sinks, key_centre, value_centre, OUT, STATS, params, threadgroup_position_in_grid,
      ushort(thread_index_in_simdgroup), ushort(simdgroup_index_in_threadgroup));
)";
constexpr char kMerge[] = R"(
  const int index = int(threadgroup_position_in_grid.x * 4 + simdgroup_index_in_threadgroup);
  if (index >= params[turboquant::metal_layout::kVectors]) return;
  turboquant::merge_splits<T, D>(q, q_strides, partial, stats, sinks, key_centre, value_centre, out, params, index,
                                 ushort(thread_index_in_simdgroup));
)";

std::string replace(std::string text, const std::string& from, const std::string& to) {
  return text.replace(text.find(from), from.size(), to);
}

}  // namespace

Type type_of(Dtype dtype) {
  return dtype == Dtype::float16 ? Type::float16 : dtype == Dtype::bfloat16 ? Type::bfloat16 : Type::float32;
}

Params encode_params(const EncodeShape& s) {
  Params p = base_params(s.seed);
  p[kVectors] = s.batch * s.heads * s.tokens;
  p[kTokens] = s.tokens;
  p[kHeads] = s.heads;
  for (size_t i = 0; i < s.centred.size(); ++i) {
    if (s.centred[i]) p[kFlags] |= i == 0 ? kCentre : kSecondCentre;
  }
  for (size_t i = 0; i < s.feedback.size(); ++i) {
    if (s.feedback[i]) p[kFlags] |= i == 0 ? kFeedback : kSecondFeedback;
  }
  return p;
}

Kernel encode_kernel(const EncodeShape& s) {
  const bool two = s.bits.size() == 2;
  // 32 coordinates are one block, to which feedback does nothing.
  const bool feedback = s.head_dim > group_size() && std::count(s.feedback.begin(), s.feedback.end(), true) > 0;
  const auto codes = [&](const char* name, int side) {
    return Output{name, Type::uint32, {s.batch, s.heads, s.tokens, words_per_vector(s.bits[side], s.head_dim)}};
  };
  const auto scales = [&](const char* name) { return Output{name, Type::float16, {s.batch, s.heads, s.tokens}}; };
  Kernel k{.name = two ? "turboquant_encode_two" : "turboquant_encode",
           .header = Source::codec,
           .inputs = {"x", "x_centre"},
           .outputs = {codes("x_codes", 0), scales("x_scales")},
           .source = two ? kEncodeTwo : kEncodeOne,
           .template_args = {{"D", Kind::integer, s.head_dim}, {"XB", Kind::integer, s.bits[0]}}};
  if (feedback) {
    k.name += "_feedback";
    k.source = two ? kEncodeTwoFeedback : kEncodeOneFeedback;
    k.inputs.push_back("x_feedback");
  }
  if (two) {
    k.inputs.insert(k.inputs.end(), {"y", "y_centre"});
    if (feedback) k.inputs.push_back("y_feedback");
    k.outputs.insert(k.outputs.end(), {codes("y_codes", 1), scales("y_scales")});
    k.template_args.push_back({"YB", Kind::integer, s.bits[1]});
  }
  k.inputs.push_back("params");
  k.grid = {ceil_div(int64_t(s.batch) * s.heads * s.tokens, kSimdgroups) * kThreads, two ? 2 : 1, 1};
  return k;
}

Kernel decode_kernel(const EncodeShape& s, Dtype dtype) {
  return {.name = "turboquant_decode",
          .header = Source::codec,
          .inputs = {"codes", "scales", "centre", "params"},
          .outputs = {{"out", type_of(dtype), {s.batch, s.heads, s.tokens, s.head_dim}}},
          .source = kDecode,
          .template_args = {{"T", Kind::dtype, int(dtype)},
                            {"B", Kind::integer, s.bits[0]},
                            {"D", Kind::integer, s.head_dim}},
          .grid = {ceil_div(int64_t(s.batch) * s.heads * s.tokens, kSimdgroups) * kThreads, 1, 1}};
}

AttentionPlan plan_attention(const AttentionShape& s) {
  const int group = s.query_heads / s.kv_heads, rows = group * s.query_len;
  AttentionPlan plan{};
  plan.decode = is_decode(group, s.query_len);
  const int simdgroups = plan.decode ? kDecodeSimdgroups : kSimdgroups;
  const int of_tile = !plan.decode ? int(kTileRows) : rows == 1 ? 1 : rows == 2 ? 2 : 4;
  const int tiles = ceil_div(rows, of_tile);
  const int64_t threadgroups = std::max<int64_t>(1, int64_t(tiles) * s.kv_heads * s.batch);
  const int most = std::clamp(ceil_div(s.kv_len, 2 * kBlock * simdgroups), 1, kMostSplits);
  plan.splits =
      s.splits > 0 ? s.splits : int(std::clamp<int64_t>(kSimdgroupsWanted / simdgroups / threadgroups, 1, most));
  plan.merged = plan.decode || plan.splits > 1;

  Params& p = plan.params = base_params(s.seed);
  p[kKvLen] = s.kv_len;
  p[kQueryLen] = s.query_len;
  p[kQueryHeads] = s.query_heads;
  p[kKvHeads] = s.kv_heads;
  p[kSplits] = plan.splits;
  p[kWindow] = s.window;
  p[kScale] = std::bit_cast<int32_t>(s.scale);
  p[kVectors] = s.batch * s.query_heads * s.query_len;
  p[kFlags] = (s.causal ? kCausal : 0) | (s.starts ? kStarts : 0) | (s.sinks ? kSinks : 0) |
              (s.key_centre ? kKeyCentre : 0) | (s.value_centre ? kValueCentre : 0) |
              (s.mask == MaskKind::boolean    ? kBooleanMask
               : s.mask == MaskKind::additive ? kAdditiveMask
                                              : 0);

  const TemplateArg type{"T", Kind::dtype, int(s.dtype)}, dim{"D", Kind::integer, s.head_dim};
  Kernel& k = plan.attend;
  k.inputs = {"q", "key_codes", "key_scales", "value_codes", "value_scales", "starts", "mask"};
  if (!plan.decode) k.inputs.insert(k.inputs.end(), {"sinks", "key_centre", "value_centre"});
  k.inputs.push_back("params");
  const Output out{"out", type_of(s.dtype), {s.batch, s.query_heads, s.query_len, s.head_dim}};
  if (plan.merged) {
    k.outputs = {{"partial", Type::float16, {s.batch, s.query_heads, s.query_len, plan.splits, s.head_dim}},
                 {"stats", Type::float32, {s.batch, s.query_heads, s.query_len, plan.splits, kStats}}};
  } else {
    k.outputs = {out};
  }
  if (plan.decode) {
    k.name = "turboquant_attend_decode";
    k.header = Source::decode;
    k.source = kAttendDecode;
    k.template_args = {
        {"KB", Kind::integer, s.key_bits}, {"VB", Kind::integer, s.value_bits}, dim, {"R", Kind::integer, of_tile}};
    k.grid = {tiles * kDecodeThreads, plan.splits, s.batch * s.kv_heads};
    k.threadgroup = {kDecodeThreads, 1, 1};
  } else {
    k.name = "turboquant_attend_prefill";
    k.header = Source::prefill;
    // Without partial results `stats` is a name for something that is not touched.
    k.source = replace(replace(kAttendPrefill, "OUT", plan.merged ? "partial" : "out"), "STATS",
                       plan.merged ? "stats" : "params");
    k.template_args = {type,
                       {"KB", Kind::integer, s.key_bits},
                       {"VB", Kind::integer, s.value_bits},
                       dim,
                       {"FINISH", Kind::boolean, !plan.merged}};
    k.grid = {tiles * kThreads, s.kv_heads, s.batch * plan.splits};
  }
  plan.merge = {.name = "turboquant_merge",
                .header = Source::decode,
                .inputs = {"q", "partial", "stats", "sinks", "key_centre", "value_centre", "params"},
                .outputs = {out},
                .source = kMerge,
                .template_args = {type, dim},
                .grid = {ceil_div(p[kVectors], kSimdgroups) * kThreads, 1, 1}};
  return plan;
}

const char* route(int query_heads, int kv_heads, int query_len) {
  return is_decode(query_heads / kv_heads, query_len) ? "metal decode" : "metal prefill (simdgroup_matrix)";
}

}  // namespace turboquant::metal
