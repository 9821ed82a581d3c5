// The bytes of the format that every encoder must write, derived from the words of format.h alone by a separate
// program.
#pragma once

#include <cstdint>
#include <vector>

#include "turboquant/rotation.h"

namespace turboquant::golden {

constexpr int kDim = 32, kSeed = 3;

/// Codes and the bits of the fp16 scale of `vector()`.
struct Bytes {
  int bits;
  std::vector<uint32_t> words;
  uint16_t scale;
};
inline std::vector<Bytes> bytes() {
  return {
      {2, {0xc29c28c2, 0x29829c29}, 0x503b},
      {3, {0x84a85105, 0x43043842, 0x68c78c78}, 0x4ccc},
      {4, {0x0940a30a, 0x87096095, 0xd18e18f0, 0x28b28c18}, 0x4cae},
  };
}

inline std::vector<Bytes> bytes_of_8_bits() {
  return {
      {8, {0xe42d01dc, 0x05e93b03, 0x6207ee4c, 0xf47f0af1, 0x0ff6810c, 0xb412f99e, 0xfdc517fb, 0x24ffd31c}, 0x4b96}};
}
inline std::vector<Bytes> trellis_bytes() {
  return {
      {2, {0x69d6dc29, 0x2a82ab06}, 0x4c4d},
      {3, {0x86d86d46, 0x6e46e86e, 0xa0fd932c}, 0x4c6a},
  };
}

/// A vector whose rotated coordinates are v + v^5 / 20000 with v = (11 i + 5) mod 32 - 15.5.
inline std::vector<float> vector() {
  std::vector<double> r(kDim);
  for (int i = 0; i < kDim; ++i) {
    const double v = (11 * i + 5) % 32 - 15.5;
    r[size_t(i)] = v + v * v * v * v * v / 20000;
  }
  unrotate(r.data(), kDim, kSeed);
  return {r.begin(), r.end()};
}

}  // namespace turboquant::golden
