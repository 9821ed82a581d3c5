#include "primitives/cache.h"

#include <algorithm>

#include "primitives/checks.h"

namespace turboquant::ops {

Coding checked_coding(Coding coding) {
  check_bits("cache", "key_bits", coding.key_bits);
  check_bits("cache", "value_bits", coding.value_bits);
  for (auto* centre : {&coding.key_centre, &coding.value_centre}) {
    if (!*centre) continue;
    require((*centre)->ndim() == 2, "[cache] centres must have shape (kv_heads, head_dim); got ", (*centre)->shape());
    // Kept as it is when it can be: caches that share the array are known to agree without a comparison.
    if ((*centre)->dtype() == mx::float32 && (*centre)->is_available() && (*centre)->flags().row_contiguous) continue;
    *centre = mx::contiguous(mx::astype(**centre, mx::float32));
  }
  return coding;
}

KVCache::KVCache(Coding coding) : coding_(checked_coding(std::move(coding))) {}

// An append may overwrite nothing that a view or a copy can see.  Views see only tokens before their length, so room
// that nobody was promised is free; below that, only arrays that nobody else holds are.
bool KVCache::owns_room(int added) const {
  if (!store_ || length_ + added > store_->capacity()) return false;
  return (frontier_ && *frontier_ == length_) || store_->unshared();
}

void KVCache::append_in_place(const mx::array& keys, const mx::array& values, mx::StreamOrDevice s) {
  const int added = keys.shape(2);
  const bool here = owns_room(added);
  Store next = here     ? *store_
               : store_ ? copy_with_room(store_, length_, *store_, length_ + added, s)
                        : zeros(coding_, keys.shape(0), keys.shape(1), round_up(added), keys.shape(3), s);
  auto frontier = here && frontier_ ? frontier_ : std::make_shared<int>(length_);
  const bool follows = next.written && int(next.written->size()) == length_ + 1;
  next.written = append_kv(keys, values, coding_.key_bits, coding_.value_bits, coding_.seed, coding_.key_centre,
                           coding_.value_centre, next.keys, next.values,
                           follows ? *next.written : nothing_to_wait_for(length_, s), s);
  store_ = std::move(next);
  length_ += added;
  *frontier = length_;
  frontier_ = std::move(frontier);
}

void KVCache::append(const mx::array& keys, const mx::array& values, mx::StreamOrDevice s) {
  const auto stream = mx::to_stream(s);
  check_sides("encode", keys, values);
  if (store_) check_follows(coding_, keys.shape(), *store_);
  std::vector<mx::array> arrays{keys, values};
  if (store_) arrays.insert(arrays.end(), {store_->keys.codes, store_->values.codes});
  if (keys.shape(2) > 0 && can_append_in_place(arrays, stream)) {
    append_in_place(keys, values, stream);
    return;
  }
  const auto rows = encode_store(coding_, keys, values, store_, stream);
  store_ = grow(store_, length_, rows, length_ + rows.capacity(), stream).write(rows, length_, stream);
  length_ += rows.capacity();
  frontier_ = std::make_shared<int>(length_);
}

View KVCache::view() const {
  require(store_.has_value(), "[cache] nothing was appended yet");
  return {coding_, *store_, length_, std::nullopt};
}

int KVCache::trim(int n) {
  n = std::clamp(n, 0, length_);
  length_ -= n;
  return n;
}

void KVCache::restore(const Store& store, int length) {
  check_store("restore", coding_, store, length);
  store_ = store;
  length_ = length;
  frontier_ = nullptr;  // others may hold these arrays
}

}  // namespace turboquant::ops
