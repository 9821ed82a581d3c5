// attend over whatever shapes, strides, masks, copies and numbers: wrong arguments are refused before anything is
// written, right ones stay within their arrays, and of moderate numbers the kernels agree with the oracle.
#include <stdexcept>

#include "fuzz/bytes.h"

namespace turboquant::fuzz {
namespace {

/// Packed vectors [batch, heads, tokens] of any codes, in buffers that may have room behind `tokens`.
struct Random {
  std::unique_ptr<uint32_t[]> codes;
  std::unique_ptr<uint16_t[]> scales;
  Packed view;

  Random(Bytes& in, int batch, int heads, int tokens, int dim, int bits, Code code, bool tame) {
    const int room = tokens + in.number(0, 3), words = words_per_vector(bits, dim);
    // The last row has no room behind it: a step beyond its tokens leaves the array.
    const size_t rows = size_t(batch) * heads == 0 ? 0 : (size_t(batch) * heads - 1) * room + tokens;
    codes.reset(new uint32_t[std::max<size_t>(1, rows * words)]);
    scales.reset(new uint16_t[std::max<size_t>(1, rows)]);
    Noise noise(in.seed());
    for (size_t i = 0; i < rows * words; ++i) codes[i] = noise.word();
    for (size_t i = 0; i < rows; ++i) {
      scales[i] = tame ? float_to_half(0.5f + float(noise.word() & 255) / 255) : uint16_t(noise.word());
    }
    if (!tame && rows > 0 && in.chance(2)) scales[in.word() % rows] = 0x7e00;
    view = {codes.get(),           scales.get(),          bits, int64_t(heads) * room * words,
            int64_t(room) * words, int64_t(heads) * room, room, code};
  }
};

/// A mask whose axes may be broadcast; exactly as long as its last element needs.
std::unique_ptr<char[]> pick_mask(Bytes& in, AttendParams& p, bool tame) {
  const int sizes[4] = {p.batch, p.query_heads, p.query_len, p.kv_len};
  int64_t stride = 1, last = 0;
  for (int a = 3; a >= 0; --a) {
    const bool broadcast = in.chance(3);
    p.mask_strides[a] = broadcast ? 0 : stride;
    if (!broadcast) last += (sizes[a] - 1) * stride, stride *= sizes[a];
  }
  p.mask_kind = in.chance(2) ? MaskKind::boolean : MaskKind::additive;
  p.mask_dtype = Dtype(in.byte() % 3);
  const size_t size = p.mask_kind == MaskKind::boolean ? 1 : size_of(p.mask_dtype);
  const size_t count = p.batch == 0 || p.query_len == 0 || p.kv_len == 0 ? 0 : size_t(last + 1);
  if (p.mask_kind == MaskKind::additive) {
    auto mask = numbers(in, p.mask_dtype, count, tame);
    for (size_t i = 0; i < count; i += 1 + in.byte() % 7) put(mask.get(), p.mask_dtype, i, -INFINITY);
    return mask;
  }
  std::unique_ptr<char[]> mask(new char[std::max<size_t>(1, count * size)]);
  Noise noise(in.seed());
  const uint32_t often = in.byte();
  for (size_t i = 0; i < count; ++i) mask[i] = char((noise.word() & 255) > often);
  return mask;
}

/// The largest distance of a query's output from the oracle's, against what the rounding of scores and weights can do.
void compare(const AttendParams& p, const std::vector<char>& got, const std::vector<char>& want) {
  const double rounding = p.out.dtype == Dtype::bfloat16 ? 0x1p-8 : p.out.dtype == Dtype::float16 ? 0x1p-10 : 1e-5;
  for (int b = 0; b < p.batch; ++b) {
    for (int h = 0; h < p.query_heads; ++h) {
      for (int i = 0; i < p.query_len; ++i) {
        const int64_t at = b * p.out.batch_stride + h * p.out.head_stride + i * p.out.token_stride;
        double error = 0, size = 0;
        for (int d = 0; d < p.value_dim; ++d) {
          const double w = get(want.data(), p.out.dtype, size_t(at + d)),
                       g = get(got.data(), p.out.dtype, size_t(at + d));
          TQ_CHECK(std::isfinite(w) && std::isfinite(g));
          error += (w - g) * (w - g), size += w * w;
        }
        // Values are of length 1 to 2 times sqrt(D), and scores of a spread of 4 at most.
        TQ_CHECK(std::sqrt(error) <= rounding * std::sqrt(size) + 2e-3 * std::sqrt(double(p.value_dim)));
      }
    }
  }
}

void fuzz_attend(Bytes& in) {
  AttendParams p;
  const bool tame = in.chance(2);
  p.batch = in.number(0, 2), p.kv_heads = in.number(1, 2), p.query_heads = p.kv_heads * in.number(1, 5);
  p.kv_len = in.chance(4) ? in.number(0, 700) : in.number(0, 70);
  p.query_len = in.chance(4) ? in.number(0, 70) : in.number(0, 4);
  p.key_dim = p.value_dim = 32 * in.number(1, 8);
  p.seed = in.seed();
  p.causal = in.chance(2);
  p.window = in.chance(3) ? in.any() & 0x7fffffff : 0;
  const float norm = 1 / std::sqrt(float(p.key_dim));
  p.scale = tame ? norm : std::ldexp(in.chance(2) ? 1.0f : -1.0f, in.number(-149, 127));
  int key_bits, value_bits;
  Code key_code, value_code;
  pick_width(in, key_bits, key_code);
  pick_width(in, value_bits, value_code);
  const Random keys(in, p.batch, p.kv_heads, p.kv_len, p.key_dim, key_bits, key_code, tame);
  const Random values(in, p.batch, p.kv_heads, p.kv_len, p.value_dim, value_bits, value_code, tame);
  p.keys = keys.view, p.values = values.view;
  std::unique_ptr<Random> exact_keys, exact_values;
  if (in.chance(2)) {
    ExactTier& e = p.exact;
    e.recent = in.chance(2) ? in.number(0, 160) : 0, e.first = in.number(0, 6);
    e.ring = e.recent ? (e.recent + p.query_len + in.number(0, 64) + 31) / 32 * 32 : 0;
    const bool bytes = in.chance(2);
    exact_keys = std::make_unique<Random>(in, p.batch, p.kv_heads, e.ring + e.first, p.key_dim, bytes ? 8 : key_bits,
                                          bytes ? Code::scalar : key_code, tame);
    exact_values = std::make_unique<Random>(in, p.batch, p.kv_heads, e.ring + e.first, p.value_dim,
                                            bytes ? 8 : value_bits, bytes ? Code::scalar : value_code, tame);
    e.keys = exact_keys->view, e.values = exact_values->view;
  }
  const Dtype dtype = Dtype(in.byte() % 3);
  const int64_t token = p.key_dim + 8 * in.number(0, 2), head = token * p.query_len, batch = head * p.query_heads;
  const size_t count =
      p.batch == 0 || p.query_len == 0
          ? 0
          : size_t((p.batch - 1) * batch + (p.query_heads - 1) * head + (p.query_len - 1) * token + p.key_dim);
  const auto q = numbers(in, dtype, count, tame);
  p.q = {q.get(), dtype, batch, head, token};
  std::unique_ptr<int32_t[]> starts(new int32_t[size_t(p.batch) + 1]);
  if (in.chance(3)) {
    for (int b = 0; b < p.batch; ++b) starts[size_t(b)] = in.any();
    p.starts = starts.get();
  }
  std::unique_ptr<char[]> mask, sinks, key_centre, value_centre;
  if (in.chance(2)) {
    mask = pick_mask(in, p, tame);
    p.mask = mask.get();
  }
  const auto floats = [&](std::unique_ptr<char[]>& held, int n) {
    held = numbers(in, Dtype::float32, size_t(n), tame);
    return reinterpret_cast<const float*>(held.get());
  };
  if (in.chance(3)) p.sinks = floats(sinks, p.query_heads);
  if (in.chance(3)) p.key_centre = floats(key_centre, p.kv_heads * p.key_dim);
  if (in.chance(3)) p.value_centre = floats(value_centre, p.kv_heads * p.value_dim);
  p.out = {nullptr, dtype, batch, head, token};
  std::vector<char> want(count * size_of(dtype), 0x5a), got;
  if (tame) {
    p.out.data = want.data();
    attend(p, Backend::reference);
  }
  for (const auto& isa : isas()) {
    force_isa(isa);
    set_num_threads(1 + in.byte() % 3);
    got.assign(count * size_of(dtype), 0x5a);
    p.out.data = got.data();
    attend(p);
    if (tame) compare(p, got, want);
  }
}

void fuzz_refusals(Bytes& in) {
  AttendParams p;
  p.batch = in.any(), p.query_heads = in.any(), p.kv_heads = in.any(), p.query_len = in.any(), p.kv_len = in.any();
  p.key_dim = p.value_dim = in.any(), p.window = in.any(), p.keys.bits = in.any(), p.values.bits = in.any();
  p.keys.code = Code(in.byte() % 2), p.values.code = Code(in.byte() % 2);
  p.exact.recent = in.any(), p.exact.first = in.any(), p.exact.ring = in.any();
  try {
    attend(p);
    TQ_CHECK(p.batch == 0 || p.query_len == 0);
  } catch (const std::invalid_argument& error) {
    TQ_CHECK(std::strncmp(error.what(), "[attend] ", 9) == 0);
  }
}

}  // namespace
}  // namespace turboquant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  turboquant::fuzz::Bytes in(data, size);
  if (in.byte() % 4 == 0) {
    turboquant::fuzz::fuzz_refusals(in);
  } else {
    turboquant::fuzz::fuzz_attend(in);
  }
  return 0;
}
