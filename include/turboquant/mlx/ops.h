// The codec and attention as lazy operations over MLX arrays.
//
// On the CPU each operation is an MLX primitive over the core library; on a GPU it is a graph of MLX custom kernels
// (gpu.h).  All are evaluated on the stream given, and can stand inside mx.compile; vmap and gradients are refused.
// Errors are std::invalid_argument, thrown when the graph is built, naming the operation, the rule and the value found.
#pragma once

#include <mlx/mlx.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "turboquant/turboquant.h"

namespace turboquant::ops {

namespace mx = mlx::core;

/// How the vectors of one side are coded: 2, 3, 4 or 8 bits a coordinate, at 2 and 3 by a trellis unless scalar codes
/// are asked for.
struct Width {
  int bits;
  Code code;
  Width(int bits = 3, Code code = Code::trellis) : bits(bits), code(bits <= 3 ? code : Code::scalar) {}
  bool operator==(const Width&) const = default;
};

/// How the vectors of one side, keys or values, are coded: all that `encode` needs besides them, and `decode` besides
/// the codes.
struct Coding {
  Width width = {};
  uint64_t seed = 0;                       // of the random signs
  std::optional<mx::array> centre = {};    // (H, D), taken from every vector of head H
  std::optional<mx::array> feedback = {};  // (H, D, D) float16, feeds errors forward; only encoding reads it

  int bits() const { return width.bits; }
};

/// Packed vectors as MLX arrays: uint32 codes (..., tokens, bits * D / 32) and float16 scales (..., tokens).
struct PackedArrays {
  mx::array codes;
  mx::array scales;
};

/// Encodes x (..., D), float16, bfloat16 or float32 (EncodeParams in turboquant/turboquant.h).  With a centre or
/// feedback, their heads are the third axis from the end of x (B, H, N, D).
PackedArrays encode(const mx::array& x, const Coding& coding, mx::StreamOrDevice s = {});

/// Both sides of a cache at once, of one seed: keys (B, H, N, D) and values (B, H, N, D_v), where D_v may be 0.  One
/// kernel on a GPU if D_v = D.
std::pair<PackedArrays, PackedArrays> encode_kv(const mx::array& keys, const mx::array& values,
                                                const Coding& key_coding, const Coding& value_coding,
                                                mx::StreamOrDevice s = {});

/// (x - centre) W of vectors x (B, H, N, D), float16, bfloat16 or float32, with a matrix (H_m, D, D) float32 for each
/// of H_m equal groups of heads and a centre (H_m, D): (B, H, N, D) float32.  On the CPU a vector's numbers do not
/// depend on what else is in the call; on a GPU they are MLX's products.
mx::array transform(const mx::array& x, const mx::array& matrix, const std::optional<mx::array>& centre = std::nullopt,
                    mx::StreamOrDevice s = {});

/// Whether `append_kv` can serve these arrays on this stream: CUDA, and no transformation is being traced.  It also
/// needs keys and values of one head_dim.
bool can_append_in_place(const std::vector<mx::array>& arrays, mx::Stream stream);

/// Exact copies beside the codes, (B, H_kv, ring + first, ...) of 8 bits: ExactTier in turboquant/turboquant.h.
struct ExactArrays {
  PackedArrays keys, values;
};

/// Where `append_kv` writes: codes (B, H, capacity, ...) and, if given, the ring of exact copies, behind which there
/// are slots of `first` tokens.
struct AppendBuffers {
  PackedArrays keys, values;
  std::optional<ExactArrays> exact = {};
  int first = 0;
};

/// As encode_kv, into buffers from a token on, in place (token t of exact copies goes into slot t % ring): one kernel
/// instead of five, and no copy of the buffers while something else reads them.  The arrays given stay the ones that
/// hold the codes; what reads the new tokens must take the array returned, `written` (tokens held + 1,), as an input
/// too.  `before` is what an earlier call returned, or any uint8 array whose size less one is the first token to write.
/// The caller makes sure that nobody else counts on the tokens overwritten.
mx::array append_kv(const mx::array& keys, const mx::array& values, const Coding& key_coding,
                    const Coding& value_coding, const AppendBuffers& to, const mx::array& before,
                    mx::StreamOrDevice s = {});

/// An array (n + 1,) for `before` and `written` when there is nothing to wait for.
mx::array nothing_to_wait_for(int n, mx::StreamOrDevice s = {});

/// Decodes to (..., D) of `dtype`.
mx::array decode(const PackedArrays& packed, const Coding& coding, mx::Dtype dtype = mx::float32,
                 mx::StreamOrDevice s = {});

/// How attention reads its inputs.  See AttendParams in turboquant/turboquant.h for the meaning of each rule.
struct AttentionOptions {
  float scale = 1;
  Coding keys, values;      // of one seed; centres (H_kv, D)
  int kv_len = -1;          // tokens to read of each buffer; -1: all
  bool dense_rows = false;  // promise: vectors follow each other densely in memory, as a cache's do (GPUs cannot look)
  bool causal = false;
  int window = 0;
  std::optional<mx::array> mask;     // broadcastable to (B, H_q, L, N): bool, or a float that is added
  std::optional<mx::array> starts;   // (B,) int32: first visible token of each row
  std::optional<mx::array> sinks;    // (H_q,)
  const char** kernel = nullptr;     // receives the name of the kernel that was chosen, a literal, to be shown
  std::optional<mx::array> written;  // of append_kv, to be waited for; (kv_len + 1,)
  std::optional<ExactArrays> exact;  // what of it is read: `recent` and `first` of ExactTier
  int recent = 0, first = 0;
};

/// Whether attention on this stream can read exact copies.
bool reads_exact_copies(mx::StreamOrDevice s = {});

/// Attention of q (B, H_q, L, D) over packed keys and values (B, H_kv, N, ...); returns (B, H_q, L, D_v) of q's dtype.
/// `values` may be `keys` (latent attention).
mx::array attention(const mx::array& q, const PackedArrays& keys, const PackedArrays& values,
                    const AttentionOptions& options, mx::StreamOrDevice s = {});

}  // namespace turboquant::ops
