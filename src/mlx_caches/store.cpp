#include "turboquant/mlx/store.h"

#include <algorithm>

#include "mlx_ops/checks.h"
#include "turboquant/turboquant.h"

namespace turboquant::ops {
namespace {

/// Start and stop corners of the tokens [from, to) of an array.
std::pair<mx::Shape, mx::Shape> token_range(const mx::array& x, int from, int to) {
  mx::Shape start(x.ndim(), 0), stop = x.shape();
  start[2] = from;
  stop[2] = to;
  return {start, stop};
}

bool same_array(const std::optional<mx::array>& a, const std::optional<mx::array>& b) {
  if (a.has_value() != b.has_value()) return false;
  return !a || a->id() == b->id() || mx::array_equal(*a, *b).item<bool>();
}

}  // namespace

bool same_write(const Store& a, const Store& b) { return a.written && b.written && a.written->id() == b.written->id(); }

void check_same_coding(const char* op, const CacheCoding& a, const CacheCoding& b) {
  require(a.keys.bits() == b.keys.bits() && a.values.bits() == b.values.bits(), "[", op,
          "] caches must have the same bits; got keys ", a.keys.bits(), " and ", b.keys.bits(), ", values ",
          a.values.bits(), " and ", b.values.bits());
  require(a.keys.width == b.keys.width && a.values.width == b.values.width, "[", op,
          "] caches must have the same codes; got scalar and trellis");
  require(a.recent == b.recent && a.sink == b.sink, "[", op, "] caches must keep the same tokens exact; got recent ",
          a.recent, " and ", b.recent, ", sink ", a.sink, " and ", b.sink);
  require(a.keys.seed == b.keys.seed && a.values.seed == b.values.seed, "[", op,
          "] caches must have the same seed; got ", a.keys.seed, " and ", b.keys.seed);
  require(same_array(a.keys.centre, b.keys.centre) && same_array(a.values.centre, b.values.centre), "[", op,
          "] caches must have the same centres");
  require(same_array(a.keys.feedback, b.keys.feedback) && same_array(a.values.feedback, b.values.feedback), "[", op,
          "] caches must have the same feedback");
  require(same_array(a.key_map, b.key_map), "[", op, "] caches must have the same key map");
}

mx::array inverse_transpose(const mx::array& key_map) {
  require(key_map.dtype() == mx::float32 && key_map.ndim() == 3 && key_map.shape(1) == key_map.shape(2),
          "[key_map] must be float32 of shape (kv_heads, head_dim, head_dim); got ", key_map.dtype(), " of shape ",
          key_map.shape());
  const mx::Device cpu = mx::Device::cpu;
  auto inverse = mx::array(0.0f);
  try {
    const auto exact = mx::linalg::inv(mx::astype(key_map, mx::float64, cpu), cpu);
    inverse = mx::contiguous(mx::swapaxes(mx::astype(exact, mx::float32, cpu), 1, 2, cpu), false, cpu);
    mx::eval(inverse);
  } catch (const std::exception& error) {
    throw std::invalid_argument(std::string("[key_map] a matrix has no inverse: ") + error.what());
  }
  require(mx::all(mx::isfinite(inverse, cpu), cpu).item<bool>(), "[key_map] a matrix has no inverse");
  return inverse;
}

CacheCoding coding_of_copies(const CacheCoding& coding) {
  CacheCoding out = coding;
  for (auto* side : {&out.keys, &out.values}) side->width = 8, side->feedback = std::nullopt;
  return out;
}

std::pair<mx::array, Coding> mapped_keys(const CacheCoding& coding, const mx::array& keys, mx::StreamOrDevice s) {
  if (!coding.key_map) return {keys, coding.keys};
  Coding rest = coding.keys;
  rest.centre = std::nullopt;
  return {ops::transform(keys, *coding.key_map, coding.keys.centre, s), rest};
}

size_t Store::nbytes() const {
  return keys.codes.nbytes() + keys.scales.nbytes() + values.codes.nbytes() + values.scales.nbytes();
}

Store Store::evaluated() const {
  if (!written) return *this;
  mx::eval({*written});
  return {keys, values};
}

Store Store::tied(const mx::array& to) const {
  Store out = *this;
  if (written) {
    out.written = mx::depends({*written}, {to})[0];
    return out;
  }
  const auto x = mx::depends({keys.codes, keys.scales, values.codes, values.scales}, {to});
  out.keys = {x[0], x[1]};
  out.values = {x[2], x[3]};
  return out;
}

bool Store::unshared() const {
  return keys.codes.is_donatable() && keys.scales.is_donatable() && values.codes.is_donatable() &&
         values.scales.is_donatable();
}

Store Store::map(const std::function<mx::array(const mx::array&)>& f) const {
  const Store x = evaluated();
  return {{f(x.keys.codes), f(x.keys.scales)}, {f(x.values.codes), f(x.values.scales)}};
}

Store Store::tokens(int from, int to, mx::StreamOrDevice s) const {
  if (from == 0 && to == capacity()) return evaluated();
  return map([&](const mx::array& x) {
    const auto [start, stop] = token_range(x, from, to);
    return mx::slice(x, start, stop, s);
  });
}

Store Store::pad(int before, int after, mx::StreamOrDevice s) const {
  if (before == 0 && after == 0) return *this;
  return map([&](const mx::array& x) {
    return mx::pad(x, std::vector<int>{2}, mx::Shape{before}, mx::Shape{after}, mx::array(0, x.dtype()), "constant", s);
  });
}

Store Store::write(const Store& rows, int at, mx::StreamOrDevice s) const {
  const auto put = [&](const mx::array& x, const mx::array& update) {
    const auto [start, stop] = token_range(x, at, at + rows.capacity());
    return mx::slice_update(x, update, start, stop, s);
  };
  const Store x = evaluated(), r = rows.evaluated();
  return {{put(x.keys.codes, r.keys.codes), put(x.keys.scales, r.keys.scales)},
          {put(x.values.codes, r.values.codes), put(x.values.scales, r.values.scales)}};
}

Store Store::take(const mx::array& rows, mx::StreamOrDevice s) const {
  return map([&](const mx::array& x) { return mx::take(x, rows, 0, s); });
}

Store Store::roll(const mx::array& amounts, mx::StreamOrDevice s) const {
  const int n = capacity();
  const auto from = mx::remainder(mx::subtract(mx::arange(n, mx::int32, s), mx::expand_dims(amounts, 1, s), s),
                                  mx::array(n), s);  // (B, n): where token t comes from
  return gather(from, s);
}

Store Store::gather(const mx::array& index, mx::StreamOrDevice s) const {
  return map([&](const mx::array& x) {
    auto at = mx::expand_dims(index, 1, s);
    if (x.ndim() == 4) at = mx::expand_dims(at, 3, s);
    return mx::take_along_axis(x, at, 2, s);
  });
}

Store zeros_like(const Store& like, int batch, int tokens, mx::StreamOrDevice s) {
  return like.map([&](const mx::array& x) {
    auto shape = x.shape();
    shape[0] = batch;
    shape[2] = tokens;
    return mx::zeros(shape, x.dtype(), s);
  });
}

Store zeros(const CacheCoding& coding, mx::Shape keys, mx::Shape values, int tokens, mx::StreamOrDevice s) {
  const auto side = [&](int bits, const mx::Shape& x) {
    return PackedArrays{mx::zeros({x[0], x[1], tokens, words_per_vector(bits, x[3])}, mx::uint32, s),
                        mx::zeros({x[0], x[1], tokens}, mx::float16, s)};
  };
  return {side(coding.keys.bits(), keys), side(coding.values.bits(), values)};
}

void check_same_shape(const char* op, const Store& a, const Store& b) {
  require(a.heads() == b.heads() && a.keys.codes.shape(3) == b.keys.codes.shape(3) &&
              a.values.codes.shape(3) == b.values.codes.shape(3),
          "[", op, "] caches must have the same heads and head_dim; got codes ", a.keys.codes.shape(), " and ",
          b.keys.codes.shape());
}

void check_store(const char* op, const CacheCoding& coding, const Store& store, int length) {
  check_packed(op, "keys", store.keys, coding.keys.bits());
  check_packed(op, "values", store.values, coding.values.bits(), true);
  require(store.keys.codes.ndim() == 4, "[", op, "] codes must have shape (batch, kv_heads, tokens, words); got ",
          store.keys.codes.shape());
  require(store.keys.scales.shape() == store.values.scales.shape(), "[", op,
          "] keys and values must agree in batch, heads and tokens; got ", store.keys.scales.shape(), " and ",
          store.values.scales.shape());
  require(length >= 0 && length <= store.capacity(), "[", op, "] length must be from 0 to the ", store.capacity(),
          " tokens held; got ", length);
  const int heads = store.heads(), dim = store.head_dim(coding), value_dim = store.value_dim(coding);
  const auto check_fits = [&](const std::optional<mx::array>& x, const char* name, const mx::Shape& want) {
    require(!x || x->shape() == want, "[", op, "] the ", name, " must have shape ", want, "; got ",
            x ? x->shape() : want);
  };
  check_fits(coding.keys.centre, "key centre", {heads, dim});
  check_fits(coding.keys.feedback, "key feedback", {heads, dim, dim});
  check_fits(coding.key_map, "key map", {heads, dim, dim});
  if (value_dim == 0) return;
  check_fits(coding.values.centre, "value centre", {heads, value_dim});
  check_fits(coding.values.feedback, "value feedback", {heads, value_dim, value_dim});
}

Store concatenate(const std::vector<Store>& stores, int axis, mx::StreamOrDevice s) {
  const auto join = [&](auto pick) {
    std::vector<mx::array> parts;
    for (const auto& store : stores) parts.push_back(pick(store.evaluated()));
    return mx::concatenate(parts, axis, s);
  };
  return {{join([](const Store& x) { return x.keys.codes; }), join([](const Store& x) { return x.keys.scales; })},
          {join([](const Store& x) { return x.values.codes; }), join([](const Store& x) { return x.values.scales; })}};
}

void check_follows(const CacheCoding& coding, const mx::Shape& keys, const mx::Shape& values, const Store& held) {
  require(keys[0] == held.batch(), "[append] batch must stay ", held.batch(), "; got ", keys[0]);
  require(keys[1] == held.heads(), "[append] KV heads must stay ", held.heads(), "; got ", keys[1]);
  const int dim = held.head_dim(coding), value_dim = held.value_dim(coding);
  require(keys[3] == dim, "[append] head_dim must stay ", dim, "; got ", keys[3]);
  require(values[3] == value_dim, "[append] head_dim of values must stay ", value_dim, "; got ", values[3]);
}

Store encode_store(const CacheCoding& coding, const mx::array& keys, const mx::array& values,
                   const std::optional<Store>& held, mx::StreamOrDevice s) {
  check_sides("encode", keys, values);
  const auto [mapped, key_coding] = mapped_keys(coding, keys, s);
  auto [k, v] = encode_kv(mapped, values, key_coding, coding.values, s);
  if (held) check_follows(coding, keys.shape(), values.shape(), *held);
  return {k, v};
}

mx::array View::attend(const mx::array& q, float scale, bool causal, const std::optional<mx::array>& mask,
                       const std::optional<mx::array>& sinks, mx::StreamOrDevice s) const {
  AttentionOptions o;
  o.scale = scale;
  o.keys = coding.keys;
  o.values = coding.values;
  o.kv_len = length;
  o.dense_rows = true;
  o.causal = causal;
  o.mask = mask;
  o.starts = starts;
  o.sinks = sinks;
  if (latent) o.values = coding.keys;
  if (!sinks) o.keys.centre = std::nullopt;  // the softmax does not see it
  if (o.keys.centre && coding.key_map) {
    o.keys.centre = mx::squeeze(mx::matmul(mx::expand_dims(*o.keys.centre, 1, s), *coding.key_map, s), 1, s);
  }
  const auto stream = mx::to_stream(s);
  const bool waits = store.written && int(store.written->size()) == length + 1 && can_append_in_place({q}, stream);
  if (copies) {
    const Store x = waits && same_write(*copies, store) ? *copies : copies->evaluated();
    o.exact = ExactArrays{x.keys, latent ? x.keys : x.values};
    o.recent = coding.recent;
    o.first = coding.sink;
  }
  o.kernel = last_kernel ? &last_kernel->name : nullptr;
  const auto asked = coding.query_map ? ops::transform(q, *coding.query_map, std::nullopt, stream) : q;
  if (waits) o.written = store.written;
  const Store x = waits ? store : store.evaluated();
  const auto out = attention(asked, x.keys, latent ? x.keys : x.values, o, stream);
  return out.dtype() == q.dtype() ? out : mx::astype(out, q.dtype(), stream);
}

mx::array decoded_keys(const CacheCoding& coding, const PackedArrays& keys, mx::Dtype dtype, mx::StreamOrDevice s) {
  if (!coding.query_map) return ops::decode(keys, coding.keys, dtype, s);
  const auto coded = ops::decode(keys, {coding.keys.width, coding.keys.seed}, mx::float32, s);
  const auto inverse = mx::contiguous(mx::swapaxes(*coding.query_map, 1, 2, s), false, s);
  const auto back = ops::transform(coded, inverse, std::nullopt, s);
  const auto shifted = coding.keys.centre ? mx::add(back, mx::expand_dims(*coding.keys.centre, 1, s), s) : back;
  return mx::astype(shifted, dtype, s);
}

mx::array decoded_values(const CacheCoding& coding, const PackedArrays& values, mx::Dtype dtype, mx::StreamOrDevice s) {
  if (values.codes.shape(-1) == 0) return mx::zeros(values.codes.shape(), dtype, s);
  return ops::decode(values, coding.values, dtype, s);
}

std::pair<mx::array, mx::array> View::decode(mx::Dtype dtype, mx::StreamOrDevice s) const {
  const auto numbers = [&](const Store& held, const CacheCoding& of) {
    return std::pair{decoded_keys(of, held.keys, dtype, s), decoded_values(of, held.values, dtype, s)};
  };
  if (!copies || starts) return numbers(store.tokens(0, length, s), coding);
  // The first tokens, the codes, and the newest in their order.
  const int ring = copies->capacity() - coding.sink;
  const int last = std::max(0, length - std::min(coding.recent, ring)), first = std::min(coding.sink, last);
  std::vector<std::pair<mx::array, mx::array>> parts{numbers(store.tokens(first, last, s), coding)};
  const auto eight = coding_of_copies(coding);
  if (first > 0) parts.insert(parts.begin(), numbers(copies->tokens(ring, ring + first, s), eight));
  for (int t = last; t < length;) {
    const int slot = t % ring, n = std::min(length - t, ring - slot);
    parts.push_back(numbers(copies->tokens(slot, slot + n, s), eight));
    t += n;
  }
  std::vector<mx::array> keys, values;
  for (const auto& [k, v] : parts) keys.push_back(k), values.push_back(v);
  return {mx::concatenate(keys, 2, s), mx::concatenate(values, 2, s)};
}

mx::array View::decode_keys(mx::Dtype dtype, mx::StreamOrDevice s) const {
  return decoded_keys(coding, store.tokens(0, length, s).keys, dtype, s);
}

mx::array View::decode_values(mx::Dtype dtype, mx::StreamOrDevice s) const {
  return decoded_values(coding, store.tokens(0, length, s).values, dtype, s);
}

Store copy_with_room(const std::optional<Store>& held, int length, const Store& like, int needed,
                     mx::StreamOrDevice s) {
  const int kept = held ? length : 0;
  const auto fresh = zeros_like(like, like.batch(), round_up(needed - kept), s);
  return kept > 0 ? concatenate({held->tokens(0, kept, s), fresh}, 2, s) : fresh;
}

Store grow(const std::optional<Store>& held, int length, const Store& like, int needed, mx::StreamOrDevice s) {
  if (held && needed <= held->capacity()) return *held;
  return copy_with_room(held, length, like, needed, s);
}

namespace {

// An append may overwrite nothing that a view or a copy can see.  Views see only tokens before their length, so room
// that nobody was promised is free; below that, only arrays that nobody else holds are.
bool owns_room(const std::optional<Store>& held, int length, int added) {
  if (!held || length + added > held->capacity()) return false;
  return (held->frontier && *held->frontier == length) || held->unshared();
}

}  // namespace

Store append_store(const CacheCoding& coding, const std::optional<Store>& held, int length, const mx::array& keys,
                   const mx::array& values, mx::StreamOrDevice s, Store* copies) {
  const auto stream = mx::to_stream(s);
  check_sides("encode", keys, values);
  if (held) check_follows(coding, keys.shape(), values.shape(), *held);
  const int added = keys.shape(2);
  std::vector<mx::array> arrays{keys, values};
  if (held) arrays.insert(arrays.end(), {held->keys.codes, held->values.codes});
  const bool possible = keys.shape(3) == values.shape(3) && can_append_in_place(arrays, stream);
  arrays.clear();  // or they would count as holders
  if (!possible || keys.size() == 0) {
    const auto rows = encode_store(coding, keys, values, held, stream);
    return grow(held, length, rows, length + added, stream).write(rows, length, stream);
  }
  Store next = owns_room(held, length, added) ? *held
               : held                         ? copy_with_room(held, length, *held, length + added, stream)
                                              : zeros(coding, keys.shape(), values.shape(), round_up(added), stream);
  if (!next.frontier) next.frontier = std::make_shared<int>(length);
  const bool follows = next.written && int(next.written->size()) == length + 1;
  const auto [mapped, key_coding] = mapped_keys(coding, keys, stream);
  AppendBuffers to{next.keys, next.values};
  if (copies) {
    if (!follows || !same_write(*copies, next)) *copies = copies->evaluated();
    to.exact = ExactArrays{copies->keys, copies->values};
    to.first = coding.sink;
  }
  next.written = append_kv(mapped, values, key_coding, coding.values, to,
                           follows ? *next.written : nothing_to_wait_for(length, stream), stream);
  if (copies) copies->written = next.written;
  *next.frontier = length + added;
  return next;
}

}  // namespace turboquant::ops
