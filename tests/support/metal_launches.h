// What the tests launch; the generator compiles a kernel for each.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "support/metal_launch.h"
#include "support/table.h"

namespace emulator {

using turboquant::Code;
using turboquant::Dtype;
using turboquant::MaskKind;
namespace metal = turboquant::metal;
using turboquant::cases::Case;

/// The shared table with every kind of codes, without or with its long rows.  Those are slow to emulate, so there is
/// none of 3 bits, which the functions of 4 read with smaller offsets, and the prompt has fewer keys, but as many
/// splits of them.  Without latent attention, which docs/limits.md says is not proven on Metal.
inline std::vector<Case> attention_cases(bool long_contexts) {
#ifdef TURBOQUANT_METAL_VARIANTS_ONLY
  (void)long_contexts;
  return {};
#else
  auto rows = turboquant::cases::table_trellis();
  for (const auto& more : {turboquant::cases::table_8bits(), turboquant::cases::table_wide(),
                           turboquant::cases::table_exact(), turboquant::cases::table(long_contexts)}) {
    rows.insert(rows.end(), more.begin(), more.end());
  }
  std::erase_if(rows, [](const Case& c) { return c.kv_len > 10000 && c.key_bits == 3; });
  for (Case& c : rows) {
    if (c.query_len > 100) c.kv_len = std::min(c.kv_len, 2100);
  }
  return rows;
#endif
}

/// Every kind of codes, and the kinds in threes that Latin squares combine.
inline std::vector<metal::Coding> all_codings() { return {2, 3, 4, {2, Code::trellis}, {3, Code::trellis}, 8}; }
inline std::vector<std::array<metal::Coding, 3>> threes_of_codings() {
  return {{2, 3, 4}, {metal::Coding{2, Code::trellis}, metal::Coding{3, Code::trellis}, 8}};
}

/// The rows to which special numbers are given, one for each kernel.
inline Case few_rows_case() {
  return {.head_dim = 256, .query_heads = 8, .kv_heads = 2, .query_len = 2, .kv_len = 290, .causal = true};
}
/// Both queries share a tile of rows, so that a key which only one of them sees is read for both.
inline Case shared_tile_case(const metal::Coding& coding) {
  Case c = few_rows_case();
  c.key_bits = c.value_bits = coding.bits;
  c.key_code = c.value_code = coding.code;
  c.query_heads = 4;
  return c;
}
inline Case prefill_case(const metal::Coding& coding) {
  Case c{.head_dim = 96, .query_heads = 8, .kv_heads = 2, .query_len = 17, .kv_len = 190, .causal = true};
  c.key_bits = c.value_bits = coding.bits;
  c.key_code = c.value_code = coding.code;
  return c;
}
inline std::vector<Case> special_cases() {
  const metal::Coding trellis{3, Code::trellis};
  return {few_rows_case(),     shared_tile_case(3), shared_tile_case(2), shared_tile_case(trellis),
          shared_tile_case(8), prefill_case(3),     prefill_case(8),     prefill_case(trellis)};
}

/// A row of our own, with its number of splits (0: as the plan chooses).
struct Variant {
  Case c;
  int splits;
};

/// Rows for kernels that the shared table leaves out.
///
/// A kernel's text is one template, so that what must be met is each place where a parameter changes the text, and
/// pairs of parameters that meet there.  Key bits are read by the unpacking of keys, the table of levels and the
/// scores' factor, value bits by the same on the other side (and so are the kinds of codes: bits stand for both), T by
/// the loads of the query, the output, and (prefill) the number of halves a query is kept in; float16 and bfloat16
/// differ in these conversions alone.  R is read with D by the sums over lanes.  FINISH, and whether there is a merge,
/// follow from the splits.  No statement reads three parameters.  For each head dimension the key bits take three
/// values, and the others follow by Latin squares, once with the scalar codes and once with trellis codes and 8 bits:
/// then of each three every pair of (D, key bits, value bits, T) and of (D, key bits, value bits, R) meets, and every D
/// both ends of a row.  The merge reads T and D alone: all 24 of its kernels are here.  Rules of visibility, sinks and
/// centres are run-time values of every kernel; they change from row to row.
inline std::vector<Variant> variants() {
  constexpr Dtype dtypes[] = {Dtype::float32, Dtype::float16, Dtype::bfloat16};
  constexpr MaskKind masks[] = {MaskKind::none, MaskKind::boolean, MaskKind::additive};
  std::vector<Variant> rows;
  // `all`: also two splits, and contexts that do not fill a block or fill several.
  const auto add = [&](const std::array<metal::Coding, 3>& codings, int d, int k, bool all) {
    Case c;
    c.head_dim = 32 * (d + 1);
    const auto &keys = codings[size_t(k)], &values = codings[size_t((k + d) % 3)];
    c.key_bits = keys.bits, c.key_code = keys.code;
    c.value_bits = values.bits, c.value_code = values.code;
    c.dtype = dtypes[(k + 2 * d) % 3];
    c.batch = 2;
    c.causal = (k + d) % 2 == 0;
    c.ragged = (k + d) % 4 < 2;
    c.sinks = (k + 2 * d) % 4 < 2;
    c.centred = d % 2 == 0;
    c.window = (k + d) % 5 == 4 ? 50 : 0;
    c.seed = uint64_t(100 + 3 * d + k);
    // A prefill of one row tile and a part of another; two heads, so that a mask's strides matter.
    c.query_heads = 6;
    c.kv_heads = 2;
    c.query_len = 13;
    c.kv_len = 75;
    rows.push_back({c, 1});
    if (all) rows.push_back({c, 2});
    // 1, 2 or 4 rows a threadgroup; once a token short of a block, twice with two blocks for some SIMD-groups.
    const int rows_of_tile = (2 * k + d) % 3;
    c.query_heads = rows_of_tile == 0 ? 2 : rows_of_tile == 1 ? 4 : 6;
    c.query_len = 1;
    c.mask = masks[(k + d) % 3];
    c.kv_len = 31;
    if (all) rows.push_back({c, 1});
    c.kv_len = 333;
    rows.push_back({c, 1});
    c.kv_len = 620;
    if (all) rows.push_back({c, 2});
  };
  for (const auto& codings : threes_of_codings()) {
    for (int d = 0; d < 8; ++d) {
      for (int k = 0; k < 3; ++k) add(codings, d, k, codings[0].code == Code::scalar);
    }
  }
  // The widths that models use, at the head dimension of the flagship, in 16 bits, all rules at once.
  for (Dtype dtype : {Dtype::float16, Dtype::bfloat16}) {
    for (const auto& coding : all_codings()) {
      Case c{.key_bits = coding.bits, .value_bits = coding.bits, .batch = 2, .query_heads = 8, .kv_heads = 2};
      c.key_code = c.value_code = coding.code;
      c.causal = c.ragged = c.sinks = c.centred = true;
      c.dtype = dtype;
      c.kv_len = 130;
      for (int query_len : {1, 40}) {
        c.query_len = query_len;
        rows.push_back({c, 1});
      }
    }
  }
  // Exact copies, whose kernels are those of the shared table.
  Case c{.batch = 2, .kv_len = 200, .ragged = true, .key_code = Code::trellis, .value_code = Code::trellis};
  c.recent = 40, c.first = 4, c.ring = 96;
  rows.push_back({c, 1});
  c = {.query_heads = 8, .kv_heads = 2, .query_len = 40, .kv_len = 190, .causal = true};
  c.recent = 128, c.first = 140,
  c.ring = 128;  // first tokens that the ring has too, and blocks of which the older are read
  rows.push_back({c, 2});
  return rows;
}

/// What the Python tests run on a device that is there: names of the shared table's rows and of our own, each once.
inline std::vector<std::string> names_for_python() {
  std::vector<Case> rows = turboquant::cases::table();
  for (const auto& v : variants()) rows.push_back(v.c);
  // In Python one kind of code serves both sides, where the width has it, and copies are a cache's.
  std::erase_if(rows, [](const Case& c) {
    const bool scalar[] = {c.key_bits < 4 && c.key_code == Code::scalar,
                           c.value_bits < 4 && c.value_code == Code::scalar};
    const bool trellis = c.key_code == Code::trellis || c.value_code == Code::trellis;
    return c.recent > 0 || (trellis && (scalar[0] || scalar[1]));
  });
  std::vector<std::string> names;
  for (const auto& c : rows) {
    if (std::find(names.begin(), names.end(), c.name()) == names.end()) names.push_back(c.name());
  }
  return names;
}

/// One encode, of one side or two.
struct CodecCase {
  int head_dim;
  std::vector<metal::Coding> sides;
  Dtype dtype = Dtype::float32;
  bool centred = false;
};
inline std::vector<CodecCase> codec_cases() {
  std::vector<CodecCase> cases;
  // All pairs of dimension, width and dtype; the kernel for two sides calls the same function twice.
  constexpr Dtype dtypes[] = {Dtype::float32, Dtype::float16, Dtype::bfloat16};
  for (const auto& coding : all_codings()) {
    for (int dim = 32; dim <= 512; dim += 32) {
      const int i = dim / 32 + coding.bits;
      cases.push_back({dim, {coding}, dtypes[i % 3], i % 2 == 0});
    }
    cases.push_back({32, {coding}});  // the golden bytes' kernel
  }
  const metal::Coding two{2, Code::trellis}, three{3, Code::trellis};
  cases.push_back({256, {3, 3}, Dtype::float16});
  cases.push_back({128, {4, 2}, Dtype::bfloat16, true});
  cases.push_back({96, {2, 3}, Dtype::float32, true});
  cases.push_back({256, {three, three}, Dtype::float16});
  cases.push_back({128, {8, two}, Dtype::bfloat16, true});
  return cases;
}

/// An encode with feedback, of one side or two.
struct FeedbackCase {
  struct Side {
    metal::Coding coding;
    bool feedback;
  };
  int head_dim;
  Dtype dtype;
  bool centred;  // the first side
  std::vector<Side> sides;
};
/// Every width at every dimension, in one dtype each, so that each dtype meets every width and dimension.  Feedback is
/// now the first, now the second side's alone.
inline std::vector<FeedbackCase> feedback_cases() {
  std::vector<FeedbackCase> cases;
  for (int dim = 32; dim <= 256; dim += 32) {
    for (const auto& codings : threes_of_codings()) {
      for (int k = 0; k < 3; ++k) {
        const int i = dim / 32 + 2 + k;
        FeedbackCase c{dim, Dtype(i % 3), i % 4 < 2, {{codings[size_t(k)], true}, {codings[size_t(2 - k)], false}}};
        if (i % 2) std::swap(c.sides[0], c.sides[1]);
        cases.push_back(c);
      }
    }
  }
  const metal::Coding three{3, Code::trellis};
  for (int dim : {288, 512}) cases.push_back({dim, Dtype::float16, true, {{three, true}, {3, true}}});
  cases.push_back({256, Dtype::float16, false, {{3, true}, {2, true}}});
  cases.push_back({256, Dtype::float16, false, {{three, true}, {three, true}}});
  for (const auto& coding : all_codings()) cases.push_back({128, Dtype(coding.bits % 3), true, {{coding, true}}});
  return cases;
}
/// The kernel for vectors that are coded alone and in company, at the flagship's size; and that for edge cases.
inline std::vector<FeedbackCase> feedback_company_cases() {
  return {{256, Dtype::float16, false, {{3, true}}},
          {256, Dtype::float16, false, {{metal::Coding{3, Code::trellis}, true}}}};
}
inline std::vector<FeedbackCase> feedback_edge_cases() {
  return {{96, Dtype::float32, false, {{4, true}}},
          {96, Dtype::float32, false, {{metal::Coding{2, Code::trellis}, true}}},
          {96, Dtype::float32, false, {{8, true}}}};
}

/// Sizes without data.
inline turboquant::AttendParams shape_of(const Case& c) {
  static const int there = 0;
  turboquant::AttendParams p;
  p.batch = c.batch;
  p.query_heads = c.query_heads;
  p.kv_heads = c.kv_heads;
  p.query_len = c.query_len;
  p.kv_len = c.kv_len;
  p.key_dim = c.head_dim;
  p.value_dim = c.value_width();
  p.q.dtype = p.out.dtype = p.mask_dtype = c.dtype;
  p.keys.bits = c.key_bits;
  p.keys.code = c.key_code;
  p.values.bits = c.value_bits;
  p.values.code = c.value_code;
  p.mask_kind = c.mask;
  if (c.ragged) p.starts = &there;
  static const float number = 0;
  if (c.sinks) p.sinks = &number;
  if (c.centred) p.key_centre = p.value_centre = &number;
  if (c.recent || c.first) {
    p.exact.keys.bits = p.exact.values.bits = c.exact_bits;
    p.exact.ring = c.ring, p.exact.recent = c.recent, p.exact.first = c.first;
  }
  return p;
}

/// Calls every operation that the tests call, for the recorder.
inline void record_launches() {
  for (const auto& c : attention_cases(true)) emulator::attend(shape_of(c));
  for (const auto& c : special_cases()) {
    for (int splits : {1, 2}) emulator::attend(shape_of(c), splits);
  }
  for (const auto& v : variants()) emulator::attend(shape_of(v.c), v.splits);
  for (const auto& c : codec_cases()) {
    turboquant::EncodeParams side;
    side.batch = side.heads = side.tokens = 1;
    side.head_dim = c.head_dim;
    side.x.dtype = c.dtype;
    static const float there = 0;
    if (c.centred) side.centre = &there;
    std::vector<turboquant::EncodeParams> sides;
    for (const auto& coding : c.sides) {
      side.out.bits = coding.bits;
      side.out.code = coding.code;
      sides.push_back(side);
    }
    emulator::encode(sides);
    turboquant::DecodeParams d;
    d.batch = d.heads = d.tokens = 1;
    d.head_dim = c.head_dim;
    d.in.bits = c.sides[0].bits;
    d.in.code = c.sides[0].code;
    d.out.dtype = c.dtype;
    if (c.centred) d.centre = &there;
    emulator::decode(d);
  }
  auto with_feedback = feedback_cases();
  for (const auto& more : {feedback_company_cases(), feedback_edge_cases()}) {
    with_feedback.insert(with_feedback.end(), more.begin(), more.end());
  }
  for (const auto& c : with_feedback) {
    static const float there = 0;
    static const uint16_t g = 0;
    std::vector<turboquant::EncodeParams> sides;
    for (const auto& side : c.sides) {
      turboquant::EncodeParams p;
      p.batch = p.heads = p.tokens = 1;
      p.head_dim = c.head_dim;
      p.x.dtype = c.dtype;
      if (c.centred && sides.empty()) p.centre = &there;
      if (side.feedback) p.feedback = &g;
      p.out.bits = side.coding.bits;
      p.out.code = side.coding.code;
      sides.push_back(p);
    }
    emulator::encode(sides);
  }
}

/// One token's decode: the flagship's 4 query heads to a KV head of 256, or 2 to one of 512.
inline Case cost_case(const metal::Coding& coding, int head_dim = 256) {
  return {.key_bits = coding.bits,
          .value_bits = coding.bits,
          .head_dim = head_dim,
          .query_heads = head_dim > 256 ? 2 : 4,
          .kv_len = 4096,
          .dtype = Dtype::float16,
          .key_code = coding.code,
          .value_code = coding.code};
}
/// The same with exact copies, as a cache hands them over.
inline Case cost_exact_case(const metal::Coding& coding) {
  Case c = cost_case(coding);
  c.recent = 128, c.first = 4, c.ring = 384;
  return c;
}
/// Vectors of 256 to encode.
inline turboquant::EncodeParams cost_encode(const metal::Coding& coding, int tokens, bool feedback) {
  static const uint16_t there = 0;
  turboquant::EncodeParams p;
  p.batch = p.heads = 1, p.tokens = tokens, p.head_dim = 256;
  p.x.dtype = Dtype::float16;
  p.out.bits = coding.bits, p.out.code = coding.code;
  if (feedback) p.feedback = &there;
  return p;
}
inline void record_cost_launches() {
  for (const auto& coding : all_codings()) {
    for (int head_dim : {256, 512}) emulator::attend(shape_of(cost_case(coding, head_dim)));
    for (bool feedback : {false, true}) emulator::encode({cost_encode(coding, 1, feedback)});
  }
  emulator::attend(shape_of(cost_exact_case({3, Code::trellis})));
}

}  // namespace emulator
