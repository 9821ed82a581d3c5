// Evaluates the operations on the CPU: describes MLX arrays to the core, and queues the core's call on the stream.
#include "mlx_ops/primitives.h"

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>

#include <cstring>
#include <stdexcept>

#include "mlx_ops/checks.h"
#include "turboquant/turboquant.h"

namespace turboquant::ops {
namespace {

Dtype core_dtype(mx::Dtype dtype) {
  return dtype == mx::float16 ? Dtype::float16 : dtype == mx::bfloat16 ? Dtype::bfloat16 : Dtype::float32;
}

void allocate(mx::array& out) { out.set_data(mx::allocator::malloc(out.nbytes())); }

/// Copies any strided array of rank <= 4 to dense memory.
void copy_dense(const char* from, char* to, size_t item, const mx::Shape& shape, const mx::Strides& strides) {
  const int rank = int(shape.size());
  std::vector<int> index(rank);
  size_t count = 1;
  for (int n : shape) count *= size_t(n);
  for (size_t i = 0; i < count; ++i, to += item) {
    int64_t offset = 0;
    for (int a = 0; a < rank; ++a) offset += index[a] * strides[a];
    std::memcpy(to, from + offset * int64_t(item), item);
    for (int a = rank - 1; a >= 0 && ++index[a] == shape[a]; --a) index[a] = 0;
  }
}

/// The array itself when its last `dense_axes` axes are dense, else a dense temporary filled by a task of the stream.
mx::array dense(const mx::array& x, int dense_axes, mx::cpu::CommandEncoder& encoder) {
  int64_t expected = 1;
  bool ok = true;
  for (int a = int(x.ndim()) - 1; a >= int(x.ndim()) - dense_axes; --a) {
    ok = ok && (x.shape(a) == 1 || x.strides(a) == expected);
    expected *= x.shape(a);
  }
  if (ok || x.size() == 0) return x;
  mx::array copy(x.shape(), x.dtype(), nullptr, {});
  allocate(copy);
  encoder.add_temporary(copy);
  encoder.dispatch([from = x.data<char>(), to = copy.data<char>(), item = x.itemsize(), shape = x.shape(),
                    strides = x.strides()] { copy_dense(from, to, item, shape, strides); });
  return copy;
}

template <class Pointer>
BasicTensor<Pointer> tensor(const mx::array& x, Pointer data) {
  return {data, core_dtype(x.dtype()), x.strides(0), x.strides(1), x.strides(2)};
}

Tensor tensor(const mx::array& x) { return tensor<const void*>(x, x.data<void>()); }

Packed packed(const mx::array& codes, const mx::array& scales, Width width) {
  return {codes.data<uint32_t>(),
          reinterpret_cast<const uint16_t*>(scales.data<mx::float16_t>()),
          width.bits,
          codes.strides(0),
          codes.strides(1),
          scales.strides(0),
          scales.strides(1),
          width.code};
}

}  // namespace

void CorePrimitive::refuse(const char* what) const {
  throw std::invalid_argument(std::string("[") + name() + "] " + what + " is not supported: codes are not numbers to " +
                              "differentiate or map over; apply it outside the attention cache");
}

void CorePrimitive::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error(std::string("[") + name() + "] this is the CPU's primitive; it cannot run on a GPU stream");
}

std::vector<mx::array> CorePrimitive::jvp(const std::vector<mx::array>&, const std::vector<mx::array>&,
                                          const std::vector<int>&) {
  refuse("jvp");
}

std::vector<mx::array> CorePrimitive::vjp(const std::vector<mx::array>&, const std::vector<mx::array>&,
                                          const std::vector<int>&, const std::vector<mx::array>&) {
  refuse("vjp");
}

std::pair<std::vector<mx::array>, std::vector<int>> CorePrimitive::vmap(const std::vector<mx::array>&,
                                                                        const std::vector<int>&) {
  refuse("vmap");
}

