// The oracle of attend: decodes keys and values to double, then computes attention by its definition.
#include <vector>

#include "backend.h"
#include "reference/codec.h"
#include "tensor.h"
#include "turboquant/softmax.h"

namespace turboquant::reference {
namespace {

/// Decoded vectors of KV head (b, h), [tokens, dim], centre added.
std::vector<double> decode_head(const Packed& packed, int dim, uint64_t seed, int tokens, const float* centre, int b,
                                int h) {
  std::vector<double> x(size_t(tokens) * dim);
  for (int t = 0; t < tokens; ++t) {
    double* row = &x[size_t(t) * dim];
    decode_vector(row_codes(packed, dim, b, h, t), row_scale(packed, b, h, t), dim, {packed.bits, packed.code, seed},
                  row);
    for (int i = 0; i < dim && centre; ++i) row[i] += centre[h * dim + i];
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
  if (!first && !recent) return {&head.keys[size_t(t) * p.key_dim], &head.values[size_t(t) * p.value_dim]};
  const size_t at = recent ? t % p.exact.ring : p.exact.ring + t - start;
  return {&head.exact_keys[at * p.key_dim], &head.exact_values[at * p.value_dim]};
}

void attend_query(const AttendParams& p, int b, int h, int i, const Head& head) {
  const int64_t row = row_offset(p.q, b, h, i);
  std::vector<double> out(p.value_dim);
  OnlineSoftmax<double> softmax;
  if (p.sinks) softmax.push(p.sinks[h]);
  const KeyRange range = visible_keys(p, b, i);
  const ExactRange exact = exact_keys(p, b, i);
  for (int t = range.first; t < range.last; ++t) {
    const double bias = mask_term(p, b, h, i, t);
    if (bias == -std::numeric_limits<double>::infinity()) continue;
    const Pair at = token(p, head, exact, t);
    double dot = 0;
    for (int d = 0; d < p.key_dim; ++d) dot += load_number(p.q.data, p.q.dtype, row + d) * at.key[d];
    const auto [old_part, new_part] = softmax.push(double(p.scale) * dot + bias);
    for (int d = 0; d < p.value_dim; ++d) out[d] = out[d] * old_part + new_part * at.value[d];
  }
  const double norm = softmax.finish();
  for (int d = 0; d < p.value_dim; ++d) {
    store_number(p.out.data, p.out.dtype, row_offset(p.out, b, h, i) + d, float(out[d] * norm));
  }
}

}  // namespace

void attend(const AttendParams& p) {
  const int group = p.query_heads / p.kv_heads;
  for (int b = 0; b < p.batch; ++b) {
    for (int kv = 0; kv < p.kv_heads; ++kv) {
      const auto keys = [&](const Packed& x, int n) {
        return decode_head(x, p.key_dim, p.seed, n, p.key_centre, b, kv);
      };
      const auto values = [&](const Packed& x, int n) {
        return decode_head(x, p.value_dim, p.seed, n, p.value_centre, b, kv);
      };
      Head head{keys(p.keys, p.kv_len), values(p.values, p.kv_len), {}, {}};
      if (const int slots = p.exact.ring + p.exact.first; p.exact.recent > 0 || p.exact.first > 0) {
        head.exact_keys = keys(p.exact.keys, slots);
        head.exact_values = values(p.exact.values, slots);
      }
      for (int h = kv * group; h < (kv + 1) * group; ++h) {
        for (int i = 0; i < p.query_len; ++i) attend_query(p, b, h, i, head);
      }
    }
  }
}

const BackendTable table = {"reference", encode, decode, attend, transform};

}  // namespace turboquant::reference
