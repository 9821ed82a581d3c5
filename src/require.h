// How arguments are refused, in the core and in the MLX layer.
#pragma once

#include <sstream>
#include <stdexcept>

namespace turboquant {

/// Throws std::invalid_argument unless `ok`; its message is `words`, one after the other.
template <class... Words>
void require(bool ok, const Words&... words) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << words);
  throw std::invalid_argument(message.str());
}

}  // namespace turboquant
