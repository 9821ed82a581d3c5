// One case of attention for tests and benchmarks: its deterministic data, and the comparison with the oracle.  A
// backend joins by giving a function that takes AttendParams (host pointers) and fills params.out.  table.h has the
// cases.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "turboquant/half.h"
#include "turboquant/turboquant.h"

namespace turboquant::cases {

/// One row of the table.  Zero or false leaves a feature out.
struct Case {
  int key_bits = 3, value_bits = 3, head_dim = 256;
  int batch = 1, query_heads = 4, kv_heads = 1, query_len = 1, kv_len = 100;
  bool causal = false, ragged = false, sinks = false, centred = false;
  int window = 0;
  MaskKind mask = MaskKind::none;
  Dtype dtype = Dtype::float32;  // of q and out, and of an additive mask
  uint64_t seed = 1;
  Code key_code = Code::scalar, value_code = Code::scalar;
  int recent = 0, first = 0, ring = 0;  // exact copies (ExactTier), of exact_bits
  int exact_bits = 8;
  int value_dim = -1;      // -1: as the keys' head_dim
  bool latent = false;     // values are the keys' own codes
  bool head_mask = false;  // the mask has numbers of its own for each query head
  bool saturated = false;  // every key's scale and every second value's is the largest; queries are small accordingly

  int value_width() const { return value_dim < 0 ? head_dim : value_dim; }

  std::string name() const {
    std::ostringstream s;
    const auto mark = [](Code code) { return code == Code::trellis ? "t" : ""; };
    s << "K" << key_bits << mark(key_code) << "V" << value_bits << mark(value_code) << "_D" << head_dim;
    if (value_dim >= 0) s << "v" << value_dim;
    s << "_B" << batch << "_H" << query_heads << "x" << kv_heads << "_L" << query_len << "_N" << kv_len;
    if (causal) s << "_causal";
    if (window) s << "_window" << window;
    if (ragged) s << "_ragged";
    if (sinks) s << "_sinks";
    if (centred) s << "_centred";
    if (mask == MaskKind::boolean) s << "_boolean";
    if (mask == MaskKind::additive) s << "_additive";
    if (recent) s << "_recent" << recent << "of" << ring;
    if (first) s << "_first" << first;
    if (latent) s << "_latent";
    if (head_mask) s << "_headmask";
    if (saturated) s << "_saturated";
    if (dtype != Dtype::float32) s << (dtype == Dtype::float16 ? "_f16" : "_bf16");
    return s.str();
  }
};

/// Bytes per number.
inline size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

/// Numbers stored in a dtype.
struct Buffer {
  Dtype dtype = Dtype::float32;
  std::vector<uint8_t> bytes;
  explicit Buffer(Dtype dtype = Dtype::float32, size_t count = 0) : dtype(dtype), bytes(count * size_of(dtype)) {}
  size_t size() const { return bytes.size() / size_of(dtype); }
  float get(size_t i) const {
    if (dtype == Dtype::float32) return reinterpret_cast<const float*>(bytes.data())[i];
    const uint16_t v = reinterpret_cast<const uint16_t*>(bytes.data())[i];
    return dtype == Dtype::float16 ? half_to_float(v) : bfloat_to_float(v);
  }
  void set(size_t i, float v) {
    if (dtype == Dtype::float32) {
      reinterpret_cast<float*>(bytes.data())[i] = v;
    } else {
      reinterpret_cast<uint16_t*>(bytes.data())[i] = dtype == Dtype::float16 ? float_to_half(v) : float_to_bfloat(v);
    }
  }
};

/// Owns packed vectors.  Rows `capacity` apart, as in a cache that has grown beyond its tokens.
struct PackedBuffer {
  std::vector<uint32_t> codes;
  std::vector<uint16_t> scales;
  MutablePacked view;
  PackedBuffer(int batch, int heads, int capacity, int head_dim, int bits, Code code = Code::scalar)
      : codes(size_t(batch) * heads * capacity * words_per_vector(bits, head_dim), 0xdeadbeef),
        scales(size_t(batch) * heads * capacity, 0x7e00) {
    const int64_t row = int64_t(capacity) * words_per_vector(bits, head_dim);
    view = {codes.data(), scales.data(), bits, heads * row, row, int64_t(heads) * capacity, capacity, code};
  }
  Packed packed() const {
    return {codes.data(),
            scales.data(),
            view.bits,
            view.codes_batch_stride,
            view.codes_head_stride,
            view.scales_batch_stride,
            view.scales_head_stride,
            view.code};
  }
};

/// A contiguous [batch, heads, tokens, dim] view.
template <class Pointer>
BasicTensor<Pointer> contiguous(Pointer data, Dtype dtype, int heads, int tokens, int dim) {
  return {data, dtype, int64_t(heads) * tokens * dim, int64_t(tokens) * dim, dim};
}

/// Everything an attention call needs.  Keys share a direction with the queries, so that softmax is neither flat nor a
/// single token, and values have a mean, so that the output does not vanish for long contexts.
struct Inputs {
  Case c;
  Buffer q, mask, out;
  PackedBuffer keys, values, exact_keys, exact_values;
  std::vector<float> key_centre, value_centre, sinks;
  std::vector<int32_t> starts;

