// Shared by the two caches of a sliding window: make room for a token, drop the oldest.
#pragma once

#include <optional>
#include <utility>

#include "turboquant/mlx/store.h"

namespace turboquant::ops {

/// `store` without its oldest tokens after the first `keep`, so that `size` are left.
inline Store drop_oldest(const Store& store, int size, int keep, mx::StreamOrDevice s) {
  const int excess = store.capacity() - size;
  if (excess <= 0) return store;
  const auto rest = store.tokens(keep + excess, store.capacity(), s);
  return keep ? concatenate({store.tokens(0, keep, s), rest}, 2, s) : rest;
}

/// The store with room for one token, and its place; a place equal to max_size means that the ring is full.
inline std::pair<Store, int> room_for_one(const std::optional<Store>& store, const Store& like, int length, int index,
                                          int max_size, int keep, mx::StreamOrDevice s) {
  std::optional<Store> out = store;
  if (!out || (length >= out->capacity() && out->capacity() < max_size)) {
    const auto fresh = zeros_like(like, like.batch(), std::min(kGrowth, max_size - length), s);
    out = out ? concatenate({*out, fresh}, 2, s) : fresh;
    index = length;
  }
  if (out->capacity() > max_size) return {drop_oldest(*out, max_size, keep, s), max_size};
  return {*out, index};
}

}  // namespace turboquant::ops
