// AVX-512 with VNNI and VBMI.
#include <immintrin.h>

#include "cpu/isa/avx512.h"
#include "cpu/simd/table.h"
#include "cpu/simd/weights.h"

namespace turboquant::cpu {
namespace {

struct Simd : ByteWeights<64>, Avx512Loads {
  static constexpr bool interleaves = true;
  static constexpr int score_rows = 2, level_offset = 128;
  using Levels = __m512i;
  struct Weights {
    __m512i a, b;
  };
  struct Acc {
    __m512i high, low;
  };
  /// Looks at six bits; the upper two make no difference, because the table holds its 16 levels four times.
  static U8 lookup(Table table, U8 v) { return U8(_mm512_permutexvar_epi8(__m512i(v), table)); }
  static Levels levels(U8 v) { return Levels(v); }
  static Weights load_weights(const uint8_t* p) { return {load<__m512i>(p), load<__m512i>(p + 64)}; }
  static Weights broadcast_weights(uint32_t a, uint32_t b) {
    return {_mm512_set1_epi32(int(a)), _mm512_set1_epi32(int(b))};
  }
  static void dot(Acc& acc, Levels l, const Weights& w) {
    dpbusd(acc.high, l, w.a);
    dpbusd(acc.low, l, w.b);
  }
  /// The intrinsic would do, but GCC 12 copies every accumulator twice around it.
  static void dpbusd(__m512i& acc, __m512i levels, __m512i weights) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(levels), "v"(weights));
  }
  static I32 total(const Acc& acc) { return I32(_mm512_add_epi32(_mm512_slli_epi32(acc.high, 8), acc.low)); }
};

}  // namespace

const Kernels avx512_vbmi_kernels = make_kernels<Simd>("avx512_vbmi", [] {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
});

}  // namespace turboquant::cpu
