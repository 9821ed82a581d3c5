#include <algorithm>

#include "mlx_caches/ring.h"
#include "mlx_ops/checks.h"
#include "turboquant/mlx/batch_kv_cache.h"
#include "turboquant/mlx/rotating_kv_cache.h"

namespace turboquant::ops {
namespace {

void add(std::vector<int>& to, int n) {
  for (int& x : to) x += n;
}

}  // namespace

BatchRotatingKVCache::BatchRotatingKVCache(int max_size, std::vector<int> left_padding, CacheCoding coding)
    : coding_(checked_coding(std::move(coding))), max_size_(max_size), left_padding_(std::move(left_padding)) {
  require(max_size >= 1, "[cache] max_size must be at least 1; got ", max_size);
  check_no_copies(coding_);
  for (int n : left_padding_) {
    require(n >= 0, "[cache] left_padding must be at least 0; got ", n);
    offsets_.push_back(-n);
  }
}

BatchRotatingKVCache BatchRotatingKVCache::merge(const std::vector<RotatingKVCache>& caches, mx::StreamOrDevice s) {
  require(!caches.empty(), "[merge] there must be at least one cache");
  int longest = 0;
  const RotatingKVCache* filled = nullptr;
  for (const auto& c : caches) {
    check_same_coding("merge", caches[0].coding(), c.coding());
    require(c.max_size() == caches[0].max_size(), "[merge] caches must have the same max_size; got ",
            caches[0].max_size(), " and ", c.max_size());
    require(c.keep() == 0, "[merge] a batch of rotating caches cannot keep first tokens; got keep = ", c.keep());
    longest = std::max(longest, c.size());
    if (c.empty()) continue;
    filled = filled ? filled : &c;
    check_same_shape("merge", *filled->store(), *c.store());
  }
  std::vector<int> padding, offsets;
  std::vector<Store> rows;
  for (const auto& c : caches) {
    const int size = c.size();
    padding.push_back(longest - size);
    offsets.push_back(c.offset());
    if (longest == 0) continue;
    if (size == 0) {
      rows.push_back(zeros_like(*filled->store(), 1, longest, s));
      continue;
    }
    const auto held = *c.ordered(s);
    require(held.batch() == 1, "[merge] each cache must hold one sequence; got ", held.batch());
    rows.push_back(held.tokens(held.capacity() - size, held.capacity(), s).pad(longest - size, 0, s));
  }
  BatchRotatingKVCache out(caches[0].max_size(), std::move(padding), caches[0].coding());
  if (longest == 0) return out;
  out.offsets_ = std::move(offsets);
  out.store_ = concatenate(rows, 0, s);
  out.length_ = out.index_ = longest;
  return out;
}

BatchRotatingKVCache BatchRotatingKVCache::ordered(mx::StreamOrDevice s) const {
  auto out = *this;
  if (!store_) return out;
  if (rotated_) {
    out.store_ = concatenate({store_->tokens(index_, store_->capacity(), s), store_->tokens(0, index_, s)}, 2, s);
    out.index_ = store_->capacity();
    out.rotated_ = false;
  } else {
    out.store_ = store_->tokens(0, index_, s);
  }
  return out;
}

void BatchRotatingKVCache::justify(mx::StreamOrDevice s) {
  std::vector<int> by;
  for (int b = 0; b < batch(); ++b) by.push_back(std::max(0, offsets_[b] - targets_[b]));
  store_ = store_->roll(mx::array(by.data(), {batch()}, mx::int32), s);
  for (int b = 0; b < batch(); ++b) left_padding_[b] += by[b], offsets_[b] -= by[b];
}

void BatchRotatingKVCache::append(const mx::array& keys, const mx::array& values, mx::StreamOrDevice s) {
  const auto rows = encode_store(coding_, keys, values, store_, s);
  require(rows.batch() == batch(), "[append] batch must stay ", batch(), "; got ", rows.batch());
  const int added = rows.capacity();
  auto next = *this;
  if (added == 1 && targets_.empty()) {
    auto [store, at] = room_for_one(store_, rows, length_, index_, max_size_, 0, s);
    if (store_ && store_->capacity() > max_size_) add(next.left_padding_, max_size_ - store_->capacity());
    if (at == max_size_) {
      next.rotated_ = true;
      at = 0;
    }
    if (next.rotated_) add(next.left_padding_, -1);
    next.store_ = store.write(rows, at, s);
    next.index_ = at + 1;
  } else {
    if (store_) {
      next = ordered(s);
      // Rows that end in pads go to the right first, so that no real token is dropped for a pad.
      if (!targets_.empty()) next.justify(s);
      add(next.left_padding_, -std::max(0, next.index_ - max_size_ + 1));
      next.store_ = concatenate({drop_oldest(*next.store_, max_size_ - 1, 0, s), rows}, 2, s);
    } else {
      next.store_ = rows;
    }
    next.index_ = next.store_->capacity();
  }
  next.length_ += added;
  add(next.offsets_, added);
  *this = std::move(next);
}

View BatchRotatingKVCache::view() const {
  require(store_.has_value(), "[cache] nothing was appended yet");
  return {coding_, *store_, std::min(length_, store_->capacity()), std::nullopt};
}

int BatchRotatingKVCache::trim(int n) {
  n = can_trim() ? std::clamp(n, 0, length_) : 0;
  length_ -= n;
  index_ -= n;
  add(offsets_, -n);
  return n;
}

void BatchRotatingKVCache::prepare(const std::vector<int>& left_padding, const std::vector<int>& lengths,
                                   const std::vector<int>& right_padding) {
  for (const auto* numbers : {&left_padding, &right_padding}) {
    require(numbers->empty() || int(numbers->size()) == batch(), "[prepare] padding must have one number for each of ",
            batch(), " rows; got ", numbers->size());
    for (int n : *numbers) require(n >= 0, "[prepare] padding must be at least 0; got ", n);
  }
  const bool pads = std::any_of(right_padding.begin(), right_padding.end(), [](int n) { return n > 0; });
  require(!pads || int(lengths.size()) == batch(), "[prepare] right padding needs the lengths of all ", batch(),
          " rows; got ", lengths.size());
  require(left_padding.empty() || !store_, "[prepare] left padding can be added only to an empty batch");
  for (size_t b = 0; b < left_padding.size(); ++b) {
    left_padding_[b] += left_padding[b];
    offsets_[b] -= left_padding[b];
  }
  if (!pads) return;
  targets_ = lengths;
  for (int b = 0; b < batch(); ++b) targets_[b] += offsets_[b];
}

void BatchRotatingKVCache::finalize(mx::StreamOrDevice s) {
  if (targets_.empty()) return;
  if (store_) justify(s);
  targets_.clear();
}

void BatchRotatingKVCache::filter(const std::vector<int>& rows, mx::StreamOrDevice s) {
  check_rows("filter", rows, batch());
  const auto pick = [&](const std::vector<int>& from) {
    std::vector<int> out;
    for (int row : rows) out.push_back(from[row]);
    return out;
  };
  if (store_) store_ = store_->take(mx::array(rows.data(), {int(rows.size())}, mx::int32), s);
  left_padding_ = pick(left_padding_);
  offsets_ = pick(offsets_);
  if (!targets_.empty()) targets_ = pick(targets_);
}

void BatchRotatingKVCache::extend(const BatchRotatingKVCache& other, mx::StreamOrDevice s) {
  check_same_coding("extend", coding_, other.coding_);
  require(max_size_ == other.max_size_, "[extend] caches must have the same max_size; got ", max_size_, " and ",
          other.max_size_);
  require(targets_.empty() && other.targets_.empty(), "[extend] finalize the batches first");
  if (store_ && other.store_) check_same_shape("extend", *store_, *other.store_);
  auto a = ordered(s), b = other.ordered(s);
  const int longest = std::max(a.index_, b.index_);
  if (a.store_ || b.store_) {
    const auto like = a.store_ ? *a.store_ : *b.store_;
    const auto justified = [&](const BatchRotatingKVCache& c) {
      return c.store_ ? c.store_->pad(longest - c.index_, 0, s) : zeros_like(like, c.batch(), longest, s);
    };
    a.store_ = concatenate({justified(a), justified(b)}, 0, s);
  }
  add(a.left_padding_, longest - a.index_);
  add(b.left_padding_, longest - b.index_);
  a.left_padding_.insert(a.left_padding_.end(), b.left_padding_.begin(), b.left_padding_.end());
  a.offsets_.insert(a.offsets_.end(), b.offsets_.begin(), b.offsets_.end());
  a.index_ = longest;
  a.length_ = std::max(a.length_, b.length_);
  *this = std::move(a);
}

RotatingKVCache BatchRotatingKVCache::extract(int row, mx::StreamOrDevice s) const {
  check_rows("extract", {row}, batch());
  RotatingKVCache out(max_size_, 0, coding_);
  const auto whole = ordered(s);
  const int from = std::clamp(left_padding_[row], 0, whole.index_);
  if (!store_ || from == whole.index_) return out;
  const auto held = whole.store_->tokens(from, whole.index_, s).take(mx::reshape(mx::array(row), {1}, s), s);
  mx::async_eval({held.keys.codes, held.keys.scales, held.values.codes, held.values.scales});  // as BatchKVCache does
  out.restore(held, offsets_[row], held.capacity());
  return out;
}

Mask BatchRotatingKVCache::mask(int queries, int window, bool as_array, mx::StreamOrDevice s) const {
  window = window > 0 ? window : max_size_;
  const int offset = std::min(max_size_ - 1, length_);
  const bool joins = queries > 1 || !targets_.empty();  // as in append
  const bool wraps = !joins && (rotated_ || index_ >= max_size_);
  auto padding = left_padding_;
  add(padding, -std::max(0, index_ - max_size_ + int(joins)) - int(wraps));
  const bool padded = std::any_of(padding.begin(), padding.end(), [](int n) { return n > 0; });
  if (!padded && !as_array && offset + queries <= window) return {queries > 1, std::nullopt};
  auto mask = causal_mask(queries, offset, window, padding, s);
  if (wraps) mask = mx::roll(mask, (index_ >= max_size_ ? 0 : index_) + 1, -1, s);
  return {false, mask};
}

void BatchRotatingKVCache::restore(const Store& store, Position position) {
  check_store("restore", coding_, store, std::min(position.length, store.capacity()));
  const size_t rows = store.batch();
  require(position.left_padding.size() == rows && position.offsets.size() == rows,
          "[restore] left_padding and offsets must have one number for each of ", rows, " rows; got ",
          position.left_padding.size(), " and ", position.offsets.size());
  require(position.index >= 0 && position.index <= store.capacity(), "[restore] index must be from 0 to ",
          store.capacity(), "; got ", position.index);
  for (const auto* numbers : {&position.left_padding, &position.offsets}) {  // padding counts down below zero
    for (int n : *numbers) {
      require(n >= -(1 << 30) && n <= 1 << 30, "[restore] left_padding and offsets must be within 1073741824; got ", n);
    }
  }
  require(position.length <= 1 << 30, "[restore] length must be at most 1073741824; got ", position.length);
  store_ = store;
  length_ = position.length;
  index_ = position.index;
  rotated_ = position.rotated;
  left_padding_ = std::move(position.left_padding);
  offsets_ = std::move(position.offsets);
  targets_.clear();
}

}  // namespace turboquant::ops
