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
constexpr int kFewQueries = 8, kFewRows = 32;
// Beyond this head dimension fragments do not fit the registers, nor a block of keys threadgroup memory.
constexpr int kPrefillDim = 256;

// SIMD-groups wanted: sixteen for each of the 40 cores of the largest GPUs, while a split keeps at least two blocks for
// each of its SIMD-groups.  Fewer, longer splits write fewer partial results.
constexpr int kSimdgroupsWanted = 640, kMostSplits = 128;

bool is_few_rows(int group, int query_len, int head_dim) {
  return head_dim > kPrefillDim || (query_len <= kFewQueries && group * query_len <= kFewRows);
}

/// Rows that a threadgroup of the kernel for few rows serves: as many as registers hold.
int rows_of_tile(int rows, int head_dim) { return rows == 1 ? 1 : rows == 2 || head_dim > 256 ? 2 : 4; }

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

Params base_params(uint64_t seed) {
  Params p{};
  for (int w = 0; w < kParamCount - kSigns; ++w) p[kSigns + w] = int32_t(sign_word(seed, w));
  return p;
}

// Bodies.  MLX declares the arguments of a kernel by the names that occur in its body: an input by its own name, its
// strides as <name>_strides, and attributes such as thread_index_in_simdgroup.

/// A text with every NAME replaced.
std::string fill(std::string text, const std::vector<std::pair<std::string, std::string>>& names) {
  for (const auto& [name, value] : names) {
    for (size_t at; (at = text.find(name)) != std::string::npos;) text.replace(at, name.size(), value);
  }
  return text;
}

constexpr char kPlace[] = R"(
  using namespace turboquant;
  const Place place = {threadgroup_position_in_grid, ushort(thread_index_in_simdgroup),
                       ushort(simdgroup_index_in_threadgroup)};
)";
/// A SIMD-group takes one of params[kVectors] vectors or rows.
constexpr char kIndex[] = R"(
  const int index = int(place.group.x * 4 + place.simdgroup);
  if (index >= params[metal_layout::kVectors]) return;
)";

/// Encodes the side `NAME`.
constexpr char kEncodeSide[] = R"(
    encode_vector<CODING, D>(&shared, side(strided(NAME, NAME_strides), NAME_centre, flags & metal_layout::CENTRE),
                             encoded(NAME_codes, NAME_scales), params, index, place);
)";
constexpr char kEncodeSideWithFeedback[] = R"(
    encode_with_feedback<CODING, D>(
        &shared, side(strided(NAME, NAME_strides), NAME_centre, flags & metal_layout::CENTRE), NAME_feedback,
        flags & metal_layout::FEEDBACK, encoded(NAME_codes, NAME_scales), params, index, place);
)";
constexpr char kEncodeOne[] = R"(
  threadgroup EncodeShared<XC> shared;
  INDEX
  const int flags = params[metal_layout::kFlags];
  FIRST
)";
constexpr char kEncodeTwo[] = R"(
  threadgroup EncodeShared<XC || YC> shared;
  INDEX
  const int flags = params[metal_layout::kFlags];
  if (place.group.y == 0) {
    FIRST
  } else {
    SECOND
  }
)";
std::string encode_body(bool two, bool feedback) {
  const char* side = feedback ? kEncodeSideWithFeedback : kEncodeSide;
  const auto first =
      fill(side, {{"NAME", "x"}, {"CODING", "Coding<XB, XC>"}, {"CENTRE", "kCentre"}, {"FEEDBACK", "kFeedback"}});
  const auto second =
      fill(side,
           {{"NAME", "y"}, {"CODING", "Coding<YB, YC>"}, {"CENTRE", "kSecondCentre"}, {"FEEDBACK", "kSecondFeedback"}});
  return kPlace + fill(two ? kEncodeTwo : kEncodeOne, {{"INDEX", kIndex}, {"FIRST", first}, {"SECOND", second}});
}

constexpr char kDecode[] = R"(
  decode_vector<T, Coding<B, C>, D>(codes, scales, centre, out, params, index, place.lane);
)";

/// Arguments of both kinds of attention.
constexpr char kKeys[] = "packed(key_codes, key_codes_strides, key_scales, key_scales_strides)";
constexpr char kValues[] = "packed(value_codes, value_codes_strides, value_scales, value_scales_strides)";
constexpr char kRules[] = "rules_of<COPIES>(params, starts, mask, mask_strides)";
constexpr char kEnding[] = "ending(strided(q, q_strides), sinks, key_centre, value_centre)";

