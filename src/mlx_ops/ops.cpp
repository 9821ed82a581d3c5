// Builds the graph of an operation: checks its arguments, then chooses the CPU primitive or GPU kernels.
#include "turboquant/mlx/ops.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "mlx_ops/checks.h"
#include "mlx_ops/gpu.h"
#include "mlx_ops/primitives.h"
#include "turboquant/turboquant.h"

namespace turboquant::ops {
namespace {

bool on_gpu(const mx::Stream& stream) { return stream.device == mx::Device::gpu; }

/// (..., N, D) as (B, H, N, D): shorter shapes gain leading ones, longer ones are merged into the first axis.
mx::Shape as_rank4(const mx::Shape& shape) {
  mx::Shape out{1, 1, 1, 1};
  const int n = int(shape.size());
  for (int i = 0; i < n; ++i) {
    const int axis = std::max(0, i - n + 4);
    out[axis] = (n - i > 4 || (axis == 0 && n > 4)) ? out[axis] * shape[i] : shape[i];
  }
  return out;
}

mx::Shape with_last(mx::Shape shape, int last) {
  shape.back() = last;
  return shape;
}

mx::Shape without_last(mx::Shape shape) {
  shape.pop_back();
  return shape;
}

/// The GPU's kernels may not have every head dimension that the CPU's have.
void check_gpu_dim(const char* op, int dim) {
  require(dim <= most_head_dim_gpu(), "[", op, "] head_dim must be at most ", most_head_dim_gpu(),
          " with the kernels of this GPU; got ", dim);
}

/// A side without numbers: no vectors, or vectors of no coordinate.
PackedArrays encode_nothing(const mx::array& x, int words, mx::Stream stream) {
  return {mx::zeros(with_last(x.shape(), words), mx::uint32, stream),
          mx::zeros(without_last(x.shape()), mx::float16, stream)};
}

PackedArrays encode_rank4(const mx::array& x, const Coding& coding, mx::Stream stream) {
  std::vector<mx::array> inputs{x};
  for (const auto* extra : {&coding.centre, &coding.feedback}) {
    if (*extra) inputs.push_back(**extra);
  }
  auto outputs = mx::array::make_arrays(
      {with_last(x.shape(), words_per_vector(coding.bits(), x.shape(-1))), without_last(x.shape())},
      {mx::uint32, mx::float16}, std::make_shared<Encode>(stream, coding.width, coding.seed, coding.centre.has_value()),
      inputs);
  return {outputs[0], outputs[1]};
}

/// The coding with its arrays in the form that kernels take; messages call its fields `prefix` + name.
Coding checked(const char* op, const std::string& prefix, Coding coding, int heads, int dim, mx::Stream stream) {
  check_bits(op, (prefix + "bits").c_str(), coding.bits());
  coding.centre = checked_centre(op, (prefix + "centre").c_str(), coding.centre, heads, dim, stream);
  coding.feedback = checked_feedback(op, (prefix + "feedback").c_str(), coding.feedback, heads, dim, stream);
  return coding;
}

void check_one_seed(const char* op, const Coding& keys, const Coding& values) {
  require(keys.seed == values.seed, "[", op, "] keys and values must have the same seed; got ", keys.seed, " and ",
          values.seed);
}

}  // namespace

PackedArrays encode(const mx::array& x, const Coding& coding, mx::StreamOrDevice s) {
  check_bits("encode", "bits", coding.bits());
  check_vectors("encode", "x", x);
  const auto stream = mx::to_stream(s);
  const auto shape = as_rank4(x.shape());
  const auto ready = checked("encode", "", coding, shape[1], shape[3], stream);
  const auto rank4 = x.shape() == shape ? x : mx::reshape(x, shape, stream);
  if (on_gpu(stream)) check_gpu_dim("encode", shape[3]);
  if (x.size() == 0) return encode_nothing(x, words_per_vector(coding.bits(), x.shape(-1)), stream);
  auto packed = on_gpu(stream) ? encode_gpu({rank4}, {ready}, stream)[0] : encode_rank4(rank4, ready, stream);
  if (x.shape() == shape) return packed;
  return {mx::reshape(packed.codes, with_last(x.shape(), packed.codes.shape(-1)), stream),
          mx::reshape(packed.scales, without_last(x.shape()), stream)};
}

namespace {

/// Checks what encode_kv and append_kv take; the codings of keys and values in the form that kernels take.
std::vector<Coding> checked_sides(const char* op, const mx::array& keys, const mx::array& values,
                                  const Coding& key_coding, const Coding& value_coding, mx::Stream stream) {
  check_bits(op, "key_bits", key_coding.bits());
  check_bits(op, "value_bits", value_coding.bits());
  check_sides(op, keys, values);
  check_one_seed(op, key_coding, value_coding);
  const int heads = keys.shape(1), dim = keys.shape(3), value_dim = values.shape(3);
  if (on_gpu(stream)) check_gpu_dim(op, std::max(dim, value_dim));
  return {checked(op, "key_", key_coding, heads, dim, stream),
          checked(op, "value_", value_coding, heads, value_dim, stream)};
}

}  // namespace

std::pair<PackedArrays, PackedArrays> encode_kv(const mx::array& keys, const mx::array& values,
                                                const Coding& key_coding, const Coding& value_coding,
                                                mx::StreamOrDevice s) {
  const auto stream = mx::to_stream(s);
  const auto codings = checked_sides("encode", keys, values, key_coding, value_coding, stream);
  if (on_gpu(stream) && keys.shape(3) == values.shape(3) && keys.size() > 0) {  // one kernel for both
    auto sides = encode_gpu({keys, values}, codings, stream);
    return {sides[0], sides[1]};
  }
  const auto side = [&](const mx::array& x, const Coding& coding) {
    if (x.size() == 0) return encode_nothing(x, words_per_vector(coding.bits(), x.shape(3)), stream);
    return on_gpu(stream) ? encode_gpu({x}, {coding}, stream)[0] : encode_rank4(x, coding, stream);
  };
  return {side(keys, codings[0]), side(values, codings[1])};
}

namespace {

/// The same as MLX's own operations, for a GPU; of a decoding step's few vectors by one kernel, for there five
/// operations cost the host more than the products take.
mx::array transform_on_gpu(const mx::array& x, const mx::array& matrix, const std::optional<mx::array>& centre,
                           mx::Stream stream) {
  const int heads = x.shape(1), dim = x.shape(3), matrices = matrix.shape(0);
  constexpr int kFew = 16;  // vectors a matrix
  const bool few = x.size() > 0 && x.shape(0) * heads / matrices * x.shape(2) <= kFew;
  if (few && dim % 32 == 0 && dim <= most_head_dim_gpu() && transforms_gpu()) {
    return transform_gpu(x, matrix, centre, stream);
  }
  auto rows = mx::reshape(mx::astype(x, mx::float32, stream),
                          {x.shape(0), matrices, heads / matrices * x.shape(2), dim}, stream);
  if (centre) rows = mx::subtract(rows, mx::expand_dims(*centre, 1, stream), stream);
  return mx::reshape(mx::matmul(rows, matrix, stream), x.shape(), stream);
}

}  // namespace

mx::array transform(const mx::array& x, const mx::array& matrix, const std::optional<mx::array>& centre,
                    mx::StreamOrDevice s) {
  check_vectors("transform", "x", x);
  require(x.ndim() == 4, "[transform] x must have shape (batch, heads, tokens, head_dim); got ", x.shape());
  require(matrix.ndim() == 3 && matrix.shape(0) > 0 && x.shape(1) % matrix.shape(0) == 0,
          "[transform] matrix must have shape (matrices, head_dim, head_dim), as many as divide the heads; got ",
          matrix.shape(), " for x of shape ", x.shape());
  const auto stream = mx::to_stream(s);
  const auto checked = *checked_matrix("transform", "matrix", matrix, matrix.shape(0), x.shape(3), stream);
  const auto shift = checked_centre("transform", "centre", centre, matrix.shape(0), x.shape(3), stream);
  if (on_gpu(stream)) return transform_on_gpu(x, checked, shift, stream);
  std::vector<mx::array> inputs{x, checked};
  if (shift) inputs.push_back(*shift);
  return mx::array(x.shape(), mx::float32, std::make_shared<Transform>(stream), std::move(inputs));
}

bool can_append_in_place(const std::vector<mx::array>& arrays, mx::Stream stream) {
  return on_gpu(stream) && appends_in_place_gpu() &&
         std::none_of(arrays.begin(), arrays.end(), [](const mx::array& x) { return x.is_tracer(); });
}

mx::array append_kv(const mx::array& keys, const mx::array& values, const Coding& key_coding,
                    const Coding& value_coding, const AppendBuffers& to, const mx::array& before,
                    mx::StreamOrDevice s) {
  const auto stream = mx::to_stream(s);
  const auto codings = checked_sides("append", keys, values, key_coding, value_coding, stream);
  require(can_append_in_place({keys, values}, stream), "[append] in place needs a CUDA stream and no transformation");
  for (auto [side, bits, name] :
       {std::tuple{&to.keys, codings[0].bits(), "keys"}, {&to.values, codings[1].bits(), "values"}}) {
    check_packed("append", name, *side, bits);
    const mx::Shape room{keys.shape(0), keys.shape(1), int(before.size()) - 1 + keys.shape(2)};
    require(side->scales.shape(0) == room[0] && side->scales.shape(1) == room[1] && side->scales.shape(2) >= room[2] &&
                side->codes.shape(3) == words_per_vector(bits, keys.shape(3)),
            "[append] the ", name, "' buffers must have room for ", room, "; got codes ", side->codes.shape());
  }
  if (to.exact) {
    for (auto [side, name] : {std::pair{&to.exact->keys, "exact keys"}, {&to.exact->values, "exact values"}}) {
      check_packed("append", name, *side, 8);
      require(side->scales.shape(0) == keys.shape(0) && side->scales.shape(1) == keys.shape(1) &&
                  side->scales.shape(2) - to.first >= keys.shape(2) &&
                  side->codes.shape(3) == words_per_vector(8, keys.shape(3)),
              "[append] the ", name, " must be a ring of at least ", keys.shape(2), " slots and ", to.first,
              " more; got codes ", side->codes.shape());
    }
  }
  return append_gpu({keys, values}, codings, to, before, stream);
}

mx::array nothing_to_wait_for(int n, mx::StreamOrDevice s) {
  static const auto* zero = new mx::array(0, mx::uint8);  // outlives MLX's allocator
  return mx::broadcast_to(*zero, {n + 1}, s);
}

mx::array decode(const PackedArrays& packed, const Coding& coding, mx::Dtype dtype, mx::StreamOrDevice s) {
  check_bits("decode", "bits", coding.bits());
  check_packed("decode", "packed", packed, coding.bits());
  require(is_float(dtype), "[decode] dtype must be float16, bfloat16 or float32; got ", dtype);
  const auto stream = mx::to_stream(s);
  const int dim = head_dim_of(packed, coding.bits());
  if (on_gpu(stream)) check_gpu_dim("decode", dim);
  const auto shape = as_rank4(packed.codes.shape());
  Coding ready{coding.width, coding.seed};  // codes with feedback decode as those without
  ready.centre = checked_centre("decode", "centre", coding.centre, shape[1], dim, stream);
  const PackedArrays rank4{mx::reshape(packed.codes, shape, stream),
                           mx::reshape(packed.scales, without_last(shape), stream)};
  const auto out_shape = with_last(packed.codes.shape(), dim);
  if (packed.scales.size() == 0) return mx::zeros(out_shape, dtype, stream);  // no kernel has nothing to do
  if (on_gpu(stream)) {
    const PackedArrays dense{mx::contiguous(rank4.codes, false, stream), mx::contiguous(rank4.scales, false, stream)};
    return mx::reshape(decode_gpu(dense, ready, dtype, stream), out_shape, stream);
  }
  std::vector<mx::array> inputs{rank4.codes, rank4.scales};
  if (ready.centre) inputs.push_back(*ready.centre);
  return mx::reshape(mx::array(with_last(shape, dim), dtype, std::make_shared<Decode>(stream, ready.width, ready.seed),
                               std::move(inputs)),
                     out_shape, stream);
}

namespace {

/// The options with every array in the form the kernels take.
AttentionOptions checked_options(const mx::array& q, const PackedArrays& keys, const PackedArrays& values,
                                 AttentionOptions o, mx::Stream stream) {
  check_bits("attention", "key_bits", o.keys.bits());
  check_bits("attention", "value_bits", o.values.bits());
  check_one_seed("attention", o.keys, o.values);
  check_vectors("attention", "q", q);
  check_packed("attention", "keys", keys, o.keys.bits());
  check_packed("attention", "values", values, o.values.bits(), true);
  require(q.ndim() == 4, "[attention] q must have shape (batch, query_heads, query_len, head_dim); got ", q.shape());
  require(keys.codes.ndim() == 4 && values.codes.ndim() == 4,
          "[attention] codes must have shape (batch, kv_heads, tokens, words); got ", keys.codes.shape(), " and ",
          values.codes.shape());
  require(keys.scales.shape() == values.scales.shape(),
          "[attention] keys and values must agree in batch, heads and tokens; got ", keys.scales.shape(), " and ",
          values.scales.shape());
  const int batch = q.shape(0), query_heads = q.shape(1), dim = q.shape(3);
  const int value_dim = head_dim_of(values, o.values.bits());
  if (on_gpu(stream)) {
    check_gpu_dim("attention", std::max(dim, value_dim));
    require(dim == value_dim || value_dim == 0 || has_value_dims_gpu(),
            "[attention] the kernels of this GPU need keys and values of one head_dim; got ", dim, " and ", value_dim);
  }
  const int kv_heads = keys.codes.shape(1), capacity = keys.codes.shape(2);
  require(keys.codes.shape(0) == batch, "[attention] q and keys must have the same batch; got ", batch, " and ",
          keys.codes.shape(0));
  require(keys.codes.shape(3) == words_per_vector(o.keys.bits(), dim), "[attention] keys of ", o.keys.bits(),
          " bits and head_dim ", dim, " must have ", words_per_vector(o.keys.bits(), dim), " words a vector; got ",
          keys.codes.shape(3));
  require(kv_heads > 0 && query_heads % kv_heads == 0, "[attention] query heads must be a multiple of KV heads; got ",
          query_heads, " and ", kv_heads);
  require(std::isfinite(o.scale), "[attention] scale must be finite; got ", o.scale);
  require(o.window >= 0, "[attention] window must be at least 0; got ", o.window);
  const int kv_len = o.kv_len < 0 ? capacity : o.kv_len;
  require(kv_len <= capacity, "[attention] kv_len must be at most the ", capacity, " tokens held; got ", kv_len);
  if (o.mask) {
    require(o.mask->dtype() == mx::bool_ || is_float(o.mask->dtype()),
            "[attention] mask must be bool, float16, bfloat16 or float32; got ", o.mask->dtype());
    const mx::Shape full{batch, query_heads, q.shape(2), kv_len};
    bool fits = o.mask->ndim() <= 4;
    for (int i = 1; fits && i <= int(o.mask->ndim()); ++i) {
      fits = o.mask->shape(-i) == 1 || o.mask->shape(-i) == full[4 - i];
    }
    require(fits, "[attention] mask must broadcast to (batch, query_heads, query_len, kv_len) = ", full, "; got ",
            o.mask->shape());
    o.mask = mx::broadcast_to(*o.mask, full, stream);
  }
  if (o.starts) {
    require(o.starts->shape() == mx::Shape{batch}, "[attention] starts must have shape (", batch, "); got ",
            o.starts->shape());
    require(mx::issubdtype(o.starts->dtype(), mx::integer), "[attention] starts must be integers; got ",
            o.starts->dtype());
    o.starts = mx::contiguous(mx::astype(*o.starts, mx::int32, stream), false, stream);
  }
  if (o.sinks) {
    require(o.sinks->shape() == mx::Shape{query_heads}, "[attention] sinks must have shape (", query_heads, "); got ",
            o.sinks->shape());
    o.sinks = mx::contiguous(mx::astype(*o.sinks, mx::float32, stream), false, stream);
  }
  if (o.exact) {
    for (auto [side, width, name] :
         {std::tuple{&o.exact->keys, dim, "exact keys"}, {&o.exact->values, value_dim, "exact values"}}) {
      check_packed("attention", name, *side, 8, true);
      require(side->codes.ndim() == 4 && side->codes.shape(0) == batch && side->codes.shape(1) == kv_heads &&
                  side->codes.shape(3) == words_per_vector(8, width),
              "[attention] ", name, " must fit the keys' batch, heads and head_dim; got codes ", side->codes.shape());
    }
    require(o.exact->keys.scales.shape() == o.exact->values.scales.shape(),
            "[attention] exact keys and values must agree in slots; got ", o.exact->keys.scales.shape(), " and ",
            o.exact->values.scales.shape());
    const int ring = o.exact->keys.scales.shape(2) - o.first;
    require(o.recent >= 0 && o.first >= 0 && ring >= std::min(o.recent, kv_len) && ring % 32 == 0,
            "[attention] the exact copies must be a ring of a multiple of 32 slots, at least recent = ", o.recent,
            ", and first = ", o.first, " more; got ", o.exact->keys.scales.shape(2), " slots");
  }
  o.keys.centre = checked_centre("attention", "key_centre", o.keys.centre, kv_heads, dim, stream);
  o.values.centre = checked_centre("attention", "value_centre", o.values.centre, kv_heads, value_dim, stream);
  return o;
}

/// The CPU has one kernel an instruction set, for any number of queries.
const char* cpu_kernel() {
  static const auto names = [] {
    std::map<std::string, std::string> all;
    for (const auto& isa : available_isas()) all[isa] = "cpu " + isa;
    return all;
  }();
  return names.at(current_isa()).c_str();
}

}  // namespace

bool reads_exact_copies(mx::StreamOrDevice s) { return !on_gpu(mx::to_stream(s)) || reads_exact_copies_gpu(); }

mx::array attention(const mx::array& q, const PackedArrays& keys, const PackedArrays& values,
                    const AttentionOptions& options, mx::StreamOrDevice s) {
  const auto stream = mx::to_stream(s);
  const auto o = checked_options(q, keys, values, options, stream);
  const auto out_shape = with_last(q.shape(), head_dim_of(values, o.values.bits()));
  if (out_shape.back() == 0) return mx::zeros(out_shape, q.dtype(), stream);
  if (on_gpu(stream)) {
    if (q.size() == 0) return mx::zeros(out_shape, q.dtype(), stream);  // no kernel has nothing to do
    auto gpu = o;                                                       // kernels are built for these shapes
    if (gpu.kv_len < 0) gpu.kv_len = keys.codes.shape(2);
    require(!o.exact || reads_exact_copies_gpu(),
            "[attention] the kernels of this GPU cannot read exact copies: use recent = 0 and sink = 0");
    const auto dense = [&](const mx::array& x) { return o.dense_rows ? x : mx::contiguous(x, false, stream); };
    if (gpu.exact) {
      for (auto* side : {&gpu.exact->keys, &gpu.exact->values}) *side = {dense(side->codes), dense(side->scales)};
    }
    return attention_gpu(q, {dense(keys.codes), dense(keys.scales)}, {dense(values.codes), dense(values.scales)}, gpu,
                         stream);
  }
  if (o.kernel) *o.kernel = cpu_kernel();
  const Attention::Settings settings{o.scale,
                                     o.keys.width,
                                     o.values.width,
                                     o.keys.seed,
                                     o.kv_len,
                                     o.window,
                                     o.causal,
                                     o.mask.has_value(),
                                     o.starts.has_value(),
                                     o.sinks.has_value(),
                                     o.keys.centre.has_value(),
                                     o.values.centre.has_value(),
                                     o.exact.has_value(),
                                     o.recent,
                                     o.first};
  std::vector<mx::array> inputs{q, keys.codes, keys.scales, values.codes, values.scales};
  for (const auto* extra : {&o.mask, &o.starts, &o.sinks, &o.keys.centre, &o.values.centre}) {
    if (*extra) inputs.push_back(**extra);
  }
  if (o.exact) {
    const auto& [k, v] = *o.exact;
    inputs.insert(inputs.end(), {k.codes, k.scales, v.codes, v.scales});
  }
  return mx::array(out_shape, q.dtype(), std::make_shared<Attention>(stream, settings), std::move(inputs));
}

}  // namespace turboquant::ops
