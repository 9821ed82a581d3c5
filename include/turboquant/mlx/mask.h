// Attention masks that follow from a cache's own rules: causal, a sliding window, the padding of a batch row.
#pragma once

#include <optional>
#include <vector>

#include "turboquant/mlx/ops.h"

namespace turboquant::ops {

/// What attention is told: nothing, "causal", or an array (True: visible).
struct Mask {
  bool causal = false;
  std::optional<mx::array> array;
};

/// (queries, offset + queries), or (B, 1, queries, offset + queries) with padding: query i stands at offset + i; it
/// sees keys at or before it, at most `window` of them (0: any number), and none of its row's first left_padding[b]
/// keys.
mx::array causal_mask(int queries, int offset, int window, const std::vector<int>& left_padding = {},
                      mx::StreamOrDevice s = {});

}  // namespace turboquant::ops