constexpr char kAttendFewRows[] = R"(
  typedef Coding<KB, KC> K;
  typedef Coding<VB, VC> V;
  threadgroup FewRowsShared<K, V, D, R> shared;
  attend_few_rows<K, V, D, R>(&shared, strided(q, q_strides), KEYS, VALUES, RULES, partials(partial, stats), place);
)";
constexpr char kAttendPrefill[] = R"(
  typedef Coding<KB, KC> K;
  typedef Coding<VB, VC> V;
  threadgroup PrefillShared<K, V, D> shared;
  attend_prefill<T, K, V, D, FINISH>(&shared, KEYS, VALUES, RULES, ENDING, partials(OUT, STATS), place);
)";
std::string attend_body(bool few_rows, bool merged) {
  // Without partial results their statistics are a name for something that is not touched.
  return kPlace + fill(few_rows ? kAttendFewRows : kAttendPrefill, {{"KEYS", kKeys},
                                                                    {"VALUES", kValues},
                                                                    {"RULES", kRules},
                                                                    {"ENDING", kEnding},
                                                                    {"OUT", merged ? "partial" : "out"},
                                                                    {"STATS", merged ? "stats" : "params"}});
}

constexpr char kMerge[] = R"(
  merge_splits<T, D>(partials(partial, stats), ENDING, out, params, index, place.lane);
)";
constexpr char kMergeWithCopies[] = R"(
  merge_with_copies<T, D>(partials(partial, stats), partials(copy_partial, copy_stats), ENDING, out, params, index,
                          place.lane);
)";

TemplateArg type_arg(Dtype dtype) { return {"T", Kind::dtype, int(dtype)}; }
TemplateArg dim_arg(int head_dim) { return {"D", Kind::integer, head_dim}; }

/// Bits and code as template arguments <name>B and <name>C.
void add_coding(Kernel& k, const std::string& name, const Coding& coding) {
  k.template_args.push_back({name + "B", Kind::integer, coding.bits});
  k.template_args.push_back({name + "C", Kind::integer, int(coding.code)});
}

/// How the rows of an attention are shared out.
struct Tiles {
  bool few_rows;
  int rows, count;  // of a tile; tiles of a KV head
  explicit Tiles(const AttentionShape& s) {
    const int group = s.query_heads / s.kv_heads, all = group * s.query_len;
    few_rows = is_few_rows(group, s.query_len, s.head_dim);
    rows = few_rows ? rows_of_tile(all, s.head_dim) : int(kTileRows);
    count = ceil_div(all, rows);
  }
  /// Splits of so many keys.
  int splits_of(const AttentionShape& s, int keys) const {
    const int simdgroups = few_rows ? kFewRowsSimdgroups : kSimdgroups;
    const int64_t threadgroups = std::max<int64_t>(1, int64_t(count) * s.kv_heads * s.batch);
    const int most = std::clamp(ceil_div(keys, 2 * kBlock * simdgroups), 1, kMostSplits);
    return int(std::clamp<int64_t>(kSimdgroupsWanted / simdgroups / threadgroups, 1, most));
  }
};

Output output_of(const AttentionShape& s) {
  return {"out", type_of(s.dtype), {s.batch, s.query_heads, s.query_len, s.head_dim}};
}

