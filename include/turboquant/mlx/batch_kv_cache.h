// The packed key-value cache of one attention layer for a batch of sequences of different lengths.
#pragma once

#include <optional>
#include <vector>

#include "turboquant/mlx/kv_cache.h"
#include "turboquant/mlx/mask.h"

namespace turboquant::ops {

/// Rows are right-justified: row b starts with left_padding()[b] tokens that attention never sees.  A value type; a
/// call that throws changes nothing.
class BatchKVCache {
 public:
  /// An empty batch of left_padding.size() rows; the first tokens appended to row b will be left_padding[b] pads.
  explicit BatchKVCache(std::vector<int> left_padding, CacheCoding coding = {});

  /// A batch of single sequences, in their order.  Throws std::invalid_argument when codings or shapes differ.
  static BatchKVCache merge(const std::vector<KVCache>& caches, mx::StreamOrDevice s = {});

  /// As KVCache::append, one row of the batch each.
  void append(const mx::array& keys, const mx::array& values, mx::StreamOrDevice s = {});
  View view() const;
  /// Forgets the last n tokens of every row (at most all); returns how many.
  int trim(int n);

  /// Announces padding of the tokens to come: pads in front (only while the batch is empty) or behind each row.
  /// An empty vector announces nothing.  `lengths`, the tokens to come of each row without its pads, keeps exact copies
  /// of a row's newest tokens while pads follow behind them; without it those copies are made from the codes in the
  /// end.
  void prepare(const std::vector<int>& left_padding, const std::vector<int>& right_padding,
               const std::vector<int>& lengths = {});
  /// Moves the pads announced behind the rows to their front.
  void finalize(mx::StreamOrDevice s = {});

  /// Keeps these rows, in this order, and drops the padding that all of them share.
  void filter(const std::vector<int>& rows, mx::StreamOrDevice s = {});
  /// Appends the rows of another batch.
  void extend(const BatchKVCache& other, mx::StreamOrDevice s = {});
  /// One row as a cache of its own, which shares no buffer with the batch.  Its copying is begun, not awaited: as after
  /// any mx::async_eval, a program that may end before it reads the row calls mx::synchronize() first.
  KVCache extract(int row, mx::StreamOrDevice s = {}) const;

  /// Takes over packed vectors: `length` tokens of `store`, and exact copies; without them they are made from the
  /// codes.
  void restore(const Store& store, int length, std::vector<int> left_padding,
               const std::optional<Copies>& copies = std::nullopt);

  /// None, causal or an array for `queries` coming tokens; the view itself hides the padding.
  Mask mask(int queries, int window, bool as_array, mx::StreamOrDevice s = {}) const;

  int batch() const { return int(left_padding_.size()); }
  /// Tokens of the longest row, pads included.
  int length() const { return length_; }
  const std::vector<int>& left_padding() const { return left_padding_; }
  /// Next position of each row: length() less its padding.
  std::vector<int> offsets() const;
  /// Makes whatever reads the history wait for `to`: a model under pipeline parallelism ties what it sends to its
  /// cache.
  void tie(const mx::array& to) { tie_both(store_, copies_, to); }
  bool empty() const { return !store_; }
  size_t nbytes() const { return (store_ ? store_->nbytes() : 0) + (copies_ ? copies_->nbytes() : 0); }
  const CacheCoding& coding() const { return coding_; }
  const std::optional<Store>& store() const { return store_; }
  /// As KVCache's.
  const std::optional<Copies>& copies() const { return copies_; }
  void end_chunk();

 private:
  void set_padding(std::vector<int> left_padding);

  CacheCoding coding_;
  std::optional<Store> store_;
  std::optional<Copies> copies_;
  int length_ = 0;
  std::vector<int> left_padding_;
  std::vector<int> right_padding_;   // announced and not yet finalized
  std::vector<int> ends_;            // where each row's tokens then end, its pads excluded; empty: unknown
  std::optional<mx::array> starts_;  // left_padding_ for attention; none when no row has any
};

/// Throws std::invalid_argument naming `op` unless every row is one of a batch of `size`.
void check_rows(const char* op, const std::vector<int>& rows, int size);

}  // namespace turboquant::ops
