// The kernel of encode with error feedback: the errors of a vector's earlier blocks move the targets of later ones
// (EncodeParams in turboquant.h).
//
// A block takes vectors of one head, eight at a time.  Each warp rotates one; then, 32 coordinates after another, all
// threads multiply the errors so far by G, a thread a row and every eighth four columns, and each warp codes its
// vector's 32 targets.  A thread's part of G stays in registers.  A vector's sums do not depend on what else the block
// holds.
#pragma once

#include "cuda/device/encode.cu.h"

namespace turboquant::cuda {

/// Shared memory of a block, one for a kernel whatever widths and types its sides have.
template <int D>
struct FeedbackMemory {
  static constexpr int kWarps = 8;
  alignas(16) float u[kWarps][D], error[kWarps][D], sums[kWarps][kWarps][32];
  unsigned char codes[kWarps][D];
};
template <int D>
__device__ FeedbackMemory<D>& feedback_memory() {
  __shared__ FeedbackMemory<D> memory;
  return memory;
}

/// Encodes the vectors of block `block`: up to TOKENS tokens of one head of one batch row.
template <int D, int BITS, int TOKENS, class T>
__device__ void encode_with_feedback(const EncodeArgs& a, int block) {
  constexpr int kWarps = FeedbackMemory<D>::kWarps, kBlocks = D / 32, kParts = kBlocks * (kBlocks - 1) / 2;
  auto& [u, error, sums, codes] = feedback_memory<D>();
  const int lane = threadIdx.x & 31, warp = warp_index();
  const int chunks = (a.tokens + TOKENS - 1) / TOKENS;
  const int row = block / chunks, first = block % chunks * TOKENS, last = min(a.tokens, first + TOKENS);
  if (row >= a.batch * a.heads) return;

  // Of the rows 32 i + lane, the columns 4 (warp + 8 k) to + 3, k < i.
  uint2 parts[kParts > 0 ? kParts : 1];
  const __half* g = a.feedback + (long long)(row % a.heads) * D * D;
  const auto load_parts = [&](const auto& load) {
#pragma unroll
    for (int i = 1; i < kBlocks; ++i) {
#pragma unroll
      for (int k = 0; k < i; ++k) parts[i * (i - 1) / 2 + k] = load(g + (32 * i + lane) * D + 4 * (warp + 8 * k));
    }
  };
  if (aligned_to(g, 8)) {
    load_parts([](const __half* from) { return *reinterpret_cast<const uint2*>(from); });
  } else {
    load_parts([](const __half* from) {
      const unsigned short* x = reinterpret_cast<const unsigned short*>(from);
      return make_uint2(x[0] | unsigned(x[1]) << 16, x[2] | unsigned(x[3]) << 16);
    });
  }

#pragma unroll 1
  for (int token = first; token < last; token += kWarps) {
    const int count = min(kWarps, last - token);
    const bool active = warp < count && lane < D / 8;
    float v[8];
    const Rotated r = load_rotated<D, T>(a, (long long)row * a.tokens + token + warp, active, lane, v);
    if (lane >= D / 8) {
#pragma unroll
      for (float& x : v) x = 0;  // of other vectors, where a warp could hold several
    }
    unsigned nibbles = nearest_codes<D, BITS>(r, v);
    // In levels at the scale that the nearest codes would have.
    const float length = sqrtf(float(level_square<D, BITS>(nibbles))), norm = sqrtf(r.square * Lanes<D>::power);
    if (lane < D / 8) {
#pragma unroll
      for (float& x : v) x = r.codable() ? x * (length / norm) : 0.f;
      store8(&u[warp][8 * lane], v);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (i > 0) {
#pragma unroll 1
        for (int some = 0; some < count; some += 4) {
          float sum[4] = {};
#pragma unroll
          for (int k = 0; k < i; ++k) {
            const uint2 part = parts[i * (i - 1) / 2 + k];
            const float2 low = __half22float2(reinterpret_cast<const __half2&>(part.x));
            const float2 high = __half22float2(reinterpret_cast<const __half2&>(part.y));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float4 e = *reinterpret_cast<const float4*>(&error[some + j][4 * (warp + 8 * k)]);
              sum[j] = fmaf(low.x, e.x, fmaf(low.y, e.y, fmaf(high.x, e.z, fmaf(high.y, e.w, sum[j]))));
            }
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[warp][some + j][lane] = sum[j];
        }
        __syncthreads();
      }
      const float own = u[warp][32 * i + lane];
      float target = own;
      if (i > 0) {
        float moved = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) moved += sums[w][warp][lane];
        target -= moved;
      }
      const unsigned code = nearest_code<BITS>(target, 2 * fabsf(target));
      const int size = magnitude(BITS, int(code & (magnitudes(BITS) - 1)));
      error[warp][32 * i + lane] = float(code < magnitudes(BITS) ? size : -size) - own;
      codes[warp][32 * i + lane] = (unsigned char)code;
      __syncthreads();
    }
    if (r.codable() && D > 32) {
      nibbles = 0;
      if (lane < D / 8) {
#pragma unroll
        for (int j = 0; j < 8; ++j) nibbles |= unsigned(codes[warp][8 * lane + j]) << (4 * j);
      }
    }
    write_codes<D, BITS>(a, r, active, lane, nibbles);
    __syncthreads();
  }
}

/// The same with T from a pointer, for generated code.
template <int D, int BITS, int TOKENS, class T>
__device__ void encode_feedback_as(const EncodeArgs& a, const T*, int block) {
  encode_with_feedback<D, BITS, TOKENS, T>(a, block);
}

}  // namespace turboquant::cuda
