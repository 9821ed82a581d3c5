#include "support/cuda_attend.h"

#include <tuple>

namespace turboquant::jit {
namespace {

size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

std::vector<int64_t> strides_of(int64_t batch, int64_t head, int64_t row) { return {batch, head, row, 1}; }

void* writable(const void* p) { return const_cast<void*>(p); }

cuda::AttentionShape shape_of(const AttendParams& p) {
  return {p.batch,       p.query_heads,       p.kv_heads,  p.query_len,   p.kv_len,       p.key_dim,     p.keys.bits,
          p.values.bits, p.starts != nullptr, p.keys.code, p.values.code, p.exact.recent, p.exact.first, p.value_dim};
}

}  // namespace

AttentionCall attention_call(const AttendParams& p, const cuda::Device& device, bool allocate,
                             const cuda::AttentionPlan* forced) {
  const auto shape = shape_of(p);
  const cuda::AttentionSettings settings{p.scale,
                                         p.seed,
                                         p.causal,
                                         p.window,
                                         p.mask_kind,
                                         p.starts != nullptr,
                                         p.sinks != nullptr,
                                         p.key_centre != nullptr,
                                         p.value_centre != nullptr};
  const Array q(writable(p.q.data), type_name(p.q.dtype), {p.batch, p.query_heads, p.query_len, p.key_dim},
                {p.q.batch_stride, p.q.head_stride, p.q.token_stride, 1});
  const auto codes = [&](const Packed& x, int rows, int dim) {
    const int words = words_per_vector(x.bits, dim);
    return Array(writable(x.codes), "uint32_t", {p.batch, p.kv_heads, rows, words},
                 strides_of(x.codes_batch_stride, x.codes_head_stride, words));
  };
  const auto scales = [&](const Packed& x, int rows) {
    return Array(writable(x.scales), "__half", {p.batch, p.kv_heads, rows},
                 {x.scales_batch_stride, x.scales_head_stride, 1});
  };
  const Array starts = p.starts ? Array(writable(p.starts), "int32_t", {p.batch}) : q;
  const Array mask = p.mask_kind == MaskKind::none
                         ? q
                         : Array(writable(p.mask), p.mask_kind == MaskKind::boolean ? "bool" : type_name(p.mask_dtype),
                                 {p.batch, p.query_heads, p.query_len, p.kv_len},
                                 {p.mask_strides[0], p.mask_strides[1], p.mask_strides[2], p.mask_strides[3]});
  const Array sinks = p.sinks ? Array(writable(p.sinks), "float", {p.query_heads}) : q;
  const auto centre = [&](const float* x, int dim) { return x ? Array(writable(x), "float", {p.kv_heads, dim}) : q; };
  const Array out(p.out.data, type_name(p.q.dtype), {p.batch, p.query_heads, p.query_len, p.value_dim});

  const Array written(nullptr, "uint8_t", {p.kv_len + 1});

  AttentionCall call;
  std::vector<Array> cache{q};
  const auto add_packed = [&](const Packed& keys, const Packed& values, int rows) {
    cache.insert(cache.end(), {codes(keys, rows, p.key_dim), scales(keys, rows), codes(values, rows, p.value_dim),
                               scales(values, rows)});
  };
  add_packed(p.keys, p.values, p.kv_len);
  cache.insert(cache.end(), {written, starts, mask});
  if (shape.copies()) add_packed(p.exact.keys, p.exact.values, p.exact.ring + p.exact.first);
  const std::vector<Array> rows{sinks, centre(p.key_centre, p.key_dim), centre(p.value_centre, p.value_dim)};
  const auto plan = forced ? *forced : cuda::plan_attention(shape, device);
  if (plan.method == cuda::AttentionPlan::whole) {
    call.kernels = {cuda::whole_kernel(shape, settings, plan)};
    call.inputs = {cache};
    call.inputs[0].insert(call.inputs[0].end(), rows.begin(), rows.end());
    call.outputs = {{out}};
    return call;
  }
  call.workspace.emplace_back(allocate ? size_t(plan.slots) * plan.rows * plan.partial_floats(p.value_dim) * 4 : 0);
  const Array partial(call.workspace[0].get(), "float", {plan.slots, plan.rows, plan.partial_floats(p.value_dim)});
  call.kernels = {cuda::partial_kernel(shape, settings, plan), cuda::merge_kernel(shape, settings, plan)};
  call.inputs = {cache, {q, written, partial, starts}};
  call.inputs[1].insert(call.inputs[1].end(), rows.begin(), rows.end());
  call.outputs = {{partial}, {out}};
  return call;
}

void attend_on_gpu(const AttendParams& host, Planner planner) {
  AttendParams p = host;
  std::vector<Memory> memory;
  const auto upload = [&](auto& pointer, size_t bytes) {
    if (!pointer) return;
    memory.emplace_back(pointer, bytes);
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(memory.back().get());
  };
  const size_t q_bytes = size_t(p.batch) * p.q.batch_stride * size_of(p.q.dtype);
  upload(p.q.data, q_bytes);
  const int slots = p.exact.ring + p.exact.first;
  for (auto [x, tokens, dim] : {std::tuple{&p.keys, p.kv_len, p.key_dim},
                                {&p.values, p.kv_len, p.value_dim},
                                {&p.exact.keys, slots, p.key_dim},
                                {&p.exact.values, slots, p.value_dim}}) {
    if (tokens == 0) continue;
    // Not a byte beyond the last row, so that a read there is one out of bounds.
    const int words = words_per_vector(x->bits, dim);
    const int64_t heads = p.kv_heads - 1, rows = p.batch - 1;
    upload(x->codes, 4 * (rows * x->codes_batch_stride + heads * x->codes_head_stride + int64_t(tokens) * words));
    upload(x->scales, 2 * (rows * x->scales_batch_stride + heads * x->scales_head_stride + tokens));
  }
  upload(p.key_centre, size_t(p.kv_heads) * p.key_dim * 4);
  upload(p.value_centre, size_t(p.kv_heads) * p.value_dim * 4);
  upload(p.starts, size_t(p.batch) * 4);
  upload(p.sinks, size_t(p.query_heads) * 4);
  if (p.mask_kind != MaskKind::none) {
    const int64_t sizes[4] = {p.batch, p.query_heads, p.query_len, p.kv_len};
    int64_t last = 0;
    for (int i = 0; i < 4; ++i) last += (sizes[i] - 1) * p.mask_strides[i];
    upload(p.mask, (last + 1) * (p.mask_kind == MaskKind::boolean ? 1 : size_of(p.mask_dtype)));
  }
  const Memory out(size_t(p.batch) * p.query_heads * p.query_len * p.value_dim * size_of(p.q.dtype));
  p.out.data = out.get();
  const cuda::AttentionPlan plan = planner(shape_of(p), current_device());
  const AttentionCall call = attention_call(p, current_device(), true, &plan);
  for (size_t i = 0; i < call.kernels.size(); ++i) Launch(call.kernels[i], call.inputs[i], call.outputs[i])();
  check(cudaDeviceSynchronize(), "attend");
  out.download(host.out.data);
}

void encode_on_gpu(const EncodeParams& keys, const EncodeParams* values) {
  std::vector<const EncodeParams*> sides{&keys};
  if (values) sides.push_back(values);
  std::vector<Memory> memory;
  std::vector<Array> inputs, outputs;
  std::vector<cuda::EncodeSide> what;
  const int64_t vectors = int64_t(keys.batch) * keys.heads * keys.tokens;
  memory.reserve(10);
  for (const EncodeParams* p : sides) {
    const int words = words_per_vector(p->out.bits, p->head_dim);
    memory.emplace_back(p->x.data, p->batch * p->x.batch_stride * size_of(p->x.dtype));
    inputs.emplace_back(memory.back().get(), type_name(p->x.dtype),
                        std::vector<int32_t>{p->batch, p->heads, p->tokens, p->head_dim},
                        std::vector<int64_t>{p->x.batch_stride, p->x.head_stride, p->x.token_stride, 1});
    if (p->centre) {
      memory.emplace_back(p->centre, size_t(p->heads) * p->head_dim * 4);
      inputs.emplace_back(memory.back().get(), "float", std::vector<int32_t>{p->heads, p->head_dim});
    } else {
      inputs.push_back(inputs.back());
    }
    if (p->feedback) {
      memory.emplace_back(p->feedback, size_t(p->heads) * p->head_dim * p->head_dim * 2);
      inputs.emplace_back(memory.back().get(), "__half", std::vector<int32_t>{p->heads, p->head_dim, p->head_dim});
    } else {
      inputs.push_back(inputs.back());
    }
    memory.emplace_back(vectors * words * 4);
    outputs.emplace_back(memory.back().get(), "uint32_t", std::vector<int32_t>{p->batch, p->heads, p->tokens, words});
    memory.emplace_back(vectors * 2);
    outputs.emplace_back(memory.back().get(), "__half", std::vector<int32_t>{p->batch, p->heads, p->tokens});
    what.push_back({p->out.bits, p->centre != nullptr, p->feedback != nullptr, p->out.code});
  }
  Launch(cuda::encode_kernel(what, keys.head_dim, keys.seed, keys.batch * keys.heads, keys.tokens), inputs, outputs)();
  check(cudaDeviceSynchronize(), "encode");
  size_t at = 0;
  for (const EncodeParams* p : sides) {
    at += 1 + (p->centre != nullptr) + (p->feedback != nullptr);
    memory[at++].download(p->out.codes);
    memory[at++].download(p->out.scales);
  }
}

void decode_on_gpu(const DecodeParams& p) {
  const int64_t vectors = int64_t(p.batch) * p.heads * p.tokens;
  const int words = words_per_vector(p.in.bits, p.head_dim);
  const Memory codes(p.in.codes, vectors * words * 4), scales(p.in.scales, vectors * 2);
  const Memory centre(p.centre ? p.centre : reinterpret_cast<const float*>(p.in.codes),
                      p.centre ? size_t(p.heads) * p.head_dim * 4 : 4);
  const Memory out(vectors * p.head_dim * size_of(p.out.dtype));
  const std::vector<Array> inputs{{codes.get(), "uint32_t", {p.batch, p.heads, p.tokens, words}},
                                  {scales.get(), "__half", {p.batch, p.heads, p.tokens}},
                                  {centre.get(), "float", {p.heads, p.head_dim}}};
  Launch(cuda::decode_kernel({p.in.bits, p.centre != nullptr, false, p.in.code}, p.head_dim, p.seed, vectors), inputs,
         {{out.get(), type_name(p.out.dtype), {p.batch, p.heads, p.tokens, p.head_dim}}})();
  check(cudaDeviceSynchronize(), "decode");
  out.download(p.out.data);
}

}  // namespace turboquant::jit
