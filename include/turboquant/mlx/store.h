// Store holds the packed keys and values of a cache as MLX arrays.  All caches are built from its operations: append,
// grow, slice, pad, gather.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "turboquant/mlx/ops.h"

namespace turboquant::ops {

/// How a cache codes its vectors.  It is part of the cache's identity: caches of different coding never mix.
struct CacheCoding {
  Coding keys = {}, values = {};  // of one seed
  /// What is coded of a key is (k - centre) key_map; queries go through query_map, the transpose of its inverse, so
  /// that their products stay.  (H_kv, D, D) float32, both or none.
  std::optional<mx::array> key_map = {}, query_map = {};
  int recent = 0, sink = 0;  // newest and first tokens that queries read from exact copies (exact.h)
};

/// The query_map of a key_map (H_kv, D, D) float32, computed in double.  Throws std::invalid_argument when a matrix has
/// no inverse.
mx::array inverse_transpose(const mx::array& key_map);

/// The coding of exact copies: of 8 bits, without feedback, with the same centres and map.
CacheCoding coding_of_copies(const CacheCoding& coding);

/// Keys (B, H_kv, N, D) after the key map, and their coding: without a centre when the map has taken it.
std::pair<mx::array, Coding> mapped_keys(const CacheCoding& coding, const mx::array& keys, mx::StreamOrDevice s = {});

/// Keys as they came, from their codes: (B, H_kv, N, D) of `dtype`.
mx::array decoded_keys(const CacheCoding& coding, const PackedArrays& keys, mx::Dtype dtype, mx::StreamOrDevice s = {});

/// Values likewise.
mx::array decoded_values(const CacheCoding& coding, const PackedArrays& values, mx::Dtype dtype,
                         mx::StreamOrDevice s = {});

/// Throws std::invalid_argument naming `op` unless both codings decode the same bits to the same vectors.
void check_same_coding(const char* op, const CacheCoding& a, const CacheCoding& b);

/// Keys and values of shape (B, H_kv, capacity, ...).  The token axis of all four arrays is axis 2.
struct Store {
  PackedArrays keys, values;
  /// When tokens were written in place (append_kv): the array to wait for before the four are read.
  std::optional<mx::array> written = std::nullopt;
  /// Up to where anybody has written into these buffers, or promised to: shared with the copies that share them.  Room
  /// behind it belongs to the first that takes it.
  std::shared_ptr<int> frontier = nullptr;

