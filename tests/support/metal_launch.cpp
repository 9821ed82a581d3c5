#include "support/metal_launch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

#include "emulator/counts.h"
#include "metal/launch.h"

namespace emulator {

namespace metal = turboquant::metal;
using turboquant::Dtype;
using turboquant::MaskKind;
using turboquant::words_per_vector;

std::vector<Recorded>* recorder = nullptr;

#if defined(__SANITIZE_ADDRESS__)
Guarded::Guarded(size_t bytes) : size_(bytes) {
  if (recorder) return;
  memory_ = std::shared_ptr<char[]>(new char[bytes]);
  data_ = memory_.get();
  std::memset(data_, 0xff, bytes);
}
#else
Guarded::Guarded(size_t bytes) : size_(bytes) {
  if (recorder) return;
  const size_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
  char* base =
      static_cast<char*>(mmap(nullptr, whole + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base == MAP_FAILED) throw std::bad_alloc();
  mprotect(base, page, PROT_NONE);
  mprotect(base + page + whole, page, PROT_NONE);
  memory_ = std::shared_ptr<void>(base, [=](void* p) { munmap(p, whole + 2 * page); });
  data_ = base + page + whole - bytes;
  std::memset(base + page, 0xff, whole);
}
#endif

size_t size_of(const std::string& type) {
  return type == "bool" ? 1 : type == "float16_t" || type == "bfloat16_t" ? 2 : type == "int64_t" ? 8 : 4;
}

Array dense(const std::string& type, std::vector<int> shape, const void* from) {
  size_t count = 1;
  std::vector<int64_t> strides(shape.size());
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = int64_t(count);
    count *= shape[i];
  }
  const size_t bytes = count * size_of(type);
  return {type, std::move(shape), std::move(strides), from ? Guarded(from, bytes) : Guarded(bytes)};
}

namespace {

/// A view with strides; binds up to its last element.
Array view(const std::string& type, std::vector<int> shape, std::vector<int64_t> strides, const void* from) {
  int64_t last = 0;
  bool empty = false;
  for (size_t i = 0; i < shape.size(); ++i) {
    empty = empty || shape[i] == 0;
    last += (shape[i] - 1) * strides[i];
  }
  const size_t bytes = empty ? 0 : (last + 1) * size_of(type);
  return {type, std::move(shape), std::move(strides), Guarded(from, bytes)};
}

template <class P>
std::pair<Array, Array> packed(const P& p, int batch, int heads, int tokens, int dim) {
  const int words = words_per_vector(p.bits, dim);
  return {
      view("uint32_t", {batch, heads, tokens, words}, {p.codes_batch_stride, p.codes_head_stride, words, 1}, p.codes),
      view("float16_t", {batch, heads, tokens}, {p.scales_batch_stride, p.scales_head_stride, 1}, p.scales)};
}

template <class Pointer>
Array tensor(const turboquant::BasicTensor<Pointer>& t, int batch, int heads, int tokens, int dim) {
  return view(type_name(t.dtype), {batch, heads, tokens, dim}, {t.batch_stride, t.head_stride, t.token_stride, 1},
              t.data);
}

/// Copies a dense result [batch, heads, tokens, row] into rows of a strided place.
void copy_rows(const Array& from, char* to, int64_t batch_stride, int64_t head_stride, int64_t token_stride) {
  const size_t row = from.shape.size() > 3 ? size_t(from.shape[3]) * size_of(from.type) : size_of(from.type);
  const char* at = static_cast<const char*>(from.memory.data());
  if (recorder) return;
  for (int b = 0; b < from.shape[0]; ++b) {
    for (int h = 0; h < from.shape[1]; ++h) {
      for (int t = 0; t < from.shape[2]; ++t, at += row) {
        std::memcpy(to + (b * batch_stride + h * head_stride + t * token_stride) * int64_t(size_of(from.type)), at,
                    row);
      }
    }
  }
}

const char* name_of(metal::Type type) {
  return type == metal::Type::float16    ? "float16_t"
         : type == metal::Type::bfloat16 ? "bfloat16_t"
         : type == metal::Type::uint32   ? "uint32_t"
                                         : "float";
}

/// As launch.h wants it.
struct Launcher {
  using Array = emulator::Array;

  int dim(const Array& a, int axis) const { return a.shape[size_t(axis)]; }
  Array params(const metal::Params& p) const { return dense("int32_t", {int(p.size())}, p.data()); }

