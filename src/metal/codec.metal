// Encoding and decoding vectors: one SIMD-group a vector, coordinate 32 r + l in register r of lane l.

namespace turboquant {

/// Encodes vector `v` of one side.  x [batch, heads, tokens, D] with any strides; codes and scales are dense.
template <int B, int D, class X, class Strides, class Centre, class Codes, class Scales, class Params>
void encode_vector(X x, Strides strides, Centre centre, bool centred, Codes codes, Scales scales, Params params, uint v,
                   ushort lane) {
  constexpr int registers = D / 32;
  const int tokens = params[metal_layout::kTokens], heads = params[metal_layout::kHeads];
  const int t = int(v) % tokens, h = int(v) / tokens % heads, b = int(v) / tokens / heads;
  const long row = b * strides[0] + h * strides[1] + t * strides[2];
  float y[registers];
  float largest = 0.0f;
  bool finite = true;
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) {
    const int i = 32 * r + lane;
    y[r] = float(x[row + i * strides[3]]) - (centred ? float(centre[h * D + i]) : 0.0f);
    finite = finite && isfinite(y[r]);
    largest = fmax(largest, fabs(y[r]));
  }
  finite = simd_all(finite);
  largest = simd_max(largest);
  // Dividing by a power of two near the largest number keeps the squares in range and every quotient exact.
  const uint exponent = min(as_type<uint>(largest) >> 23, 253u);
  const float shrink = as_type<float>((254u - exponent) << 23), grow = exponent ? as_type<float>(exponent << 23) : 0.0f;
  float square = 0.0f;
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) {
    y[r] *= shrink;
    square = fma(y[r], y[r], square);
  }
  square = simd_sum(square);
  const bool empty = !finite || !(square > 0.0f);
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) y[r] = with_sign(y[r], uint(params[metal_layout::kSigns + r]), lane);
  hadamard<D>(y, lane);
  // |H u| = 1, so coordinates times sqrt(D) are compared; sqrt(D) times H's own factor is sqrt of the odd part.
  const float doubled = 2.0f * unit(B) * sqrt(float(odd_part(D)) / square);
  int level_square = 0;
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) {
    int m = 0;
    for (int k = 0; k + 1 < magnitudes(B); ++k) m += fabs(y[r]) * doubled >= float(double_threshold(B, k)) ? 1 : 0;
    level_square += magnitude(B, m) * magnitude(B, m);
    const uint code = empty ? 0u : uint(y[r] < 0.0f ? m + magnitudes(B) : m);
    for (int w = 0; w < B; ++w) {
      uint bits = 0;
      for (int bit = 0; bit < B; ++bit) {
        if (bit_word(B, lane, bit) == w) bits |= (code >> bit & 1u) << bit_position(B, lane, bit);
      }
      bits = simd_or(bits);
      if (lane == w) codes[ulong(v) * (B * registers) + r * B + w] = bits;
    }
  }
  level_square = simd_sum(level_square);
  const float scale = grow * sqrt(square / float(level_square)) / level_step(B);
  if (lane == 0) scales[v] = !finite ? half(as_type<float>(0x7fc00000u)) : empty ? half(0.0f) : half(scale);
}

/// Decodes vector `v`; everything dense.
template <class T, int B, int D, class Codes, class Scales, class Centre, class Out, class Params>
void decode_vector(Codes codes, Scales scales, Centre centre, Out out, Params params, uint v, ushort lane) {
  constexpr int registers = D / 32;
  const int tokens = params[metal_layout::kTokens], heads = params[metal_layout::kHeads];
  const int h = int(v) / tokens % heads;
  const bool centred = params[metal_layout::kFlags] & metal_layout::kCentre;
  const float step = float(scales[v]) * level_step(B);
  float y[registers];
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) {
    uint code = 0;
    for (int bit = 0; bit < B; ++bit) {
      const uint word = codes[ulong(v) * (B * registers) + r * B + bit_word(B, lane, bit)];
      code |= (word >> bit_position(B, lane, bit) & 1u) << bit;
    }
    y[r] = step * float(level(B, int(code)));
  }
  unrotate_vector<D>(y, params, lane);
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) {
    const int i = 32 * r + lane;
    const float value = y[r] + (centred ? float(centre[h * D + i]) : 0.0f);
    out[ulong(v) * D + i] = T(value);
  }
}

}  // namespace turboquant