  int batch() const { return keys.scales.shape(0); }
  int heads() const { return keys.scales.shape(1); }
  int capacity() const { return keys.scales.shape(2); }
  int head_dim(const CacheCoding& coding) const { return keys.codes.shape(3) / coding.keys.bits() * 32; }
  int value_dim(const CacheCoding& coding) const { return values.codes.shape(3) / coding.values.bits() * 32; }
  /// Bytes of all four arrays.
  size_t nbytes() const;
  /// This store after its pending in-place writes: evaluates `written`.  The operations below call it first, but for
  /// `pad` when there is nothing to pad.
  Store evaluated() const;
  /// The same, which to read waits for `to`.
  Store tied(const mx::array& to) const;
  /// Whether nobody else holds the arrays, pending operations and the GPU included.
  bool unshared() const;
  /// f on each of the four arrays.
  Store map(const std::function<mx::array(const mx::array&)>& f) const;
  /// Tokens [from, to).
  Store tokens(int from, int to, mx::StreamOrDevice s = {}) const;
  /// Zero tokens in front and behind; a zero scale decodes to a zero vector.
  Store pad(int before, int after, mx::StreamOrDevice s = {}) const;
  /// This store with `rows` written at token `at`; in place when nobody else holds the buffers.
  Store write(const Store& rows, int at, mx::StreamOrDevice s = {}) const;
  /// Rows of the batch, in the order given.
  Store take(const mx::array& rows, mx::StreamOrDevice s = {}) const;
  /// Each row's tokens rolled to the right by its own amount (B,).
  Store roll(const mx::array& amounts, mx::StreamOrDevice s = {}) const;
  /// Of each row the tokens of `index` (B, n), in that order.
  Store gather(const mx::array& index, mx::StreamOrDevice s = {}) const;
};

/// Whether the same kernel wrote last into both: who waits for one waits for the other.
bool same_write(const Store& a, const Store& b);

/// Zero tokens of the same kind: (batch, H_kv, tokens, ...).
Store zeros_like(const Store& like, int batch, int tokens, mx::StreamOrDevice s = {});

/// Zero tokens of this coding, for keys and values of the shapes (B, H_kv, N, D) but for N.
Store zeros(const CacheCoding& coding, mx::Shape keys, mx::Shape values, int tokens, mx::StreamOrDevice s = {});

/// Throws std::invalid_argument naming `op` unless both hold vectors of the same heads and size.
void check_same_shape(const char* op, const Store& a, const Store& b);

/// Throws std::invalid_argument naming `op` unless `store` is packed with this coding and holds `length` tokens.
void check_store(const char* op, const CacheCoding& coding, const Store& store, int length);

/// Stores joined along an axis (0: batch, 2: tokens).
Store concatenate(const std::vector<Store>& stores, int axis, mx::StreamOrDevice s = {});

/// Throws std::invalid_argument unless keys and values of these shapes (B, H_kv, N, D) can follow those held.
void check_follows(const CacheCoding& coding, const mx::Shape& keys, const mx::Shape& values, const Store& held);

/// Encodes keys and values (B, H_kv, N, D) and checks that they can follow `held`.
Store encode_store(const CacheCoding& coding, const mx::array& keys, const mx::array& values,
                   const std::optional<Store>& held, mx::StreamOrDevice s = {});

/// The first `length` tokens of `held` and then keys and values, encoded: in place where that is possible and nobody
/// can notice, else by copies as far as MLX needs them.  Throws as encode_store does.  `copies`, if given, may be
/// written in place: where the codes are, both are, by one kernel, and both then have the same `written`.
Store append_store(const CacheCoding& coding, const std::optional<Store>& held, int length, const mx::array& keys,
                   const mx::array& values, mx::StreamOrDevice s = {}, Store* copies = nullptr);

/// The name of the kernel that attention used last; null before it ran.
struct LastKernel {
  const char* name = nullptr;
};

/// What a cache hands to attention: the packed history up to `length`.  It does not change when the cache goes on.
struct View {
  CacheCoding coding;
  Store store;
  int length;
  std::optional<mx::array> starts = std::nullopt;     // (B,) first real token of each row, for left-padded batches
  mx::Dtype dtype = mx::float16;                      // of the vectors as they came, for models that ask
  std::shared_ptr<LastKernel> last_kernel = nullptr;  // if given, `attend` notes its kernel there
  std::optional<Store> copies = std::nullopt;         // exact copies of the newest and the first tokens (exact.h)
  bool latent = false;  // attention reads the keys' codes as values, too (MLA); the values are the rotary keys

  int head_dim() const { return store.head_dim(coding); }
  int value_dim() const { return store.value_dim(coding); }
  /// Attention of q (B, H_q, L, D) over the history.  With exact copies, L is at most the number of tokens appended
  /// last unless the result is evaluated before the cache goes on: copies that only more queries read may be
  /// overwritten.
  mx::array attend(const mx::array& q, float scale, bool causal, const std::optional<mx::array>& mask = std::nullopt,
                   const std::optional<mx::array>& sinks = std::nullopt, mx::StreamOrDevice s = {}) const;
  /// The history as numbers, keys and values (B, H_kv, length, D): materialises all of it.
  std::pair<mx::array, mx::array> decode(mx::Dtype dtype, mx::StreamOrDevice s = {}) const;
  /// The keys' codes alone as numbers, without exact copies; materialises them when they are evaluated.
  mx::array decode_keys(mx::Dtype dtype, mx::StreamOrDevice s = {}) const;
  /// The values' likewise.
  mx::array decode_values(mx::Dtype dtype, mx::StreamOrDevice s = {}) const;
};

/// How many tokens buffers grow by.
constexpr int kGrowth = 256;
inline int round_up(int tokens) { return (tokens + kGrowth - 1) / kGrowth * kGrowth; }

/// The first `length` tokens held and zeros, room for `needed` tokens and up to kGrowth - 1 more in all: a copy.
Store copy_with_room(const std::optional<Store>& held, int length, const Store& like, int needed,
                     mx::StreamOrDevice s = {});

/// A store with room for `needed` tokens: the one held if it can, else a larger one with its first `length` tokens.
Store grow(const std::optional<Store>& held, int length, const Store& like, int needed, mx::StreamOrDevice s = {});

}  // namespace turboquant::ops
