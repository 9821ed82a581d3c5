// The operations as MLX CUDA kernels, compiled by NVRTC from the text in src/cuda.
#include "mlx_ops/cuda.h"

#include <dlfcn.h>
#include <mlx/fast.h>

#include <algorithm>
#include <compare>
#include <map>
#include <mutex>

#include "cuda/kernels.h"
#include "gpu/kernel_text.h"

namespace turboquant::ops::cuda_backend {
namespace {

namespace cuda = turboquant::cuda;

/// A function of the NVIDIA driver's library; null without a driver.
template <class F>
F driver_function(const char* name) {
  static void* const driver = dlopen("libcuda.so.1", RTLD_LAZY);
  return driver ? reinterpret_cast<F>(dlsym(driver, name)) : nullptr;
}

/// Limits of the first GPU, from the driver, which MLX has loaded where there is one.
cuda::Device device() {
  static const cuda::Device found = [] {
    cuda::Device d;
    const auto get_device = driver_function<int (*)(int*, int)>("cuDeviceGet");
    const auto get = driver_function<int (*)(int*, int, int)>("cuDeviceGetAttribute");
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
  if (kernel_directory().empty() || !gpu::source_checkout().empty()) return std::string(cuda::source_text(k.header));
  return "#include \"" + kernel_directory() + "/" + std::string(cuda::source_name(k.header)) + ".cuh\"\n";
}

using Function = mx::fast::CustomKernelFunction;

/// The kernel that `build` describes, described once for each key: writing its text and searching it for the names of
/// inputs, which MLX does, costs the host more than a launch.
template <class Key, class Build>
const Function& kernel_for(const Key& key, const Build& build) {
  static std::map<Key, Function> kernels;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  auto found = kernels.find(key);
  if (found == kernels.end()) {
    const cuda::Kernel k = build();
    found = kernels
                .emplace(key, mx::fast::cuda_kernel(k.name, k.inputs, k.outputs, cuda::body(k),
                                                    header_of(k) + cuda::before_kernel(k),
                                                    /*ensure_row_contiguous=*/false, k.shared_bytes))
                .first;
  }
  return found->second;
}

std::vector<mx::array> launch(const Function& run, const cuda::Extent& extent, const std::vector<mx::array>& inputs,
                              const std::vector<mx::Shape>& shapes, const std::vector<mx::Dtype>& dtypes,
                              mx::Stream stream) {
  const auto [grid, block] = extent;
  return run(inputs, shapes, dtypes, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, {}, std::nullopt,
             false, stream);
}

/// What the text of a codec kernel depends on.
struct CodecKey {
  enum Kind { encode, append, decode, transform } kind;
  std::vector<cuda::EncodeSide> sides;
  int head_dim;
  uint64_t seed;
  int first = -1;  // of append_kernel; of transform_kernel whether there is a centre
  auto operator<=>(const CodecKey&) const = default;
};

/// What the text of an attention kernel depends on: of the shape, only what selects code.
struct AttentionKey {
  bool merge, one_row, even;
  cuda::AttentionSettings settings;
  int query_heads, kv_heads, query_len, head_dim, value_dim, key_bits, value_bits;
  Code key_code, value_code;
  int recent, first, exact_splits;
  int method, rows, warps, stages, row_warps, token_warps, shared_bytes;
  auto operator<=>(const AttentionKey&) const = default;
};

AttentionKey key_of(bool merge, const cuda::AttentionShape& s, const cuda::AttentionSettings& settings,
                    const cuda::AttentionPlan& p) {
  return {
      merge,         s.batch == 1,   p.splits > 0, settings,     s.query_heads, s.kv_heads,   std::min(s.query_len, 9),
      s.head_dim,    s.value_dim(),  s.key_bits,   s.value_bits, s.key_code,    s.value_code, s.recent,
      s.first,       p.exact_splits, p.method,     p.rows,       p.warps,       p.stages,     p.row_warps,
      p.token_warps, p.shared_bytes};
}

mx::Shape with_last(mx::Shape shape, int last) {
  shape.back() = last;
  return shape;
}

mx::Shape without_last(mx::Shape shape) {
  shape.pop_back();
  return shape;
}

cuda::AttentionShape shape_of(const mx::array& q, const PackedArrays& keys, const PackedArrays& values,
                              const AttentionOptions& o) {
  return {q.shape(0),
          q.shape(1),
          keys.codes.shape(1),
          q.shape(2),
          o.kv_len,
          q.shape(3),
          o.keys.bits(),
          o.values.bits(),
          o.starts.has_value(),
          o.keys.width.code,
          o.values.width.code,
          o.exact ? o.recent : 0,
          o.exact ? o.first : 0,
          values.codes.shape(3) / o.values.bits() * 32};
}

std::vector<cuda::EncodeSide> sides_of(const std::vector<Coding>& codings) {
  std::vector<cuda::EncodeSide> sides;
  for (const auto& c : codings) sides.push_back({c.bits(), c.centre.has_value(), c.feedback.has_value(), c.width.code});
  return sides;
}

}  // namespace

void set_kernel_directory(const std::string& directory) { kernel_directory() = directory; }

int driver_version() {
  const auto get = driver_function<int (*)(int*)>("cuDriverGetVersion");
  int version = 0;
  return get && get(&version) == 0 ? version : 0;
}

std::vector<PackedArrays> encode(const std::vector<mx::array>& sides, const std::vector<Coding>& codings,
                                 mx::Stream stream) {
  const auto settings = sides_of(codings);
  std::vector<mx::array> inputs;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  const uint64_t seed = codings[0].seed;
  const int dim = sides[0].shape(-1);
  for (size_t i = 0; i < sides.size(); ++i) {
    inputs.push_back(sides[i]);
    inputs.push_back(codings[i].centre.value_or(sides[i]));
    inputs.push_back(codings[i].feedback.value_or(sides[i]));
    shapes.push_back(with_last(sides[i].shape(), words_per_vector(codings[i].bits(), dim)));
    shapes.push_back(without_last(sides[i].shape()));
    dtypes.insert(dtypes.end(), {mx::uint32, mx::float16});
  }
  const int tokens = sides[0].shape(2), rows = sides[0].shape(0) * sides[0].shape(1);
  const auto& run = kernel_for(CodecKey{CodecKey::encode, settings, dim, seed},
                               [&] { return cuda::encode_kernel(settings, dim, seed, rows, tokens); });
  const auto out = launch(run, cuda::encode_extent(settings, dim, rows, tokens), inputs, shapes, dtypes, stream);
  std::vector<PackedArrays> packed;
  for (size_t i = 0; i < out.size(); i += 2) packed.push_back({out[i], out[i + 1]});
  return packed;
}

mx::array append(const std::vector<mx::array>& sides, const std::vector<Coding>& codings, const AppendBuffers& to,
                 const mx::array& before, mx::Stream stream) {
  const auto settings = sides_of(codings);
  const uint64_t seed = codings[0].seed;
  std::vector<mx::array> inputs;
  const int dim = sides[0].shape(-1);
  for (size_t i = 0; i < sides.size(); ++i) {
    const PackedArrays& side = i ? to.values : to.keys;
    inputs.insert(inputs.end(), {sides[i], codings[i].centre.value_or(sides[i]), codings[i].feedback.value_or(sides[i]),
                                 side.codes, side.scales});
  }
  if (to.exact) {
    for (const auto* side : {&to.exact->keys, &to.exact->values}) {
      inputs.insert(inputs.end(), {side->codes, side->scales});
    }
  }
  inputs.push_back(before);
  const int first = to.exact ? to.first : -1;
  const int tokens = sides[0].shape(2), rows = sides[0].shape(0) * sides[0].shape(1);
  const auto& run = kernel_for(CodecKey{CodecKey::append, settings, dim, seed, first},
                               [&] { return cuda::append_kernel(settings, dim, seed, rows, tokens, first); });
  const auto extent = cuda::encode_extent(cuda::append_sides(settings, first >= 0), dim, rows, tokens);
  return launch(run, extent, inputs, {{int(before.size()) + tokens}}, {mx::uint8}, stream)[0];
}

mx::array transform(const mx::array& x, const mx::array& matrix, const std::optional<mx::array>& centre,
                    mx::Stream stream) {
  const int dim = x.shape(3), matrices = matrix.shape(0);
  const auto& run = kernel_for(CodecKey{CodecKey::transform, {}, dim, 0, int(centre.has_value())},
                               [&] { return cuda::transform_kernel(dim, matrices, centre.has_value()); });
  return launch(run, cuda::transform_extent(dim, matrices), {x, matrix, centre.value_or(matrix)}, {x.shape()},
                {mx::float32}, stream)[0];
}

mx::array decode(const PackedArrays& packed, const Coding& coding, mx::Dtype dtype, mx::Stream stream) {
  const int dim = packed.codes.shape(-1) / coding.bits() * 32;
  const int64_t vectors = int64_t(packed.scales.size());
  const cuda::EncodeSide side{coding.bits(), coding.centre.has_value(), false, coding.width.code};
  const auto& run = kernel_for(CodecKey{CodecKey::decode, {side}, dim, coding.seed},
                               [&] { return cuda::decode_kernel(side, dim, coding.seed, vectors); });
  return launch(run, cuda::decode_extent(dim, vectors),
                {packed.codes, packed.scales, coding.centre.value_or(packed.scales)},
                {with_last(packed.codes.shape(), dim)}, {dtype}, stream)[0];
}

mx::array attention(const mx::array& q, const PackedArrays& keys, const PackedArrays& values, const AttentionOptions& o,
                    mx::Stream stream) {
  const auto shape = shape_of(q, keys, values, o);
  const cuda::AttentionSettings settings{.scale = o.scale,
                                         .seed = o.keys.seed,
                                         .causal = o.causal,
                                         .window = o.window,
                                         .mask = !o.mask                        ? MaskKind::none
                                                 : o.mask->dtype() == mx::bool_ ? MaskKind::boolean
                                                                                : MaskKind::additive,
                                         .starts = o.starts.has_value(),
                                         .sinks = o.sinks.has_value(),
                                         .key_centre = o.keys.centre.has_value(),
                                         .value_centre = o.values.centre.has_value()};
  const auto& dummy = q;
  const auto written = o.written ? *o.written : nothing_to_wait_for(o.kv_len, stream);
  const auto starts = o.starts.value_or(dummy), mask = o.mask.value_or(dummy), sinks = o.sinks.value_or(dummy),
             key_centre = o.keys.centre.value_or(dummy), value_centre = o.values.centre.value_or(dummy);
  const auto plan = cuda::plan_attention(shape, device());
  if (o.kernel) *o.kernel = plan.kernel_name();
  const auto out_shape = with_last(q.shape(), shape.value_dim());
  const bool whole = plan.method == cuda::AttentionPlan::whole;
  std::vector<mx::array> cache{q, keys.codes, keys.scales, values.codes, values.scales, written, starts, mask};
  if (shape.copies()) {
    for (const auto* side : {&o.exact->keys, &o.exact->values}) cache.insert(cache.end(), {side->codes, side->scales});
  }
  const auto& scan = kernel_for(key_of(false, shape, settings, plan), [&] {
    return whole ? cuda::whole_kernel(shape, settings, plan) : cuda::partial_kernel(shape, settings, plan);
  });
  if (whole) {
    cache.insert(cache.end(), {sinks, key_centre, value_centre});
    return launch(scan, cuda::scan_extent(plan), cache, {out_shape}, {q.dtype()}, stream)[0];
  }
  const auto partial =
      launch(scan, cuda::scan_extent(plan), cache, {{plan.slots, plan.rows, plan.partial_floats(shape.value_dim())}},
             {mx::float32}, stream)[0];
  const auto& merge =
      kernel_for(key_of(true, shape, settings, plan), [&] { return cuda::merge_kernel(shape, settings, plan); });
  return launch(merge, cuda::merge_extent(shape), {q, written, partial, starts, sinks, key_centre, value_centre},
                {out_shape}, {q.dtype()}, stream)[0];
}

}  // namespace turboquant::ops::cuda_backend
