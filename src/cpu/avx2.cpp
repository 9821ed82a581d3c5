// AVX2 and FMA.  The byte dot product of AVX2 saturates, so levels and weights are multiplied as 16-bit words.
#include "cpu/avx2.h"

#include <immintrin.h>

#include "cpu/table.h"
#include "cpu/weights.h"

namespace turboquant::cpu {
namespace {

struct Simd : WordWeights<32>, Avx2Loads {
  static constexpr int score_rows = 2;
  struct Levels {
    __m256i a, b;
  };
  using Weights = Levels;
  using Acc = Vec<int32_t, 32>;
  static Levels load_levels(const uint8_t* p) { return {load<__m256i>(p), load<__m256i>(p + 32)}; }
  static Weights load_weights(const uint8_t* p) { return load_levels(p); }
  static Weights broadcast_weights(uint32_t a, uint32_t b) {
    return {_mm256_set1_epi32(int(a)), _mm256_set1_epi32(int(b))};
  }
  static void dot(Acc& acc, const Levels& l, const Weights& w) {
    acc += Acc(_mm256_madd_epi16(l.a, w.a));
    acc += Acc(_mm256_madd_epi16(l.b, w.b));
  }
  static Acc total(Acc acc) { return acc; }
};

}  // namespace

const Kernels avx2_kernels =
    make_kernels<Simd>("avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); });

}  // namespace turboquant::cpu
