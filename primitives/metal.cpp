// The operations as MLX Metal kernels, compiled by Metal from the text in src/metal.
#include "primitives/metal.h"

#include <mlx/fast.h>

#include "metal/plan.h"

namespace turboquant::ops::metal_backend {
namespace {

namespace metal = turboquant::metal;

Dtype core_dtype(mx::Dtype dtype) {
  return dtype == mx::float16 ? Dtype::float16 : dtype == mx::bfloat16 ? Dtype::bfloat16 : Dtype::float32;
}

mx::Dtype mlx_dtype(Dtype dtype) {
  return dtype == Dtype::float16 ? mx::float16 : dtype == Dtype::bfloat16 ? mx::bfloat16 : mx::float32;
}

mx::array params_array(const metal::Params& params) {
  return mx::array(params.data(), mx::Shape{int(params.size())}, mx::int32);
}

std::vector<mx::array> launch(const metal::Kernel& k, const std::vector<mx::array>& inputs,
                              const std::vector<mx::Shape>& shapes, const std::vector<mx::Dtype>& dtypes,
                              mx::Stream stream) {
  std::vector<std::pair<std::string, mx::fast::TemplateArg>> template_args;
  for (const auto& arg : k.template_args) {
    using Kind = metal::TemplateArg::Kind;
    if (arg.kind == Kind::dtype) {
      template_args.emplace_back(arg.name, mlx_dtype(Dtype(arg.value)));
    } else if (arg.kind == Kind::boolean) {
      template_args.emplace_back(arg.name, arg.value != 0);
    } else {
      template_args.emplace_back(arg.name, arg.value);
    }
  }
  const auto run = mx::fast::metal_kernel(k.name, k.inputs, k.outputs, k.source,
                                          std::string(metal::source_text(k.header)), /*ensure_row_contiguous=*/false);
  return run(inputs, shapes, dtypes, {k.grid[0], k.grid[1], k.grid[2]},
             {k.threadgroup[0], k.threadgroup[1], k.threadgroup[2]}, template_args, std::nullopt, false, stream);
}

mx::Shape with_last(mx::Shape shape, int last) {
  shape.back() = last;
  return shape;
}

mx::Shape without_last(mx::Shape shape) {
  shape.pop_back();
  return shape;
}

}  // namespace

std::vector<PackedArrays> encode(const std::vector<mx::array>& sides, const std::vector<int>& bits, uint64_t seed,
                                 const std::vector<std::optional<mx::array>>& centres, mx::Stream stream) {
  const auto& x = sides[0];
  metal::EncodeShape shape{x.shape(0), x.shape(1), x.shape(2), x.shape(3), bits, {}, seed};
  for (const auto& centre : centres) shape.centred.push_back(centre.has_value());
  const auto params = params_array(metal::encode_params(shape));
  std::vector<mx::array> inputs;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (size_t i = 0; i < sides.size(); ++i) {
    inputs.push_back(sides[i]);
    inputs.push_back(centres[i].value_or(params));
    shapes.push_back(with_last(x.shape(), words_per_vector(bits[i], shape.head_dim)));
    shapes.push_back(without_last(x.shape()));
    dtypes.insert(dtypes.end(), {mx::uint32, mx::float16});
  }
  inputs.push_back(params);
  std::vector<mx::array> out;
  if (x.size() > 0) {
    out = launch(metal::encode_kernel(shape), inputs, shapes, dtypes, stream);
  } else {
    for (size_t i = 0; i < shapes.size(); ++i) out.push_back(mx::zeros(shapes[i], dtypes[i], stream));
  }
  std::vector<PackedArrays> packed;
  for (size_t i = 0; i < out.size(); i += 2) packed.push_back({out[i], out[i + 1]});
  return packed;
}

mx::array decode(const PackedArrays& packed, int bits, uint64_t seed, mx::Dtype dtype,
                 const std::optional<mx::array>& centre, mx::Stream stream) {
  const auto& codes = packed.codes;
  const int dim = codes.shape(-1) / bits * 32;
  const auto out_shape = with_last(codes.shape(), dim);
  if (codes.size() == 0) return mx::zeros(out_shape, dtype, stream);
  const metal::EncodeShape shape{
      codes.shape(0), codes.shape(1), codes.shape(2), dim, {bits}, {centre.has_value()}, seed};
  const auto params = params_array(metal::encode_params(shape));
  return launch(metal::decode_kernel(shape, core_dtype(dtype)), {codes, packed.scales, centre.value_or(params), params},
                {out_shape}, {dtype}, stream)[0];
}

mx::array attention(const mx::array& q, const PackedArrays& keys, const PackedArrays& values, const AttentionOptions& o,
                    mx::Stream stream) {
  // Without keys every output is zero, sinks or not.
  if (q.size() == 0 || o.kv_len == 0) return mx::zeros(q.shape(), q.dtype(), stream);
  const metal::AttentionShape shape{.batch = q.shape(0),
                                    .query_heads = q.shape(1),
                                    .kv_heads = keys.codes.shape(1),
                                    .query_len = q.shape(2),
                                    .kv_len = o.kv_len,
                                    .head_dim = q.shape(3),
                                    .key_bits = o.key_bits,
                                    .value_bits = o.value_bits,
                                    .dtype = core_dtype(q.dtype()),
                                    .scale = o.scale,
                                    .seed = o.seed,
                                    .causal = o.causal,
                                    .window = o.window,
                                    .mask = !o.mask                        ? MaskKind::none
                                            : o.mask->dtype() == mx::bool_ ? MaskKind::boolean
                                                                           : MaskKind::additive,
                                    .starts = o.starts.has_value(),
                                    .sinks = o.sinks.has_value(),
                                    .key_centre = o.key_centre.has_value(),
                                    .value_centre = o.value_centre.has_value()};
  const auto plan = metal::plan_attention(shape);
  const auto params = params_array(plan.params);
  const auto sinks = o.sinks.value_or(params), key_centre = o.key_centre.value_or(params),
             value_centre = o.value_centre.value_or(params);
  std::vector<mx::array> inputs{
      q, keys.codes, keys.scales, values.codes, values.scales, o.starts.value_or(params), o.mask.value_or(params)};
  if (!plan.decode) inputs.insert(inputs.end(), {sinks, key_centre, value_centre});
  inputs.push_back(params);
  if (!plan.merged) return launch(plan.attend, inputs, {q.shape()}, {q.dtype()}, stream)[0];
  const mx::Shape rows{shape.batch, shape.query_heads, shape.query_len, plan.splits};
  auto with = [&](int last) {
    mx::Shape s = rows;
    s.push_back(last);
    return s;
  };
  const auto partial = launch(plan.attend, inputs, {with(shape.head_dim), with(2)}, {mx::float32, mx::float32}, stream);
  return launch(plan.merge, {q, partial[0], partial[1], sinks, key_centre, value_centre, params}, {q.shape()},
                {q.dtype()}, stream)[0];
}

}  // namespace turboquant::ops::metal_backend
