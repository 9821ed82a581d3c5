// Checks of the operations' arguments.  Each throws std::invalid_argument that names the rule and the value found.
#pragma once

#include <algorithm>

#include "require.h"
#include "turboquant/format.h"
#include "turboquant/mlx/ops.h"
#include "turboquant/rotation.h"

namespace turboquant::ops {

inline bool is_float(mx::Dtype dtype) { return dtype == mx::float16 || dtype == mx::bfloat16 || dtype == mx::float32; }

inline void check_bits(const char* op, const char* name, int bits) {
  require((bits >= 2 && bits <= 4) || bits == 8, "[", op, "] ", name, " must be 2, 3, 4 or 8; got ", bits);
}

/// A float array whose last axis is a valid head_dim.
inline void check_vectors(const char* op, const char* name, const mx::array& x) {
  require(is_float(x.dtype()), "[", op, "] ", name, " must be float16, bfloat16 or float32; got ", x.dtype());
  require(x.ndim() >= 1, "[", op, "] ", name, " must have at least one axis; got a scalar");
  require(valid_head_dim(x.shape(-1)), "[", op, "] head_dim must be a multiple of 32 from 32 to 512; got ", x.shape(-1),
          " in ", name, " of shape ", x.shape());
}

/// The head dimension of codes; 0 of a side without numbers.
inline int head_dim_of(const PackedArrays& p, int bits) { return p.codes.shape(-1) / bits * 32; }

/// Keys and values of one cache: values may have a head_dim of their own, or 0.
inline void check_sides(const char* op, const mx::array& keys, const mx::array& values) {
  check_vectors(op, "keys", keys);
  const bool empty = values.ndim() == 4 && values.shape(3) == 0;
  if (!empty) check_vectors(op, "values", values);
  require(keys.ndim() == 4, "[", op, "] keys must have shape (batch, kv_heads, tokens, head_dim); got ", keys.shape());
  require(values.ndim() == 4 && std::equal(keys.shape().begin(), keys.shape().begin() + 3, values.shape().begin()), "[",
          op, "] keys and values must agree in batch, heads and tokens; got ", keys.shape(), " and ", values.shape());
}

/// Codes and scales that belong together; with `empty` a side may have no numbers.
inline void check_packed(const char* op, const char* name, const PackedArrays& p, int bits, bool empty = false) {
  require(p.codes.dtype() == mx::uint32, "[", op, "] ", name, " codes must be uint32; got ", p.codes.dtype());
  require(p.scales.dtype() == mx::float16, "[", op, "] ", name, " scales must be float16; got ", p.scales.dtype());
  require(p.codes.ndim() >= 1 && p.scales.ndim() + 1 == p.codes.ndim() &&
              mx::Shape(p.codes.shape().begin(), p.codes.shape().end() - 1) == p.scales.shape(),
          "[", op, "] ", name, " scales must have the codes' shape without its last axis; got codes ", p.codes.shape(),
          " and scales ", p.scales.shape());
  const int words = p.codes.shape(-1);
  require((empty && words == 0) || (words % bits == 0 && valid_head_dim(words / bits * 32)), "[", op, "] ", name,
          " of ", bits,
          " bits must have bits * head_dim / 32 words in the last axis, head_dim a multiple of 32 from 32 to 512; got ",
          words, " words");
}

/// A centre as the kernels take it: float32, (heads, head_dim), row-contiguous.
inline std::optional<mx::array> checked_centre(const char* op, const char* name, const std::optional<mx::array>& centre,
                                               int heads, int head_dim, mx::StreamOrDevice s) {
  if (!centre) return std::nullopt;
  require(centre->shape() == mx::Shape{heads, head_dim}, "[", op, "] ", name, " must have shape (", heads, ",",
          head_dim, "); got ", centre->shape());
  // A cache's centres are in that form already, and two operations a call are not free.
  if (centre->dtype() == mx::float32 && centre->is_available() && centre->flags().row_contiguous) return centre;
  return mx::contiguous(mx::astype(*centre, mx::float32, s), false, s);
}

/// Feedback as the kernels take it: float16, (heads, head_dim, head_dim), row-contiguous; none for the one block of 32.
inline std::optional<mx::array> checked_feedback(const char* op, const char* name,
                                                 const std::optional<mx::array>& feedback, int heads, int head_dim,
                                                 mx::StreamOrDevice s) {
  if (!feedback) return std::nullopt;
  require(feedback->dtype() == mx::float16, "[", op, "] ", name, " must be float16; got ", feedback->dtype());
  require(feedback->shape() == mx::Shape{heads, head_dim, head_dim}, "[", op, "] ", name, " must have shape (", heads,
          ",", head_dim, ",", head_dim, "); got ", feedback->shape());
  if (head_dim == group_size()) return std::nullopt;
  if (feedback->is_available() && feedback->flags().row_contiguous) return feedback;
  return mx::contiguous(*feedback, false, s);
}

/// Matrices as `transform` takes them: float32, (heads, head_dim, head_dim), row-contiguous.
inline std::optional<mx::array> checked_matrix(const char* op, const char* name, const std::optional<mx::array>& matrix,
                                               int heads, int head_dim, mx::StreamOrDevice s) {
  if (!matrix) return std::nullopt;
  require(matrix->dtype() == mx::float32, "[", op, "] ", name, " must be float32; got ", matrix->dtype());
  require(matrix->shape() == mx::Shape{heads, head_dim, head_dim}, "[", op, "] ", name, " must have shape (", heads,
          ",", head_dim, ",", head_dim, "); got ", matrix->shape());
  if (matrix->is_available() && matrix->flags().row_contiguous) return matrix;
  return mx::contiguous(*matrix, false, s);
}

}  // namespace turboquant::ops
