// The randomized rotation of TurboQuant (arXiv 2504.19874, section 3): r = H (s * x), with fixed random signs s and a
// symmetric orthonormal H, so that the inverse is x = s * (H r).
//
// D = 2^k m with m in {1, 3, 5, 7}: H is the Kronecker product of the Walsh-Hadamard matrix of order 2^k and the
// Householder reflection I - (2/m) 11^T of order m.  Coordinate i = 2^k * block + offset.
#pragma once

#include <cmath>
#include <cstdint>

namespace turboquant {

/// The odd factor m of a head dimension.
constexpr int odd_factor(int dim) {
  while (dim % 2 == 0) dim /= 2;
  return dim;
}

/// Whether vectors of this size can be coded: multiples of 32 from 32 to `most`.
constexpr bool valid_head_dim(int dim, int most = 512) { return dim >= 32 && dim <= most && dim % 32 == 0; }

/// Signs of coordinates 32w .. 32w + 31 as bits (1 is negative): the top half of the splitmix64 output for counter
/// w + 1 from `seed`.  They depend on the seed and the coordinate alone.
constexpr uint32_t sign_word(uint64_t seed, int w) {
  uint64_t z = seed + 0x9e3779b97f4a7c15ull * (uint64_t(w) + 1);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return uint32_t((z ^ z >> 31) >> 32);
}

/// Whether coordinate i has a negative sign.
constexpr bool is_negative(uint64_t seed, int i) { return sign_word(seed, i / 32) >> (i % 32) & 1; }

/// H without its factor 1/sqrt(2^k): in place, `dim` numbers.
template <class Real>
void unscaled_hadamard(Real* x, int dim) {
  const int m = odd_factor(dim), n = dim / m;
  for (int half = 1; half < n; half *= 2) {
    for (int i = 0; i < dim; i += 2 * half) {
      for (int j = i; j < i + half; ++j) {
        const Real a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
  if (m == 1) return;
  for (int j = 0; j < n; ++j) {
    Real sum = 0;
    for (int b = 0; b < m; ++b) sum += x[b * n + j];
    for (int b = 0; b < m; ++b) x[b * n + j] -= sum * (Real(2) / Real(m));
  }
}

/// r = H (s * x): in place, `dim` numbers.
template <class Real>
void rotate(Real* x, int dim, uint64_t seed) {
  for (int i = 0; i < dim; ++i) x[i] = is_negative(seed, i) ? -x[i] : x[i];
  unscaled_hadamard(x, dim);
  const Real scale = Real(1) / std::sqrt(Real(dim / odd_factor(dim)));
  for (int i = 0; i < dim; ++i) x[i] *= scale;
}

/// x = s * (H r): in place, `dim` numbers.
template <class Real>
void unrotate(Real* x, int dim, uint64_t seed) {
  unscaled_hadamard(x, dim);
  const Real scale = Real(1) / std::sqrt(Real(dim / odd_factor(dim)));
  for (int i = 0; i < dim; ++i) x[i] *= is_negative(seed, i) ? -scale : scale;
}

}  // namespace turboquant
