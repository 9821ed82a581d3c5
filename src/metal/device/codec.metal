// Encoding and decoding vectors: one SIMD-group a vector, coordinate 32 r + l in register r of lane l.

namespace turboquant {

/// Vectors to encode: x [batch, heads, tokens, D]; centre [heads, D], if there is one.
template <class X, class Centre>
struct Side {
  X x;
  Centre centre;
  bool centred;
};
template <class X, class Centre>
Side<X, Centre> side(X x, Centre centre, bool centred) {
  return {x, centre, centred};
}

/// Where their codes and scales go, both dense.
template <class Codes, class Scales>
struct Encoded {
  Codes codes;
  Scales scales;
};
template <class Codes, class Scales>
Encoded<Codes, Scales> encoded(Codes codes, Scales scales) {
  return {codes, scales};
}

/// A rotated vector in the registers of a SIMD-group.
template <int D>
struct Rotated {
  float y[D / 32];  // H (s * (x - centre)) / grow, without H's factor 1/sqrt(2^k)
  float square;     // |x - centre|^2 / grow^2
  float grow;       // a power of two
  bool finite;
  bool empty;  // nothing to code: zero or not finite
};

/// Vector `v` of one side.
template <int D, class Side, class Params>
Rotated<D> load_rotated(Side side, Params params, uint v, ushort lane) {
  constexpr int registers = D / 32;
  const int tokens = params[metal_layout::kTokens], heads = params[metal_layout::kHeads];
  const int t = int(v) % tokens, h = int(v) / tokens % heads, b = int(v) / tokens / heads;
  const auto strides = side.x.strides;
  const long row = b * strides[0] + h * strides[1] + t * strides[2];
  Rotated<D> of;
  float largest = 0.0f;
  bool finite = true;
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) {
    const int i = 32 * r + lane;
    of.y[r] = float(side.x.data[row + i * strides[3]]) - (side.centred ? float(side.centre[h * D + i]) : 0.0f);
    finite = finite && isfinite(of.y[r]);
    largest = fmax(largest, fabs(of.y[r]));
  }
  of.finite = simd_all(finite);
  largest = simd_max(largest);
  // Dividing by a power of two near the largest number keeps the squares in range and every quotient exact.
  const uint exponent = min(as_type<uint>(largest) >> 23, 253u);
  const float shrink = as_type<float>((254u - exponent) << 23);
  of.grow = exponent ? as_type<float>(exponent << 23) : 0.0f;
  float square = 0.0f;
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) {
    of.y[r] *= shrink;
    square = fma(of.y[r], of.y[r], square);
  }
  of.square = simd_sum(square);
  of.empty = !of.finite || !(of.square > 0.0f);
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) of.y[r] = with_sign(of.y[r], uint(params[metal_layout::kSigns + r]), lane);
  hadamard<D>(of.y, lane);
  return of;
}

/// The code nearest to x, of which `doubled` is twice the size in levels.
template <int B>
uint nearest_code(float x, float doubled) {
  int m = 0;
  for (int k = 0; k + 1 < magnitudes(B); ++k) m += doubled >= float(double_threshold(B, k)) ? 1 : 0;
  return uint(x < 0.0f ? m + magnitudes(B) : m);
}

/// The nearest codes of a vector, 0 if it is empty; returns |levels|^2.
template <int B, int D>
int nearest_codes(const thread Rotated<D>& of, thread uint* code) {
  // |H u| = 1, so coordinates times sqrt(D) are compared; sqrt(D) times H's own factor is sqrt of the odd part.
  const float doubled = 2.0f * unit(B) * sqrt(float(odd_part(D)) / of.square);
  int level_square = 0;
  TQ_UNROLL
  for (int r = 0; r < D / 32; ++r) {
    code[r] = of.empty ? 0u : nearest_code<B>(of.y[r], fabs(of.y[r]) * doubled);
    const int nearest = level(B, int(code[r]));
    level_square += nearest * nearest;
  }
  return simd_sum(level_square);
}

