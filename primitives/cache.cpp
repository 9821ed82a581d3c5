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
    *centre = mx::contiguous(mx::astype(**centre, mx::float32));
  }
  return coding;
}

KVCache::KVCache(Coding coding) : coding_(checked_coding(std::move(coding))) {}

void KVCache::append(const mx::array& keys, const mx::array& values, mx::StreamOrDevice s) {
  const auto rows = encode_store(coding_, keys, values, store_, s);
  const int added = rows.capacity();
  store_ = grow(store_, length_, rows, length_ + added, s).write(rows, length_, s);
  length_ += added;
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
  check_packed("restore", "keys", store.keys, coding_.key_bits);
  check_packed("restore", "values", store.values, coding_.value_bits);
  require(store.keys.codes.ndim() == 4, "[restore] codes must have shape (batch, kv_heads, tokens, words); got ",
          store.keys.codes.shape());
  require(store.keys.scales.shape() == store.values.scales.shape(),
          "[restore] keys and values must agree in batch, heads and tokens; got ", store.keys.scales.shape(), " and ",
          store.values.scales.shape());
  require(length >= 0 && length <= store.capacity(), "[restore] length must be from 0 to the ", store.capacity(),
          " tokens held; got ", length);
  store_ = store;
  length_ = length;
}

}  // namespace turboquant::ops
