// The oracle of attend: decodes keys and values to double, then computes attention by its definition.
#include <vector>

#include "backend.h"
#include "reference/codec.h"
#include "tensor.h"
#include "turboquant/softmax.h"

namespace turboquant::reference {
namespace {

/// Decoded vectors of one KV head [tokens, dim], centre added.
std::vector<double> decode_head(const AttendParams& p, const Packed& packed, int tokens, const float* centre, int b,
                                int h) {
  std::vector<double> x(size_t(tokens) * p.head_dim);
  for (int t = 0; t < tokens; ++t) {
    double* row = &x[size_t(t) * p.head_dim];
    decode_vector(row_codes(packed, p.head_dim, b, h, t), row_scale(packed, b, h, t), p.head_dim,
                  {packed.bits, packed.code, p.seed}, row);
    for (int i = 0; i < p.head_dim && centre; ++i) row[i] += centre[h * p.head_dim + i];
  }
  return x;
}

/// The mask's say on (b, h, i, t): a number to add to the score.
double mask_term(const AttendParams& p, int b, int h, int i, int t) {
  if (p.mask_kind == MaskKind::none) return 0;
  const int64_t at = mask_offset(p, b, h, i, t);
  if (p.mask_kind == MaskKind::additive) return load_number(p.mask, p.mask_dtype, at);
  return static_cast<const uint8_t*>(p.mask)[at] ? 0 : -std::numeric_limits<double>::infinity();
}

/// One KV head: what its codes decode to, and its exact copies.
struct Head {
  std::vector<double> keys, values, exact_keys, exact_values;
};

/// Key and value of token t for a query.
struct Pair {
  const double *key, *value;
};
Pair token(const AttendParams& p, const Head& head, const ExactRange& exact, int t) {
  const int start = exact.first_end - p.exact.first;
  const bool first = t < exact.first_end && p.exact.first > 0, recent = t >= exact.recent_begin;
  if (!first && !recent) return {&head.keys[size_t(t) * p.head_dim], &head.values[size_t(t) * p.head_dim]};
  const size_t at = size_t(recent ? t % p.exact.ring : p.exact.ring + t - start) * p.head_dim;
  return {&head.exact_keys[at], &head.exact_values[at]};
}

void attend_query(const AttendParams& p, int b, int h, int i, const Head& head) {
  const int dim = p.head_dim;
  const int64_t row = row_offset(p.q, b, h, i);
  std::vector<double> out(dim);
  OnlineSoftmax<double> softmax;
  if (p.sinks) softmax.push(p.sinks[h]);
  const KeyRange range = visible_keys(p, b, i);
  const ExactRange exact = exact_keys(p, b, i);
  for (int t = range.first; t < range.last; ++t) {
    const double bias = mask_term(p, b, h, i, t);
    if (bias == -std::numeric_limits<double>::infinity()) continue;
    const Pair at = token(p, head, exact, t);
    double dot = 0;
    for (int d = 0; d < dim; ++d) dot += load_number(p.q.data, p.q.dtype, row + d) * at.key[d];
    const auto [old_part, new_part] = softmax.push(double(p.scale) * dot + bias);
    for (int d = 0; d < dim; ++d) out[d] = out[d] * old_part + new_part * at.value[d];
  }
  const double norm = softmax.finish();
  for (int d = 0; d < dim; ++d) {
    store_number(p.out.data, p.out.dtype, row_offset(p.out, b, h, i) + d, float(out[d] * norm));
  }
}

}  // namespace

void attend(const AttendParams& p) {
  const int group = p.query_heads / p.kv_heads;
  for (int b = 0; b < p.batch; ++b) {
    for (int kv = 0; kv < p.kv_heads; ++kv) {
      Head head{decode_head(p, p.keys, p.kv_len, p.key_centre, b, kv),
                decode_head(p, p.values, p.kv_len, p.value_centre, b, kv)};
      if (const int slots = p.exact.ring + p.exact.first; p.exact.recent > 0 || p.exact.first > 0) {
        head.exact_keys = decode_head(p, p.exact.keys, slots, p.key_centre, b, kv);
        head.exact_values = decode_head(p, p.exact.values, slots, p.value_centre, b, kv);
      }
      for (int h = kv * group; h < (kv + 1) * group; ++h) {
        for (int i = 0; i < p.query_len; ++i) attend_query(p, b, h, i, head);
      }
    }
  }
}

const BackendTable table = {"reference", encode, decode, attend, transform};

}  // namespace turboquant::reference
