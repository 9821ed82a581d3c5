// Encoding and decoding vectors: one SIMD-group a vector, coordinate 32 r + l in register r of lane l.

#pragma once

#include "metal/device/trellis.metal"
#include "metal/device/unpack.metal"

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
Rotated<D> load_rotated(Side side, Params params, int v, ushort lane) {
  constexpr int registers = D / 32;
  const int tokens = params[metal_layout::kTokens], heads = params[metal_layout::kHeads];
  const int t = v % tokens, h = v / tokens % heads, b = v / tokens / heads;
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

/// The scalar code nearest to x, in levels.
template <int B>
uint nearest_code(float x) {
  const float doubled = 2.0f * fabs(x);
  if (B == 8) {
    const int size = int(fmin(0.5f * doubled + 0.5f, 127.0f));
    return uint(x < 0.0f ? -size : size) & 255u;
  }
  int m = 0;
  for (int k = 0; k + 1 < magnitudes(B); ++k) m += doubled >= float(double_threshold(B, k)) ? 1 : 0;
  return uint(x < 0.0f ? m + magnitudes(B) : m);
}

/// Codes nearest to the targets, in levels, of GROUPS (1 or 2) groups of 32 coordinates, of which a lane has one each,
/// and their levels.
template <class K, int GROUPS, class Shared>
void code_groups(Shared shared, const thread float* targets, thread uint* code, thread int* levels, ushort lane,
                 ushort simdgroup) {
  if (K::kTrellis) {
    search_groups<K::kBits, GROUPS>(shared, targets, code, levels, lane, simdgroup);
    return;
  }
  TQ_UNROLL
  for (int g = 0; g < GROUPS; ++g) {
    code[g] = nearest_code<K::kBits>(targets[g]);
    levels[g] = level(K::kBits, int(code[g]));
  }
}

/// The nearest codes of a vector, 0 if it is empty; returns |levels|^2.
template <class K, int D, class Shared>
int nearest_codes(Shared shared, const thread Rotated<D>& of, thread uint* code, ushort lane, ushort simdgroup) {
  constexpr int registers = D / 32;
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) code[r] = 0;
  if (of.empty) return 0;
  // |H u| = 1, so coordinates times sqrt(D) are compared; sqrt(D) times H's own factor is sqrt of the odd part.
  float factor = unit(K::kBits, K::kTrellis) * sqrt(float(odd_part(D)) / of.square);
  if (K::kBits == 8) {
    float largest = 0.0f;
    TQ_UNROLL
    for (int r = 0; r < registers; ++r) largest = fmax(largest, fabs(of.y[r]));
    factor = 127.0f / simd_max(largest);
  }
  float targets[registers];
  int levels[registers], level_square = 0;
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) targets[r] = of.y[r] * factor;
  TQ_UNROLL
  for (int r = 0; r < registers; r += 2) {
    if (r + 1 < registers) {
      code_groups<K, 2>(shared, targets + r, code + r, levels + r, lane, simdgroup);
    } else {
      code_groups<K, 1>(shared, targets + r, code + r, levels + r, lane, simdgroup);
    }
  }
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) level_square += levels[r] * levels[r];
  return simd_sum(level_square);
}

/// Writes the words of a group.
template <class K, class Words>
void write_group(Words words, uint code, ushort lane) {
  constexpr int B = K::kBits;
  if (B == 8) {
    uint word = code << (8 * (lane & 3));
    word |= simd_shuffle_xor(word, 1);
    word |= simd_shuffle_xor(word, 2);
    if (!(lane & 3)) words[lane / 4] = word;
    return;
  }
  for (int w = 0; w < B; ++w) {
    uint bits = 0;
    for (int bit = 0; bit < B; ++bit) {
      const int its_word = K::kTrellis ? trellis_word(B, lane, bit) : bit_word(B, lane, bit);
      const int position = K::kTrellis ? trellis_position(B, lane, bit) : bit_position(B, lane, bit);
      if (its_word == w) bits |= (code >> bit & 1u) << position;
    }
    bits = simd_or(bits);
    if (lane == w) words[w] = bits;
  }
}

/// Writes vector `v`.  A scale beyond the largest finite half is that.
template <class K, int D, class Out>
void write_vector(const thread Rotated<D>& of, const thread uint* code, int level_square, Out out, int v,
                  ushort lane) {
  constexpr int registers = D / 32;
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) {
    write_group<K>(out.codes + (ulong(v) * (K::kBits * registers) + r * K::kBits), code[r], lane);
  }
  const float scale = of.grow * sqrt(of.square / float(level_square)) / level_step(K::kBits, K::kTrellis);
  const float stored = of.empty ? 0.0f : fmin(scale, largest_scale());
  if (lane == 0) out.scales[v] = half(of.finite ? stored : not_a_number());
}

