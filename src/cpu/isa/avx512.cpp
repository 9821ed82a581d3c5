// AVX-512 (F, BW, DQ, VL), without VNNI and VBMI: 16-bit dot products.
#include "cpu/isa/avx512.h"

#include <immintrin.h>

#include "cpu/simd/table.h"
#include "cpu/simd/weights.h"

namespace turboquant::cpu {
namespace {

struct Simd : WordWeights<64>, Avx512Loads {
  static constexpr bool interleaves = false;
  static constexpr int score_rows = 4;
  using Acc = I32;
  static void dot(Acc& acc, const Levels& l, const Weights& w) {
    acc += Acc(_mm512_madd_epi16(__m512i(l.a), __m512i(w.a)));
    acc += Acc(_mm512_madd_epi16(__m512i(l.b), __m512i(w.b)));
  }
  static Acc total(Acc acc) { return acc; }
};

}  // namespace

const Kernels avx512_kernels = make_kernels<Simd>("avx512", [] {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
});

}  // namespace turboquant::cpu
