// KVCache holds the packed keys and values of one attention layer.  It is a value: writing to a copy does not change
// the original.
//
// A program in C++ uses it directly (examples/cpp); Python's TurboQuantKVCache is a thin wrapper.
#pragma once

#include <optional>

#include "turboquant/mlx/exact.h"

namespace turboquant::ops {

/// Grows by appending, shrinks by trimming.  Operations are lazy, as MLX's are; a call that throws changes nothing.
class KVCache {
 public:
  explicit KVCache(CacheCoding coding = {});

  /// Appends keys (after RoPE) and values, (B, H_kv, N, D) of float16, bfloat16 or float32.  Throws
  /// std::invalid_argument on a wrong dtype, rank or head_dim, or when batch, heads or head_dim change.
  void append(const mx::array& keys, const mx::array& values, mx::StreamOrDevice s = {});

  /// The history for attention; std::invalid_argument when nothing was appended.
  View view() const;

  /// Forgets the last n tokens (at most all); returns how many.
  int trim(int n);

  int offset() const { return length_; }
  /// Makes whatever reads the history wait for `to`: a model under pipeline parallelism ties what it sends to its
  /// cache.
  void tie(const mx::array& to) { tie_both(store_, copies_, to); }
  bool empty() const { return !store_; }
  /// Resident bytes: the buffers, spare room included.
  size_t nbytes() const { return (store_ ? store_->nbytes() : 0) + (copies_ ? copies_->nbytes() : 0); }
  const CacheCoding& coding() const { return coding_; }
  const std::optional<Store>& store() const { return store_; }
  /// Exact copies of the newest and the first tokens, when the coding has such and tokens were appended.
  const std::optional<Copies>& copies() const { return copies_; }
  /// Lets go of what only the queries of the chunk appended last read; other queries see no difference.
  void end_chunk();

  /// Takes over packed vectors: `length` tokens of `store`, and exact copies; without them they are made from the
  /// codes.
  void restore(const Store& store, int length, const std::optional<Copies>& copies = std::nullopt);

 private:
  CacheCoding coding_;
  std::optional<Store> store_;
  std::optional<Copies> copies_;
  int length_ = 0;
};

/// A coding with checked bits, and centres, feedback and maps in the form the kernels take.
CacheCoding checked_coding(CacheCoding coding);

}  // namespace turboquant::ops
