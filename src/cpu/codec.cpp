// encode and decode on the CPU: divide the vectors into tasks.
#include <algorithm>

#include "cpu/driver.h"
#include "cpu/pool.h"

namespace turboquant::cpu {
namespace {

constexpr int kVectorsPerTask = 64;
constexpr int64_t kAlone = 1 << 19;  // multiplications of `transform` that one thread has done before another wakes

/// Calls run(b, h, t, count) for runs of vectors that cover everything.
template <class Params, class Run>
void for_vectors(const Params& p, const Run& run) {
  const int runs = (p.tokens + kVectorsPerTask - 1) / kVectorsPerTask;
  parallel_for(p.batch * p.heads * runs, [&](int task) {
    const int head = task / runs, t = task % runs * kVectorsPerTask;
    run(head / p.heads, head % p.heads, t, std::min(kVectorsPerTask, p.tokens - t));
  });
}

}  // namespace

void encode(const EncodeParams& p) {
  const Kernels& k = kernels();
  alignas(64) float signs[kMaxDim];
  fill_signs(p.seed, p.head_dim, signs);
  const bool feedback = p.feedback && p.head_dim > 32;  // one block has none before it
  for_vectors(p, [&](int b, int h, int t, int count) {
    EncodeVectors vectors;
    vectors.dim = p.head_dim;
    vectors.count = count;
    vectors.kind = kind_of(p.out);
    vectors.x = static_cast<const std::byte*>(p.x.data) + row_offset(p.x, b, h, t) * size_of(p.x.dtype);
    vectors.dtype = p.x.dtype;
    vectors.stride = p.x.token_stride;
    vectors.centre = p.centre ? p.centre + h * p.head_dim : nullptr;
    vectors.signs = signs;
    vectors.feedback = feedback ? p.feedback + int64_t(h) * p.head_dim * p.head_dim : nullptr;
    vectors.codes = row_codes(p.out, p.head_dim, b, h, t);
    vectors.scales = &row_scale(p.out, b, h, t);
    (feedback ? k.encode_feedback : k.encode)(vectors);
  });
}

void decode(const DecodeParams& p) {
  const Kernels& k = kernels();
  alignas(64) float signs[kMaxDim];
  fill_signs(p.seed, p.head_dim, signs);
  for_vectors(p, [&](int b, int h, int t, int count) {
    DecodeVectors vectors;
    vectors.dim = p.head_dim;
    vectors.count = count;
    vectors.in = {row_codes(p.in, p.head_dim, b, h, t), &row_scale(p.in, b, h, t), p.head_dim, kind_of(p.in)};
    vectors.centre = p.centre ? p.centre + h * p.head_dim : nullptr;
    vectors.signs = signs;
    vectors.out = static_cast<std::byte*>(p.out.data) + row_offset(p.out, b, h, t) * size_of(p.out.dtype);
    vectors.dtype = p.out.dtype;
    vectors.stride = p.out.token_stride;
    k.decode(vectors);
  });
}

void transform(const TransformParams& p) {
  const Kernels& k = kernels();
  const int group = p.heads / p.matrices;
  // Vectors that share a matrix go together: the tokens of a head, or of single tokens the heads of a group.
  const bool by_group = p.tokens == 1;
  const int count = by_group ? group : p.tokens;
  const int runs = (count + kVectorsPerTask - 1) / kVectorsPerTask, rows = by_group ? p.matrices : p.heads;
  const auto run = [&](int task) {
    const int row = task / runs, first = task % runs * kVectorsPerTask;
    const int b = row / rows, h = row % rows * (by_group ? group : 1) + (by_group ? first : 0);
    const int t = by_group ? 0 : first;
    const int64_t m = h / group;
    TransformVectors vectors;
    vectors.dim = p.head_dim;
    vectors.count = std::min(kVectorsPerTask, count - first);
    vectors.x = static_cast<const std::byte*>(p.x.data) + row_offset(p.x, b, h, t) * size_of(p.x.dtype);
    vectors.dtype = p.x.dtype;
    vectors.stride = by_group ? p.x.head_stride : p.x.token_stride;
    vectors.centre = p.centre ? p.centre + m * p.head_dim : nullptr;
    vectors.matrix = p.matrix + m * p.head_dim * p.head_dim;
    vectors.out = static_cast<float*>(p.out.data) + row_offset(p.out, b, h, t);
    vectors.out_stride = by_group ? p.out.head_stride : p.out.token_stride;
    k.transform(vectors);
  };
  const int tasks = p.batch * rows * runs;
  if (int64_t(p.batch) * p.heads * p.tokens * p.head_dim * p.head_dim > kAlone) return parallel_for(tasks, run);
  for (int task = 0; task < tasks; ++task) run(task);
}

}  // namespace turboquant::cpu
