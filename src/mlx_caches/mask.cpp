#include "turboquant/mlx/mask.h"

namespace turboquant::ops {

mx::array causal_mask(int queries, int offset, int window, const std::vector<int>& left_padding, mx::StreamOrDevice s) {
  const auto query = mx::arange(offset, offset + queries, mx::int32, s);
  const auto at = mx::expand_dims(query, 1, s), key = mx::arange(offset + queries, mx::int32, s);
  auto mask = mx::less_equal(key, at, s);
  if (window > 0) mask = mx::logical_and(mask, mx::greater(key, mx::subtract(at, mx::array(window), s), s), s);
  if (left_padding.empty()) return mask;
  const mx::array padding(left_padding.data(), {int(left_padding.size()), 1, 1, 1}, mx::int32);
  return mx::logical_and(mask, mx::greater_equal(key, padding, s), s);
}

}  // namespace turboquant::ops
