// encode, decode and transform over whatever arguments: wrong ones are refused before anything is written, right ones
// stay within their arrays, and the kernels agree with the oracle.
#include <algorithm>
#include <stdexcept>

#include "fuzz/bytes.h"

namespace turboquant::fuzz {
namespace {

struct Shape {
  int batch, heads, tokens, dim;
  size_t vectors() const { return size_t(batch) * heads * tokens; }
};

Shape pick_shape(Bytes& in) { return {in.number(0, 2), in.number(1, 3), in.number(0, 9), 32 * in.number(1, 8)}; }

/// A tensor whose rows have gaps between them, and its length in numbers.
template <class Pointer>
size_t strided(Bytes& in, const Shape& s, Dtype dtype, BasicTensor<Pointer>& x) {
  const int64_t token = s.dim + 8 * in.number(0, 2), head = token * s.tokens, batch = head * s.heads;
  x.dtype = dtype, x.token_stride = token, x.head_stride = head, x.batch_stride = batch;
  return s.vectors() == 0 ? 0 : size_t((s.batch - 1) * batch + (s.heads - 1) * head + (s.tokens - 1) * token + s.dim);
}

struct Coded {
  std::vector<uint32_t> codes;
  std::vector<uint16_t> scales;
  Coded(const Shape& s, int bits)
      : codes(s.vectors() * size_t(words_per_vector(bits, s.dim)), 0xabababab), scales(s.vectors(), 0x5151) {}
  MutablePacked view(const Shape& s, int bits, Code code) {
    const int64_t words = int64_t(s.tokens) * words_per_vector(bits, s.dim);
    return {codes.data(), scales.data(), bits, s.heads * words, words, int64_t(s.heads) * s.tokens, s.tokens, code};
  }
};

Packed as_read(const MutablePacked& p) {
  return {
      p.codes, p.scales, p.bits, p.codes_batch_stride, p.codes_head_stride, p.scales_batch_stride, p.scales_head_stride,
      p.code};
}

/// Whole vectors of one call, decoded by the oracle, dense.
std::vector<float> decoded(const Shape& s, const Packed& in, uint64_t seed, Backend backend) {
  std::vector<float> out(s.vectors() * size_t(s.dim));
  DecodeParams p;
  p.batch = s.batch, p.heads = s.heads, p.tokens = s.tokens, p.head_dim = s.dim, p.seed = seed, p.in = in;
  p.out = {out.data(), Dtype::float32, int64_t(s.heads) * s.tokens * s.dim, int64_t(s.tokens) * s.dim, s.dim};
  decode(p, backend);
  return out;
}

double distance(const float* a, const float* b, int dim) {
  double sum = 0;
  for (int i = 0; i < dim; ++i) sum += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
  return std::sqrt(sum);
}

/// The kernels' codes err no more than the oracle's, within rounding; vectors that are no numbers are told as such.
void check_encode(const EncodeParams& p, const Shape& s, const Packed& got, const Packed& want) {
  const std::vector<float> zero(size_t(s.dim));
  const auto a = decoded(s, got, p.seed, Backend::reference), b = decoded(s, want, p.seed, Backend::reference);
  size_t row = 0;
  std::vector<float> x(size_t(s.dim));
  for (int n = 0; n < s.batch; ++n) {
    for (int h = 0; h < s.heads; ++h) {
      for (int t = 0; t < s.tokens; ++t, ++row) {
        const uint16_t scale = got.scales[row], oracle = want.scales[row];
        const bool bad = (scale & 0x7fff) > 0x7c00;
        TQ_CHECK(bad == ((oracle & 0x7fff) > 0x7c00));
        TQ_CHECK(bad || scale <= 0x7bff);  // never negative, never infinite
        TQ_CHECK(std::abs(int(scale) - int(oracle)) <= 2 || bad || p.feedback || p.out.code == Code::trellis);
        if (bad || scale == 0 || scale == 0x7bff) continue;  // a saturated vector is short
        const int64_t at = n * p.x.batch_stride + h * p.x.head_stride + t * p.x.token_stride;
        for (int i = 0; i < s.dim; ++i) {
          x[size_t(i)] = get(p.x.data, p.x.dtype, size_t(at + i)) - (p.centre ? p.centre[h * s.dim + i] : 0);
        }
        const double size = distance(x.data(), zero.data(), s.dim);
        if (!(size < 1e30) || size < 1e-4 * s.dim) continue;  // stored scales lose bits down there
        const float* mine = &a[row * size_t(s.dim)];
        const double error = distance(mine, x.data(), s.dim),
                     least = distance(&b[row * size_t(s.dim)], x.data(), s.dim);
        TQ_CHECK(p.feedback ? error < 4 * size : error <= 1.02 * least + 2e-3 * size);
      }
    }
  }
}

void fuzz_encode(Bytes& in) {
  const Shape s = pick_shape(in);
  int bits;
  Code code;
  pick_width(in, bits, code);
  EncodeParams p;
  p.batch = s.batch, p.heads = s.heads, p.tokens = s.tokens, p.head_dim = s.dim;
  const bool tame = in.chance(3);
  const size_t count = strided(in, s, Dtype(in.byte() % 3), p.x);
  std::unique_ptr<char[]> centre, feedback;
  if (in.chance(3)) {
    centre = numbers(in, Dtype::float32, size_t(s.heads * s.dim), tame);
    p.centre = reinterpret_cast<const float*>(centre.get());
  }
  if (in.chance(3)) {  // must be finite
    feedback.reset(new char[2 * size_t(s.heads * s.dim * s.dim)]);
    Noise noise(in.seed());
    for (int i = 0; i < s.heads * s.dim * s.dim; ++i) {
      put(feedback.get(), Dtype::float16, size_t(i), 0.05f * noise.normal());
    }
    p.feedback = reinterpret_cast<const uint16_t*>(feedback.get());
  }
  p.seed = in.seed();
  const auto x = numbers(in, p.x.dtype, count, tame);
  p.x.data = x.get();
  Coded want(s, bits);
  p.out = want.view(s, bits, code);
  encode(p, Backend::reference);
  const Packed oracle = as_read(p.out);
  for (const auto& isa : isas()) {
    force_isa(isa);
    set_num_threads(1 + in.byte() % 3);
    Coded got(s, bits);
    p.out = got.view(s, bits, code);
    encode(p);
    check_encode(p, s, as_read(p.out), oracle);
  }
}

void fuzz_decode(Bytes& in) {
  const Shape s = pick_shape(in);
  int bits;
  Code code;
  pick_width(in, bits, code);
  DecodeParams p;
  p.batch = s.batch, p.heads = s.heads, p.tokens = s.tokens, p.head_dim = s.dim, p.seed = in.seed();
  Coded coded(s, bits);
  Noise noise(in.seed());
  for (auto& w : coded.codes) w = noise.word();
  for (auto& h : coded.scales) h = uint16_t(noise.word());
  p.in = as_read(coded.view(s, bits, code));
  std::unique_ptr<char[]> centre;
  if (in.chance(3)) {
    centre = numbers(in, Dtype::float32, size_t(s.heads * s.dim), in.chance(2));
    p.centre = reinterpret_cast<const float*>(centre.get());
  }
  const size_t count = strided(in, s, Dtype(in.byte() % 3), p.out);
  std::vector<char> want(count * size_of(p.out.dtype), 0x5a), got;
  p.out.data = want.data();
  decode(p, Backend::reference);
  const double rounding = p.out.dtype == Dtype::bfloat16 ? 0x1p-7 : p.out.dtype == Dtype::float16 ? 0x1p-10 : 1e-5;
  for (const auto& isa : isas()) {
    force_isa(isa);
    got.assign(want.size(), 0x5a);
    p.out.data = got.data();
    decode(p);
    for (size_t row = 0; row < s.vectors(); ++row) {
      const int64_t at = int64_t(row) / (s.heads * s.tokens) * p.out.batch_stride +
                         int64_t(row) / s.tokens % s.heads * p.out.head_stride +
                         int64_t(row) % s.tokens * p.out.token_stride;
      double largest = 0;
      for (int i = 0; i < s.dim; ++i) {
        const double w = get(want.data(), p.out.dtype, size_t(at + i));
        if (std::isfinite(w)) largest = std::max(largest, std::abs(w));
        if (p.centre) {
          const double c = std::abs(double(p.centre[int64_t(row) / s.tokens % s.heads * s.dim + i]));
          if (std::isfinite(c)) largest = std::max(largest, c);
        }
      }
      for (int i = 0; i < s.dim; ++i) {
        const double w = get(want.data(), p.out.dtype, size_t(at + i)),
                     g = get(got.data(), p.out.dtype, size_t(at + i));
        TQ_CHECK(std::isnan(w) == std::isnan(g));
        if (std::isfinite(w) && largest < 1e38) TQ_CHECK(std::abs(w - g) <= rounding * largest + 1e-6);
      }
    }
  }
}

void fuzz_transform(Bytes& in) {
  const Shape s = pick_shape(in);
  TransformParams p;
  p.batch = s.batch, p.heads = s.heads, p.tokens = s.tokens, p.head_dim = s.dim;
  p.matrices = in.chance(2) ? 1 : s.heads;
  const size_t count = strided(in, s, Dtype(in.byte() % 3), p.x);
  const auto x = numbers(in, p.x.dtype, count, false);
  const auto matrix = numbers(in, Dtype::float32, size_t(p.matrices * s.dim * s.dim), false);
  p.x.data = x.get();
  p.matrix = reinterpret_cast<const float*>(matrix.get());
  std::vector<float> out(s.vectors() * size_t(s.dim));
  p.out = {out.data(), Dtype::float32, int64_t(s.heads) * s.tokens * s.dim, int64_t(s.tokens) * s.dim, s.dim};
  for (const auto& isa : isas()) {
    force_isa(isa);
    transform(p);
  }
}

/// Shapes that are no shapes: refused, or nothing to do; the arrays, which are null, are not touched.
void fuzz_refusals(Bytes& in) {
  EncodeParams e;
  e.batch = in.any(), e.heads = in.any(), e.tokens = in.any(), e.head_dim = in.any();
  e.out.bits = in.any(), e.out.code = Code(in.byte() % 2);
  DecodeParams d;
  d.batch = e.batch, d.heads = e.heads, d.tokens = e.tokens, d.head_dim = e.head_dim;
  d.in.bits = e.out.bits, d.in.code = e.out.code;
  TransformParams t;
  t.batch = e.batch, t.heads = e.heads, t.tokens = e.tokens, t.head_dim = e.head_dim, t.matrices = in.any();
  t.out.dtype = Dtype(in.byte() % 3);
  const auto refused = [](const auto& p, auto call, int64_t size) {
    try {
      call(p, Backend::cpu);
      TQ_CHECK(size == 0);
    } catch (const std::invalid_argument& error) {
      TQ_CHECK(std::strchr(error.what(), '[') == error.what());
    }
  };
  const bool nothing = e.batch == 0 || e.heads == 0 || e.tokens == 0;
  refused(e, encode, !nothing);
  refused(d, decode, !nothing);
  refused(t, transform, !nothing);
}

}  // namespace
}  // namespace turboquant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace turboquant::fuzz;
  Bytes in(data, size);
  switch (in.byte() % 4) {
    case 0:
      fuzz_encode(in);
      break;
    case 1:
      fuzz_decode(in);
      break;
    case 2:
      fuzz_transform(in);
      break;
    default:
      fuzz_refusals(in);
  }
  return 0;
}
