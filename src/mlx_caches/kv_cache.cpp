#include "turboquant/mlx/kv_cache.h"

#include <algorithm>

#include "mlx_ops/checks.h"

namespace turboquant::ops {

CacheCoding checked_coding(CacheCoding coding) {
  check_bits("cache", "key_bits", coding.keys.bits());
  check_bits("cache", "value_bits", coding.values.bits());
  require(coding.keys.seed == coding.values.seed, "[cache] keys and values must have the same seed; got ",
          coding.keys.seed, " and ", coding.values.seed);
  check_copies(coding);
  for (auto* centre : {&coding.keys.centre, &coding.values.centre}) {
    if (!*centre) continue;
    require((*centre)->ndim() == 2, "[cache] centres must have shape (kv_heads, head_dim); got ", (*centre)->shape());
    // Kept as it is when it can be: caches that share the array are known to agree without a comparison.
    if ((*centre)->dtype() == mx::float32 && (*centre)->is_available() && (*centre)->flags().row_contiguous) continue;
    *centre = mx::contiguous(mx::astype(**centre, mx::float32));
    mx::eval(**centre);  // another thread than this may use the cache, and MLX's streams belong to threads
  }
  for (auto* feedback : {&coding.keys.feedback, &coding.values.feedback}) {
    if (!*feedback) continue;
    require((*feedback)->dtype() == mx::float16, "[cache] feedback must be float16; got ", (*feedback)->dtype());
    require((*feedback)->ndim() == 3 && (*feedback)->shape(1) == (*feedback)->shape(2),
            "[cache] feedback must have shape (kv_heads, head_dim, head_dim); got ", (*feedback)->shape());
    if ((*feedback)->is_available() && (*feedback)->flags().row_contiguous) continue;
    *feedback = mx::contiguous(**feedback);
    mx::eval(**feedback);
  }
  if (!coding.key_map) {
    coding.query_map = std::nullopt;
    return coding;
  }
  if (!coding.query_map) coding.query_map = inverse_transpose(*coding.key_map);
  for (auto* map : {&coding.key_map, &coding.query_map}) {
    require((*map)->dtype() == mx::float32 && (*map)->ndim() == 3 && (*map)->shape(1) == (*map)->shape(2),
            "[cache] maps must be float32 of shape (kv_heads, head_dim, head_dim); got ", (*map)->dtype(), " of shape ",
            (*map)->shape());
    if (!((*map)->is_available() && (*map)->flags().row_contiguous)) *map = mx::contiguous(**map);
  }
  return coding;
}

KVCache::KVCache(CacheCoding coding) : coding_(checked_coding(std::move(coding))) {}

void KVCache::append(const mx::array& keys, const mx::array& values, mx::StreamOrDevice s) {
  const int rows = keys.ndim() == 4 ? keys.shape(0) : 0;
  store_ = append_both(coding_, store_, copies_, length_, std::vector<int>(rows), {}, keys, values, s);
  length_ += keys.shape(2);
}

View KVCache::view() const {
  require(store_.has_value(), "[cache] nothing was appended yet");
  View out{coding_, *store_, length_, std::nullopt};
  if (copies_) out.copies = copies_->readable();
  return out;
}

int KVCache::trim(int n) {
  n = std::clamp(n, 0, length_);
  if (copies_) copies_ = trim_copies(coding_, *copies_, *store_, length_ - n);
  length_ -= n;
  return n;
}

void KVCache::end_chunk() {
  if (copies_) copies_->chunk.reset();
}

void KVCache::restore(const Store& store, int length, const std::optional<Copies>& copies) {
  check_store("restore", coding_, store, length);
  if (copies && has_copies(coding_)) check_restored("restore", coding_, *copies, store, length);
  copies_.reset();
  if (has_copies(coding_)) {
    copies_ = copies ? *copies : copies_of_codes(coding_, store, length, std::vector<int>(store.batch()));
  }
  if (copies_) copies_->read_from = nullptr;  // others may hold the arrays
  store_ = store;
  length_ = length;
}

}  // namespace turboquant::ops
