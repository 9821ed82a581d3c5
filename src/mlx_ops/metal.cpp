// The operations as MLX Metal kernels, compiled by Metal from the text in src/metal.
#include "mlx_ops/metal.h"

#include <mlx/fast.h>

#include "metal/launch.h"

namespace turboquant::ops::metal_backend {
namespace {

namespace metal = turboquant::metal;

Dtype core_dtype(mx::Dtype dtype) {
  return dtype == mx::float16 ? Dtype::float16 : dtype == mx::bfloat16 ? Dtype::bfloat16 : Dtype::float32;
}

mx::Dtype mlx_dtype(metal::Type type) {
  return type == metal::Type::float16    ? mx::float16
         : type == metal::Type::bfloat16 ? mx::bfloat16
         : type == metal::Type::uint32   ? mx::uint32
                                         : mx::float32;
}

/// As launch.h wants it.
struct Launcher {
  using Array = mx::array;
  mx::Stream stream;

  int dim(const mx::array& a, int axis) const { return a.shape(axis); }

  mx::array params(const metal::Params& params) const {
    return mx::array(params.data(), mx::Shape{int(params.size())}, mx::int32);
  }

  std::vector<mx::array> run(const metal::Kernel& k, const std::vector<mx::array>& inputs) const {
    std::vector<std::pair<std::string, mx::fast::TemplateArg>> template_args;
    for (const auto& arg : k.template_args) {
      using Kind = metal::TemplateArg::Kind;
      if (arg.kind == Kind::dtype) {
        template_args.emplace_back(arg.name, mlx_dtype(metal::type_of(Dtype(arg.value))));
      } else if (arg.kind == Kind::boolean) {
        template_args.emplace_back(arg.name, arg.value != 0);
      } else {
        template_args.emplace_back(arg.name, arg.value);
      }
    }
    std::vector<std::string> names;
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    for (const auto& out : k.outputs) {
      names.push_back(out.name);
      shapes.emplace_back(out.shape.begin(), out.shape.end());
      dtypes.push_back(mlx_dtype(out.type));
    }
    const auto kernel =
        mx::fast::metal_kernel(k.name, k.inputs, names, k.source, std::string(metal::source_text(k.header)),
                               /*ensure_row_contiguous=*/false);
    return kernel(inputs, shapes, dtypes, {k.grid[0], k.grid[1], k.grid[2]},
                  {k.threadgroup[0], k.threadgroup[1], k.threadgroup[2]}, template_args, std::nullopt, false, stream);
  }
};

metal::Coding width_of(const Coding& coding) { return {coding.bits(), coding.width.code}; }

mx::Shape with_last(mx::Shape shape, int last) {
  shape.back() = last;
  return shape;
}

}  // namespace

std::vector<PackedArrays> encode(const std::vector<mx::array>& sides, const std::vector<Coding>& codings,
                                 mx::Stream stream) {
  std::vector<PackedArrays> packed;
  if (sides[0].size() == 0) {
    auto scales_shape = sides[0].shape();
    scales_shape.pop_back();
    for (const Coding& c : codings) {
      const auto shape = with_last(sides[0].shape(), words_per_vector(c.bits(), sides[0].shape(-1)));
      packed.push_back({mx::zeros(shape, mx::uint32, stream), mx::zeros(scales_shape, mx::float16, stream)});
    }
    return packed;
  }
  Launcher launcher{stream};
  std::vector<metal::Coding> widths;
  std::vector<std::optional<mx::array>> centres, feedback;
  for (const Coding& c : codings) {
    widths.push_back(width_of(c));
    centres.push_back(c.centre), feedback.push_back(c.feedback);
  }
  const auto out = metal::launch_encode(launcher, sides, widths, centres, feedback, codings[0].seed);
  for (size_t i = 0; i < out.size(); i += 2) packed.push_back({out[i], out[i + 1]});
  return packed;
}

mx::array decode(const PackedArrays& packed, const Coding& coding, mx::Dtype dtype, mx::Stream stream) {
  const auto& codes = packed.codes;
  if (codes.size() == 0)
    return mx::zeros(with_last(codes.shape(), codes.shape(-1) / coding.bits() * 32), dtype, stream);
  Launcher launcher{stream};
  return metal::launch_decode(launcher, codes, packed.scales, coding.centre, width_of(coding), coding.seed,
                              core_dtype(dtype));
}

mx::array attention(const mx::array& q, const PackedArrays& keys, const PackedArrays& values, const AttentionOptions& o,
                    mx::Stream stream) {
  // Without keys every output is zero, sinks or not.
  if (q.size() == 0 || o.kv_len == 0) return mx::zeros(q.shape(), q.dtype(), stream);
  metal::AttentionShape shape{};
  shape.kv_len = o.kv_len;
  shape.keys = width_of(o.keys);
  shape.values = width_of(o.values);
  shape.dtype = core_dtype(q.dtype());
  shape.scale = o.scale;
  shape.seed = o.keys.seed;
  shape.causal = o.causal;
  shape.window = o.window;
  if (o.mask) shape.mask = o.mask->dtype() == mx::bool_ ? MaskKind::boolean : MaskKind::additive;
  if (o.kernel) *o.kernel = metal::kernel_name(q.shape(1), keys.codes.shape(1), q.shape(2), q.shape(3));
  metal::AttentionArrays<mx::array> arrays{q,        keys.codes, keys.scales, values.codes,  values.scales,
                                           o.starts, o.mask,     o.sinks,     o.keys.centre, o.values.centre};
  if (o.exact) {
    shape.recent = o.recent;
    shape.first = o.first;
    arrays.exact_key_codes = o.exact->keys.codes;
    arrays.exact_key_scales = o.exact->keys.scales;
    arrays.exact_value_codes = o.exact->values.codes;
    arrays.exact_value_scales = o.exact->values.scales;
  }
  Launcher launcher{stream};
  return metal::launch_attention(launcher, shape, arrays);
}

}  // namespace turboquant::ops::metal_backend