void Encode::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto& encoder = mx::cpu::get_command_encoder(stream());
  const auto x = dense(inputs[0], 1, encoder);
  for (auto& out : outputs) allocate(out);
  EncodeParams p;
  p.batch = x.shape(0), p.heads = x.shape(1), p.tokens = x.shape(2), p.head_dim = x.shape(3);
  p.seed = seed_;
  p.x = tensor(x);
  if (centred_) p.centre = inputs[1].data<float>();
  if (const auto& last = inputs.back(); last.ndim() == 3) {
    p.feedback = reinterpret_cast<const uint16_t*>(last.data<mx::float16_t>());
  }
  const int64_t head = int64_t(p.tokens) * words_per_vector(width_.bits, p.head_dim);
  p.out = {outputs[0].data<uint32_t>(),
           reinterpret_cast<uint16_t*>(outputs[1].data<mx::float16_t>()),
           width_.bits,
           p.heads * head,
           head,
           int64_t(p.heads) * p.tokens,
           p.tokens,
           width_.code};
  encoder.dispatch([p] { turboquant::encode(p); });
}

bool Encode::is_equivalent(const mx::Primitive& other) const {
  const auto* o = dynamic_cast<const Encode*>(&other);
  return o && o->width_ == width_ && o->seed_ == seed_ && o->centred_ == centred_;
}

std::vector<mx::Shape> Encode::output_shapes(const std::vector<mx::array>& inputs) {
  auto codes = inputs[0].shape(), scales = inputs[0].shape();
  codes.back() = words_per_vector(width_.bits, codes.back());
  scales.pop_back();
  return {codes, scales};
}

void Decode::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto& encoder = mx::cpu::get_command_encoder(stream());
  const auto codes = dense(inputs[0], 2, encoder), scales = dense(inputs[1], 1, encoder);
  auto& out = outputs[0];
  allocate(out);
  DecodeParams p;
  p.batch = out.shape(0), p.heads = out.shape(1), p.tokens = out.shape(2), p.head_dim = out.shape(3);
  p.seed = seed_;
  p.in = packed(codes, scales, width_);
  if (inputs.size() > 2) p.centre = inputs[2].data<float>();
  p.out = tensor<void*>(out, out.data<void>());
  encoder.dispatch([p] { turboquant::decode(p); });
}

bool Decode::is_equivalent(const mx::Primitive& other) const {
  const auto* o = dynamic_cast<const Decode*>(&other);
  return o && o->width_ == width_ && o->seed_ == seed_;
}

std::vector<mx::Shape> Decode::output_shapes(const std::vector<mx::array>& inputs) {
  auto shape = inputs[0].shape();
  shape.back() = shape.back() / width_.bits * 32;
  return {shape};
}

void Transform::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto& encoder = mx::cpu::get_command_encoder(stream());
  const auto x = dense(inputs[0], 1, encoder);
  auto& out = outputs[0];
  allocate(out);
  TransformParams p;
  p.batch = x.shape(0), p.heads = x.shape(1), p.tokens = x.shape(2), p.head_dim = x.shape(3);
  p.matrices = inputs[1].shape(0);
  p.x = tensor(x);
  p.matrix = inputs[1].data<float>();
  if (inputs.size() > 2) p.centre = inputs[2].data<float>();
  p.out = tensor<void*>(out, out.data<void>());
  encoder.dispatch([p] { turboquant::transform(p); });
}

bool Transform::is_equivalent(const mx::Primitive& other) const { return dynamic_cast<const Transform*>(&other); }

std::vector<mx::Shape> Transform::output_shapes(const std::vector<mx::array>& inputs) { return {inputs[0].shape()}; }

