// Vector operations that all 256-bit instruction sets share.
#pragma once

#include <immintrin.h>

#include "cpu/simd/simd.h"

namespace turboquant::cpu {
namespace {

struct Avx2Loads {
  using U8 = Vec<uint8_t, 32>;

  static Vec<float, 32> load_halves(const uint16_t* p) { return Vec<float, 32>(_mm256_cvtph_ps(load<__m128i>(p))); }

  using Table = __m256i;
  static Table table(const int8_t* p) { return _mm256_broadcastsi128_si256(load<__m128i>(p)); }
  static U8 lookup(Table table, U8 v) { return U8(_mm256_shuffle_epi8(table, __m256i(v & 0x0f))); }
  template <int bits>
  static Vec<uint32_t, 32> load_groups(const uint32_t* p, int count) {
    const __m128i low = load<__m128i>(p);
    const __m128i high = count > 1 ? load<__m128i>(p + bits) : __m128i{};
    return Vec<uint32_t, 32>(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
  }
};

}  // namespace
}  // namespace turboquant::cpu
