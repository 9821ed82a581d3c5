// The instructions that CUDA C++ has no function for.  The tests' emulator brings its own (tests/cuda/emulator).
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#ifndef TURBOQUANT_EMULATED
namespace turboquant::cuda {

/// Byte i is that of `a` (0 to 3) or `b` (4 to 7) which nibble i of the low half of `selector` names; with the nibble's
/// bit 3, eight times that byte's sign.
__device__ inline unsigned prmt(unsigned a, unsigned b, unsigned selector) {
  unsigned d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

/// Bits of `a` where MASK has ones, else of `b`, in one instruction: the compiler would make two of it.
template <unsigned MASK>
__device__ unsigned merge_bits(unsigned a, unsigned b) {
  unsigned d;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(d) : "r"(a), "r"(b), "n"(MASK));
  return d;
}

/// 1, unknown to the compiler: a product with it is an addition on the pipe of multiplications (codes.cu.h).
__device__ inline unsigned runtime_one() { return blockDim.z; }

/// min(a + b, c), of 16-bit halves and of whole words: one instruction from Hopper on.
__device__ inline unsigned min_of_sums(unsigned a, unsigned b, unsigned c) { return __viaddmin_u16x2(a, b, c); }
__device__ inline unsigned min_of_sum(unsigned a, unsigned b, unsigned c) { return __viaddmin_u32(a, b, c); }

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Copies into shared memory without passing registers, some bytes further on.  The distance is part of the
/// instruction: the compiler would make an address of its own of every sum of a lane's part and a constant, three
/// instructions a copy.
///
/// What is read ONCE is the first to leave the L2 cache again, and fetched there 256 bytes at a time: on an H100 that
/// saves 4 % of a call over 128K tokens and 9 % over 32K; other GPUs have not been tried.  `to` must then be one
/// register of the lane: a part of it that the lanes share, were it added only here, would stay in a uniform register,
/// and ptxas (CUDA 13.0) encodes such copies with a policy wrongly.
template <int FURTHER, bool ONCE = false>
__device__ void copy16(unsigned to, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  if constexpr (ONCE) {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0 + %2], [%1 + %2], 16, %3;" ::"r"(to), "l"(from),
                 "n"(FURTHER), "l"(policy)
                 : "memory");
    return;
  }
#endif
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16;" ::"r"(to), "l"(from), "n"(FURTHER) : "memory");
}
__device__ inline void copy4(unsigned to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copy8(unsigned to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/// Four 8x8 matrices of fp16, whose rows the lanes point at.
__device__ inline void load_matrices(unsigned (&r)[4], const __half* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(unsigned(__cvta_generic_to_shared(p))));
}
__device__ inline void load_transposed(unsigned (&r)[4], const __half* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(unsigned(__cvta_generic_to_shared(p))));
}

/// c += a b: 16x16 by 16x8, fp16 with fp32 sums.
__device__ inline void mma_half(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// c += a b: 16x32 by 32x8 bytes.  A and B are signed unless told.
template <bool A_UNSIGNED, bool B_UNSIGNED>
__device__ void mma_int8(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#define TQ_MMA(A, B)                                   \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." A "." B \
      ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "   \
      "{%0,%1,%2,%3};"                                 \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (A_UNSIGNED && B_UNSIGNED) {
    TQ_MMA("u8", "u8");
  } else if constexpr (A_UNSIGNED) {
    TQ_MMA("u8", "s8");
  } else if constexpr (B_UNSIGNED) {
    TQ_MMA("s8", "u8");
  } else {
    TQ_MMA("s8", "s8");
  }
#undef TQ_MMA
}

}  // namespace turboquant::cuda
#endif
