// How the CUDA kernels are launched: sizes of grids, shared memory and workspaces, in plain C++.  The MLX layer, the
// tests and the benchmarks all launch through `kernels.h`, which uses this.
//
// Kernels (kernels.h builds each one's source; shapes in elements, all outputs dense):
//   encode   in  per side x (B, H, N, D) any float, any strides; centre (H, D) f32 or a dummy; feedback (H, D, D) f16,
//                dense, or a dummy
//            out codes0 [codes1] (B, H, N, bits D / 32) u32, scales0 [scales1] (B, H, N) f16
//   append   in  per side x (B, H, N, D), centre, feedback, codes (B, H, capacity, bits D / 32) and scales (B, H,
//                capacity), views allowed; with exact copies then their codes and scales of each side, 8 bits, (B, H,
//                ring + first), of whose ring token t takes row t % ring; then before (n + 1) u8, whose size says that
//                token n is the first to write
//            out written (n + N + 1) u8, which nobody writes or reads: it stands for the codes and scales, which this
//                kernel overwrites in place although they are inputs
//   transform in  x (B, H, N, D) any float, any strides; matrix (M, D, D) f32; centre (M, D) f32 or a dummy
//            out y (B, H, N, D) f32
//   decode   in  codes (B, H, N, bits D / 32) u32, scales (B, H, N) f16, rows dense; centre;  out x (B, H, N, D)
//   attention: `partial` and `merge`, or `whole` alone (see AttentionPlan)
//     partial  in  q (B, Hq, L, D) any strides; key_codes, value_codes (B, Hkv, >= N, bits D / 32) u32 and key_scales,
//                  value_scales (B, Hkv, >= N) f16 with dense rows, views allowed; written (N + 1) u8, of which
//                  only the size is read; starts (B) i32 or a dummy; mask (B, Hq, L, N) bool or float, any strides, or
//                  a dummy
//                  with exact copies also exact_key_codes, exact_key_scales, exact_value_codes, exact_value_scales: as
//                  those of the cache, 8 bits, (B, Hkv, ring + first)
//              out partial (slots, rows, partial_floats) f32
//     merge    in  q, written, partial, starts, sinks (Hq) f32, key_centre and value_centre (Hkv, D) f32
//              out out (B, Hq, L, D) of q's type
//     whole    in  those of `partial`, then sinks, key_centre, value_centre;  out  out (B, Hq, L, D) of q's type
// A dummy is any array: the generated source never reads it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "turboquant/format.h"
#include "turboquant/turboquant.h"

namespace turboquant::cuda {

/// What a launch must know of the GPU.
struct Device {
  int multiprocessors = 132;
  int shared_bytes = 232448;  // largest dynamic shared memory of a block
};

struct AttentionShape {
  int batch, query_heads, kv_heads, query_len, kv_len, head_dim, key_bits, value_bits;
  bool ragged;  // has `starts`
  Code key_code = Code::scalar, value_code = Code::scalar;
  int recent = 0, first = 0;  // exact copies that are read beside the codes (ExactTier)
  int values = 0;             // head_dim of the values, if it is another

  int value_dim() const { return values ? values : head_dim; }
  bool copies() const { return recent > 0 || first > 0; }
  int rows() const { return query_heads / kv_heads * query_len; }  // query rows that read one KV head
};

/// Launch of an attention.
struct AttentionPlan {
  enum Method {
    few_rows,   // few_rows.cu.h: int8 products, four query rows a block; the cache is divided among blocks, then merged
    many_rows,  // many_rows.cu.h: the same for up to 32 query rows a block, which share the unpacked cache
    split,      // prefill.cu.h, divided and merged likewise
    whole,      // prefill.cu.h: a block of query rows goes through all tokens
  };
  Method method = few_rows;
  int rows = 4;                        // query rows of a block
  int warps = 8, stages = 3;           // of `few_rows` and `many_rows`
  int row_warps = 8, token_warps = 1;  // of the others: rows = 16 row_warps
  int blocks = 1;
  int splits = 0;        // of every segment, when they are divided evenly (schedule.cu.h), else 0
  int exact_splits = 0;  // splits that a segment's exact copies are read in
  int slots = 0;  // partial results: blocks, and segments unless divided evenly, and splits of copies; of `whole` none
  int shared_bytes = 0;