  explicit Inputs(const Case& c)
      : c(c),
        q(c.dtype, size_t(c.batch) * c.query_heads * c.query_len * c.head_dim),
        mask(c.dtype, c.mask == MaskKind::additive ? mask_size() : 0),
        out(c.dtype, size_t(c.batch) * c.query_heads * c.query_len * c.value_width()),
        keys(c.batch, c.kv_heads, c.kv_len + 7, c.head_dim, c.key_bits, c.key_code),
        values(c.batch, c.kv_heads, c.kv_len + 7, c.value_width(), c.value_bits, c.value_code),
        exact_keys(c.batch, c.kv_heads, c.ring + c.first, c.head_dim, c.exact_bits),
        exact_values(c.batch, c.kv_heads, c.ring + c.first, c.value_width(), c.exact_bits) {
    std::mt19937_64 rng(c.seed);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < q.size(); ++i) q.set(i, normal(rng));
    const size_t rows = size_t(c.batch) * c.kv_heads * c.kv_len;
    std::vector<float> k(rows * c.head_dim), v(rows * c.value_width());
    for (auto& x : k) x = normal(rng);
    for (size_t i = 0; i < v.size(); ++i) v[i] = 0.5f * normal(rng) + (i % c.value_width() % 7 == 0 ? 0.7f : -0.1f);
    if (c.saturated) {
      for (auto& x : k) x *= 1e6f;
      for (size_t i = 0; i < v.size(); ++i) v[i] *= i / c.value_width() % 2 ? 1e6f : 1;
      for (size_t i = 0; i < q.size(); ++i) q.set(i, q.get(i) / largest_scale());
    }
    if (c.centred) {
      key_centre.resize(c.kv_heads * c.head_dim), value_centre.resize(c.kv_heads * c.value_width());
      for (size_t i = 0; i < std::max(key_centre.size(), value_centre.size()); ++i) {
        if (i < key_centre.size()) key_centre[i] = 0.3f * normal(rng);
        if (i < value_centre.size()) value_centre[i] = 0.3f * normal(rng);
      }
    }
    pack(k, c.head_dim, key_centre, keys);
    pack(v, c.value_width(), value_centre, values);
    if (c.sinks) {
      for (int h = 0; h < c.query_heads; ++h) sinks.push_back(normal(rng));
    }
    if (c.ragged) {
      for (int b = 0; b < c.batch; ++b) starts.push_back(b * c.kv_len / (c.batch + 1));
    }
    copy_exactly(k, c.head_dim, key_centre, exact_keys);
    copy_exactly(v, c.value_width(), value_centre, exact_values);
    if (c.mask == MaskKind::boolean) mask.bytes.resize(mask_size());
    for (size_t i = 0; i < mask_size() && c.mask != MaskKind::none; ++i) {
      const bool hidden = rng() % 3 == 0;
      if (c.mask == MaskKind::boolean) mask.bytes[i] = !hidden;
      if (c.mask == MaskKind::additive) mask.set(i, hidden ? -INFINITY : 0.5f * normal(rng));
    }
  }

  /// Parameters that write into `out`.
  AttendParams params() {
    AttendParams p;
    p.batch = c.batch;
    p.query_heads = c.query_heads;
    p.kv_heads = c.kv_heads;
    p.query_len = c.query_len;
    p.kv_len = c.kv_len;
    p.key_dim = c.head_dim;
    p.value_dim = c.value_width();
    p.scale = 1.5f / std::sqrt(float(c.head_dim));
    p.seed = c.seed;
    p.q = contiguous<const void*>(q.bytes.data(), c.dtype, c.query_heads, c.query_len, c.head_dim);
    p.keys = keys.packed();
    p.values = c.latent ? p.keys : values.packed();
    if (c.centred) p.key_centre = key_centre.data(), p.value_centre = c.latent ? p.key_centre : value_centre.data();
    p.causal = c.causal;
    p.window = c.window;
    if (c.ragged) p.starts = starts.data();
    if (c.sinks) p.sinks = sinks.data();
    if (c.recent || c.first)
      p.exact = {exact_keys.packed(), (c.latent ? exact_keys : exact_values).packed(), c.ring, c.recent, c.first};
    p.mask_kind = c.mask;
    p.mask_dtype = c.dtype;
    if (c.mask != MaskKind::none) p.mask = mask.bytes.data();
    p.mask_strides[0] = int64_t(mask_heads()) * c.query_len * c.kv_len;
    p.mask_strides[1] = c.head_mask ? int64_t(c.query_len) * c.kv_len : 0;
    p.mask_strides[2] = c.kv_len;
    p.mask_strides[3] = 1;
    p.out = contiguous<void*>(out.bytes.data(), c.dtype, c.query_heads, c.query_len, c.value_width());
    return p;
  }

