#include "turboquant/mlx/batch_kv_cache.h"

#include <algorithm>

#include "mlx_ops/checks.h"

namespace turboquant::ops {
namespace {

/// The first `length` tokens of a store, with zero tokens in front and behind; all zeros when there is no store.
Store justified(const std::optional<Store>& store, const Store& like, int batch, int length, int before, int after,
                mx::StreamOrDevice s) {
  if (!store) return zeros_like(like, batch, before + length + after, s);
  return store->tokens(0, length, s).pad(before, after, s);
}

}  // namespace

void check_rows(const char* op, const std::vector<int>& rows, int size) {
  for (int row : rows) {
    require(row >= 0 && row < size, "[", op, "] rows must be from 0 to ", size - 1, "; got ", row);
  }
}

BatchKVCache::BatchKVCache(std::vector<int> left_padding, CacheCoding coding)
    : coding_(checked_coding(std::move(coding))) {
  for (int n : left_padding) require(n >= 0, "[cache] left_padding must be at least 0; got ", n);
  set_padding(std::move(left_padding));
}

BatchKVCache BatchKVCache::merge(const std::vector<KVCache>& caches, mx::StreamOrDevice s) {
  require(!caches.empty(), "[merge] there must be at least one cache");
  int longest = 0;
  const KVCache* filled = nullptr;
  for (const auto& c : caches) {
    check_same_coding("merge", caches[0].coding(), c.coding());
    longest = std::max(longest, c.offset());
    if (c.empty()) continue;
    filled = filled ? filled : &c;
    check_same_shape("merge", *filled->store(), *c.store());
  }
  std::vector<int> padding;
  std::vector<Store> rows;
  std::vector<std::optional<Copies>> copies;
  for (const auto& c : caches) {
    require(c.empty() || c.store()->batch() == 1, "[merge] each cache must hold one sequence; got ",
            c.empty() ? 0 : c.store()->batch());
    padding.push_back(longest - c.offset());
    if (longest == 0) continue;
    const auto held = c.offset() ? c.store() : std::nullopt;
    copies.emplace_back();
    if (held && c.copies()) copies.back() = move_copies(c.coding(), *c.copies(), {padding.back()}, longest, s);
    rows.push_back(justified(held, *filled->store(), 1, c.offset(), padding.back(), round_up(longest) - longest, s));
  }
  BatchKVCache out(std::move(padding), caches[0].coding());
  if (longest > 0) {
    out.store_ = concatenate(rows, 0, s);
    out.length_ = longest;
    if (has_copies(out.coding_)) out.copies_ = join_copies(copies, std::vector<int>(caches.size(), 1), s);
  }
  return out;
}

void BatchKVCache::append(const mx::array& keys, const mx::array& values, mx::StreamOrDevice s) {
  require(keys.ndim() == 0 || keys.shape(0) == batch(), "[append] batch must stay ", batch(), "; got ", keys.shape(0));
  store_ = append_both(coding_, store_, copies_, length_, left_padding_, ends_, keys, values, s);
  length_ += keys.shape(2);
}

View BatchKVCache::view() const {
  require(store_.has_value(), "[cache] nothing was appended yet");
  View out{coding_, *store_, length_, starts_};
  if (copies_) out.copies = copies_->readable();
  return out;
}

void BatchKVCache::end_chunk() {
  if (copies_) copies_->chunk.reset();
}

int BatchKVCache::trim(int n) {
  n = std::clamp(n, 0, length_);
  if (copies_) copies_ = trim_copies(coding_, *copies_, *store_, length_ - n);
  length_ -= n;
  return n;
}

void BatchKVCache::prepare(const std::vector<int>& left_padding, const std::vector<int>& right_padding,
                           const std::vector<int>& lengths) {
  for (const auto* padding : {&left_padding, &right_padding, &lengths}) {
    require(padding->empty() || int(padding->size()) == batch(), "[prepare] padding must have one number for each of ",
            batch(), " rows; got ", padding->size());
    for (int n : *padding) require(n >= 0, "[prepare] padding must be at least 0; got ", n);
  }
  require(left_padding.empty() || !store_, "[prepare] left padding can be added only to an empty batch");
  auto padding = left_padding_;
  for (size_t b = 0; b < left_padding.size(); ++b) padding[b] += left_padding[b];
  set_padding(std::move(padding));
  if (std::any_of(right_padding.begin(), right_padding.end(), [](int n) { return n > 0; })) {
    right_padding_ = right_padding;
    ends_.clear();
    for (size_t b = 0; b < lengths.size(); ++b) {
      ends_.push_back(length_ + lengths[b] + (left_padding.empty() ? 0 : left_padding[b]));
    }
  }
}

void BatchKVCache::finalize(mx::StreamOrDevice s) {
  if (right_padding_.empty()) return;
  auto padding = left_padding_;
  bool known = int(ends_.size()) == batch();  // where the rows end, which is where the copies of their newest are from
  for (int b = 0; b < batch(); ++b) {
    known = known && ends_[b] == length_ - right_padding_[b];
    require(right_padding_[b] <= length_ - padding[b], "[finalize] ", right_padding_[b],
            " pads were announced behind row ", b, ", which holds ", length_ - padding[b], " tokens");
    padding[b] += right_padding_[b];
  }
  store_ = store_->roll(mx::array(right_padding_.data(), {batch()}, mx::int32), s);
  if (copies_) {
    copies_ = known ? front_pads(coding_, *copies_, right_padding_, length_, s)
                    : copies_of_codes(coding_, *store_, length_, padding, s);
  }
  set_padding(std::move(padding));
  right_padding_.clear();
  ends_.clear();
}

void BatchKVCache::filter(const std::vector<int>& rows, mx::StreamOrDevice s) {
  check_rows("filter", rows, batch());
  std::vector<int> padding, right, ends;
  for (int row : rows) {
    padding.push_back(left_padding_[row]);
    if (!right_padding_.empty()) right.push_back(right_padding_[row]);
    if (!ends_.empty()) ends.push_back(ends_[row]);
  }
  // An empty batch keeps its padding: it is that of the tokens to come.
  const int shared =
      padding.empty() || !store_ ? 0 : std::min(length_, *std::min_element(padding.begin(), padding.end()));
  for (int& n : padding) n -= shared;
  for (int& n : ends) n -= shared;
  bool same = shared == 0 && int(rows.size()) == batch();
  for (int b = 0; same && b < batch(); ++b) same = rows[b] == b;
  if (store_ && !same) {
    const mx::array index(rows.data(), {int(rows.size())}, mx::int32);
    store_ = store_->tokens(shared, store_->capacity(), s).take(index, s);
    if (copies_) {
      const std::vector<int> by(batch(), -shared);
      copies_ = take_copies(move_copies(coding_, *copies_, by, length_ - shared, s), index, s);
    }
  }
  length_ -= shared;
  right_padding_ = std::move(right);
  ends_ = std::move(ends);
  set_padding(std::move(padding));
}

void BatchKVCache::extend(const BatchKVCache& other, mx::StreamOrDevice s) {
  check_same_coding("extend", coding_, other.coding_);
  require(right_padding_.empty() && other.right_padding_.empty(), "[extend] finalize the batches first");
  if (store_ && other.store_) check_same_shape("extend", *store_, *other.store_);
  const int longest = std::max(length_, other.length_), spare = round_up(longest) - longest;
  std::optional<Store> joined;
  std::optional<Copies> copies;
  if (has_copies(coding_) && (store_ || other.store_)) {
    std::vector<std::optional<Copies>> parts;
    for (const auto* part : {static_cast<const BatchKVCache*>(this), &other}) {
      parts.emplace_back();
      if (!part->copies_) continue;
      const std::vector<int> by(part->batch(), longest - part->length_);
      parts.back() = move_copies(coding_, *part->copies_, by, longest, s);
    }
    copies = join_copies(parts, {batch(), other.batch()}, s);
  }
  if (store_ || other.store_) {
    const auto& like = store_ ? *store_ : *other.store_;
    joined =
        concatenate({justified(store_, like, batch(), length_, longest - length_, spare, s),
                     justified(other.store_, like, other.batch(), other.length_, longest - other.length_, spare, s)},
                    0, s);
  }
  std::vector<int> padding;
  for (int n : left_padding_) padding.push_back(n + longest - length_);
  for (int n : other.left_padding_) padding.push_back(n + longest - other.length_);
  store_ = std::move(joined);
  copies_ = std::move(copies);
  length_ = longest;
  set_padding(std::move(padding));
}

KVCache BatchKVCache::extract(int row, mx::StreamOrDevice s) const {
  check_rows("extract", {row}, batch());
  KVCache out(coding_);
  const int from = std::min(left_padding_[row], length_);
  if (!store_ || from == length_) return out;
  const mx::array index(row);
  const auto rows = mx::reshape(index, {1}, s);
  const auto held = store_->tokens(from, length_, s).take(rows, s);
  std::optional<Copies> copies;
  // Evaluated at once: a lazy row would hold the whole batch's buffers for as long as nobody reads it.
  std::vector<mx::array> read{held.keys.codes, held.keys.scales, held.values.codes, held.values.scales};
  if (copies_) {
    copies = move_copies(coding_, take_copies(*copies_, rows, s), {-from}, length_ - from, s);
    const Store& x = copies->held;
    read.insert(read.end(), {x.keys.codes, x.keys.scales, x.values.codes, x.values.scales});
  }
  mx::async_eval(read);
  out.restore(held, held.capacity(), copies);
  return out;
}

void BatchKVCache::restore(const Store& store, int length, std::vector<int> left_padding,
                           const std::optional<Copies>& copies) {
  check_store("restore", coding_, store, length);
  if (copies && has_copies(coding_)) check_restored("restore", coding_, *copies, store, length);
  require(int(left_padding.size()) == store.batch(), "[restore] left_padding must have one number for each of ",
          store.batch(), " rows; got ", left_padding.size());
  for (int n : left_padding) {
    require(n >= 0 && n <= 1 << 30, "[restore] left_padding must be from 0 to 1073741824; got ", n);
  }
  copies_.reset();
  if (has_copies(coding_)) copies_ = copies ? *copies : copies_of_codes(coding_, store, length, left_padding);
  set_padding(std::move(left_padding));
  if (copies_) copies_->read_from = nullptr;  // others may hold the arrays
  store_ = store;
  length_ = length;
  right_padding_.clear();
  ends_.clear();
}

Mask BatchKVCache::mask(int queries, int window, bool as_array, mx::StreamOrDevice s) const {
  if (window > 0 || as_array) return {false, causal_mask(queries, length_, window, left_padding_, s)};
  return {queries > 1, std::nullopt};
}

std::vector<int> BatchKVCache::offsets() const {
  std::vector<int> out;
  for (int n : left_padding_) out.push_back(length_ - n);
  return out;
}

void BatchKVCache::set_padding(std::vector<int> left_padding) {
  left_padding_ = std::move(left_padding);
  const bool any = std::any_of(left_padding_.begin(), left_padding_.end(), [](int n) { return n > 0; });
  starts_.reset();
  if (any) starts_ = mx::array(left_padding_.data(), {batch()}, mx::int32);
}

}  // namespace turboquant::ops
