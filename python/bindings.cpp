// turboquant_mlx._core: the primitives and the cache for Python.  Docstrings live in turboquant_mlx/*.py and in the
// stubs; this file only translates.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "primitives/cache.h"
#include "primitives/gpu.h"
#include "primitives/ops.h"
#include "turboquant/turboquant.h"

namespace nb = nanobind;
namespace tq = turboquant;
namespace ops = turboquant::ops;
namespace mx = mlx::core;
using namespace nb::literals;

namespace {

using Array = std::optional<mx::array>;
using Mask = std::variant<std::monostate, std::string, mx::array>;

/// mlx-lm's masks: None, "causal", or an array.
std::pair<bool, Array> split_mask(const Mask& mask) {
  if (const auto* array = std::get_if<mx::array>(&mask)) return {false, *array};
  const auto* mode = std::get_if<std::string>(&mask);
  if (mode && *mode != "causal") {
    throw std::invalid_argument("[attention] mask must be None, \"causal\" or an array; got \"" + *mode + "\"");
  }
  return {mode != nullptr, std::nullopt};
}

ops::PackedArrays packed(const std::pair<mx::array, mx::array>& p) { return {p.first, p.second}; }

std::vector<mx::array> arrays(const ops::Store& s) {
  return {s.keys.codes, s.keys.scales, s.values.codes, s.values.scales};
}

ops::Store store(const std::vector<mx::array>& a) {
  if (a.size() != 4) throw std::invalid_argument("[restore] a cache has four arrays; got " + std::to_string(a.size()));
  return {{a[0], a[1]}, {a[2], a[3]}};
}

}  // namespace

NB_MODULE(_core, m) {
  nb::module_::import_("mlx.core");

  m.def(
      "accepts", [](const mx::array&) { return true; }, "x"_a);

  m.def(
      "encode",
      [](const mx::array& x, int bits, uint64_t seed, const Array& centre, mx::StreamOrDevice s) {
        auto p = ops::encode(x, bits, seed, centre, s);
        return std::pair{p.codes, p.scales};
      },
      "x"_a, "bits"_a = 3, nb::kw_only(), "seed"_a = 0, "centre"_a = nb::none(), "stream"_a = nb::none());
  m.def(
      "decode",
      [](const mx::array& codes, const mx::array& scales, int bits, uint64_t seed, const Array& centre, mx::Dtype dtype,
         mx::StreamOrDevice s) {
        return ops::decode({codes, scales}, bits, seed, dtype, centre, s);
      },
      "codes"_a, "scales"_a, "bits"_a = 3, nb::kw_only(), "seed"_a = 0, "centre"_a = nb::none(), "dtype"_a,
      "stream"_a = nb::none());
  m.def(
      "attention",
      [](const mx::array& q, const std::pair<mx::array, mx::array>& keys, const std::pair<mx::array, mx::array>& values,
         float scale, const Mask& mask, int key_bits, int value_bits, uint64_t seed, const Array& sinks,
         const Array& starts, int window, const Array& key_centre, const Array& value_centre, mx::StreamOrDevice s) {
        ops::AttentionOptions o;
        std::tie(o.causal, o.mask) = split_mask(mask);
        o.scale = scale, o.key_bits = key_bits, o.value_bits = value_bits, o.seed = seed, o.window = window;
        o.sinks = sinks, o.starts = starts, o.key_centre = key_centre, o.value_centre = value_centre;
        return ops::attention(q, packed(keys), packed(values), o, s);
      },
      "q"_a, "keys"_a, "values"_a, nb::kw_only(), "scale"_a, "mask"_a = nb::none(), "key_bits"_a = 3,
      "value_bits"_a = 3, "seed"_a = 0, "sinks"_a = nb::none(), "starts"_a = nb::none(), "window"_a = 0,
      "key_centre"_a = nb::none(), "value_centre"_a = nb::none(), "stream"_a = nb::none());

  nb::class_<ops::View>(m, "View")
      .def_ro("length", &ops::View::length)
      .def_prop_ro(
          "shape",
          [](const ops::View& v) { return nb::make_tuple(v.store.batch(), v.store.heads(), v.length, v.head_dim()); })
      .def("__getitem__",
           [](const ops::View&, nb::object) {
             throw std::runtime_error(
                 "[TurboQuantKVCache] these keys and values are packed codes, and mlx-lm's own attention cannot read "
                 "them: call turboquant_mlx.apply_patch() once before the model runs (enable(model) does it)");
           })
      .def_prop_ro("arrays", [](const ops::View& v) { return arrays(v.store.tokens(0, v.length)); })
      .def(
          "attend",
          [](const ops::View& v, const mx::array& q, float scale, const Mask& mask, const Array& sinks,
             mx::StreamOrDevice s) {
            const auto [causal, array] = split_mask(mask);
            return v.attend(q, scale, causal, array, sinks, s);
          },
          "q"_a, "scale"_a, "mask"_a = nb::none(), "sinks"_a = nb::none(), "stream"_a = nb::none())
      .def("decode", &ops::View::decode, "dtype"_a, "stream"_a = nb::none());

  nb::class_<ops::KVCache>(m, "KVCache")
      .def(
          "__init__",
          [](ops::KVCache* self, int key_bits, int value_bits, uint64_t seed, const Array& key_centre,
             const Array& value_centre) {
            new (self) ops::KVCache({key_bits, value_bits, seed, key_centre, value_centre});
          },
          "key_bits"_a, "value_bits"_a, "seed"_a = 0, "key_centre"_a = nb::none(), "value_centre"_a = nb::none())
      .def(
          "__deepcopy__", [](const ops::KVCache& c, nb::object) { return ops::KVCache(c); }, "memo"_a)
      .def("append", &ops::KVCache::append, "keys"_a, "values"_a, "stream"_a = nb::none())
      .def("view", &ops::KVCache::view)
      .def("trim", &ops::KVCache::trim, "n"_a)
      .def(
          "restore", [](ops::KVCache& c, const std::vector<mx::array>& a, int length) { c.restore(store(a), length); },
          "arrays"_a, "length"_a)
      .def_prop_ro("arrays",
                   [](const ops::KVCache& c) { return c.store() ? std::optional(arrays(*c.store())) : std::nullopt; })
      .def_prop_ro("offset", &ops::KVCache::offset)
      .def_prop_ro("empty", &ops::KVCache::empty)
      .def_prop_ro("nbytes", &ops::KVCache::nbytes);

  m.def("attention_route", &ops::attention_route, "query_len"_a, "head_dim"_a, "device"_a);
  m.def("gpu_supported", [] {
    std::string why;
    const bool ok = ops::gpu_supported(&why);
    return std::pair{ok, why};
  });
  m.def("available_isas", &tq::available_isas);
  m.def("current_isa", &tq::current_isa);
  m.def("force_isa", &tq::force_isa, "name"_a);
  m.def("num_threads", &tq::num_threads);
  m.def("set_num_threads", &tq::set_num_threads, "n"_a);
  m.def("bytes_per_vector", &tq::bytes_per_vector, "bits"_a, "head_dim"_a);
  m.attr("FORMAT_VERSION") = TQ_FORMAT_VERSION;
}