  std::vector<Array> run(const metal::Kernel& kernel, const std::vector<Array>& inputs) const {
    std::vector<Array> outputs;
    for (const auto& out : kernel.outputs) outputs.push_back(dense(name_of(out.type), out.shape, nullptr));
    launch(kernel, inputs, outputs);
    return outputs;
  }
};

std::optional<Array> dense_if(const char* type, std::vector<int> shape, const void* from) {
  if (!from) return std::nullopt;
  return dense(type, std::move(shape), from);
}

}  // namespace

void launch(const metal::Kernel& kernel, const std::vector<Array>& inputs, const std::vector<Array>& outputs) {
  std::vector<InputInfo> infos;
  std::vector<std::string> types;
  // One compilation serves inputs of all sizes: `constant` and `device` are the same here.
  for (const auto& a : inputs) infos.push_back({a.type, int(a.shape.size()), 8});
  for (const auto& a : outputs) types.push_back(a.type);
  if (inputs.size() != kernel.inputs.size() || outputs.size() != kernel.outputs.size()) {
    throw std::runtime_error("[emulator] wrong number of arrays for " + kernel.name);
  }
  if (recorder) {
    recorder->push_back({kernel, infos, types});
    return;
  }
  for (const auto& a : inputs) watch(a.memory.data(), a.memory.size());
  for (const auto& a : outputs) watch(a.memory.data(), a.memory.size());
  std::vector<void*> buffers;
  for (const auto& b : buffers_of(kernel, infos, types)) {
    const auto& a = b.kind == BufferInfo::output ? outputs[b.array] : inputs[b.array];
    buffers.push_back(b.kind == BufferInfo::shape     ? const_cast<int*>(a.shape.data())
                      : b.kind == BufferInfo::strides ? static_cast<void*>(const_cast<int64_t*>(a.strides.data()))
                                                      : a.memory.data());
  }
  run_grid(find(full_name(kernel, infos, types).c_str()), buffers.data(), kernel.grid.data(),
           kernel.threadgroup.data());
}

void encode(const std::vector<turboquant::EncodeParams>& sides) {
  const auto& p = sides[0];
  std::vector<Array> arrays;
  std::vector<std::optional<Array>> centres, feedback;
  std::vector<metal::Coding> codings;
  for (const auto& s : sides) {
    arrays.push_back(tensor(s.x, p.batch, p.heads, p.tokens, p.head_dim));
    centres.push_back(dense_if("float", {p.heads, p.head_dim}, s.centre));
    feedback.push_back(dense_if("float16_t", {p.heads, p.head_dim, p.head_dim}, s.feedback));
    codings.emplace_back(s.out.bits, s.out.code);
  }
  Launcher launcher;
  const auto outputs = metal::launch_encode(launcher, arrays, codings, centres, feedback, p.seed);
  for (size_t i = 0; i < sides.size(); ++i) {
    const auto& out = sides[i].out;
    copy_rows(outputs[2 * i], reinterpret_cast<char*>(out.codes), out.codes_batch_stride, out.codes_head_stride,
              words_per_vector(out.bits, p.head_dim));
    copy_rows(outputs[2 * i + 1], reinterpret_cast<char*>(out.scales), out.scales_batch_stride, out.scales_head_stride,
              1);
  }
}

void decode(const turboquant::DecodeParams& p) {
  const auto [codes, scales] = packed(p.in, p.batch, p.heads, p.tokens, p.head_dim);
  Launcher launcher;
  const Array out = metal::launch_decode(launcher, codes, scales, dense_if("float", {p.heads, p.head_dim}, p.centre),
                                         {p.in.bits, p.in.code}, p.seed, p.out.dtype);
  copy_rows(out, static_cast<char*>(p.out.data), p.out.batch_stride, p.out.head_stride, p.out.token_stride);
}

void attend(const turboquant::AttendParams& p, int splits) {
  metal::AttentionShape shape{};
  shape.kv_len = p.kv_len;
  shape.keys = {p.keys.bits, p.keys.code};
  shape.values = {p.values.bits, p.values.code};
  shape.dtype = p.q.dtype;
  shape.scale = p.scale;
  shape.seed = p.seed;
  shape.causal = p.causal;
  shape.window = p.window;
  shape.mask = p.mask_kind;
  shape.splits = splits;
  const auto [key_codes, key_scales] = packed(p.keys, p.batch, p.kv_heads, p.kv_len, p.key_dim);
  const auto [value_codes, value_scales] = packed(p.values, p.batch, p.kv_heads, p.kv_len, p.value_dim);
  std::optional<Array> mask;
  if (p.mask_kind != MaskKind::none) {
    mask = view(p.mask_kind == MaskKind::boolean ? "bool" : type_name(p.mask_dtype),
                {p.batch, p.query_heads, p.query_len, p.kv_len}, {p.mask_strides, p.mask_strides + 4}, p.mask);
  }
  metal::AttentionArrays<Array> arrays{tensor(p.q, p.batch, p.query_heads, p.query_len, p.key_dim),
                                       key_codes,
                                       key_scales,
                                       value_codes,
                                       value_scales,
                                       dense_if("int32_t", {p.batch}, p.starts),
                                       mask,
                                       dense_if("float", {p.query_heads}, p.sinks),
                                       dense_if("float", {p.kv_heads, p.key_dim}, p.key_centre),
                                       dense_if("float", {p.kv_heads, p.value_dim}, p.value_centre)};
  if (p.exact.recent || p.exact.first) {
    shape.exact = {p.exact.keys.bits, p.exact.keys.code};
    shape.recent = p.exact.recent;
    shape.first = p.exact.first;
    const int slots = p.exact.ring + p.exact.first;
    const auto [exact_keys, exact_key_scales] = packed(p.exact.keys, p.batch, p.kv_heads, slots, p.key_dim);
    const auto [exact_values, exact_value_scales] = packed(p.exact.values, p.batch, p.kv_heads, slots, p.value_dim);
    arrays.exact_key_codes = exact_keys, arrays.exact_key_scales = exact_key_scales;
    arrays.exact_value_codes = exact_values, arrays.exact_value_scales = exact_value_scales;
  }
  Launcher launcher;
  const Array out = metal::launch_attention(launcher, shape, arrays);
  copy_rows(out, static_cast<char*>(p.out.data), p.out.batch_stride, p.out.head_stride, p.out.token_stride);
}

}  // namespace emulator
