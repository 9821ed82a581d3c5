// turboquant_mlx._core: the primitives and the caches (bindings_cache.cpp) for Python.  Docstrings live in
// turboquant_mlx/*.py and in the stubs; this file only translates.
#include "mlx_ops/cuda.h"
#include "mlx_ops/gpu.h"
#include "python/bindings/convert.h"
#include "turboquant/mlx/ops.h"
#include "turboquant/rotation.h"
#include "turboquant/turboquant.h"

namespace nb = nanobind;
namespace tq = turboquant;
namespace ops = turboquant::ops;
namespace mx = mlx::core;
using namespace nb::literals;

namespace {

ops::PackedArrays packed(const std::pair<mx::array, mx::array>& p) { return {p.first, p.second}; }

}  // namespace

NB_MODULE(_core, m) {
  nb::module_::import_("mlx.core");

  m.def(
      "accepts", [](const mx::array&) { return true; }, "x"_a);

  m.def(
      "encode",
      [](const mx::array& x, int bits, uint64_t seed, const Array& centre, const Array& feedback,
         const std::string& code, mx::StreamOrDevice s) {
        auto p = ops::encode(x, {bits, code_from("encode", code)}, seed, centre, feedback, s);
        return std::pair{p.codes, p.scales};
      },
      "x"_a, "bits"_a = 3, nb::kw_only(), "seed"_a = 0, "centre"_a = nb::none(), "feedback"_a = nb::none(),
      "code"_a = "trellis", "stream"_a = nb::none());
  m.def(
      "decode",
      [](const mx::array& codes, const mx::array& scales, int bits, uint64_t seed, const Array& centre, mx::Dtype dtype,
         const std::string& code, mx::StreamOrDevice s) {
        return ops::decode({codes, scales}, {bits, code_from("decode", code)}, seed, dtype, centre, s);
      },
      "codes"_a, "scales"_a, "bits"_a = 3, nb::kw_only(), "seed"_a = 0, "centre"_a = nb::none(), "dtype"_a,
      "code"_a = "trellis", "stream"_a = nb::none());
  m.def(
      "attention",
      [](const mx::array& q, const std::pair<mx::array, mx::array>& keys, const std::pair<mx::array, mx::array>& values,
         float scale, const PythonMask& mask, int key_bits, int value_bits, uint64_t seed, const Array& sinks,
         const Array& starts, int window, const Array& key_centre, const Array& value_centre, const std::string& code,
         mx::StreamOrDevice s) {
        ops::AttentionOptions o;
        o.code = code_from("attention", code);
        const auto [causal, array] = mask_from(mask);
        o.causal = causal, o.mask = array;
        o.scale = scale, o.key_bits = key_bits, o.value_bits = value_bits, o.seed = seed, o.window = window;
        o.sinks = sinks, o.starts = starts, o.key_centre = key_centre, o.value_centre = value_centre;
        return ops::attention(q, packed(keys), packed(values), o, s);
      },
      "q"_a, "keys"_a, "values"_a, nb::kw_only(), "scale"_a, "mask"_a = nb::none(), "key_bits"_a = 3,
      "value_bits"_a = 3, "seed"_a = 0, "sinks"_a = nb::none(), "starts"_a = nb::none(), "window"_a = 0,
      "key_centre"_a = nb::none(), "value_centre"_a = nb::none(), "code"_a = "trellis", "stream"_a = nb::none());

  m.def("reads_exact_copies", [] { return ops::reads_exact_copies(); });
  m.def("transform", &ops::transform, "x"_a, "matrix"_a, nb::kw_only(), "centre"_a = nb::none(),
        "stream"_a = nb::none());
  m.def("inverse_transpose", &ops::inverse_transpose, "key_map"_a);

  bind_caches(m);

  m.def("gpu_supported", [] {
    std::string why;
    const bool ok = ops::gpu_supported(&why);
    return std::pair{ok, why};
  });
  m.def(
      "rotation",  // as a matrix (D, D), in double: calibration turns its metrics by it
      [](int dim, uint64_t seed) {
        std::vector<double> columns(size_t(dim) * dim);  // R is the transpose: its columns are rows here
        for (int i = 0; i < dim; ++i) {
          columns[size_t(i) * dim + i] = 1;
          tq::rotate(&columns[size_t(i) * dim], dim, seed);
        }
        return columns;
      },
      "dim"_a, "seed"_a);
  m.def("set_kernel_directory", &ops::cuda_backend::set_kernel_directory, "directory"_a);
  m.def("available_isas", &tq::available_isas);
  m.def("current_isa", &tq::current_isa);
  m.def("force_isa", &tq::force_isa, "name"_a);
  m.def("num_threads", &tq::num_threads);
  m.def("set_num_threads", &tq::set_num_threads, "n"_a);
  m.def("bytes_per_vector", &tq::bytes_per_vector, "bits"_a, "head_dim"_a);
  m.attr("FORMAT_VERSION") = TQ_FORMAT_VERSION;
  // Raise this and API in _checks.py when a binding changes: an extension of older sources is then refused by name.
  m.attr("API") = 7;
}
