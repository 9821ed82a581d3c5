// The Metal Shading Language as Clang's own types: address spaces are part of a pointer's type, half and vectors are
// the compiler's.  Declarations alone: address_spaces_test.py has the kernels checked, not run.
#pragma once

// `threadgroup` only ever declares a variable in a kernel (pointers to it are deduced).  What has no other address
// space is `thread`; bfloat converts as half does.
#define TQ_DEVICE __attribute__((address_space(1)))
#define TQ_CONSTANT __attribute__((address_space(2)))
#define TQ_THREADGROUP __attribute__((address_space(3)))
#define device TQ_DEVICE
#define constant TQ_CONSTANT
#define threadgroup extern TQ_THREADGROUP
#define thread
#define __METAL_VERSION__ 310
#define INFINITY __builtin_inff()

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef long int64_t;
typedef _Float16 half;
typedef half float16_t;
typedef half bfloat16_t;

#define TQ_VECTOR(TYPE, N) typedef TYPE TYPE##N __attribute__((ext_vector_type(N)))
TQ_VECTOR(half, 2);
TQ_VECTOR(half, 4);
TQ_VECTOR(float, 2);
TQ_VECTOR(float, 4);
TQ_VECTOR(int, 2);
TQ_VECTOR(uint, 3);
TQ_VECTOR(ulong, 2);

namespace metal {

// Metal's constructors of vectors.
half2 make_half2(half x, half y);
int2 make_int2(int x, int y);
ulong2 make_ulong2(ulong x, ulong y);
#define half2(X, Y) make_half2(X, Y)
#define int2(X, Y) make_int2(X, Y)
#define ulong2(X, Y) make_ulong2(X, Y)

template <class To, class From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  return __builtin_bit_cast(To, from);
}

// Every scalar type of the specification has an overload of its own, so that an ambiguous call is one here.
#define TQ_FLOATING(T) \
  T fma(T, T, T);      \
  T fmax(T, T);        \
  T fmin(T, T);        \
  T fabs(T);           \
  T sqrt(T);           \
  T exp2(T);           \
  T log2(T);           \
  bool isfinite(T);
TQ_FLOATING(float)
TQ_FLOATING(half)

#define TQ_INTEGER(T) \
  T min(T, T);        \
  T max(T, T);        \
  T extract_bits(T, uint, uint);
TQ_INTEGER(char)
TQ_INTEGER(unsigned char)
TQ_INTEGER(short)
TQ_INTEGER(ushort)
TQ_INTEGER(int)
TQ_INTEGER(uint)
TQ_INTEGER(long)
TQ_INTEGER(ulong)

uint rotate(uint, uint);
int rotate(int, int);

#define TQ_LANES(T)     \
  T select(T, T, bool); \
  T simd_sum(T);        \
  T simd_max(T);        \
  T simd_shuffle(T, ushort);
TQ_LANES(float)
TQ_LANES(half)
TQ_LANES(short)
TQ_LANES(ushort)
TQ_LANES(int)
TQ_LANES(uint)

int simd_or(int);
uint simd_or(uint);
int simd_shuffle_xor(int, ushort);
uint simd_shuffle_xor(uint, ushort);
bool simd_any(bool);
bool simd_all(bool);

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <class T, int Columns, int Rows>
struct simdgroup_matrix {
  T at[Columns * Rows / 32];
};
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;

template <class T, int Columns, int Rows>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T);
#define TQ_MATRIX_MEMORY(SPACE)                                                                                        \
  template <class T, int Columns, int Rows>                                                                            \
  void simdgroup_load(simdgroup_matrix<T, Columns, Rows>&, const SPACE T*, ulong = Columns, ulong2 = 0, bool = false); \
  template <class T, int Columns, int Rows>                                                                            \
  void simdgroup_store(simdgroup_matrix<T, Columns, Rows>, SPACE T*, ulong = Columns, ulong2 = 0, bool = false);
TQ_MATRIX_MEMORY(TQ_DEVICE)
TQ_MATRIX_MEMORY(TQ_THREADGROUP)
// A and B may differ from T: docs/metal.md.
template <class T, class A, class B>
void simdgroup_multiply_accumulate(simdgroup_matrix<T, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>,
                                   simdgroup_matrix<T, 8, 8>);
template <class T>
void simdgroup_multiply(simdgroup_matrix<T, 8, 8>&, simdgroup_matrix<T, 8, 8>, simdgroup_matrix<T, 8, 8>);

}  // namespace metal
