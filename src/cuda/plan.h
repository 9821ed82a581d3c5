// How the CUDA kernels are launched: sizes of grids, shared memory and workspaces, in plain C++.  The MLX layer, the
// tests and the benchmarks all launch through `kernels.h`, which uses this.
//
// Kernels (kernels.h builds each one's source; shapes in elements, all outputs dense):
//   encode   in  x0 [x1] (B, H, N, D) any float, any strides; centre0 [centre1] (H, D) f32 or a dummy
//            out codes0 [codes1] (B, H, N, bits D / 32) u32, scales0 [scales1] (B, H, N) f16
//   decode   in  codes (B, H, N, bits D / 32) u32, scales (B, H, N) f16, rows dense; centre;  out x (B, H, N, D)
//   attention, in two kernels:
//     partial  in  q (B, Hq, L, D) any strides; key_codes, value_codes (B, Hkv, >= N, bits D / 32) u32 and key_scales,
//                  value_scales (B, Hkv, >= N) f16 with dense rows, views allowed, N = key_scales' third size;
//                  starts (B) i32 or a dummy; mask (B, Hq, L, N) bool or float, any strides, or a dummy
//              out partial (slots, rows, D) f32, partial_sums (slots, rows, 2) f32
//     merge    in  q, key_scales, partial, partial_sums, starts, sinks (Hq) f32, key_centre and value_centre (Hkv, D)
//     f32
//              out out (B, Hq, L, D) of q's type
// A dummy is any array: the generated source never reads it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "turboquant/format.h"

namespace turboquant::cuda {

/// What a launch must know of the GPU.
struct Device {
  int multiprocessors = 132;
  int shared_bytes = 232448;  // largest dynamic shared memory of a block
};

struct AttentionShape {
  int batch, query_heads, kv_heads, query_len, kv_len, head_dim, key_bits, value_bits;
  bool ragged;  // has `starts`

  int rows() const { return query_heads / kv_heads * query_len; }  // query rows that read one KV head
};

/// Whether there are few rows, so that the cache and not arithmetic bounds the time.
inline bool decodes(const AttentionShape& s) { return s.query_len <= 8; }

/// Launch of `partial` and `merge`.
struct DecodePlan {
  int rows = 4;  // query rows that a block takes through the cache at once
  int warps = 8, stages = 3;
  int blocks = 1;
  int slots = 1;  // partial results: blocks + segments
  int shared_bytes = 0;
};

/// sizeof(Decode::Shared).
inline int decode_shared_bytes(const AttentionShape& s, const DecodePlan& p) {
  const int words = 32 * (words_per_vector(s.key_bits, s.head_dim) + words_per_vector(s.value_bits, s.head_dim)) + 32;
  const int bytes =
      p.warps * p.stages * words * 4 + p.warps * 32 * 8 + 2 * p.rows * s.head_dim + 12 * p.rows + 8 * p.warps * p.rows;
  return (bytes + 15) / 16 * 16;
}

inline DecodePlan plan_decode(const AttentionShape& s, const Device& device) {
  DecodePlan p;
  for (auto [warps, stages] : {std::pair{8, 3}, {8, 2}, {4, 3}, {4, 2}, {2, 2}}) {
    p.warps = warps, p.stages = stages;
    p.shared_bytes = decode_shared_bytes(s, p);
    if (p.shared_bytes <= device.shared_bytes) break;
  }
  const int64_t segments = int64_t(s.batch) * s.kv_heads * ((s.rows() + p.rows - 1) / p.rows);
  const int64_t tiles = (s.kv_len + 31) / 32;
  // Below four tiles a block, merging costs more than the shorter run saves.
  const int64_t useful = std::max<int64_t>(1, segments * tiles / 4);
  int64_t blocks = std::min<int64_t>(device.multiprocessors, useful);
  if (!s.ragged && segments <= blocks) {
    // Whole splits of every segment spare a block the change of segment, unless that leaves many processors idle.
    const int64_t whole = blocks / segments * segments;
    if (10 * whole >= 9 * blocks || blocks < device.multiprocessors) blocks = whole;
  }
  // Weights are summed in 32 bits: at most 32,768 tokens a warp.
  const int64_t least = (segments * tiles + 1024 * p.warps - 1) / (1024 * p.warps);
  p.blocks = int(std::max(blocks, least));
  p.slots = int(p.blocks + segments);
  return p;
}

}  // namespace turboquant::cuda
