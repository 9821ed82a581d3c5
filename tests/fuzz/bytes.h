// What a fuzzer's bytes say: numbers in ranges, and arrays that end exactly where they must, so that AddressSanitizer
// sees every step beyond them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "turboquant/half.h"
#include "turboquant/turboquant.h"

namespace turboquant::fuzz {

/// Ends the run as a finding.
#define TQ_CHECK(condition) \
  if (!(condition)) __builtin_trap()

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}
  uint8_t byte() { return at_ < end_ ? *at_++ : 0; }
  /// From `least` to `most`.
  int number(int least, int most) { return least + int(word() % uint32_t(most - least + 1)); }
  bool chance(int of) { return byte() % of == 0; }
  uint32_t word() {
    uint32_t w = 0;
    for (int i = 0; i < 4; ++i) w = w << 8 | byte();
    return w;
  }
  uint64_t seed() { return uint64_t(word()) << 32 | word(); }
  /// Whatever an int can be, usually a small one.
  int any() { return chance(4) ? int(word()) : number(-2, 40); }
  size_t left() const { return size_t(end_ - at_); }

 private:
  const uint8_t *at_, *end_;
};

/// Numbers that a short input grows into.
class Noise {
 public:
  explicit Noise(uint64_t seed) : state_(seed) {}
  uint32_t word() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return uint32_t((z ^ z >> 31) >> 32);
  }
  /// Roughly Gaussian.
  float normal() {
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += float(word() >> 8) * 0x1p-24f - 0.5f;
    return sum * 1.7320508f;
  }

 private:
  uint64_t state_;
};

inline size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline void put(void* data, Dtype dtype, size_t i, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (dtype == Dtype::float32) {
    static_cast<float*>(data)[i] = x;
  } else {
    static_cast<uint16_t*>(data)[i] = dtype == Dtype::float16 ? float_to_half(x)
                                      : std::isnan(x)         ? uint16_t(0x7fc0)
                                                              : uint16_t(bits >> 16);
  }
}

inline float get(const void* data, Dtype dtype, size_t i) {
  if (dtype == Dtype::float32) return static_cast<const float*>(data)[i];
  const uint16_t h = static_cast<const uint16_t*>(data)[i];
  if (dtype == Dtype::float16) return half_to_float(h);
  const uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

/// Numbers of some kind: usually normal, at times with what floats have at their ends.
inline std::unique_ptr<char[]> numbers(Bytes& in, Dtype dtype, size_t count, bool tame) {
  std::unique_ptr<char[]> out(new char[std::max<size_t>(1, count * size_of(dtype))]);
  Noise noise(in.seed());
  const float size = tame ? 1 : std::ldexp(1.0f, in.chance(2) ? 0 : in.number(-149, 127));
  for (size_t i = 0; i < count; ++i) put(out.get(), dtype, i, noise.normal() * size);
  for (int n = tame ? 0 : in.byte() % 8; n > 0 && count > 0; --n) {
    constexpr float inf = std::numeric_limits<float>::infinity();
    constexpr float ends[] = {0,      -0.0f, inf,      -inf,    NAN,      3.4e38f, -3.4e38f,
                              1e-45f, 65504, 65520.0f, 6.1e-5f, 5.96e-8f, 1,       -1};
    put(out.get(), dtype, in.word() % count, ends[in.byte() % (sizeof ends / sizeof *ends)]);
  }
  return out;
}

inline const std::vector<std::string>& isas() {
  static const std::vector<std::string> all = available_isas();
  return all;
}

/// A width that exists, with the code.
inline void pick_width(Bytes& in, int& bits, Code& code) {
  constexpr int widths[] = {2, 3, 4, 8, 2, 3};
  const int i = in.byte() % 6;
  bits = widths[i];
  code = i < 4 ? Code::scalar : Code::trellis;
}

}  // namespace turboquant::fuzz
