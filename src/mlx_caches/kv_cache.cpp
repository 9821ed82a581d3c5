#include "turboquant/mlx/kv_cache.h"

#include <algorithm>

#include "mlx_ops/checks.h"

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
    mx::eval(**centre);  // another thread than this may use the cache, and MLX's streams belong to threads
  }
  for (auto* feedback : {&coding.key_feedback, &coding.value_feedback}) {
    if (!*feedback) continue;
    require((*feedback)->dtype() == mx::float16, "[cache] feedback must be float16; got ", (*feedback)->dtype());
    require((*feedback)->ndim() == 3 && (*feedback)->shape(1) == (*feedback)->shape(2),
            "[cache] feedback must have shape (kv_heads, head_dim, head_dim); got ", (*feedback)->shape());
    if ((*feedback)->is_available() && (*feedback)->flags().row_contiguous) continue;
    *feedback = mx::contiguous(**feedback);
    mx::eval(**feedback);
  }
  return coding;
}

KVCache::KVCache(Coding coding) : coding_(checked_coding(std::move(coding))) {}

void KVCache::append(const mx::array& keys, const mx::array& values, mx::StreamOrDevice s) {
  store_ = append_store(coding_, store_, length_, keys, values, s);
  length_ += keys.shape(2);
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
}

}  // namespace turboquant::ops