/// Encodes vector `v` of one side.
template <class K, int D, class Shared, class Side, class Out, class Params>
void encode_vector(Shared shared, Side side, Out out, Params params, int v, Place place) {
  const Rotated<D> of = load_rotated<D>(side, params, v, place.lane);
  uint code[D / 32];
  const int level_square = nearest_codes<K, D>(shared, of, code, place.lane, place.simdgroup);
  write_vector<K, D>(of, code, level_square, out, v, place.lane);
}

/// Codes of u, in levels, 32 coordinates after another: errors of those before, multiplied by rows of `feedback`
/// (D x D), move the targets.  Lane l multiplies the columns whose errors it made, so that a SIMD-group reads 64 bytes
/// of a row together.  Returns |levels|^2.
template <class K, int D, class Shared, class Feedback>
int codes_with_feedback(Shared shared, const thread float* u, Feedback feedback, thread uint* code, ushort lane,
                        ushort simdgroup) {
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
    int nearest;
    code_groups<K, 1>(shared, &target, code + b, &nearest, lane, simdgroup);
    error[b] = float(nearest) - u[b];
    level_square += nearest * nearest;
  }
  return simd_sum(level_square);
}

/// encode_vector with feedback [heads, D, D], if it is `given`; D > 32.
template <class K, int D, class Shared, class Side, class Feedback, class Out, class Params>
void encode_with_feedback(Shared shared, Side side, Feedback feedback, bool given, Out out, Params params, int v,
                          Place place) {
  const ushort lane = place.lane;
  const Rotated<D> of = load_rotated<D>(side, params, v, lane);
  const bool fed = given && !of.empty;
  uint code[D / 32];
  int level_square = 0;
  if (!fed || !K::kTrellis) level_square = nearest_codes<K, D>(shared, of, code, lane, place.simdgroup);
  if (fed) {
    // In levels; of scalar codes at the scale that the nearest codes would have.
    const float factor = K::kTrellis ? feedback_unit(K::kBits) * sqrt(float(odd_part(D)) / of.square)
                                  : sqrt(float(level_square) / (of.square * float(D / odd_part(D))));
    float u[D / 32];
    TQ_UNROLL
    for (int r = 0; r < D / 32; ++r) u[r] = of.y[r] * factor;
    const int h = v / params[metal_layout::kTokens] % params[metal_layout::kHeads];
    level_square =
        codes_with_feedback<K, D>(shared, u, feedback + h * (D * D), code, lane, place.simdgroup);
  }
  write_vector<K, D>(of, code, level_square, out, v, lane);
}

/// The level of a lane's coordinate of a group.
template <class K, class Words>
int read_level(Words words, ushort lane) {
  constexpr int B = K::kBits;
  if (B == 8) return level(8, int(words[lane / 4] >> (8 * (lane & 3)) & 255u));
  uint code = 0;
  for (int bit = 0; bit < B; ++bit) {
    const uint word = words[K::kTrellis ? trellis_word(B, lane, bit) : bit_word(B, lane, bit)];
    code |= (word >> (K::kTrellis ? trellis_position(B, lane, bit) : bit_position(B, lane, bit)) & 1u) << bit;
  }
  if (!K::kTrellis) return level(B, int(code));
  return trellis_level(B, int(code >> 1) * 4 + subset_of(words[B - 1], trellis_step(lane)));
}

/// Decodes vector `v`; everything dense.
template <class T, class K, int D, class Codes, class Scales, class Centre, class Out, class Params>
void decode_vector(Codes codes, Scales scales, Centre centre, Out out, Params params, int v, ushort lane) {
  constexpr int registers = D / 32;
  const int tokens = params[metal_layout::kTokens], heads = params[metal_layout::kHeads];
  const int h = v / tokens % heads;
  const bool centred = params[metal_layout::kFlags] & metal_layout::kCentre;
  const float step = float(scales[v]) * level_step(K::kBits, K::kTrellis);
  float y[registers];
  TQ_UNROLL
  for (int r = 0; r < registers; ++r) {
    y[r] = step * float(read_level<K>(codes + (ulong(v) * (K::kBits * registers) + r * K::kBits), lane));
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