 private:
  int mask_heads() const { return c.head_mask ? c.query_heads : 1; }
  size_t mask_size() const { return size_t(c.batch) * mask_heads() * c.query_len * c.kv_len; }

  void pack(const std::vector<float>& x, int dim, const std::vector<float>& centre, PackedBuffer& into) {
    EncodeParams p;
    p.batch = c.batch;
    p.heads = c.kv_heads;
    p.tokens = c.kv_len;
    p.head_dim = dim;
    p.seed = c.seed;
    p.x = contiguous<const void*>(x.data(), Dtype::float32, c.kv_heads, c.kv_len, dim);
    if (!centre.empty()) p.centre = centre.data();
    p.out = into.view;
    encode(p, Backend::reference);
  }

  /// The copies of the newest and the first tokens.  What is no copy stays as it was: NaN.
  void copy_exactly(const std::vector<float>& x, int dim, const std::vector<float>& centre, PackedBuffer& into) {
    if (c.recent == 0 && c.first == 0) return;
    PackedBuffer all(c.batch, c.kv_heads, c.kv_len, dim, c.exact_bits);
    pack(x, dim, centre, all);
    const int words = words_per_vector(c.exact_bits, dim), slots = c.ring + c.first;
    for (int row = 0; row < c.batch * c.kv_heads; ++row) {
      const auto copy = [&](int t, int slot) {
        const auto from = all.codes.begin() + (int64_t(row) * c.kv_len + t) * words;
        std::copy(from, from + words, into.codes.begin() + (int64_t(row) * slots + slot) * words);
        into.scales[size_t(row) * slots + slot] = all.scales[size_t(row) * c.kv_len + t];
      };
      const int start = c.ragged ? starts[row / c.kv_heads] : 0;
      for (int t = std::max(0, c.kv_len - c.ring); t < c.kv_len; ++t) copy(t, t % c.ring);
      for (int i = 0; i < c.first && start + i < c.kv_len; ++i) copy(start + i, c.ring + i);
    }
  }
};

/// What the comparison with the oracle found.
struct Difference {
  double overall = 0;    // |out - oracle| / |oracle| over everything
  double worst_row = 0;  // the same for the worst single query
};

/// The oracle's output, float32 whatever the case's dtype.
inline Buffer oracle(Inputs& inputs) {
  const Case& c = inputs.c;
  Buffer want(Dtype::float32, inputs.out.size());
  AttendParams p = inputs.params();
  p.out = contiguous<void*>(want.bytes.data(), Dtype::float32, c.query_heads, c.query_len, c.value_width());
  attend(p, Backend::reference);
  return want;
}

/// Runs a backend on the inputs and compares with what the oracle wants.
inline Difference compare(Inputs& inputs, const Buffer& want, const std::function<void(const AttendParams&)>& run) {
  const Case& c = inputs.c;
  for (size_t i = 0; i < inputs.out.size(); ++i) inputs.out.set(i, NAN);  // an unwritten number must not pass
  run(inputs.params());
  Difference d;
  double all_error = 0, all_square = 0;
  for (size_t row = 0; row < want.size() / c.value_width(); ++row) {
    double error = 0, square = 0;
    for (int i = 0; i < c.value_width(); ++i) {
      const size_t at = row * c.value_width() + i;
      const double a = inputs.out.get(at), wide = want.get(at);
      const double b = c.dtype == Dtype::float16 ? std::clamp(wide, -65504.0, 65504.0) : wide;
      error += (a - b) * (a - b);
      square += b * b;
    }
    all_error += error;
    all_square += square;
    const double ratio = error == 0 ? 0 : std::sqrt(error / square);
    if (!(ratio <= d.worst_row)) d.worst_row = ratio;  // NaN sticks out
  }
  d.overall = all_error == 0 ? 0 : std::sqrt(all_error / all_square);
  return d;
}

/// Runs a backend on a case and compares.
inline Difference compare(const Case& c, const std::function<void(const AttendParams&)>& run) {
  Inputs inputs(c);
  return compare(inputs, oracle(inputs), run);
}

/// What rounding the output to its dtype alone can add.
inline double rounding(Dtype dtype) { return dtype == Dtype::float32 ? 0 : dtype == Dtype::float16 ? 0x1p-11 : 0x1p-8; }

}  // namespace turboquant::cases
