// What the 256-bit instruction sets share.
#pragma once

#include <immintrin.h>

#include "cpu/simd.h"

namespace turboquant::cpu {
namespace {

struct Avx2Loads {
  using U8 = Vec<uint8_t, 32>;

  static U8 lookup(const int8_t* table, U8 index) {
    return U8(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load<__m128i>(table)), __m256i(index)));
  }
  template <int bits>
  static Vec<uint32_t, 32> load_groups(const uint32_t* p, int count) {
    const __m128i low = load<__m128i>(p);
    const __m128i high = count > 1 ? load<__m128i>(p + bits) : __m128i{};
    return Vec<uint32_t, 32>(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
  }
};

}  // namespace
}  // namespace turboquant::cpu
