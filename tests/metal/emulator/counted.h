// Numbers that count what is done to them, in place of types.h's, for the cost model
// (benchmarks/kernels/metal_cost.cpp).
//
// Counted: arithmetic on float and uint, conversions, special functions, and accesses to device and threadgroup memory,
// told apart by address.  Not counted: arithmetic on int (indices; most of it is constant after unrolling) and selects
// written as ?: outside the loops over tokens.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "counts.h"
#include "memory.h"

namespace metal {
using ushort = unsigned short;
using ulong = unsigned long;
using uchar = unsigned char;

template <class To, class From>
inline To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  std::memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof to);
  return to;
}
}  // namespace metal

namespace emulator {

/// A number in a register, or in memory when its address says so.
template <class Native>
struct Counted {
  Native value;

  Counted() = default;
  constexpr Counted(const Native& v) : value(v) {
    if (!__builtin_is_constant_evaluated()) read(&v, sizeof v);
  }
  template <class Other,
            class = std::enable_if_t<std::is_arithmetic<Other>::value && !std::is_same<Other, Native>::value>>
  constexpr Counted(Other v) : value(Native(v)) {}
  constexpr Counted(const Counted& o) : value(o.value) {
    if (!__builtin_is_constant_evaluated()) read(&o, sizeof o);
  }
  Counted& operator=(const Counted& o) {
    read(&o, sizeof o);
    write(this, sizeof *this);
    value = o.value;
    return *this;
  }
  template <class Other>
  explicit constexpr Counted(const Counted<Other>& o) : value(Native(o.value)) {
    if (!__builtin_is_constant_evaluated()) count(Kind::convert);
  }
  template <class I, class = std::enable_if_t<std::is_integral<I>::value>>
  constexpr operator I() const {
    return I(value);
  }

  Counted operator-() const { return *this; }
  Counted& operator+=(const Counted& o) { return *this = *this + o; }
  Counted& operator-=(const Counted& o) { return *this = *this - o; }
  Counted& operator*=(const Counted& o) { return *this = *this * o; }
  Counted& operator|=(const Counted& o) { return *this = *this | o; }
};
using Float = Counted<float>;
using Uint = Counted<unsigned>;

template <class Native>
constexpr Native operand(const Counted<Native>& x) {
  if (!__builtin_is_constant_evaluated()) read(&x, sizeof x);
  return x.value;
}

// Each operator takes two counted numbers, or one and a plain one.
#define TQ_OPERATOR(OP, KIND, RESULT)                                                 \
  template <class N>                                                                  \
  constexpr RESULT operator OP(const Counted<N>& a, const Counted<N>& b) {            \
    if (!__builtin_is_constant_evaluated()) count(Kind::KIND);                        \
    return operand(a) OP operand(b);                                                  \
  }                                                                                   \
  template <class N, class P, class = std::enable_if_t<std::is_arithmetic<P>::value>> \
  constexpr RESULT operator OP(const Counted<N>& a, P b) {                            \
    if (!__builtin_is_constant_evaluated()) count(Kind::KIND);                        \
    return operand(a) OP N(b);                                                        \
  }                                                                                   \
  template <class N, class P, class = std::enable_if_t<std::is_arithmetic<P>::value>> \
  constexpr RESULT operator OP(P a, const Counted<N>& b) {                            \
    if (!__builtin_is_constant_evaluated()) count(Kind::KIND);                        \
    return N(a) OP operand(b);                                                        \
  }
TQ_OPERATOR(+, simple, Counted<N>)
TQ_OPERATOR(-, simple, Counted<N>)
TQ_OPERATOR(*, simple, Counted<N>)
TQ_OPERATOR(/, special, Counted<N>)
TQ_OPERATOR(&, simple, Counted<N>)
TQ_OPERATOR(|, simple, Counted<N>)
TQ_OPERATOR(^, simple, Counted<N>)
TQ_OPERATOR(>>, shift, Counted<N>)
TQ_OPERATOR(<<, shift, Counted<N>)
TQ_OPERATOR(==, simple, bool)
TQ_OPERATOR(!=, simple, bool)
TQ_OPERATOR(<, simple, bool)
TQ_OPERATOR(>, simple, bool)
TQ_OPERATOR(<=, simple, bool)
TQ_OPERATOR(>=, simple, bool)
#undef TQ_OPERATOR

}  // namespace emulator

