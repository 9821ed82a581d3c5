// Plain C++: no instruction beyond what the compiler takes for granted.
#include "cpu/table.h"
#include "cpu/weights.h"

namespace turboquant::cpu {
namespace {

struct Simd : WordWeights<16> {
  static constexpr int score_rows = 1;
  using U8 = Vec<uint8_t, 16>;
  using I16 = Vec<int16_t, 16>;

  static U8 lookup(const int8_t* table, U8 index) {
    U8 out;
    for (int i = 0; i < 16; ++i) out[i] = uint8_t(table[index[i]]);
    return out;
  }
  template <int bits>
  static Vec<uint32_t, 16> load_groups(const uint32_t* p, int) {
    return load<Vec<uint32_t, 16>>(p);
  }
  struct Levels {
    I16 a, b;
  };
  using Weights = Levels;
  using Acc = I32;
  static Levels load_levels(const uint8_t* p) { return {load<I16>(p), load<I16>(p + 16)}; }
  static Weights load_weights(const uint8_t* p) { return load_levels(p); }
  static Weights broadcast_weights(uint32_t a, uint32_t b) {
    return {as<I16>(splat<I32>(int32_t(a))), as<I16>(splat<I32>(int32_t(b)))};
  }
  static void dot(Acc& acc, const Levels& l, const Weights& w) {
    for (int i = 0; i < 4; ++i) {
      acc[i] += l.a[2 * i] * w.a[2 * i] + l.a[2 * i + 1] * w.a[2 * i + 1] + l.b[2 * i] * w.b[2 * i] +
                l.b[2 * i + 1] * w.b[2 * i + 1];
    }
  }
  static I32 total(Acc acc) { return acc; }
};

}  // namespace

const Kernels scalar_kernels = make_kernels<Simd>("scalar", [] { return true; });

}  // namespace turboquant::cpu
