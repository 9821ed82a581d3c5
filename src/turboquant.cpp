// The core's public edge: checks every argument of encode, decode, transform and attend, then calls a backend.  The
// backends check nothing.  (Only force_isa and set_num_threads check their own argument elsewhere, and parallel_for
// passes on what a task throws.)
#include "turboquant/turboquant.h"

#include <cmath>

#include "backend.h"
#include "require.h"
#include "turboquant/rotation.h"

namespace turboquant {
namespace {

void check_dim(const char* op, const char* name, int dim) {
  require(valid_head_dim(dim), "[", op, "] ", name, " must be a multiple of 32 from 32 to 512; got ", dim);
}

void check_codes(const char* op, int bits, Code code) {
  require((bits >= 2 && bits <= 4) || bits == 8, "[", op, "] bits must be 2, 3, 4 or 8; got ", bits);
  require(code == Code::scalar || bits <= 3, "[", op, "] bits must be 2 or 3 with a trellis; got ", bits);
}

void check_size(const char* op, const char* name, int value, int least) {
  require(value >= least, "[", op, "] ", name, " must be at least ", least, "; got ", value);
}

template <class P, class Side>
void check_rows(const char* op, const P& p, const Side& packed) {
  check_dim(op, "head_dim", p.head_dim);
  check_codes(op, packed.bits, packed.code);
  check_size(op, "batch", p.batch, 0);
  check_size(op, "heads", p.heads, 0);
  check_size(op, "tokens", p.tokens, 0);
}

/// The exact copies, when there are any.
void check_exact(const AttendParams& p) {
  const ExactTier& e = p.exact;
  check_size("attend", "exact.recent", e.recent, 0);
  check_size("attend", "exact.first", e.first, 0);
  if (e.recent == 0 && e.first == 0) return;
  check_size("attend", "exact.ring", e.ring, std::min(e.recent, p.kv_len));
  require(e.ring % 32 == 0, "[attend] exact.ring must be a multiple of 32; got ", e.ring);
  check_codes("attend", e.keys.bits, e.keys.code);
  check_codes("attend", e.values.bits, e.values.code);
  require(p.kv_len == 0 || (e.keys.codes && e.keys.scales && e.values.codes && e.values.scales),
          "[attend] codes and scales of the exact copies must not be null");
}

const BackendTable& table_of(Backend backend) { return backend == Backend::cpu ? cpu::table : reference::table; }

}  // namespace

void encode(const EncodeParams& p, Backend backend) {
  check_rows("encode", p, p.out);
  if (int64_t(p.batch) * p.heads * p.tokens == 0) return;
  require(p.x.data && p.out.codes && p.out.scales, "[encode] x, codes and scales must not be null");
  table_of(backend).encode(p);
}

void decode(const DecodeParams& p, Backend backend) {
  check_rows("decode", p, p.in);
  if (int64_t(p.batch) * p.heads * p.tokens == 0) return;
  require(p.out.data && p.in.codes && p.in.scales, "[decode] codes, scales and out must not be null");
  table_of(backend).decode(p);
}

void transform(const TransformParams& p, Backend backend) {
  check_dim("transform", "head_dim", p.head_dim);
  check_size("transform", "batch", p.batch, 0);
  check_size("transform", "heads", p.heads, 0);
  check_size("transform", "tokens", p.tokens, 0);
  check_size("transform", "matrices", p.matrices, 1);
  require(p.heads % p.matrices == 0, "[transform] heads must be a multiple of matrices; got ", p.heads, " and ",
          p.matrices);
  require(p.out.dtype == Dtype::float32, "[transform] out must be float32");
  if (int64_t(p.batch) * p.heads * p.tokens == 0) return;
  require(p.x.data && p.matrix && p.out.data, "[transform] x, matrix and out must not be null");
  table_of(backend).transform(p);
}

void attend(const AttendParams& p, Backend backend) {
  check_dim("attend", "key_dim", p.key_dim);
  if (p.value_dim != 0) check_dim("attend", "value_dim", p.value_dim);
  check_codes("attend", p.keys.bits, p.keys.code);
  check_codes("attend", p.values.bits, p.values.code);
  check_size("attend", "batch", p.batch, 0);
  check_size("attend", "kv_heads", p.kv_heads, 1);
  check_size("attend", "query_heads", p.query_heads, 1);
  check_size("attend", "query_len", p.query_len, 0);
  check_size("attend", "kv_len", p.kv_len, 0);
  check_size("attend", "window", p.window, 0);
  require(p.query_heads % p.kv_heads == 0, "[attend] query_heads must be a multiple of kv_heads; got ", p.query_heads,
          " and ", p.kv_heads);
  require(std::isfinite(p.scale), "[attend] scale must be finite; got ", p.scale);
  check_exact(p);
  if (int64_t(p.batch) * p.query_len * p.value_dim == 0) return;
  require(p.q.data && p.out.data, "[attend] q and out must not be null");
  require(p.kv_len == 0 || (p.keys.codes && p.keys.scales && p.values.codes && p.values.scales),
          "[attend] codes and scales must not be null");
  require(p.mask_kind == MaskKind::none || p.kv_len == 0 || p.mask, "[attend] mask must not be null");
  table_of(backend).attend(p);
}

}  // namespace turboquant
