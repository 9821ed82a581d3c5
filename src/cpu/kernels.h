// What an instruction set provides: a table of kernels over plain pointers.  The driver (attention.cpp, codec.cpp)
// splits the work and knows about threads; the kernels know neither.
//
// The files that implement the table are compiled for processors that may not be the one at hand, so they must not
// emit any function that another file could be linked against: their code is in unnamed namespaces (kernel headers
// included) and calls nothing inline from elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "turboquant/turboquant.h"

namespace turboquant::cpu {

constexpr int kBlock = 128;    // tokens attended at a time: 16 KiB of nibbles of keys, of values, at head_dim 256
constexpr int kTileRows = 64;  // query rows attended at a time
constexpr int kMaxDim = 512;   // coordinates of a vector

/// What codes are: their width, and whether they are paths through a trellis.
struct Kind {
  int bits;
  bool trellis;
  bool operator==(const Kind&) const = default;
};

/// Packed vectors of one head.
struct PackedHead {
  const uint32_t* codes;
  const uint16_t* scales;
  int dim;
  Kind kind;
};

/// Tokens that lie one after the other in memory.
struct Range {
  int begin, end, kv_len;                 // kv_len: the token before which memory ends
  int shift;                              // token t is row t + shift of the buffers
  int first[kTileRows], last[kTileRows];  // tokens of the range that each row may see: [first, last)
};
constexpr int kMaxRanges = 3;

/// Query rows [rows, keys.dim] against ranges of tokens of one KV head.
struct Tile {
  int rows, ranges;
  Range range[kMaxRanges];
  PackedHead keys, values;
  float scale;  // of the scores
  Dtype q_dtype;
  const void* q[kTileRows];  // of each row, keys.dim numbers
  const float* signs;        // [keys.dim] +-1
  /// Adds the mask of `row` to scores [t, t + n) (base-2 logarithms); null: no mask.
  void (*add_mask)(const void* context, int row, int t, int n, float* scores);
  const void* context;
  std::byte* workspace;    // workspace_bytes of the other fields, 64-byte aligned
  float *max, *sum, *acc;  // out: [rows] base-2 maximum and sum, [rows, values.dim] weighted values, rotated basis
};

/// `count` vectors of one head.
struct EncodeVectors {
  int dim, count;
  Kind kind;
  const void* x;
  Dtype dtype;
  int64_t stride;                      // in elements
  const float* centre;                 // [dim] or null
  const float* signs;                  // [dim] +-1
  const uint16_t* feedback = nullptr;  // [dim, dim] float16, of encode_feedback alone
  uint32_t* codes;
  uint16_t* scales;
};
struct DecodeVectors {
  int dim, count;
  PackedHead in;
  const float* centre;
  const float* signs;
  void* out;
  Dtype dtype;
  int64_t stride;
};

/// `count` vectors of one head, by one matrix.
struct TransformVectors {
  int dim, count;
  const void* x;
  Dtype dtype;
  int64_t stride;       // of x, in elements
  const float* centre;  // [dim] or null
  const float* matrix;  // [dim, dim]
  float* out;
  int64_t out_stride;
};

struct Kernels {
  const char* name;
  bool (*runs_here)();
  size_t (*workspace_bytes)(const Tile&);
  void (*attend)(const Tile&);
  void (*encode)(const EncodeVectors&);
  void (*encode_feedback)(const EncodeVectors&);  // dim > 32
  void (*decode)(const DecodeVectors&);
  void (*transform)(const TransformVectors&);
  void (*hadamard)(float* x, int dim);  // the symmetric orthonormal H of rotation.h, in place
};

/// The one in use.
const Kernels& kernels();

extern const Kernels scalar_kernels, avx2_kernels, avx_vnni_kernels, avx512_kernels, avx512_vbmi_kernels, neon_kernels;

}  // namespace turboquant::cpu