/// Writes vector `v`.
template <int B, int D, class Out>
void write_vector(const thread Rotated<D>& of, const thread uint* code, int level_square, Out out, uint v,
                  ushort lane) {
  constexpr int registers = D / 32;
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) {
    for (int w = 0; w < B; ++w) {
      uint bits = 0;
      for (int bit = 0; bit < B; ++bit) {
        if (bit_word(B, lane, bit) == w) bits |= (code[r] >> bit & 1u) << bit_position(B, lane, bit);
      }
      bits = simd_or(bits);
      if (lane == w) out.codes[ulong(v) * (B * registers) + r * B + w] = bits;
    }
  }
  const float scale = of.grow * sqrt(of.square / float(level_square)) / level_step(B);
  const float stored = of.empty ? 0.0f : scale > largest_scale() ? largest_scale() : scale;
  if (lane == 0) out.scales[v] = half(of.finite ? stored : as_type<float>(0x7fc00000u));
}

/// Encodes vector `v` of one side.
template <int B, int D, class Side, class Out, class Params>
void encode_vector(Side side, Out out, Params params, uint v, ushort lane) {
  const Rotated<D> of = load_rotated<D>(side, params, v, lane);
  uint code[D / 32];
  const int level_square = nearest_codes<B, D>(of, code);
  write_vector<B, D>(of, code, level_square, out, v, lane);
}

/// Codes of u, in levels, 32 coordinates after another: errors of those before, multiplied by rows of `feedback`
/// (D x D), move the targets.  Lane l multiplies the columns whose errors it made, so that a SIMD-group reads 64 bytes
/// of a row together.  Returns |levels|^2.
template <int B, int D, class Feedback>
int codes_with_feedback(const thread float* u, Feedback feedback, thread uint* code, ushort lane) {
  constexpr int registers = D / 32, rows = 16;  // rows in flight together: only latency depends on them
  float error[registers];
  int level_square = 0;
  TQ_UNROLL
  for (int b = 0; b < registers; ++b) {
    float target = u[b];
    for (int first = 0; b > 0 && first < 32; first += rows) {
      float sums[rows];
      TQ_UNROLL
      for (int i = 0; i < rows; ++i) {
        sums[i] = 0.0f;
        TQ_UNROLL
        for (int r = 0; r < registers; ++r) {
          if (r >= b) continue;
          sums[i] = fma(float(feedback[(32 * b + first + i) * D + 32 * r + lane]), error[r], sums[i]);
        }
      }
      TQ_UNROLL
      for (int i = 0; i < rows; ++i) {
        const float moved = simd_sum(sums[i]);
        if (lane == first + i) target -= moved;
      }
    }
    code[b] = nearest_code<B>(target, 2.0f * fabs(target));
    const int nearest = level(B, int(code[b]));
    error[b] = float(nearest) - u[b];
    level_square += nearest * nearest;
  }
  return simd_sum(level_square);
}

/// encode_vector with feedback [heads, D, D], if it is `given`; D > 32.
template <int B, int D, class Side, class Feedback, class Out, class Params>
void encode_with_feedback(Side side, Feedback feedback, bool given, Out out, Params params, uint v, ushort lane) {
  const Rotated<D> of = load_rotated<D>(side, params, v, lane);
  uint code[D / 32];
  int level_square = nearest_codes<B, D>(of, code);
  if (given && !of.empty) {
    // In levels at the scale that the nearest codes would have.
    const float factor = sqrt(float(level_square) / (of.square * float(D / odd_part(D))));
    float u[D / 32];
    TQ_UNROLL
    for (int r = 0; r < D / 32; ++r) u[r] = of.y[r] * factor;
    const int h = int(v) / params[metal_layout::kTokens] % params[metal_layout::kHeads];
    level_square = codes_with_feedback<B, D>(u, feedback + h * (D * D), code, lane);
  }
  write_vector<B, D>(of, code, level_square, out, v, lane);
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
    out[ulong(v) * D + i] = to_output<T>(value);
  }
}

}  // namespace turboquant