  bool int8() const { return method == few_rows || method == many_rows; }
  bool half_partials() const { return method == many_rows; }
  /// Floats of a row of partial results.
  int partial_floats(int head_dim) const { return (half_partials() ? head_dim / 2 : head_dim) + 4; }
  const char* kernel_name() const {
    return method == few_rows    ? "cuda int8 decode"
           : method == many_rows ? "cuda int8 rows"
           : method == split     ? "cuda fp16 split"
                                 : "cuda fp16 prefill";
  }
};

/// sizeof(SearchMemory<64>), and at most of TrellisFeedbackMemory.
constexpr int kTrellisSharedBytes = 46400, kTrellisFeedbackSharedBytes = 91136;

/// Bytes of LevelTables::Stored, at most.
inline int level_table_bytes(const AttentionShape& s) {
  const auto of = [](int bits, Code code) { return 8 * (bits == 3 && code == Code::trellis ? 10 : 1); };
  return of(s.key_bits, s.key_code) + of(s.value_bits, s.value_code);
}

/// What reading the exact copies takes for codes: 8 bits on both sides.
inline AttentionShape shape_of_copies(AttentionShape s) {
  s.key_bits = s.value_bits = 8;
  s.key_code = s.value_code = Code::scalar;
  s.recent = s.first = 0;
  return s;
}

/// The larger of what a kernel of `p` and the kernel for its exact copies share, which has one stage.
template <class Bytes>
int with_copies(const AttentionShape& s, AttentionPlan p, const Bytes& bytes) {
  const int of_codes = bytes(s, p);
  p.stages = 1;
  return s.copies() ? std::max(of_codes, bytes(shape_of_copies(s), p)) : of_codes;
}

/// sizeof(FewRows::Shared).
inline int few_rows_shared_bytes(const AttentionShape& s, const AttentionPlan& p) {
  const int words = 32 * (words_per_vector(s.key_bits, s.head_dim) + words_per_vector(s.value_bits, s.head_dim)) + 32;
  const int bytes = p.warps * p.stages * words * 4 + p.warps * 32 * 8 + 2 * p.rows * s.head_dim + 12 * p.rows +
                    8 * p.warps * p.rows + level_table_bytes(s);
  return (bytes + 15) / 16 * 16;
}

/// ManyRows::kKeySteps.
inline int key_steps(int head_dim) {
  const int groups = head_dim / 32;
  return groups > 2 ? (groups + 3) / 4 * 4 : groups == 2 ? 2 : 1;
}

/// sizeof(ManyRows::Shared).
inline int many_rows_shared_bytes(const AttentionShape& s, const AttentionPlan& p) {
  const int words =
      16 * (words_per_vector(s.key_bits, s.head_dim) + words_per_vector(s.value_bits, s.value_dim())) + 16;
  const int groups = s.value_dim() / 32 * (s.value_bits == 8 ? 2 : 1);  // and planes of passed values
  const int bytes = p.warps * p.stages * words * 4 + 64 * key_steps(s.head_dim) * p.rows +
                    2 * groups * (p.warps * 64 + 4) * 4 + 2 * (p.warps / 2) * 64 * p.rows + p.warps * 16 * 16 +
                    28 * p.rows + 8 * p.warps * p.rows + level_table_bytes(s) +
                    (p.stages == 1 ? 8 * p.rows : 8);  // ranges of first tokens
  return (bytes + 15) / 16 * 16;
}

/// sizeof(Prefill::Shared).
inline int prefill_shared_bytes(const AttentionShape& s, const AttentionPlan& p) {
  const int words = 32 * (words_per_vector(s.key_bits, s.head_dim) + words_per_vector(s.value_bits, s.head_dim)) + 32;
  const int tiles = 2 * (p.rows + 128) * (s.head_dim + 8), result = 4 * p.rows * (s.head_dim + 4);
  const int bytes = std::max(tiles, result) + 4 * words * 4 + 64 * 8 + 4 * p.rows + 8 * p.token_warps * p.rows;
  return (bytes + 15) / 16 * 16;
}

/// Divides `segments` of `tiles` tiles each among blocks: at least `least` tiles a block where that leaves enough to
/// do, and at most `most`, whose sums fit; uneven runs may have 32 more (schedule.cu.h), which fit, too.  Where splits
/// are short, a segment's exact copies are read in two splits.
inline void divide(const AttentionShape& s, const Device& device, int64_t segments, int64_t tiles, int least, int most,
                   AttentionPlan& p) {
  if (s.copies()) {
    const bool short_splits = segments * tiles < 12 * int64_t(device.multiprocessors);
    p.exact_splits = p.int8() && short_splits && !s.ragged ? 2 : 1;
  }
  const int64_t useful = std::max<int64_t>(1, segments * (tiles + least * p.exact_splits) / least);
  const int64_t blocks =
      std::max(std::min<int64_t>(device.multiprocessors, useful), (segments * tiles + most - 1) / most);
  // Equal splits of every segment spare a block the search for its run, unless that leaves many processors idle.
  const int64_t splits = blocks / segments;
  const bool even = !s.ragged && splits > 0 && segments <= 65535 &&  // columns of a grid
                    (10 * splits * segments >= 9 * blocks || blocks < device.multiprocessors) &&
                    splits * int64_t(most) >= tiles;
  p.splits = even ? int(splits) : 0;
  p.blocks = int(even ? splits * segments : blocks);
  p.slots = int((even ? p.blocks : blocks + segments) + segments * p.exact_splits);
}

inline AttentionPlan plan_few_rows(const AttentionShape& s, const Device& device) {
  AttentionPlan p;
  for (auto [warps, stages] : {std::pair{8, 3}, {8, 2}, {4, 3}, {4, 2}, {2, 2}}) {
    p.warps = warps, p.stages = stages;
    p.shared_bytes = with_copies(s, p, few_rows_shared_bytes);
    if (p.shared_bytes <= device.shared_bytes) break;
  }
  const int64_t segments = int64_t(s.batch) * s.kv_heads * ((s.rows() + p.rows - 1) / p.rows);
  const int64_t tiles = (s.kv_len + 31) / 32;
  // Below four tiles a block, merging costs more than the shorter run saves. Weights are summed in 32 bits: at most
  // 32,768 tokens a warp.
  divide(s, device, segments, tiles, 4, 1024 * p.warps, p);
  return p;
}

/// Tiles of all segments to a multiprocessor.
inline int64_t tiles_each(const AttentionShape& s, const Device& device) {
  return int64_t(s.batch) * s.kv_heads * ((s.kv_len + 31) / 32) / std::max(1, device.multiprocessors);
}

/// `many_rows`, if shared memory has room.  Sixteen warps hide more of each other's latencies where there is enough to
/// do, but have half the registers: enough for sixteen rows.
inline bool plan_many_rows(const AttentionShape& s, const Device& device, AttentionPlan& p) {
  p.method = AttentionPlan::many_rows;
  p.rows = (std::min(s.rows(), 32) + 7) / 8 * 8;
  for (auto [warps, stages] : {std::pair{16, 2}, {8, 3}, {8, 2}}) {
    if (warps == 16 && (p.rows > 16 || tiles_each(s, device) < 12)) continue;
    p.warps = warps, p.stages = stages;
    p.shared_bytes = with_copies(s, p, many_rows_shared_bytes);
    if (p.shared_bytes <= device.shared_bytes) break;
  }
  if (p.shared_bytes > device.shared_bytes) return false;
  const int64_t segments = int64_t(s.batch) * s.kv_heads * ((s.rows() + p.rows - 1) / p.rows);
  const int64_t tiles = (s.kv_len + 31) / 32;
  // Weights up to 255 times levels up to 104 are summed in 32 bits: at most 65,536 tokens a block.
  divide(s, device, segments, tiles, 4, 2048, p);
  return true;
}

/// Heads of more than 256 coordinates, and values of another dimension than keys: `many_rows` for any number of rows,
/// a block of them after the other.  A warp that sums more coordinates has registers for the sums of fewer rows.
inline AttentionPlan plan_wide(const AttentionShape& s, const Device& device) {
  AttentionPlan p;
  p.method = AttentionPlan::many_rows;
  const int wanted = (std::min(s.rows(), 32) + 7) / 8 * 8;
  bool fits = false;
  for (auto [warps, stages] : {std::pair{16, 2}, {8, 3}, {8, 2}, {8, 1}, {4, 2}, {4, 1}, {2, 1}}) {
    const int sums = std::max(1, s.value_dim() / 32 / warps);  // of groups of 32
    if (warps == 16 && (wanted > 16 || tiles_each(s, device) < 12)) continue;
    for (p.rows = std::min(wanted, 64 / sums / 8 * 8); p.rows >= 8 && !fits; p.rows -= fits ? 0 : 8) {
      p.warps = warps, p.stages = stages;
      p.shared_bytes = with_copies(s, p, many_rows_shared_bytes);
      fits = p.shared_bytes <= device.shared_bytes;
    }
    if (fits) break;
  }
  if (!fits) {
    throw std::invalid_argument("[attention] the GPU's shared memory is too small for head_dim " +
                                std::to_string(s.head_dim) + " and " + std::to_string(s.value_dim()));
  }
  const int64_t segments = int64_t(s.batch) * s.kv_heads * ((s.rows() + p.rows - 1) / p.rows);
  divide(s, device, segments, (s.kv_len + 31) / 32, 4, 2048, p);
  return p;
}

/// Most tiles to a multiprocessor of which up to four rows go through `many_rows`: there, on an H200, both kernels take
/// as long (32K tokens of four KV heads; 16K of trellis codes of 3 bits, which cost more to unpack, and beside exact
/// copies, which leave no room for sixteen warps).
inline int most_tiles_of_many_rows(const AttentionShape& s) {
  const auto trellis3 = [](int bits, Code code) { return bits == 3 && code == Code::trellis; };
  return s.copies() || trellis3(s.key_bits, s.key_code) || trellis3(s.value_bits, s.value_code) ? 14 : 31;
}

/// Heads of more than 128 coordinates (measured with 256): `many_rows` for up to 32 rows, but up to four rows over long
/// contexts go through `few_rows` (most_tiles_of_many_rows).  Smaller heads: up to twenty rows go through `few_rows`,
/// four at a time; six passes take as long as one over fp16 tiles.  More rows go through fp16 tiles; where shared
/// memory has no room for those (head_dim 256 below 112 KiB), all rows go through `few_rows`.
inline AttentionPlan plan_attention(const AttentionShape& s, const Device& device) {
  if (s.head_dim > 256 || s.value_dim() != s.head_dim) return plan_wide(s, device);
  AttentionPlan p;
  const bool many =
      s.rows() <= 32 && s.head_dim > 128 && (s.rows() > 4 || tiles_each(s, device) <= most_tiles_of_many_rows(s));
  if (many && plan_many_rows(s, device, p)) return p;
  if (s.rows() <= 20) return plan_few_rows(s, device);
  p = {};
  bool fits = false;
  for (int row_warps : {2, 4, 8}) {
    AttentionPlan next = p;
    next.row_warps = row_warps, next.token_warps = 8 / row_warps, next.rows = 16 * row_warps;
    next.shared_bytes = prefill_shared_bytes(s, next);
    if (next.shared_bytes > device.shared_bytes) break;
    p = next, fits = true;
    if (p.rows >= s.rows()) break;
  }
  if (!fits) return plan_few_rows(s, device);
  const int64_t segments = int64_t(s.batch) * s.kv_heads * ((s.rows() + p.rows - 1) / p.rows);
  const int64_t tiles = (s.kv_len + 63) / 64, waves = (segments + device.multiprocessors - 1) / device.multiprocessors;
  const bool full_waves = 20 * segments >= 17 * waves * device.multiprocessors;
  const bool triangular = 2 * s.query_len > s.kv_len && 2 * segments >= device.multiprocessors;
  const int64_t workspace = (device.multiprocessors + segments) * p.rows * (s.head_dim + 4) * 4;
  if (full_waves || triangular || workspace > (64 << 20)) {
    p.method = AttentionPlan::whole;
    p.blocks = int(segments);
    return p;
  }
  p.method = AttentionPlan::split;
  divide(s, device, segments, tiles, 2, 1 << 20, p);
  return p;
}

}  // namespace turboquant::cuda
