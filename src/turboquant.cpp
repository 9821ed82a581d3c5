// The core's public edge: checks every argument of encode, decode and attend, then calls a backend.  The backends check
// nothing.  (Only force_isa and set_num_threads check their own argument elsewhere, and parallel_for passes on what a
// task throws.)
#include "turboquant/turboquant.h"

#include <cmath>
#include <sstream>
#include <stdexcept>

#include "backend.h"
#include "turboquant/rotation.h"

namespace turboquant {
namespace {

template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

/// The largest head dimension of a backend.
int most_head_dim(Backend backend) { return backend == Backend::reference ? 512 : 256; }

void check_vectors(const char* op, int head_dim, int bits, Code code, Backend backend) {
  const int most = most_head_dim(backend);
  require(valid_head_dim(head_dim, most), "[", op, "] head_dim must be a multiple of 32 from 32 to ", most, "; got ",
          head_dim);
  require((bits >= 2 && bits <= 4) || bits == 8, "[", op, "] bits must be 2, 3, 4 or 8; got ", bits);
  require(code == Code::scalar || bits <= 3, "[", op, "] bits must be 2 or 3 with a trellis; got ", bits);
}

void check_size(const char* op, const char* name, int value, int least) {
  require(value >= least, "[", op, "] ", name, " must be at least ", least, "; got ", value);
}

template <class P, class Side>
void check_rows(const char* op, const P& p, const Side& packed, Backend backend) {
  check_vectors(op, p.head_dim, packed.bits, packed.code, backend);
  check_size(op, "batch", p.batch, 0);
  check_size(op, "heads", p.heads, 0);
  check_size(op, "tokens", p.tokens, 0);
}

/// The exact copies, when there are any.
void check_exact(const AttendParams& p, Backend backend) {
  const ExactTier& e = p.exact;
  check_size("attend", "exact.recent", e.recent, 0);
  check_size("attend", "exact.first", e.first, 0);
  if (e.recent == 0 && e.first == 0) return;
  check_size("attend", "exact.ring", e.ring, e.recent);
  require(e.ring % 32 == 0, "[attend] exact.ring must be a multiple of 32; got ", e.ring);
  check_vectors("attend", p.head_dim, e.keys.bits, e.keys.code, backend);
  check_vectors("attend", p.head_dim, e.values.bits, e.values.code, backend);
  require(p.kv_len == 0 || (e.keys.codes && e.keys.scales && e.values.codes && e.values.scales),
          "[attend] codes and scales of the exact copies must not be null");
}

const BackendTable& table_of(Backend backend) { return backend == Backend::cpu ? cpu::table : reference::table; }

}  // namespace

void encode(const EncodeParams& p, Backend backend) {
  check_rows("encode", p, p.out, backend);
  if (int64_t(p.batch) * p.heads * p.tokens == 0) return;
  require(p.x.data && p.out.codes && p.out.scales, "[encode] x, codes and scales must not be null");
  table_of(backend).encode(p);
}

void decode(const DecodeParams& p, Backend backend) {
  check_rows("decode", p, p.in, backend);
  if (int64_t(p.batch) * p.heads * p.tokens == 0) return;
  require(p.out.data && p.in.codes && p.in.scales, "[decode] codes, scales and out must not be null");
  table_of(backend).decode(p);
}

void transform(const TransformParams& p, Backend backend) {
  require(valid_head_dim(p.head_dim), "[transform] head_dim must be a multiple of 32 from 32 to 256; got ", p.head_dim);
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
  check_vectors("attend", p.head_dim, p.keys.bits, p.keys.code, backend);
  check_vectors("attend", p.head_dim, p.values.bits, p.values.code, backend);
  check_size("attend", "batch", p.batch, 0);
  check_size("attend", "kv_heads", p.kv_heads, 1);
  check_size("attend", "query_heads", p.query_heads, 1);
  check_size("attend", "query_len", p.query_len, 0);
  check_size("attend", "kv_len", p.kv_len, 0);
  check_size("attend", "window", p.window, 0);
  require(p.query_heads % p.kv_heads == 0, "[attend] query_heads must be a multiple of kv_heads; got ", p.query_heads,
          " and ", p.kv_heads);
  require(std::isfinite(p.scale), "[attend] scale must be finite; got ", p.scale);
  check_exact(p, backend);
  if (int64_t(p.batch) * p.query_len == 0) return;
  require(p.q.data && p.out.data, "[attend] q and out must not be null");
  require(p.kv_len == 0 || (p.keys.codes && p.keys.scales && p.values.codes && p.values.scales),
          "[attend] codes and scales must not be null");
  require(p.mask_kind == MaskKind::none || p.kv_len == 0 || p.mask, "[attend] mask must not be null");
  table_of(backend).attend(p);
}

}  // namespace turboquant
