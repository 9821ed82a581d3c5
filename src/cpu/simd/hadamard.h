// The orthonormal H of rotation.h in vectors: butterflies within registers where the distance is shorter than one.
#pragma once

#include "cpu/simd/simd.h"

namespace turboquant::cpu {
namespace {

/// One butterfly stage at a distance within the vector: (a, b) -> (a + b, a - b).
template <int distance, class F>
inline F butterfly(F x) {
  constexpr int n = sizeof(F) / 4;
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    const F swapped = __builtin_shufflevector(x, x, (I ^ distance)...);
    constexpr F sign = {(I & distance ? -1.0f : 1.0f)...};
    return x * sign + swapped;
  }
  (std::make_integer_sequence<int, n>());
}

template <int count, class F>
inline void walsh_hadamard_block(float* x, float scale) {
  constexpr int lanes = sizeof(F) / 4, n = count / lanes;
  F v[n];
#pragma GCC unroll 64
  for (int i = 0; i < n; ++i) {
    F a = load<F>(x + i * lanes) * scale;
    a = butterfly<1>(a);
    a = butterfly<2>(a);
    if constexpr (lanes > 4) a = butterfly<4>(a);
    if constexpr (lanes > 8) a = butterfly<8>(a);
    v[i] = a;
  }
#pragma GCC unroll 8
  for (int half = 1; half < n; half *= 2) {
#pragma GCC unroll 64
    for (int i = 0; i < n; ++i) {
      if (i & half) continue;
      const F a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
  }
#pragma GCC unroll 64
  for (int i = 0; i < n; ++i) store(x + i * lanes, v[i]);
}

template <class F>
void hadamard(float* x, int dim) {
  int m = dim;
  while (m % 2 == 0) m /= 2;
  const int n = dim / m;
  for (int b = 0; b < m; ++b) {
    switch (n) {
      case 32:
        walsh_hadamard_block<32, F>(x + b * n, 0.17677669529663687f);
        break;
      case 64:
        walsh_hadamard_block<64, F>(x + b * n, 0.125f);
        break;
      case 128:
        walsh_hadamard_block<128, F>(x + b * n, 0.08838834764831845f);
        break;
      case 256:
        walsh_hadamard_block<256, F>(x + b * n, 0.0625f);
        break;
      default:  // 512, in two halves
        walsh_hadamard_block<256, F>(x, 0.04419417382415922f);
        walsh_hadamard_block<256, F>(x + 256, 0.04419417382415922f);
        for (int i = 0; i < 256; i += int(sizeof(F) / 4)) {
          const F low = load<F>(x + i), high = load<F>(x + 256 + i);
          store(x + i, low + high);
          store(x + 256 + i, low - high);
        }
    }
  }
  if (m == 1) return;
  const float factor = 2.0f / float(m);  // the Householder reflection across the m blocks
  for (int j = 0; j < n; j += sizeof(F) / 4) {
    F sum = load<F>(x + j);
    for (int b = 1; b < m; ++b) sum += load<F>(x + b * n + j);
    sum *= factor;
    for (int b = 0; b < m; ++b) store(x + b * n + j, load<F>(x + b * n + j) - sum);
  }
}

}  // namespace
}  // namespace turboquant::cpu
