// What the tests launch; the generator compiles a kernel for each.
#pragma once

#include <vector>

#include "cases.h"
#include "launch.h"

namespace emulator {

using turboquant::Dtype;
using turboquant::MaskKind;
using turboquant::cases::Case;

/// The shared table, without or with its long rows.
inline std::vector<Case> attention_cases(bool long_contexts) { return turboquant::cases::table(long_contexts); }

/// One encode of two sides.
struct CodecCase {
  int head_dim, bits, second_bits;  // second_bits 0: one side
  Dtype dtype = Dtype::float32;
  bool centred = false;
};
inline std::vector<CodecCase> codec_cases() {
  std::vector<CodecCase> cases;
  for (int bits : {2, 3, 4}) {
    for (int dim : {32, 64, 96, 128, 160, 192, 224, 256}) cases.push_back({dim, bits, 0});
  }
  cases.push_back({256, 3, 3, Dtype::float16});
  cases.push_back({128, 4, 2, Dtype::bfloat16, true});
  cases.push_back({96, 2, 3, Dtype::float32, true});
  return cases;
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
  p.head_dim = c.head_dim;
  p.q.dtype = p.out.dtype = p.mask_dtype = c.dtype;
  p.keys.bits = c.key_bits;
  p.values.bits = c.value_bits;
  p.mask_kind = c.mask;
  if (c.ragged) p.starts = &there;
  static const float number = 0;
  if (c.sinks) p.sinks = &number;
  if (c.centred) p.key_centre = p.value_centre = &number;
  return p;
}

/// Calls every operation that the tests call, for the recorder.
inline void record_launches() {
  for (const auto& c : attention_cases(true)) emulator::attend(shape_of(c));
  for (const auto& c : codec_cases()) {
    turboquant::EncodeParams side;
    side.batch = side.heads = side.tokens = 1;
    side.head_dim = c.head_dim;
    side.x.dtype = c.dtype;
    static const float there = 0;
    if (c.centred) side.centre = &there;
    side.out.bits = c.bits;
    std::vector<turboquant::EncodeParams> sides{side};
    if (c.second_bits) {
      sides.push_back(side);
      sides[1].out.bits = c.second_bits;
    }
    emulator::encode(sides);
    turboquant::DecodeParams d;
    d.batch = d.heads = d.tokens = 1;
    d.head_dim = c.head_dim;
    d.in.bits = c.bits;
    d.out.dtype = c.dtype;
    if (c.centred) d.centre = &there;
    emulator::decode(d);
  }
}

/// The flagship's decode: 4 query heads to a KV head of 256, one token.
inline Case cost_case(int bits) {
  return {.key_bits = bits, .value_bits = bits, .query_heads = 4, .kv_len = 4096, .dtype = Dtype::float16};
}
inline void record_cost_launches() {
  for (int bits : {2, 3, 4}) emulator::attend(shape_of(cost_case(bits)));
}

}  // namespace emulator
