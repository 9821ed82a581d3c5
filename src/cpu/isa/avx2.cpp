// AVX2 and FMA.  The byte dot product of AVX2 saturates, so levels and weights are multiplied as 16-bit words.
#include "cpu/isa/avx2.h"

#include <immintrin.h>

#include "cpu/simd/table.h"
#include "cpu/simd/weights.h"

namespace turboquant::cpu {
namespace {

struct Simd : WordWeights<32>, Avx2Loads {
  static constexpr bool interleaves = false;
  static constexpr int score_rows = 2;
  using Acc = I32;
  static void dot(Acc& acc, const Levels& l, const Weights& w) {
    acc += Acc(_mm256_madd_epi16(__m256i(l.a), __m256i(w.a)));
    acc += Acc(_mm256_madd_epi16(__m256i(l.b), __m256i(w.b)));
  }
  static Acc total(Acc acc) { return acc; }
};

}  // namespace

const Kernels avx2_kernels =
    make_kernels<Simd>("avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); });

}  // namespace turboquant::cpu
