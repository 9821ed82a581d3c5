// AVX-VNNI: the quad dot product on 256-bit vectors, for processors without AVX-512.
#include <immintrin.h>

#include "cpu/isa/avx2.h"
#include "cpu/simd/table.h"
#include "cpu/simd/weights.h"

namespace turboquant::cpu {
namespace {

struct Simd : ByteWeights<32>, Avx2Loads {
  static constexpr bool interleaves = false;
  static constexpr int score_rows = 1, level_offset = 128;
  using Levels = __m256i;
  struct Weights {
    __m256i a, b;
  };
  struct Acc {
    __m256i high, low;
  };
  static Levels levels(U8 v) { return Levels(v); }
  static Weights load_weights(const uint8_t* p) { return {load<__m256i>(p), load<__m256i>(p + 32)}; }
  static Weights broadcast_weights(uint32_t a, uint32_t b) {
    return {_mm256_set1_epi32(int(a)), _mm256_set1_epi32(int(b))};
  }
  static void dot(Acc& acc, Levels l, const Weights& w) {
    acc.high = _mm256_dpbusd_avx_epi32(acc.high, l, w.a);
    acc.low = _mm256_dpbusd_avx_epi32(acc.low, l, w.b);
  }
  static I32 total(const Acc& acc) { return I32(_mm256_add_epi32(_mm256_slli_epi32(acc.high, 8), acc.low)); }
};

/// CPUID leaf 7, subleaf 1, EAX bit 4; this compiler's __builtin_cpu_supports may not know its name.
bool has_avx_vnni() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
  unsigned a, b, c, d;
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
  return a >> 4 & 1;
}

}  // namespace

const Kernels avx_vnni_kernels = make_kernels<Simd>("avx_vnni", has_avx_vnni);

}  // namespace turboquant::cpu
