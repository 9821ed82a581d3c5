// The caches for Python.  Docstrings live in turboquant_mlx/*.py; this file only translates.
#include "python/bindings/convert.h"
#include "turboquant/mlx/batch_kv_cache.h"
#include "turboquant/mlx/kv_cache.h"
#include "turboquant/mlx/rotating_kv_cache.h"

namespace nb = nanobind;
namespace ops = turboquant::ops;
namespace mx = mlx::core;
using namespace nb::literals;

namespace {

using Arrays = std::vector<mx::array>;

Arrays arrays(const ops::Store& held) {
  const auto s = held.evaluated();
  return {s.keys.codes, s.keys.scales, s.values.codes, s.values.scales};
}

ops::Store store(const Arrays& a) {
  if (a.size() != 4) throw std::invalid_argument("[restore] a cache has four arrays; got " + std::to_string(a.size()));
  return {{a[0], a[1]}, {a[2], a[3]}};
}

mx::array numbers(const std::vector<int>& v) { return mx::array(v.data(), {int(v.size())}, mx::int32); }

const char* code_name(const ops::Coding& coding) {
  return coding.width.code == turboquant::Code::trellis ? "trellis" : "scalar";
}

void bind_codings(nb::module_& m) {
  nb::class_<ops::Coding>(m, "Coding")
      .def(
          "__init__",
          [](ops::Coding* self, int bits, const std::string& code, uint64_t seed, const Array& centre,
             const Array& feedback) {
            new (self) ops::Coding{{bits, code_from("coding", code)}, seed, centre, feedback};
          },
          "bits"_a = 3, nb::kw_only(), "code"_a = "trellis", "seed"_a = 0, "centre"_a = nb::none(),
          "feedback"_a = nb::none())
      .def_prop_ro("bits", &ops::Coding::bits)
      .def_prop_ro("code", &code_name)
      .def_ro("seed", &ops::Coding::seed)
      .def_ro("centre", &ops::Coding::centre)
      .def_ro("feedback", &ops::Coding::feedback);

  nb::class_<ops::CacheCoding>(m, "CacheCoding")
      .def(
          "__init__",
          [](ops::CacheCoding* self, const ops::Coding& keys, const ops::Coding& values, const Array& key_map,
             const Array& query_map, int recent,
             int sink) { new (self) ops::CacheCoding{keys, values, key_map, query_map, recent, sink}; },
          "keys"_a, "values"_a, nb::kw_only(), "key_map"_a = nb::none(), "query_map"_a = nb::none(), "recent"_a = 0,
          "sink"_a = 0)
      .def_ro("keys", &ops::CacheCoding::keys)
      .def_ro("values", &ops::CacheCoding::values)
      .def_ro("key_map", &ops::CacheCoding::key_map)
      .def_ro("query_map", &ops::CacheCoding::query_map)
      .def_ro("recent", &ops::CacheCoding::recent)
      .def_ro("sink", &ops::CacheCoding::sink);
}

/// Exact copies: four arrays, and the first token that their ring holds.
using PythonCopies = std::optional<std::pair<Arrays, int>>;

std::optional<ops::Copies> copies(const PythonCopies& c) {
  if (!c) return std::nullopt;
  return ops::Copies{store(c->first), c->second, std::nullopt};
}

/// What caches with exact copies have besides.
template <class Cache>
void bind_copies(nb::class_<Cache>& cache) {
  cache
      .def_prop_ro("copies",
                   [](const Cache& c) {
                     if (!c.copies()) return PythonCopies();
                     c.copies()->note_readers();  // whoever gets the arrays
                     return PythonCopies({arrays(c.copies()->held), c.copies()->from});
                   })
      .def_prop_ro("copies_nbytes", [](const Cache& c) { return c.copies() ? c.copies()->nbytes() : 0; })
      .def("end_chunk", &Cache::end_chunk);
}

/// What all four caches have.
template <class Cache>
nb::class_<Cache> bind_cache(nb::module_& m, const char* name) {
  return nb::class_<Cache>(m, name)
      .def(
          "__deepcopy__", [](const Cache& c, nb::object) { return Cache(c); }, "memo"_a)
      .def("append", &Cache::append, "keys"_a, "values"_a, "stream"_a = nb::none())
      .def("view", &Cache::view)
      .def(
          "update",  // append and view in one call, for the sake of decoding
          [](Cache& c, const mx::array& keys, const mx::array& values, std::shared_ptr<ops::LastKernel> last) {
            c.append(keys, values);
            auto view = c.view();
            view.dtype = values.dtype();
            view.last_kernel = std::move(last);
            return view;
          },
          "keys"_a, "values"_a, "last_kernel"_a)
      .def("trim", &Cache::trim, "n"_a)
      .def("tie", &Cache::tie, "to"_a)
      .def_prop_ro("empty", &Cache::empty)
      .def_prop_ro("nbytes", &Cache::nbytes)
      .def_prop_ro("coding", &Cache::coding)
      .def_prop_ro("arrays",
                   [](const Cache& c) { return c.store() ? std::optional(arrays(*c.store())) : std::nullopt; });
}

template <class Cache>
PythonMask mask(const Cache& c, int n, std::optional<int> window, bool return_array) {
  return mask_to(c.mask(n, window.value_or(0), return_array));
}

}  // namespace