namespace metal {

using emulator::Float;

struct half {
  uint16_t bits;
  half() = default;
  half(const half& o) : bits(o.bits) { emulator::read(&o, 2); }
  half& operator=(const half& o) {
    emulator::read(&o, 2);
    emulator::write(this, 2);
    bits = o.bits;
    return *this;
  }
  explicit half(const Float& f) : bits(emulator::round_to_half(f.value)) { emulator::count(emulator::Kind::convert); }
  // As an operand of float arithmetic a half register costs nothing to convert (docs/metal.md).
  explicit operator Float() const {
    emulator::read(this, 2);
    return Float(emulator::widen_half(bits));
  }
  half operator-() const {
    emulator::count(emulator::Kind::simple);
    half h;
    h.bits = uint16_t(bits ^ 0x8000u);
    return h;
  }
};
struct bfloat {
  uint16_t bits;
};

struct half2 {
  half x, y;
  half2() = default;
  half2(const half& x, const half& y) : x(x), y(y) {}
  half2(const half2& o) { *this = o; }
  half2& operator=(const half2& o) {  // one access of four bytes
    emulator::read(&o, 4);
    emulator::write(this, 4);
    x.bits = o.x.bits;
    y.bits = o.y.bits;
    return *this;
  }
  half& operator[](int i) { return i ? y : x; }
  const half& operator[](int i) const { return i ? y : x; }
};
/// A vector of N; copying it is one access.
template <class T, int N>
struct Vector {
  T at[N];
  Vector() = default;
  Vector(const Vector& o) { *this = o; }
  Vector& operator=(const Vector& o) {
    emulator::read(&o, sizeof o);
    emulator::write(this, sizeof o);
    std::memcpy(static_cast<void*>(at), o.at, sizeof at);
    return *this;
  }
  T& operator[](int i) { return at[i]; }
  const T& operator[](int i) const { return at[i]; }
};
using float2 = Vector<Float, 2>;
using float4 = Vector<Float, 4>;
using half4 = Vector<half, 4>;
struct int2 {
  int x, y;
  int2(int x, int y) : x(x), y(y) {}
};
struct ulong2 {
  ulong x, y;
  ulong2(ulong x, ulong y) : x(x), y(y) {}
};
struct uint3 {
  unsigned x, y, z;
};

inline Float fma(const Float& a, const Float& b, const Float& c) {
  emulator::count(emulator::Kind::simple);
  return std::fma(operand(a), operand(b), operand(c));
}
inline Float fmax(const Float& a, const Float& b) {
  emulator::count(emulator::Kind::simple);
  return std::fmax(operand(a), operand(b));
}
inline Float fmin(const Float& a, const Float& b) {
  emulator::count(emulator::Kind::simple);
  return std::fmin(operand(a), operand(b));
}
inline Float fabs(const Float& a) { return std::fabs(operand(a)); }  // a modifier of the operand
#define TQ_SPECIAL(NAME)                      \
  inline Float NAME(const Float& a) {         \
    emulator::count(emulator::Kind::special); \
    return std::NAME(operand(a));             \
  }
TQ_SPECIAL(sqrt)
TQ_SPECIAL(exp2)
TQ_SPECIAL(log2)
#undef TQ_SPECIAL
inline bool isfinite(const Float& a) {
  emulator::count(emulator::Kind::simple);
  return std::isfinite(operand(a));
}
template <class T>
inline T select(const T& a, const T& b, bool c) {
  emulator::count(emulator::Kind::simple);
  return c ? b : a;
}
inline emulator::Uint extract_bits(const emulator::Uint& x, unsigned offset, unsigned bits) {
  emulator::count(emulator::Kind::shift);
  return operand(x) >> offset & ((1u << bits) - 1u);
}
/// One instruction, like the extraction of bits (docs/metal.md).
inline emulator::Uint rotate(const emulator::Uint& x, unsigned n) {
  emulator::count(emulator::Kind::shift);
  return n % 32 ? operand(x) << n % 32 | operand(x) >> (32 - n % 32) : operand(x);
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

}  // namespace metal

namespace emulator {
template <>
struct Element<metal::half2> {
  using type = Whole<metal::half2>;
};
template <class T, int N>
struct Element<metal::Vector<T, N>> {
  using type = Whole<metal::Vector<T, N>>;
};
}  // namespace emulator

using float16_t = metal::half;
using bfloat16_t = metal::bfloat;
