// CUDA C++ as far as the kernels use it, for a C++ compiler: threads are fibers of the tests' emulator, the functions
// of a warp gather what all lanes bring, and instructions (src/cuda/device/ptx.cu.h) are written out.  Copies into
// shared memory happen when they are waited for, and shared memory holds garbage at first, so that a missing wait or
// barrier shows.
#pragma once

#define TURBOQUANT_EMULATED

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "runtime.h"

#undef __global__
#define __global__
#undef __shared__
#define __shared__ static
#define __grid_constant__

namespace emulator {

constexpr int kWarps = 32;
constexpr int kSharedBytes = 232448;

alignas(1024) static unsigned char shared_memory[kSharedBytes];

/// What `extern __shared__` names.
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(shared_memory);
}

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Thread {
  std::vector<std::vector<Copy>> pending;  // committed groups, the oldest first
  std::vector<Copy> open;
  int parity = 0;
};
static Thread threads[kWarps * 32];
extern "C" {
uint32_t emulated_block[1], emulated_grid[3], emulated_at[3];  // set by the launcher; the block that runs
}

inline Thread& self() { return threads[position.simdgroup * 32 + position.lane]; }

/// What all lanes of this warp bring.  Two sets in turn: a lane cannot be two functions ahead of another.
template <class T>
const T* gather(const T& mine, int line) {
  alignas(16) static T all[2][kWarps][32];
  const int parity = self().parity ^= 1;
  all[parity][position.simdgroup][position.lane] = mine;
  wait({Op::simdgroup_barrier, line}, 0, 0);
  return all[parity][position.simdgroup];
}

struct ThreadIndex {
  struct X {
    operator unsigned() const { return position.simdgroup * 32 + position.lane; }
  } x;
};
struct BlockIndex {
  template <int I>
  struct Part {
    operator unsigned() const { return position.group[I]; }
  };
  Part<0> x;
  Part<1> y;
};
struct Size {
  const uint32_t& x;
};

/// Runs a kernel for one thread; the first of a block spoils what shared memory held.
template <class... A>
void enter(void (*kernel)(A...), void* const* arguments) {
  if (std::memcmp(emulated_at, position.group, sizeof emulated_at) != 0) {
    std::memcpy(emulated_at, position.group, sizeof emulated_at);
    for (int i = 0; i < kSharedBytes; i += 2) std::memcpy(shared_memory + i, "\x00\xfc", 2);  // minus infinity as half
    for (auto& t : threads) t = {};
  }
  [&]<size_t... I>(std::index_sequence<I...>) { kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...); }
  (std::index_sequence_for<A...>{});
}

}  // namespace emulator

static const emulator::ThreadIndex threadIdx;
static const emulator::BlockIndex blockIdx;
static const emulator::Size blockDim{emulator::emulated_block[0]}, gridDim{emulator::emulated_grid[0]};

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

inline void __syncthreads(int line = __builtin_LINE()) {
  emulator::wait({emulator::Op::threadgroup_barrier, line}, 0, 0);
}
inline void __syncwarp(int line = __builtin_LINE()) { emulator::wait({emulator::Op::simdgroup_barrier, line}, 0, 0); }
template <class T>
T __shfl_sync(unsigned, T x, int from, int line = __builtin_LINE()) {
  return emulator::gather(x, line)[from & 31];
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int by, int line = __builtin_LINE()) {
  return emulator::gather(x, line)[emulator::position.lane ^ by];
}
template <class T>
T __shfl_up_sync(unsigned, T x, int by, int line = __builtin_LINE()) {
  const T* all = emulator::gather(x, line);
  const int lane = int(emulator::position.lane);
  return all[lane < by ? lane : lane - by];
}
inline unsigned __ballot_sync(unsigned, int x, int line = __builtin_LINE()) {
  const int* all = emulator::gather(x, line);
  unsigned lanes = 0;
  for (int i = 0; i < 32; ++i) lanes |= unsigned(all[i] != 0) << i;
  return lanes;
}
inline bool __any_sync(unsigned, int x, int line = __builtin_LINE()) { return __ballot_sync(~0u, x, line) != 0; }
inline bool __all_sync(unsigned, int x, int line = __builtin_LINE()) { return __ballot_sync(~0u, x, line) == ~0u; }
inline unsigned __reduce_add_sync(unsigned, unsigned x, int line = __builtin_LINE()) {
  const unsigned* all = emulator::gather(x, line);
  unsigned sum = 0;
  for (int i = 0; i < 32; ++i) sum += all[i];
  return sum;
}
inline int atomicMax(int* to, int x) {
  const int old = *to;
  *to = max(old, x);
  return old;
}

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline int __float2int_rn(float x) { return x != x ? 0 : x >= 2147483648.f ? 0x7fffffff : int(std::nearbyint(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
/// A result that is no number has all mantissa bits set on a GPU and few on other processors, which matters to code
/// that takes it apart.
inline float gpu_fmaf(float a, float b, float c) {
  const float x = std::fma(a, b, c);
  return x == x ? x : std::bit_cast<float>(0x7fffffffu);
}
#define fmaf gpu_fmaf
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += int(int8_t(a >> i)) * int(int8_t(b >> i));
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}
/// An address within the shared memory.
inline size_t __cvta_generic_to_shared(const void* p) {
  return size_t(static_cast<const unsigned char*>(p) - emulator::shared_memory);
}

namespace turboquant::cuda {

inline unsigned prmt(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)b << 32 | a;
  unsigned d = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i) & 15;
    unsigned byte = unsigned(bytes >> (8 * (nibble & 7))) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    d |= byte << (8 * i);
  }
  return d;
}

