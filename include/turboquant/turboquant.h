// TurboQuant: key and value vectors as 2-, 3-, 4- or 8-bit codes, and attention that reads the codes.
//
// arXiv 2504.19874 (the MSE quantizer, section 3): a vector's norm is split off, a randomized rotation makes its
// coordinates nearly Gaussian, and each is rounded to a Lloyd-Max codebook, or all of a group together to the nearest
// sequence of a trellis.  Attention rotates the query once, works in the rotated basis, and rotates its result back
// once.
//
// All functions throw std::invalid_argument before they write anything when an argument breaks a rule; the message
// names the operation, the rule and the value found.  They are thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "turboquant/format.h"

namespace turboquant {

enum class Dtype : uint8_t { float32, float16, bfloat16 };

/// How coordinates become codes (format.h): each by itself, or 32 of them by a path through a trellis, which errs by a
/// third less in the same bytes.  A trellis needs 2 or 3 bits.
enum class Code : uint8_t { scalar, trellis };

/// Numbers [batch, heads, tokens, head_dim]; the last axis is dense, strides are in elements.
template <class Pointer>
struct BasicTensor {
  Pointer data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
};
using Tensor = BasicTensor<const void*>;
using MutableTensor = BasicTensor<void*>;

/// Packed vectors: codes [batch, heads, tokens, words_per_vector] and fp16 scales [batch, heads, tokens].  Rows follow
/// each other densely; batch and head strides are in words (codes) and in elements (scales), so a view of the first
/// tokens of a larger buffer works.
template <class Codes, class Scales>
struct BasicPacked {
  Codes codes = nullptr;
  Scales scales = nullptr;
  int bits = 3;
  int64_t codes_batch_stride = 0, codes_head_stride = 0;
  int64_t scales_batch_stride = 0, scales_head_stride = 0;
  Code code = Code::scalar;
};
using Packed = BasicPacked<const uint32_t*, const uint16_t*>;
using MutablePacked = BasicPacked<uint32_t*, uint16_t*>;

/// What `encode` does.  For each vector x (less its head's centre):
///   r = H (s * x),  codes = those of the levels nearest to r * unit / rms(r),  scale = |x| / |levels| (so that
///   |x^| = |x|).
/// Nearest means: for scalar codes, each coordinate's nearest level; at 8 bits unit / rms(r) is 127 / max |r_i|.  For
/// trellis codes, the path of each group of 32 coordinates with the least squared error of all 2^32, where a target
/// beyond `trellis_limit` counts as that.
/// A zero vector has scale 0.  NaN propagates: a vector that holds NaN or infinity gets the scale NaN and codes 0.
/// A scale beyond fp16's range saturates to `largest_scale()`: the decoded vector keeps its direction and is too short.
///
/// With `feedback`, G, the errors of coordinates coded earlier move those coded later (docs/algorithm.md says how G is
/// made and why; noise shaping, or the successive quantization of GPTQ, arXiv 2210.17323).  Everything is in levels:
///   u = r / s0,  with s0 = |r| / |levels of the nearest codes| for scalar codes, rms(r) / feedback_unit for trellis
///   codes;  then for each block b of 32 coordinates, in order,
///   t_b = u_b - G[b, <b] e_<b,   codes_b = those nearest to t_b,   e_b = their levels - u_b (not - t_b);
/// and the scale is |x| / |levels| of these codes.  A vector of 32 coordinates is one block: feedback does nothing to
/// it.  Zero vectors, NaN and infinity are as above.  Only columns < 32 * (row / 32) of G are read; they must be
/// finite.
struct EncodeParams {
  int batch = 0, heads = 0, tokens = 0, head_dim = 0;
  uint64_t seed = 0;                   // of the signs
  Tensor x;                            // [batch, heads, tokens, head_dim]
  const float* centre = nullptr;       // [heads, head_dim], taken from every vector; null: none
  const uint16_t* feedback = nullptr;  // [heads, head_dim, head_dim] float16, row-major; null: none
  MutablePacked out;
};

/// What `decode` does: x^ = s * H (scale * levels) + centre.  Numbers beyond the range of a float16 output saturate.
struct DecodeParams {
  int batch = 0, heads = 0, tokens = 0, head_dim = 0;
  uint64_t seed = 0;
  Packed in;
  const float* centre = nullptr;  // [heads, head_dim]
  MutableTensor out;              // [batch, heads, tokens, head_dim]
};

/// What `transform` does: y = (x - c) W, vectors as rows, with a matrix W for each of `matrices` equal groups of heads.
/// Balanced keys are coded this way (docs/algorithm.md): W takes keys to what is coded, the transpose of its inverse
/// takes queries along, so that their products stay, and its inverse takes decoded keys back.  A vector's arithmetic
/// does not depend on the others in the call.
struct TransformParams {
  int batch = 0, heads = 0, tokens = 0, head_dim = 0;
  int matrices = 1;               // head h takes matrix h / (heads / matrices)
  Tensor x;                       // [batch, heads, tokens, head_dim]
  const float* centre = nullptr;  // [matrices, head_dim], taken from every vector; null: none
  const float* matrix = nullptr;  // [matrices, head_dim, head_dim], row-major
  MutableTensor out;              // as x; its dtype must be float32
};

enum class MaskKind : uint8_t {
  none,
  boolean,   // one byte a pair; zero hides the key
  additive,  // a number added to the scaled score; minus infinity hides the key
};

/// Copies of a row's newest and first tokens that are more exact than its codes, usually of 8 bits.  They take the
/// place of the codes of these tokens, in the same softmax; `recent` and `first` 0 leave either kind out.
///
/// The query at position p reads token t from the copies when
///   t > p - recent  and  t >= kv_len - ring   (older tokens are no longer in the ring), or
///   t < start + first                         (start: that of the row, AttendParams::starts),
/// and from the codes otherwise.  Which tokens it reads from where depends on positions alone, and not on how a prompt
/// was cut, as long as ring >= recent + query_len - 1.  Masks and scales of scores are as without copies.
struct ExactTier {
  Packed keys, values;  // [batch, kv_heads, ring + first]; of any bits; centres and seed are those of the codes
  int ring = 0;         // slots of the ring, a multiple of 32, the first of the buffer: token t is in slot t % ring
  int recent = 0;       // at most `ring`, or any number while the ring holds all tokens
  int first = 0;        // token start + i is in slot ring + i
};

/// What `attend` does:  out = softmax(scale * q K^T + mask, sink) V  with K and V decoded from their codes.
/// `values` may be `keys` themselves (latent attention, arXiv 2405.04434: one vector is key and value; the scores of
/// the rotary part come as an additive mask of each query head). Query head h reads KV head h / (query_heads /
/// kv_heads).  Query i stands at position kv_len - query_len + i. A key is visible when every rule given allows it;
/// hidden keys have no influence, whatever they hold.  A query that sees no key gets 0.  Numbers beyond the range of a
/// float16 output saturate.
struct AttendParams {
  int batch = 0, query_heads = 0, kv_heads = 0, query_len = 0, kv_len = 0;
  int key_dim = 0;                      // of queries and keys
  int value_dim = 0;                    // of values and out; 0: values and out are empty
  float scale = 1;                      // of the scores; finite
  uint64_t seed = 0;                    // of the signs, for keys and values alike
  Tensor q;                             // [batch, query_heads, query_len, key_dim]
  Packed keys, values;                  // [batch, kv_heads, kv_len]; widths may differ
  const float* key_centre = nullptr;    // [kv_heads, key_dim]; matters only beside sinks (softmax ignores a shift)
  const float* value_centre = nullptr;  // [kv_heads, value_dim]; added once to the output
  bool causal = false;                  // key position <= query position
  int window = 0;                       // > 0: key position > query position - window
  const int32_t* starts = nullptr;      // [batch] first visible key: a left-padded batch; null: 0
  MaskKind mask_kind = MaskKind::none;
  Dtype mask_dtype = Dtype::float32;       // of an additive mask
  const void* mask = nullptr;              // [batch, query_heads, query_len, kv_len], any stride may be 0
  int64_t mask_strides[4] = {0, 0, 0, 0};  // in elements
  ExactTier exact;                         // none by default
  const float* sinks = nullptr;            // [query_heads] a logit per head that takes weight and has no value
  MutableTensor out;                       // [batch, query_heads, query_len, value_dim]
};

/// A set of kernels.  `reference` is the oracle: scalar, double, in the paper's order.  `cpu` picks the best
/// instruction set of the processor.
enum class Backend : uint8_t { reference, cpu };

/// Sizes: head_dim a multiple of 32 from 32 to 512, bits 2, 3, 4 or 8 (2 or 3 with a trellis), the rest >= 0
/// (heads >= 1).
void encode(const EncodeParams& params, Backend backend = Backend::cpu);
void decode(const DecodeParams& params, Backend backend = Backend::cpu);
/// Also: heads a multiple of matrices.
void transform(const TransformParams& params, Backend backend = Backend::cpu);
/// Also: key_dim and value_dim as head_dim, or value_dim 0; query_heads a multiple of kv_heads, a finite scale; of
/// exact copies: 0 <= recent <= ring.
void attend(const AttendParams& params, Backend backend = Backend::cpu);

/// Instruction sets of the `cpu` backend that this processor can run, best first; the last is "scalar".
std::vector<std::string> available_isas();
/// The one in use: the best, unless TURBOQUANT_ISA or `force_isa` names another.
std::string current_isa();
/// Uses this instruction set from now on ("" goes back to the best).  Throws when it cannot run here.
void force_isa(const std::string& name);

/// Threads of the `cpu` backend: TURBOQUANT_NUM_THREADS, else the processors this process may use.
/// Results do not depend on it.
int num_threads();
/// Changes it; n >= 1.
void set_num_threads(int n);

}  // namespace turboquant