void bind_caches(nb::module_& m) {
  bind_codings(m);

  nb::class_<ops::LastKernel>(m, "LastKernel")
      .def(nb::init<>())
      .def(nb::init<const ops::LastKernel&>(), "other"_a)
      .def_ro("name", &ops::LastKernel::name);

  nb::class_<ops::View>(m, "View")
      .def_ro("length", &ops::View::length)
      .def_rw("dtype", &ops::View::dtype)
      .def_rw("last_kernel", &ops::View::last_kernel)
      .def_rw("latent", &ops::View::latent)
      .def_prop_ro("value_dim", &ops::View::value_dim)
      .def_prop_ro(
          "shape",
          [](const ops::View& v) { return nb::make_tuple(v.store.batch(), v.store.heads(), v.length, v.head_dim()); })
      .def("__getitem__",
           [](const ops::View&, nb::object) {
             throw std::runtime_error(
                 "[TurboQuantKVCache] these keys and values are packed codes, and mlx-lm's own attention cannot read "
                 "them: call turboquant_mlx.apply_patch() once before the model runs (enable(model) does it)");
           })
      .def(
          "astype", [](nb::object view, nb::handle, nb::handle) { return view; }, "dtype"_a, "stream"_a = nb::none())
      .def_prop_ro("arrays", [](const ops::View& v) { return arrays(v.store.tokens(0, v.length)); })
      .def(
          "attend",
          [](const ops::View& v, const mx::array& q, float scale, const PythonMask& mask, const Array& sinks,
             mx::StreamOrDevice s) {
            const auto [causal, array] = mask_from(mask);
            return v.attend(q, scale, causal, array, sinks, s);
          },
          "q"_a, "scale"_a, "mask"_a = nb::none(), "sinks"_a = nb::none(), "stream"_a = nb::none())
      .def("decode", &ops::View::decode, "dtype"_a, "stream"_a = nb::none())
      .def("decode_keys", &ops::View::decode_keys, "dtype"_a, "stream"_a = nb::none())
      .def("decode_values", &ops::View::decode_values, "dtype"_a, "stream"_a = nb::none());

  auto single = bind_cache<ops::KVCache>(m, "KVCache");
  bind_copies(single);
  single.def(nb::init<ops::CacheCoding>(), "coding"_a)
      .def(
          "restore",
          [](ops::KVCache& c, const Arrays& a, int length, const PythonCopies& exact) {
            c.restore(store(a), length, copies(exact));
          },
          "arrays"_a, "length"_a, "copies"_a = nb::none())
      .def_prop_ro("offset", &ops::KVCache::offset);

  auto batch = bind_cache<ops::BatchKVCache>(m, "BatchKVCache");
  bind_copies(batch);
  batch.def(nb::init<std::vector<int>, ops::CacheCoding>(), "left_padding"_a, "coding"_a)
      .def_static("merge", &ops::BatchKVCache::merge, "caches"_a, "stream"_a = nb::none())
      .def("prepare", &ops::BatchKVCache::prepare, "left_padding"_a, "right_padding"_a,
           "lengths"_a = std::vector<int>())
      .def("finalize", &ops::BatchKVCache::finalize, "stream"_a = nb::none())
      .def("filter", &ops::BatchKVCache::filter, "rows"_a, "stream"_a = nb::none())
      .def("extend", &ops::BatchKVCache::extend, "other"_a, "stream"_a = nb::none())
      .def("extract", &ops::BatchKVCache::extract, "row"_a, "stream"_a = nb::none())
      .def("mask", &mask<ops::BatchKVCache>, "n"_a, "window"_a = nb::none(), "return_array"_a = false)
      .def(
          "restore",
          [](ops::BatchKVCache& c, const Arrays& a, int length, std::vector<int> left_padding,
             const PythonCopies& exact) { c.restore(store(a), length, std::move(left_padding), copies(exact)); },
          "arrays"_a, "length"_a, "left_padding"_a, "copies"_a = nb::none())
      .def_prop_ro("length", &ops::BatchKVCache::length)
      .def_prop_ro("left_padding", [](const ops::BatchKVCache& c) { return numbers(c.left_padding()); })
      .def_prop_ro("offset", [](const ops::BatchKVCache& c) { return numbers(c.offsets()); });

  bind_cache<ops::RotatingKVCache>(m, "RotatingKVCache")
      .def(nb::init<int, int, ops::CacheCoding>(), "max_size"_a, "keep"_a, "coding"_a)
      .def("mask", &mask<ops::RotatingKVCache>, "n"_a, "window"_a = nb::none(), "return_array"_a = false)
      .def(
          "restore",
          [](ops::RotatingKVCache& c, const Arrays& a, int offset, int index) { c.restore(store(a), offset, index); },
          "arrays"_a, "offset"_a, "index"_a)
      .def_prop_ro("can_trim", &ops::RotatingKVCache::can_trim)
      .def_prop_ro("undoable", &ops::RotatingKVCache::undoable)
      .def_prop_ro("offset", &ops::RotatingKVCache::offset)
      .def_prop_ro("index", &ops::RotatingKVCache::index)
      .def_prop_ro("size", &ops::RotatingKVCache::size)
      .def_prop_ro("max_size", &ops::RotatingKVCache::max_size)
      .def_prop_ro("keep", &ops::RotatingKVCache::keep);

  using Batch = ops::BatchRotatingKVCache;
  bind_cache<Batch>(m, "BatchRotatingKVCache")
      .def(nb::init<int, std::vector<int>, ops::CacheCoding>(), "max_size"_a, "left_padding"_a, "coding"_a)
      .def_static("merge", &Batch::merge, "caches"_a, "stream"_a = nb::none())
      .def("prepare", &Batch::prepare, "left_padding"_a, "lengths"_a, "right_padding"_a)
      .def("finalize", &Batch::finalize, "stream"_a = nb::none())
      .def("filter", &Batch::filter, "rows"_a, "stream"_a = nb::none())
      .def("extend", &Batch::extend, "other"_a, "stream"_a = nb::none())
      .def("extract", &Batch::extract, "row"_a, "stream"_a = nb::none())
      .def("mask", &mask<Batch>, "n"_a, "window"_a = nb::none(), "return_array"_a = false)
      .def(
          "restore",
          [](Batch& c, const Arrays& a, int length, int index, bool rotated, std::vector<int> left_padding,
             std::vector<int> offsets) {
            c.restore(store(a), {length, index, rotated, std::move(left_padding), std::move(offsets)});
          },
          "arrays"_a, "length"_a, "index"_a, "rotated"_a, "left_padding"_a, "offsets"_a)
      .def_prop_ro("position",
                   [](const Batch& c) {
                     const auto p = c.position();
                     nb::dict d;
                     d["length"] = p.length, d["index"] = p.index, d["rotated"] = p.rotated;
                     d["left_padding"] = p.left_padding, d["offsets"] = p.offsets;
                     return d;
                   })
      .def_prop_ro("can_trim", &Batch::can_trim)
      .def_prop_ro("size", &Batch::size)
      .def_prop_ro("max_size", &Batch::max_size)
      .def_prop_ro("left_padding", [](const Batch& c) { return numbers(c.left_padding()); })
      .def_prop_ro("offset", [](const Batch& c) { return numbers(c.offsets()); });
}