inline unsigned runtime_one() { return 1; }
inline unsigned min_of_sum(unsigned a, unsigned b, unsigned c) { return std::min(a + b, c); }
inline unsigned min_of_sums(unsigned a, unsigned b, unsigned c) {
  const unsigned low = std::min((a & 0xffff) + (b & 0xffff), c & 0xffff),
                 high = std::min((a >> 16) + (b >> 16), c >> 16);
  return low | high << 16;
}
template <unsigned MASK>
unsigned merge_bits(unsigned a, unsigned b) {
  return (a & MASK) | (b & ~MASK);
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline float log2_fast(float x) { return std::log2(x); }

template <int FURTHER, bool ONCE = false>
void copy16(unsigned to, const void* from) {
  emulator::self().open.push_back(
      {emulator::shared_memory + to + FURTHER, static_cast<const unsigned char*>(from) + FURTHER, 16});
}
inline void copy4(unsigned to, const void* from) {
  emulator::self().open.push_back({emulator::shared_memory + to, from, 4});
}
inline void copy8(unsigned to, const void* from) {
  emulator::self().open.push_back({emulator::shared_memory + to, from, 8});
}
inline void commit_copies() {
  auto& t = emulator::self();
  t.pending.push_back(std::exchange(t.open, {}));
}
template <int PENDING>
void wait_copies() {
  auto& t = emulator::self();
  while (t.pending.size() > PENDING) {
    for (const auto& c : t.pending.front()) {
      // Neither side may be misaligned, nor the place outside the shared memory.
      const auto place = static_cast<unsigned char*>(c.to) - emulator::shared_memory;
      if (size_t(c.from) % c.bytes || place % c.bytes || place < 0 || place + c.bytes > emulator::kSharedBytes) {
        emulator::index_error(place, emulator::kSharedBytes);
      }
      std::memcpy(c.to, c.from, c.bytes);
    }
    t.pending.erase(t.pending.begin());
  }
}

inline void load_matrices(unsigned (&r)[4], const __half* p, int line = __builtin_LINE()) {
  const __half* const* rows = emulator::gather(p, line);
  const int lane = emulator::position.lane;
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], rows[8 * i + lane / 4] + 2 * (lane % 4), 4);
}
inline void load_transposed(unsigned (&r)[4], const __half* p, int line = __builtin_LINE()) {
  const __half* const* rows = emulator::gather(p, line);
  const int lane = emulator::position.lane;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 2; ++k) {
      std::memcpy(reinterpret_cast<char*>(&r[i]) + 2 * k, rows[8 * i + 2 * (lane % 4) + k] + lane / 4, 2);
    }
  }
}

/// What a lane brings to a product of matrices.
struct Operands {
  unsigned a[4], b[2];
};
inline void mma_half(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int line = __builtin_LINE()) {
  const auto* all = emulator::gather(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, line);
  const int g = emulator::position.lane / 4, t = emulator::position.lane % 4;
  const auto half = [](unsigned word, int i) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> (16 * i))));
  };
  for (int i = 0; i < 4; ++i) {
    const int row_half = i / 2, column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2, part = k / 8;
      sum +=
          double(half(all[4 * g + owner].a[2 * part + row_half], k % 2)) * half(all[4 * column + owner].b[part], k % 2);
    }
    c[i] = float(sum);
  }
}

template <bool A_UNSIGNED, bool B_UNSIGNED>
void mma_int8(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1,
              int line = __builtin_LINE()) {
  const auto* all = emulator::gather(Operands{{a0, a1, a2, a3}, {b0, b1}}, line);
  const int g = emulator::position.lane / 4, t = emulator::position.lane % 4;
  const auto byte = [](unsigned word, int i, bool is_unsigned) {
    const unsigned x = word >> (8 * i) & 255;
    return is_unsigned ? int(x) : int(int8_t(x));
  };
  for (int i = 0; i < 4; ++i) {
    const int row_half = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 32; ++k) {
      const int owner = k % 16 / 4, part = k / 16;
      c[i] += byte(all[4 * g + owner].a[2 * part + row_half], k % 4, A_UNSIGNED) *
              byte(all[4 * column + owner].b[part], k % 4, B_UNSIGNED);
    }
  }
}

}  // namespace turboquant::cuda

namespace mlx::core::cu {
struct Shape {
  int32_t v[10];
  int32_t operator[](int i) const { return v[i]; }
};
struct Strides {
  int64_t v[10];
  int64_t operator[](int i) const { return v[i]; }
};
}  // namespace mlx::core::cu
