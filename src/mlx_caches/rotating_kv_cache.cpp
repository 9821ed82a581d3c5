#include "turboquant/mlx/rotating_kv_cache.h"

#include <algorithm>

#include "mlx_caches/ring.h"
#include "mlx_ops/checks.h"

namespace turboquant::ops {

RotatingKVCache::RotatingKVCache(int max_size, int keep, CacheCoding coding)
    : coding_(checked_coding(std::move(coding))), max_size_(max_size), keep_(keep) {
  require(max_size >= 1, "[cache] max_size must be at least 1; got ", max_size);
  check_no_copies(coding_);
  require(keep >= 0 && keep < max_size, "[cache] keep must be from 0 to max_size - 1 = ", max_size - 1, "; got ", keep);
}

void RotatingKVCache::append(const mx::array& keys, const mx::array& values, mx::StreamOrDevice s) {
  const auto rows = encode_store(coding_, keys, values, store_, s);
  const int added = rows.capacity();
  if (added == 1) {
    auto [next, at] = room_for_one(store_, rows, offset_, index_, max_size_, keep_, s);
    at = at == max_size_ ? keep_ : at;
    store_ = next.write(rows, at, s);
    index_ = at + 1;
  } else {
    store_ = store_ ? concatenate({drop_oldest(*ordered(s), max_size_ - 1, keep_, s), rows}, 2, s) : rows;
    index_ = store_->capacity();
  }
  undoable_ = added == 0 ? undoable_ : added - 1;
  offset_ += added;
}

View RotatingKVCache::view() const {
  require(store_.has_value(), "[cache] nothing was appended yet");
  return {coding_, *store_, std::min(offset_, store_->capacity()), std::nullopt};
}

int RotatingKVCache::trim(int n) {
  const bool whole = can_trim();
  n = std::clamp(n, 0, whole ? offset_ : undoable_);
  if (!whole && n > 0) store_ = store_->tokens(0, store_->capacity() - n);
  undoable_ = std::max(0, undoable_ - n);
  offset_ -= n;
  index_ -= n;
  return n;
}

Mask RotatingKVCache::mask(int queries, int window, bool as_array, mx::StreamOrDevice s) const {
  if (queries > 1) {
    window = window > 0 ? window : max_size_;
    const int offset = std::min(max_size_ - 1, offset_);
    if (offset + queries > window || as_array) return {false, causal_mask(queries, offset, window, {}, s)};
    return {true, std::nullopt};
  }
  if (window <= 0 || offset_ < window || max_size_ <= window) return {};
  // The newest `window` tokens, in the order of the ring.
  const int size = std::min(offset_ + 1, max_size_), at = index_ >= max_size_ ? 0 : index_;
  const auto newest = mx::greater_equal(mx::arange(size, mx::int32, s), mx::array(size - window), s);
  return {false, mx::roll(newest, at + 1, s)};
}

std::optional<Store> RotatingKVCache::ordered(mx::StreamOrDevice s) const {
  if (!store_ || index_ == store_->capacity()) return store_;
  if (index_ >= offset_) return store_->tokens(0, index_, s);
  return concatenate(
      {store_->tokens(0, keep_, s), store_->tokens(index_, store_->capacity(), s), store_->tokens(keep_, index_, s)}, 2,
      s);
}

void RotatingKVCache::restore(const Store& store, int offset, int index) {
  check_store("restore", coding_, store, std::min(offset, store.capacity()));
  require(offset >= 0 && index >= 0 && index <= store.capacity(),
          "[restore] offset must be at least 0 and index from 0 to ", store.capacity(), "; got ", offset, " and ",
          index);
  require(offset <= 1 << 30, "[restore] offset must be at most 1073741824; got ", offset);
  require(index == store.capacity() || index >= offset || index >= keep_,
          "[restore] index must be at least keep = ", keep_, " once the window has moved on; got ", index);
  store_ = store;
  offset_ = offset;
  index_ = index;
  undoable_ = 0;
}

}  // namespace turboquant::ops
