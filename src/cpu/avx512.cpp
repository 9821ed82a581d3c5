// AVX-512 (F, BW, DQ, VL), without VNNI and VBMI: 16-bit dot products.
#include "cpu/avx512.h"

#include <immintrin.h>

#include "cpu/table.h"
#include "cpu/weights.h"

namespace turboquant::cpu {
namespace {

struct Simd : WordWeights<64>, Avx512Loads {
  static constexpr int score_rows = 4;
  struct Levels {
    __m512i a, b;
  };
  using Weights = Levels;
  using Acc = Vec<int32_t, 64>;
  static Levels load_levels(const uint8_t* p) { return {load<__m512i>(p), load<__m512i>(p + 64)}; }
  static Weights load_weights(const uint8_t* p) { return load_levels(p); }
  static Weights broadcast_weights(uint32_t a, uint32_t b) {
    return {_mm512_set1_epi32(int(a)), _mm512_set1_epi32(int(b))};
  }
  static void dot(Acc& acc, const Levels& l, const Weights& w) {
    acc += Acc(_mm512_madd_epi16(l.a, w.a));
    acc += Acc(_mm512_madd_epi16(l.b, w.b));
  }
  static Acc total(Acc acc) { return acc; }
};

}  // namespace

const Kernels avx512_kernels = make_kernels<Simd>("avx512", [] {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
});

}  // namespace turboquant::cpu