/// One launch of attention: over codes or over exact copies.
struct Pass {
  Coding keys, values;
  int splits;
  bool merged, copies;
};
Kernel attend_kernel(const AttentionShape& s, const Tiles& tiles, const Pass& pass) {
  Kernel k;
  k.inputs = {"q", "key_codes", "key_scales", "value_codes", "value_scales", "starts", "mask"};
  if (!tiles.few_rows) k.inputs.insert(k.inputs.end(), {"sinks", "key_centre", "value_centre"});
  k.inputs.push_back("params");
  k.source = attend_body(tiles.few_rows, pass.merged);
  if (pass.merged) {
    k.outputs = {{"partial", Type::float16, {s.batch, s.query_heads, s.query_len, pass.splits, s.head_dim}},
                 {"stats", Type::float32, {s.batch, s.query_heads, s.query_len, pass.splits, kStats}}};
  } else {
    k.outputs = {output_of(s)};
  }
  if (tiles.few_rows) {
    k.name = "turboquant_attend_few_rows";
    k.header = Source::few_rows;
    k.template_args = {dim_arg(s.head_dim), {"R", Kind::integer, tiles.rows}};
    k.grid = {tiles.count * kFewRowsThreads, pass.splits, s.batch * s.kv_heads};
    k.threadgroup = {kFewRowsThreads, 1, 1};
  } else {
    k.name = "turboquant_attend_prefill";
    k.header = Source::prefill;
    k.template_args = {type_arg(s.dtype), dim_arg(s.head_dim), {"FINISH", Kind::boolean, !pass.merged}};
    k.grid = {tiles.count * kThreads, s.kv_heads, s.batch * pass.splits};
  }
  add_coding(k, "K", pass.keys);
  add_coding(k, "V", pass.values);
  k.template_args.push_back({"COPIES", Kind::boolean, pass.copies});
  return k;
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
  const bool two = s.codings.size() == 2;
  // 32 coordinates are one block, to which feedback does nothing.
  const bool feedback = s.head_dim > group_size() && std::count(s.feedback.begin(), s.feedback.end(), true) > 0;
  const auto codes = [&](const char* name, int side) {
    return Output{name, Type::uint32, {s.batch, s.heads, s.tokens, words_per_vector(s.codings[side].bits, s.head_dim)}};
  };
  const auto scales = [&](const char* name) { return Output{name, Type::float16, {s.batch, s.heads, s.tokens}}; };
  Kernel k{.name = two ? "turboquant_encode_two" : "turboquant_encode",
           .header = Source::codec,
           .inputs = {"x", "x_centre"},
           .outputs = {codes("x_codes", 0), scales("x_scales")},
           .source = encode_body(two, feedback),
           .template_args = {dim_arg(s.head_dim)}};
  add_coding(k, "X", s.codings[0]);
  if (feedback) {
    k.name += "_feedback";
    k.inputs.push_back("x_feedback");
  }
  if (two) {
    k.inputs.insert(k.inputs.end(), {"y", "y_centre"});
    if (feedback) k.inputs.push_back("y_feedback");
    k.outputs.insert(k.outputs.end(), {codes("y_codes", 1), scales("y_scales")});
    add_coding(k, "Y", s.codings[1]);
  }
  k.inputs.push_back("params");
  k.grid = {ceil_div(int64_t(s.batch) * s.heads * s.tokens, kSimdgroups) * kThreads, two ? 2 : 1, 1};
  return k;
}

Kernel decode_kernel(const EncodeShape& s, Dtype dtype) {
  Kernel k{.name = "turboquant_decode",
           .header = Source::codec,
           .inputs = {"codes", "scales", "centre", "params"},
           .outputs = {{"out", type_of(dtype), {s.batch, s.heads, s.tokens, s.head_dim}}},
           .source = std::string(kPlace) + kIndex + kDecode,
           .template_args = {{"T", Kind::dtype, int(dtype)}, dim_arg(s.head_dim)},
           .grid = {ceil_div(int64_t(s.batch) * s.heads * s.tokens, kSimdgroups) * kThreads, 1, 1}};
  add_coding(k, "", s.codings[0]);
  return k;
}

AttentionPlan plan_attention(const AttentionShape& s) {
  const Tiles tiles(s);
  AttentionPlan plan{};
  plan.few_rows = tiles.few_rows;
  plan.copies = s.recent > 0 || s.first > 0;
  plan.splits = s.splits > 0 ? s.splits : tiles.splits_of(s, s.kv_len);
  plan.merged = plan.few_rows || plan.copies || plan.splits > 1;

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
  plan.attend = attend_kernel(s, tiles, {s.keys, s.values, plan.splits, plan.merged, false});
  plan.merge = {.name = "turboquant_merge",
                .header = Source::few_rows,
                .inputs = {"q", "partial", "stats", "sinks", "key_centre", "value_centre", "params"},
                .outputs = {output_of(s)},
                .source = std::string(kPlace) + kIndex + fill(kMerge, {{"ENDING", kEnding}}),
                .template_args = {type_arg(s.dtype), dim_arg(s.head_dim)},
                .grid = {ceil_div(p[kVectors], kSimdgroups) * kThreads, 1, 1}};
  if (plan.copies) {
    p[kRing] = s.ring;
    p[kRecent] = s.recent;
    p[kFirst] = s.first;
    p[kCopySplits] = tiles.splits_of(s, s.ring + s.first);
    plan.copy_params = p;
    plan.copy_params[kSplits] = p[kCopySplits];
    plan.copy_params[kFlags] |= kCopies;
    plan.attend_copies = attend_kernel(s, tiles, {s.exact, s.exact, p[kCopySplits], true, true});
    plan.merge.name += "_with_copies";
    plan.merge.inputs.insert(plan.merge.inputs.begin() + 3, {"copy_partial", "copy_stats"});
    plan.merge.source = std::string(kPlace) + kIndex + fill(kMergeWithCopies, {{"ENDING", kEnding}});
  }
  return plan;
}

const char* kernel_name(int query_heads, int kv_heads, int query_len, int head_dim) {
  return is_few_rows(query_heads / kv_heads, query_len, head_dim) ? "metal decode" : "metal prefill (simdgroup_matrix)";
}

}  // namespace turboquant::metal
