// Packed caches of a sliding window.  They keep and drop the same tokens as mlx-lm's RotatingKVCache.
#pragma once

#include <optional>
#include <vector>

#include "turboquant/mlx/kv_cache.h"
#include "turboquant/mlx/mask.h"

namespace turboquant::ops {

/// Holds the first `keep` tokens and the latest max_size - keep.  Single tokens overwrite the oldest in place; several
/// at once are joined in temporal order, so that each of them still sees max_size tokens.  Masks must come from `mask`.
/// A value type; a call that throws changes nothing.
class RotatingKVCache {
 public:
  /// Throws std::invalid_argument unless max_size >= 1 and 0 <= keep < max_size.
  explicit RotatingKVCache(int max_size, int keep = 0, CacheCoding coding = {});

  void append(const mx::array& keys, const mx::array& values, mx::StreamOrDevice s = {});
  View view() const;
  bool can_trim() const { return offset_ < max_size_; }
  /// Tokens that can be forgotten although older ones were dropped: all but one of those appended at once last, for
  /// each of them still sees max_size tokens.
  int undoable() const { return undoable_; }
  /// Forgets the last n tokens; at most undoable() once older tokens were dropped.
  int trim(int n);
  /// The mask for `queries` coming tokens; window 0 means max_size.
  Mask mask(int queries, int window, bool as_array, mx::StreamOrDevice s = {}) const;
  /// What is held, oldest first.
  std::optional<Store> ordered(mx::StreamOrDevice s = {}) const;
  /// Takes over packed vectors: all of `store`, the next single token at `index`, after `offset` tokens in all.
  void restore(const Store& store, int offset, int index);

  /// Tokens seen.
  int offset() const { return offset_; }
  /// Where the next single token goes, before wrapping.
  int index() const { return index_; }
  int size() const { return offset_ < max_size_ ? offset_ : max_size_; }
  int max_size() const { return max_size_; }
  int keep() const { return keep_; }
  /// Makes whatever reads the history wait for `to`: a model under pipeline parallelism ties what it sends to its
  /// cache.
  void tie(const mx::array& to) {
    if (store_) store_ = store_->tied(to);
  }
  bool empty() const { return !store_; }
  size_t nbytes() const { return store_ ? store_->nbytes() : 0; }
  const CacheCoding& coding() const { return coding_; }
  const std::optional<Store>& store() const { return store_; }

 private:
  CacheCoding coding_;
  std::optional<Store> store_;
  int max_size_, keep_, offset_ = 0, index_ = 0, undoable_ = 0;
};

/// The same for a batch of sequences of different lengths, right-justified as in BatchKVCache; keeps no first tokens.
class BatchRotatingKVCache {
 public:
  BatchRotatingKVCache(int max_size, std::vector<int> left_padding, CacheCoding coding = {});
  static BatchRotatingKVCache merge(const std::vector<RotatingKVCache>& caches, mx::StreamOrDevice s = {});

  void append(const mx::array& keys, const mx::array& values, mx::StreamOrDevice s = {});
  View view() const;
  bool can_trim() const { return length_ < max_size_; }
  int trim(int n);
  /// As BatchKVCache::prepare; `lengths` are the tokens to come of each row, pads excluded.
  void prepare(const std::vector<int>& left_padding, const std::vector<int>& lengths,
               const std::vector<int>& right_padding);
  void finalize(mx::StreamOrDevice s = {});
  void filter(const std::vector<int>& rows, mx::StreamOrDevice s = {});
  void extend(const BatchRotatingKVCache& other, mx::StreamOrDevice s = {});
  RotatingKVCache extract(int row, mx::StreamOrDevice s = {}) const;
  Mask mask(int queries, int window, bool as_array, mx::StreamOrDevice s = {}) const;

  /// What a saved batch consists of, besides its arrays.
  struct Position {
    int length = 0, index = 0;  // tokens appended; where the next single token goes
    bool rotated = false;       // whether the oldest tokens are being overwritten
    std::vector<int> left_padding, offsets;
  };
  void restore(const Store& store, Position position);
  Position position() const { return {length_, index_, rotated_, left_padding_, offsets_}; }

  int batch() const { return int(left_padding_.size()); }
  int size() const { return length_ < max_size_ ? length_ : max_size_; }
  int max_size() const { return max_size_; }
  const std::vector<int>& left_padding() const { return left_padding_; }
  const std::vector<int>& offsets() const { return offsets_; }
  /// Makes whatever reads the history wait for `to`: a model under pipeline parallelism ties what it sends to its
  /// cache.
  void tie(const mx::array& to) {
    if (store_) store_ = store_->tied(to);
  }
  bool empty() const { return !store_; }
  size_t nbytes() const { return store_ ? store_->nbytes() : 0; }
  const CacheCoding& coding() const { return coding_; }
  const std::optional<Store>& store() const { return store_; }

 private:
  /// This batch with its tokens oldest first and no spare room behind them.
  BatchRotatingKVCache ordered(mx::StreamOrDevice s) const;
  /// Rolls rows whose latest tokens are pads until their real tokens are the latest.
  void justify(mx::StreamOrDevice s);

  CacheCoding coding_;
  std::optional<Store> store_;
  int max_size_, length_ = 0, index_ = 0;
  bool rotated_ = false;
  std::vector<int> left_padding_, offsets_;
  std::vector<int> targets_;  // offset of each row after the tokens announced by prepare
};

}  // namespace turboquant::ops