void Attention::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto& encoder = mx::cpu::get_command_encoder(stream());
  const auto q = dense(inputs[0], 1, encoder);
  const auto key_codes = dense(inputs[1], 2, encoder), key_scales = dense(inputs[2], 1, encoder);
  const auto value_codes = dense(inputs[3], 2, encoder), value_scales = dense(inputs[4], 1, encoder);
  auto& out = outputs[0];
  allocate(out);
  AttendParams p;
  p.batch = q.shape(0), p.query_heads = q.shape(1), p.query_len = q.shape(2), p.key_dim = q.shape(3);
  p.value_dim = out.shape(3);
  p.kv_heads = key_codes.shape(1), p.kv_len = settings_.kv_len < 0 ? key_codes.shape(2) : settings_.kv_len;
  p.scale = settings_.scale;
  p.seed = settings_.seed;
  p.q = tensor(q);
  p.keys = packed(key_codes, key_scales, settings_.keys);
  p.values = packed(value_codes, value_scales, settings_.values);
  p.causal = settings_.causal;
  p.window = settings_.window;
  size_t next = 5;
  if (settings_.mask) {
    const auto& mask = inputs[next++];
    p.mask_kind = mask.dtype() == mx::bool_ ? MaskKind::boolean : MaskKind::additive;
    p.mask_dtype = core_dtype(mask.dtype());
    p.mask = mask.data<void>();
    for (int a = 0; a < 4; ++a) p.mask_strides[a] = mask.strides(a);
  }
  if (settings_.starts) p.starts = inputs[next++].data<int32_t>();
  if (settings_.sinks) p.sinks = inputs[next++].data<float>();
  if (settings_.key_centre) p.key_centre = inputs[next++].data<float>();
  if (settings_.value_centre) p.value_centre = inputs[next++].data<float>();
  if (settings_.exact) {
    const auto k = dense(inputs[next], 2, encoder), k_scales = dense(inputs[next + 1], 1, encoder);
    const auto v = dense(inputs[next + 2], 2, encoder), v_scales = dense(inputs[next + 3], 1, encoder);
    p.exact = {packed(k, k_scales, Width(8)), packed(v, v_scales, Width(8)), k.shape(2) - settings_.first,
               settings_.recent, settings_.first};
  }
  p.out = tensor<void*>(out, out.data<void>());
  encoder.dispatch([p] { turboquant::attend(p); });
}

std::vector<mx::Shape> Attention::output_shapes(const std::vector<mx::array>& inputs) {
  const auto &q = inputs[0], &keys = inputs[1], &values = inputs[3];
  const int batch = q.shape(0), dim = q.shape(3), held = keys.shape(2);
  const int kv_len = settings_.kv_len < 0 ? held : settings_.kv_len;
  const mx::Shape scales{batch, keys.shape(1), held};
  require(keys.shape(0) == batch && values.shape(0) == batch && values.shape(1) == keys.shape(1) &&
              values.shape(2) == held && inputs[2].shape() == scales && inputs[4].shape() == scales &&
              keys.shape(3) == words_per_vector(settings_.keys.bits, dim) &&
              values.shape(3) % settings_.values.bits == 0 && q.shape(1) % keys.shape(1) == 0,
          "[attention] q, keys and values must fit together; got q ", q.shape(), ", keys ", keys.shape(),
          " and values ", values.shape());
  require(kv_len <= held, "[attention] kv_len must be at most the ", held, " tokens held; got ", kv_len);
  size_t next = 5;
  if (settings_.mask) {
    const mx::Shape full{batch, q.shape(1), q.shape(2), kv_len};
    require(inputs[next].shape() == full, "[attention] mask must have shape ", full, "; got ", inputs[next].shape());
    ++next;
  }
  if (settings_.starts) {
    require(inputs[next].shape() == mx::Shape{batch}, "[attention] starts must have shape (", batch, "); got ",
            inputs[next].shape());
  }
  auto out = q.shape();
  out.back() = values.shape(3) / settings_.values.bits * 32;
  return {out};
}

bool Attention::is_equivalent(const mx::Primitive& other) const {
  const auto* o = dynamic_cast<const Attention*>(&other);
  return o && o->settings_ == settings_;
}

}  // namespace turboquant::ops
