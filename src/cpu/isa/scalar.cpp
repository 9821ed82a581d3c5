// Plain C++: no instruction beyond what the compiler takes for granted.
#include "cpu/simd/table.h"
#include "cpu/simd/weights.h"

namespace turboquant::cpu {
namespace {

struct Simd : WordWeights<16> {
  static constexpr bool interleaves = false;
  static constexpr int score_rows = 4;
  using U8 = Vec<uint8_t, 16>;

  using Table = const int8_t*;
  static Table table(const int8_t* p) { return p; }
  static U8 lookup(Table table, U8 v) {
    U8 out;
    for (int i = 0; i < 16; ++i) out[i] = uint8_t(table[v[i] & 15]);
    return out;
  }
  template <int bits>
  static Vec<uint32_t, 16> load_groups(const uint32_t* p, int) {
    return load<Vec<uint32_t, 16>>(p);
  }
  using Acc = I32;
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
