// encode and decode on the CPU: divide the vectors into tasks.
#include <algorithm>

#include "cpu/driver.h"
#include "cpu/pool.h"

namespace turboquant::cpu {
namespace {

constexpr int kRowsPerTask = 64;

/// Calls run(b, h, t, count) for runs of rows that cover everything.
template <class Params, class Run>
void for_rows(const Params& p, const Run& run) {
  const int runs = (p.tokens + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(p.batch * p.heads * runs, [&](int task) {
    const int head = task / runs, t = task % runs * kRowsPerTask;
    run(head / p.heads, head % p.heads, t, std::min(kRowsPerTask, p.tokens - t));
  });
}

}  // namespace

void encode(const EncodeParams& p) {
  const Kernels& k = kernels();
  alignas(64) float signs[kMaxDim];
  fill_signs(p.seed, p.head_dim, signs);
  const bool feedback = p.feedback && p.head_dim > 32;  // one block has none before it
  for_rows(p, [&](int b, int h, int t, int count) {
    EncodeRows rows;
    rows.dim = p.head_dim;
    rows.count = count;
    rows.kind = kind_of(p.out);
    rows.x = static_cast<const std::byte*>(p.x.data) + row_offset(p.x, b, h, t) * size_of(p.x.dtype);
    rows.dtype = p.x.dtype;
    rows.stride = p.x.token_stride;
    rows.centre = p.centre ? p.centre + h * p.head_dim : nullptr;
    rows.signs = signs;
    rows.feedback = feedback ? p.feedback + int64_t(h) * p.head_dim * p.head_dim : nullptr;
    rows.codes = row_codes(p.out, p.head_dim, b, h, t);
    rows.scales = &row_scale(p.out, b, h, t);
    (feedback ? k.encode_feedback : k.encode)(rows);
  });
}

void decode(const DecodeParams& p) {
  const Kernels& k = kernels();
  alignas(64) float signs[kMaxDim];
  fill_signs(p.seed, p.head_dim, signs);
  for_rows(p, [&](int b, int h, int t, int count) {
    DecodeRows rows;
    rows.dim = p.head_dim;
    rows.count = count;
    rows.in = {row_codes(p.in, p.head_dim, b, h, t), &row_scale(p.in, b, h, t), p.head_dim, kind_of(p.in)};
    rows.centre = p.centre ? p.centre + h * p.head_dim : nullptr;
    rows.signs = signs;
    rows.out = static_cast<std::byte*>(p.out.data) + row_offset(p.out, b, h, t) * size_of(p.out.dtype);
    rows.dtype = p.out.dtype;
    rows.stride = p.out.token_stride;
    k.decode(rows);
  });
}

void transform(const TransformParams& p) {
  const Kernels& k = kernels();
  for_rows(p, [&](int b, int h, int t, int count) {
    const int64_t m = h / (p.heads / p.matrices);
    TransformRows rows;
    rows.dim = p.head_dim;
    rows.count = count;
    rows.x = static_cast<const std::byte*>(p.x.data) + row_offset(p.x, b, h, t) * size_of(p.x.dtype);
    rows.dtype = p.x.dtype;
    rows.stride = p.x.token_stride;
    rows.centre = p.centre ? p.centre + m * p.head_dim : nullptr;
    rows.matrix = p.matrix + m * p.head_dim * p.head_dim;
    rows.out = static_cast<float*>(p.out.data) + row_offset(p.out, b, h, t);
    rows.out_stride = p.out.token_stride;
    k.transform(rows);
  });
}

}  // namespace turboquant::cpu
