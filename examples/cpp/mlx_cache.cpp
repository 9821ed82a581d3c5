// The cache over MLX arrays: append, attend, trim.
#include <turboquant/mlx/kv_cache.h>

#include <cstdio>

namespace mx = mlx::core;
using turboquant::ops::KVCache;

int main() {
  KVCache cache({.keys = {4}, .values = {3}});  // bits of each side
  for (int step = 0; step < 4; ++step) {
    cache.append(mx::random::normal({1, 4, 100, 256}), mx::random::normal({1, 4, 100, 256}));
  }
  const auto out = cache.view().attend(mx::random::normal({1, 16, 1, 256}), 1.0f / 16, /*causal=*/false);
  std::printf("%d tokens, %zu bytes, |out| = %.4f\n", cache.offset(), cache.nbytes(),
              mx::linalg::norm(out).item<float>());
  cache.trim(150);
  std::printf("%d tokens after trim\n", cache.offset());
}
