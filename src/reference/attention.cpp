// The oracle of attend: keys and values are decoded to double and plain attention follows.
#include <vector>

#include "backend.h"
#include "reference/codec.h"
#include "tensor.h"
#include "turboquant/softmax.h"

namespace turboquant::reference {
namespace {

/// Decoded vectors of one KV head [tokens, dim], centre added.
std::vector<double> decode_head(const AttendParams& p, const Packed& packed, const float* centre, int b, int h) {
  std::vector<double> x(size_t(p.kv_len) * p.head_dim);
  for (int t = 0; t < p.kv_len; ++t) {
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

void attend_query(const AttendParams& p, int b, int h, int i, const double* keys, const double* values) {
  const int dim = p.head_dim;
  const int64_t row = row_offset(p.q, b, h, i);
  std::vector<double> out(dim);
  OnlineSoftmax<double> softmax;
  if (p.sinks) softmax.push(p.sinks[h]);
  const KeyRange range = visible_keys(p, b, i);
  for (int t = range.first; t < range.last; ++t) {
    const double bias = mask_term(p, b, h, i, t);
    if (bias == -std::numeric_limits<double>::infinity()) continue;
    double dot = 0;
    for (int d = 0; d < dim; ++d) dot += load_number(p.q.data, p.q.dtype, row + d) * keys[size_t(t) * dim + d];
    const auto [old_part, new_part] = softmax.push(double(p.scale) * dot + bias);
    for (int d = 0; d < dim; ++d) out[d] = out[d] * old_part + new_part * values[size_t(t) * dim + d];
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
      const auto keys = decode_head(p, p.keys, p.key_centre, b, kv);
      const auto values = decode_head(p, p.values, p.value_centre, b, kv);
      for (int h = kv * group; h < (kv + 1) * group; ++h) {
        for (int i = 0; i < p.query_len; ++i) attend_query(p, b, h, i, keys.data(), values.data());
      }
    }
  }
}

const BackendTable table = {"reference", encode, decode, attend};

}  // namespace turboquant::reference
