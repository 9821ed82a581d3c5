// The operations as MLX CUDA kernels, compiled by NVRTC from the text in src/cuda.
#include "primitives/cuda.h"

#include <dlfcn.h>
#include <mlx/fast.h>

#include "cuda/kernels.h"

namespace turboquant::ops::cuda_backend {
namespace {

namespace cuda = turboquant::cuda;

/// Limits of the first GPU, from the driver, which MLX has loaded where there is one.
cuda::Device device() {
  static const cuda::Device found = [] {
    cuda::Device d;
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
    const auto get_device = driver ? reinterpret_cast<int (*)(int*, int)>(dlsym(driver, "cuDeviceGet")) : nullptr;
    const auto get =
        driver ? reinterpret_cast<int (*)(int*, int, int)>(dlsym(driver, "cuDeviceGetAttribute")) : nullptr;
    int handle = 0, processors = 0, shared_bytes = 0;
    constexpr int kMultiprocessors = 16, kSharedBytesOptin = 97;  // of CUdevice_attribute
    if (get_device && get && get_device(&handle, 0) == 0 && get(&processors, kMultiprocessors, handle) == 0 &&
        get(&shared_bytes, kSharedBytesOptin, handle) == 0) {
      d = {processors, shared_bytes};
    }
    return d;
  }();
  return found;
}

std::string& kernel_directory() {
  static std::string directory;
  return directory;
}

/// MLX copies and hashes a kernel's whole text at every launch: an include of a file keeps it short.
std::string header_of(const cuda::Kernel& k) {
  if (kernel_directory().empty()) return std::string(cuda::source_text(k.header));
  return "#include \"" + kernel_directory() + "/" + std::string(cuda::source_name(k.header)) + ".cuh\"\n";
}

std::vector<mx::array> launch(const cuda::Kernel& k, const std::vector<mx::array>& inputs,
                              const std::vector<mx::Shape>& shapes, const std::vector<mx::Dtype>& dtypes,
                              mx::Stream stream) {
  const auto run = mx::fast::cuda_kernel(k.name, k.inputs, k.outputs, k.source, header_of(k),
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

void set_kernel_directory(const std::string& directory) { kernel_directory() = directory; }

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
  const auto plan = cuda::plan_attention(shape, device());
  if (o.kernel) *o.kernel = plan.name();
  std::vector<mx::array> cache{q, keys.codes, key_scales, values.codes, value_scales, starts, mask};
  const std::vector<mx::array> rows{sinks, key_centre, value_centre};
  if (plan.method == cuda::AttentionPlan::whole) {
    cache.insert(cache.end(), rows.begin(), rows.end());
    return launch(cuda::whole_kernel(shape, settings, plan), cache, {q.shape()}, {q.dtype()}, stream)[0];
  }
  const auto partial =
      launch(cuda::partial_kernel(shape, settings, plan), cache,
             {{plan.slots, plan.rows, shape.head_dim}, {plan.slots, plan.rows, 2}}, {mx::float32, mx::float32}, stream);
  return launch(cuda::merge_kernel(shape, settings, plan),
                {q, key_scales, partial[0], partial[1], starts, sinks, key_centre, value_centre}, {q.shape()},
                {q.dtype()}, stream)[0];
}

}  // namespace turboquant::ops::cuda_backend
