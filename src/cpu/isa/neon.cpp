// NEON with the dot-product extension (Armv8.2): signed bytes by signed bytes.
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "cpu/simd/table.h"
#include "cpu/simd/weights.h"

namespace turboquant::cpu {
namespace {

struct Simd : ByteWeights<16> {
  static constexpr bool interleaves = false;
  static constexpr int score_rows = 2, level_offset = 0;
  using U8 = Vec<uint8_t, 16>;

  static Vec<float, 16> load_halves(const uint16_t* p) {
    return Vec<float, 16>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))));
  }

  using Table = uint8x16_t;
  static Table table(const int8_t* p) { return load<uint8x16_t>(p); }
  static U8 lookup(Table table, U8 v) { return U8(vqtbl1q_u8(table, uint8x16_t(v & 0x0f))); }
  template <int bits>
  static Vec<uint32_t, 16> load_groups(const uint32_t* p, int) {
    return load<Vec<uint32_t, 16>>(p);
  }
  using Levels = int8x16_t;
  struct Weights {
    int8x16_t a, b;
  };
  struct Acc {
    int32x4_t high, low;
  };
  static Levels levels(U8 v) { return Levels(v); }
  static Weights load_weights(const uint8_t* p) { return {load<int8x16_t>(p), load<int8x16_t>(p + 16)}; }
  static Weights broadcast_weights(uint32_t a, uint32_t b) {
    return {vreinterpretq_s8_u32(vdupq_n_u32(a)), vreinterpretq_s8_u32(vdupq_n_u32(b))};
  }
  static void dot(Acc& acc, Levels l, const Weights& w) {
    acc.high = vdotq_s32(acc.high, l, w.a);
    acc.low = vdotq_s32(acc.low, l, w.b);
  }
  static I32 total(const Acc& acc) { return I32(vaddq_s32(vshlq_n_s32(acc.high, 8), acc.low)); }
};

bool has_dot_product() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Apple processor that macOS for Arm runs on has it
#endif
}

}  // namespace

const Kernels neon_kernels = make_kernels<Simd>("neon", has_dot_product);

}  // namespace turboquant::cpu
