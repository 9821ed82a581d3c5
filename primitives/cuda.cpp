// The operations as MLX CUDA kernels, compiled by NVRTC from the text in src/cuda.
#include "primitives/cuda.h"

#include <mlx/fast.h>

#include <stdexcept>

#include "cuda/kernels.h"

namespace turboquant::ops::cuda_backend {
namespace {

namespace cuda = turboquant::cuda;

cuda::Device device() {
  static const cuda::Device found = [] {
    const auto& info = mx::device_info(mx::Device::gpu);
    const auto number = [&](const char* key) {
      const auto it = info.find(key);
      return it == info.end() ? size_t(0) : std::get<size_t>(it->second);
    };
    const size_t major = number("compute_capability_major"), minor = number("compute_capability_minor");
    cuda::Device d;
    // Largest shared memory of a block (CUDA C++ Programming Guide, table of technical specifications).
    d.shared_bytes = major == 9 || major == 10 ? 232448 : major == 8 && (minor == 0 || minor == 7) ? 166912 : 101376;
    return d;
  }();
  return found;
}

std::vector<mx::array> launch(const cuda::Kernel& k, const std::vector<mx::array>& inputs,
                              const std::vector<mx::Shape>& shapes, const std::vector<mx::Dtype>& dtypes,
                              mx::Stream stream) {
  const auto run =
      mx::fast::cuda_kernel(k.name, k.inputs, k.outputs, k.source, std::string(cuda::source_text(k.header)),
                            /*ensure_row_contiguous=*/false, k.shared_bytes);
  return run(inputs, shapes, dtypes, {k.grid[0], k.grid[1], k.grid[2]}, {k.block[0], k.block[1], k.block[2]}, {},
             std::nullopt, false, stream);
}

mx::Shape with_last(mx::Shape shape, int last) {
  shape.back() = last;
  return shape;
}

mx::Shape without_last(mx::Shape shape) {
  shape.pop_back();
  return shape;
}

cuda::AttentionShape shape_of(const mx::array& q, const PackedArrays& keys, const AttentionOptions& o) {
  return {q.shape(0), q.shape(1), keys.codes.shape(1), q.shape(2),          o.kv_len,
          q.shape(3), o.key_bits, o.value_bits,        o.starts.has_value()};
}

}  // namespace

std::vector<PackedArrays> encode(const std::vector<mx::array>& sides, const std::vector<int>& bits, uint64_t seed,
                                 const std::vector<std::optional<mx::array>>& centres, mx::Stream stream) {
  std::vector<cuda::EncodeSide> settings;
  std::vector<mx::array> inputs;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  const int dim = sides[0].shape(-1);
  for (size_t i = 0; i < sides.size(); ++i) {
    settings.push_back({bits[i], centres[i].has_value()});
    inputs.push_back(sides[i]);
    inputs.push_back(centres[i].value_or(sides[i]));
    shapes.push_back(with_last(sides[i].shape(), words_per_vector(bits[i], dim)));
    shapes.push_back(without_last(sides[i].shape()));
    dtypes.insert(dtypes.end(), {mx::uint32, mx::float16});
  }
  const int64_t vectors = int64_t(sides[0].size()) / dim;
  const auto out = launch(cuda::encode_kernel(settings, dim, seed, vectors), inputs, shapes, dtypes, stream);
  std::vector<PackedArrays> packed;
  for (size_t i = 0; i < out.size(); i += 2) packed.push_back({out[i], out[i + 1]});
  return packed;
}

mx::array decode(const PackedArrays& packed, int bits, uint64_t seed, mx::Dtype dtype,
                 const std::optional<mx::array>& centre, mx::Stream stream) {
  const int dim = packed.codes.shape(-1) / bits * 32;
  const auto kernel = cuda::decode_kernel(bits, centre.has_value(), dim, seed, int64_t(packed.scales.size()));
  return launch(kernel, {packed.codes, packed.scales, centre.value_or(packed.scales)},
                {with_last(packed.codes.shape(), dim)}, {dtype}, stream)[0];
}

mx::array attention(const mx::array& q, const PackedArrays& keys, const PackedArrays& values, const AttentionOptions& o,
                    mx::Stream stream) {
  const auto shape = shape_of(q, keys, o);
  const cuda::AttentionSettings settings{.scale = o.scale,
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
  // The kernels take the number of tokens from the scales' shape, so that one compilation serves a growing cache.
  const auto first = [&](const mx::array& scales) {
    if (scales.shape(2) == o.kv_len) return scales;
    return mx::slice(scales, {0, 0, 0}, {scales.shape(0), scales.shape(1), o.kv_len}, stream);
  };
  const auto key_scales = first(keys.scales), value_scales = first(values.scales);
  const auto& dummy = q;
  const auto starts = o.starts.value_or(dummy), mask = o.mask.value_or(dummy), sinks = o.sinks.value_or(dummy),
             key_centre = o.key_centre.value_or(dummy), value_centre = o.value_centre.value_or(dummy);
  if (!cuda::decodes(shape)) {
    throw std::runtime_error("[attention] the CUDA backend takes at most 8 queries a sequence; got " +
                             std::to_string(shape.query_len));
  }
  const auto plan = cuda::plan_decode(shape, device());
  const auto partial =
      launch(cuda::partial_kernel(shape, settings, plan),
             {q, keys.codes, key_scales, values.codes, value_scales, starts, mask},
             {{plan.slots, plan.rows, shape.head_dim}, {plan.slots, plan.rows, 2}}, {mx::float32, mx::float32}, stream);
  return launch(cuda::merge_kernel(shape, settings, plan),
                {q, key_scales, partial[0], partial[1], starts, sinks, key_centre, value_centre}, {q.shape()},
                {q.dtype()}, stream)[0];
}

std::string route(int query_len) { return query_len <= 8 ? "cuda decode (int8 mma)" : "cuda prefill"; }

}  // namespace turboquant::ops::cuda_backend
