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
      [](const mx::array& x, const ops::Coding& coding, mx::StreamOrDevice s) {
        auto p = ops::encode(x, coding, s);
        return std::pair{p.codes, p.scales};
      },
      "x"_a, "coding"_a, nb::kw_only(), "stream"_a = nb::none());
  m.def(
      "decode",
      [](const mx::array& codes, const mx::array& scales, const ops::Coding& coding, mx::Dtype dtype,
         mx::StreamOrDevice s) {
        return ops::decode({codes, scales}, coding, dtype, s);
      },
      "codes"_a, "scales"_a, "coding"_a, nb::kw_only(), "dtype"_a, "stream"_a = nb::none());
  m.def(
      "attention",
      [](const mx::array& q, const std::pair<mx::array, mx::array>& keys, const std::pair<mx::array, mx::array>& values,
         const ops::Coding& key_coding, const ops::Coding& value_coding, float scale, const PythonMask& mask,
         const Array& sinks, const Array& starts, int window, mx::StreamOrDevice s) {
        ops::AttentionOptions o;
        const auto [causal, array] = mask_from(mask);
        o.causal = causal, o.mask = array;
        o.keys = key_coding, o.values = value_coding;
        o.scale = scale, o.window = window;
        o.sinks = sinks, o.starts = starts;
        return ops::attention(q, packed(keys), packed(values), o, s);
      },
      "q"_a, "keys"_a, "values"_a, "key_coding"_a, "value_coding"_a, nb::kw_only(), "scale"_a, "mask"_a = nb::none(),
      "sinks"_a = nb::none(), "starts"_a = nb::none(), "window"_a = 0, "stream"_a = nb::none());

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
  m.attr("API") = 8;
}
