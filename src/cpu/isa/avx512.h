// Vector operations that all 512-bit instruction sets share.
#pragma once

#include <immintrin.h>

#include "cpu/simd/simd.h"

namespace turboquant::cpu {
namespace {

struct Avx512Loads {
  using U8 = Vec<uint8_t, 64>;

  static Vec<float, 64> load_halves(const uint16_t* p) { return Vec<float, 64>(_mm512_cvtph_ps(load<__m256i>(p))); }

  using Table = __m512i;
  static Table table(const int8_t* p) { return _mm512_broadcast_i32x4(load<__m128i>(p)); }
  static U8 lookup(Table table, U8 v) { return U8(_mm512_shuffle_epi8(table, __m512i(v & 0x0f))); }
  using U32 = Vec<uint32_t, 64>;
  static U32 merge(uint32_t mask, U32 a, U32 b) {
    return U32(_mm512_ternarylogic_epi32(_mm512_set1_epi32(int(mask)), __m512i(a), __m512i(b), 0xca));
  }
  static U32 exclusive_or(U32 a, U32 b, U32 c) {
    return U32(_mm512_ternarylogic_epi32(__m512i(a), __m512i(b), __m512i(c), 0x96));
  }
  /// Masked, so nothing past the groups is touched.
  template <int bits>
  static Vec<uint32_t, 64> load_groups(const uint32_t* p, int count) {
    const __m512i words = _mm512_maskz_loadu_epi32(__mmask16((1u << (bits * count)) - 1), p);
    if constexpr (bits == 4) return Vec<uint32_t, 64>(words);
    constexpr int b = bits;
    return Vec<uint32_t, 64>(
        _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 3, b, b + 1, b + 2, b + 3, 2 * b, 2 * b + 1, 2 * b + 2,
                                                   2 * b + 3, 3 * b, 3 * b + 1, 3 * b + 2, 3 * b + 3),
                                 words));
  }
};

}  // namespace
}  // namespace turboquant::cpu
