// What codes made with error feedback must be, whoever made them: each the nearest to a target that is computed here,
// in double, from the codes that came before it.  One code that is rounded the other way changes all that follow, so
// codes cannot be compared with another encoder's.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "support/vectors.h"
#include "turboquant/rotation.h"

namespace turboquant::cases {

/// One vector as an encoder was given it.
struct FeedbackInput {
  const Buffer& x;
  size_t row;
  int dim, bits;
  uint64_t seed;
  const float* centre;       // [dim] or null
  const uint16_t* feedback;  // [dim, dim], of the vector's head
  Code code = Code::scalar;
};

/// How an encoder may round.  The defaults are those of float32 arithmetic.
struct FeedbackRounding {
  double unit = 0x1p-24;     // relative error of an operation
  double operand = 0;        // relative error of G and of e as they enter products
  int of_a_coordinate = 16;  // roundings of a rotated coordinate, each of the vector's length at most: a stage of
                             // butterflies each (8), the odd factor's (3), centre, norm, factors
  SearchRounding search;     // of trellis codes
};

/// A vector's direction in the rotated basis, and its length.
struct Direction {
  std::vector<double> r;
  double norm = 0;

  explicit Direction(const FeedbackInput& in) : r(in.dim) {
    for (int i = 0; i < in.dim; ++i) {
      r[i] = double(in.x.get(in.row * in.dim + i)) - (in.centre ? in.centre[i] : 0);
      norm += r[i] * r[i];
    }
    norm = std::sqrt(norm);
    for (double& v : r) v /= norm;
    rotate(r.data(), in.dim, in.seed);
  }
};

/// A target, and how far an encoder's may be from it.
struct Target {
  double value, tolerance;
};

/// Target of coordinate i, given the errors of the blocks before.  u is known to `of_u` of a level, and its scale to
/// the relative `spread`.
inline Target target_of(const FeedbackInput& in, const std::vector<double>& u, const std::vector<double>& error, int i,
                        double of_u, double spread, const FeedbackRounding& rounding) {
  const int columns = in.dim == 32 ? 0 : i / 32 * 32;
  double target = u[i], moves_with_scale = u[i], products = 0, weights = 0;
  for (int j = 0; j < columns; ++j) {
    const double g = half_to_float(in.feedback[i * in.dim + j]);
    target -= g * error[j];
    moves_with_scale += g * u[j];
    products += std::abs(g * error[j]);
    weights += std::abs(g);
  }
  return {target, of_u * (1 + weights) + spread * std::abs(moves_with_scale) +
                      (columns + 3) * rounding.unit * (std::abs(u[i]) + products) + 2 * rounding.operand * products};
}

/// Levels nearest to a direction at its own scale, `up` levels to the side: the square of their length.
inline double nearest_square(const FeedbackInput& in, const std::vector<double>& r, double plain, double up) {
  double square = 0;
  for (double v : r) {
    const double doubled = 2 * (plain * std::abs(v) + up);
    int m = 0;
    if (in.bits == 8) {
      const double level = std::clamp(std::floor(doubled / 2 + 0.5), 0.0, 127.0);
      square += level * level;
      continue;
    }
    while (m + 1 < magnitudes(in.bits) && doubled >= double_threshold(in.bits, m)) ++m;
    square += magnitude(in.bits, m) * magnitude(in.bits, m);
  }
  return square;
}

/// Whether the level of a scalar code is nearest to a number of levels, give or take.
inline bool is_nearest(int bits, int code, double levels, double tolerance) {
  if (bits == 8) {
    const int own = level(8, code);
    return std::abs(std::clamp(levels, -127.0, 127.0) - own) <= 0.5 + tolerance;
  }
  const int m = code & (magnitudes(bits) - 1);
  const double doubled = 2 * (code < magnitudes(bits) ? levels : -levels);
  const bool above = doubled >= (m == 0 ? 0 : double_threshold(bits, m - 1)) - 2 * tolerance;
  return above && (m + 1 == magnitudes(bits) || doubled <= double_threshold(bits, m) + 2 * tolerance);
}

/// Empty when codes and scale are right, else what is wrong.
inline std::string wrong_with_feedback(const FeedbackInput& in, const uint32_t* words, uint16_t scale,
                                       const FeedbackRounding& rounding = {}) {
  const int dim = in.dim, bits = in.bits;
  const bool trellis = in.code == Code::trellis;
  std::ostringstream wrong;
  const Direction of(in);
  const double coordinate = rounding.of_a_coordinate * rounding.unit;  // of a unit vector
  double largest = 0;
  for (double v : of.r) largest = std::max(largest, std::abs(v));

  // Levels of a unit: of trellis codes a constant, else |levels| of the nearest codes, which is not known exactly where
  // coordinates lie beside a threshold.  A vector of 32 coordinates keeps the codes of nearest levels at their own
  // unit.
  const double plain = bits == 8 ? 127 / largest : unit(bits, trellis) * std::sqrt(double(dim));
  double length = dim == 32 ? plain : feedback_unit(bits) * std::sqrt(double(dim)), spread = 4 * rounding.unit;
  if (bits == 8) spread += coordinate / largest;
  if (!trellis && dim > 32) {
    const double slack = plain * coordinate, square = nearest_square(in, of.r, plain, 0);
    length = std::sqrt(square);
    spread += std::sqrt(nearest_square(in, of.r, plain, slack) / nearest_square(in, of.r, plain, -slack)) - 1;
  }
  std::vector<double> u(of.r), error(dim);
  for (double& v : u) v *= length;

  double own = 0;
  for (int block = 0; block < dim; block += 32) {
    double targets[32], tolerances[32];
    for (int i = 0; i < 32; ++i) {
      const Target t = target_of(in, u, error, block + i, length * coordinate, spread, rounding);
      targets[i] = t.value, tolerances[i] = t.tolerance;
      const int code = trellis ? 0 : code_at(words, bits, block + i);
      if (!trellis && !is_nearest(bits, code, t.value, t.tolerance)) {
        wrong << "coordinate " << block + i << " has level " << level(bits, code) << " for the target " << t.value
              << " +- " << t.tolerance << "; ";
      }
    }
    if (trellis) wrong << wrong_path(words + block / 32 * bits, bits, targets, tolerances, rounding.search);
    for (int i = block; i < block + 32; ++i) {
      const int level = level_at(words, bits, in.code, i);
      error[i] = level - u[i];
      own += level * level;
    }
  }
  const int want = float_to_half(float(of.norm / (std::sqrt(own) * level_step(bits, trellis))));
  if (std::abs(want - int(scale)) > 1) wrong << "scale has bits " << scale << " instead of " << want;
  return wrong.str();
}

/// Feedback [heads, dim, dim] that moves targets by some levels; NaN where nothing may be read.
inline std::vector<uint16_t> random_feedback(int heads, int dim, uint64_t seed = 9) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal(0, 0.06f);
  std::vector<uint16_t> g(size_t(heads) * dim * dim);
  for (size_t i = 0; i < g.size(); ++i) {
    const int row = int(i / dim % dim), column = int(i % dim);
    g[i] = column < row / 32 * 32 ? float_to_half(normal(rng)) : 0x7e00;
  }
  return g;
}

/// The same for all vectors [heads, tokens, dim] of `e`, or for several such batches; `centres` [heads, dim] or null,
/// `feedback` [heads, dim, dim].
inline std::string wrong_vectors(const Buffer& x, const Encoded& e, int heads, uint64_t seed, const float* centres,
                                 const uint16_t* feedback, const FeedbackRounding& rounding = {}) {
  std::ostringstream wrong;
  for (size_t row = 0; row < e.scales.size(); ++row) {
    const size_t head = row / e.tokens % heads;
    const FeedbackInput in{
        x,     row, e.dim, e.bits, seed, centres ? centres + head * e.dim : nullptr, feedback + head * e.dim * e.dim,
        e.code};
    const auto found =
        wrong_with_feedback(in, &e.codes[row * words_per_vector(e.bits, e.dim)], e.scales[row], rounding);
    if (!found.empty()) wrong << "row " << row << ": " << found << "\n";
  }
  return wrong.str();
}

// Checks of an encoder given as Encoded(const Buffer& x, int heads, int tokens, int dim, int bits, const uint16_t* g):
// empty when it is right, else what is wrong.

/// A zero vector and vectors with NaN and infinity among a small one, a one-hot one and others, one head.
template <class Encoder>
std::string wrong_beside_bad_vectors(const Encoder& encoder, Dtype dtype, int dim, int bits, uint64_t seed) {
  const int tokens = 7, words = words_per_vector(bits, dim);
  Buffer x = gaussian(size_t(tokens) * dim, dtype);
  for (int i = 0; i < dim; ++i) {
    x.set(i, 0);
    x.set(4 * dim + i, x.get(4 * dim + i) * 1e-4f);
    x.set(5 * dim + i, i == 5 ? -2.0f : 0.0f);
  }
  x.set(dim + 5, NAN);
  x.set(2 * dim + 9, INFINITY);
  const auto g = random_feedback(1, dim);
  const Encoded e = encoder(x, 1, tokens, dim, bits, g.data());
  std::ostringstream wrong;
  if (e.scales[0] != 0) wrong << "the zero vector has scale bits " << e.scales[0] << "; ";
  for (int t : {1, 2}) {
    if (!std::isnan(half_to_float(e.scales[t])))
      wrong << "bad vector " << t << " has scale bits " << e.scales[t] << "; ";
  }
  for (int i = 0; i < 3 * words; ++i) {
    if (e.codes[i] != 0) wrong << "word " << i << " of the zero and bad vectors is " << e.codes[i] << "; ";
  }
  for (int t = 3; t < tokens; ++t) {
    const FeedbackInput in{x, size_t(t), dim, bits, seed, nullptr, g.data(), e.code};
    const auto found = wrong_with_feedback(in, &e.codes[size_t(t) * words], e.scales[t]);
    if (!found.empty()) wrong << "vector " << t << ": " << found;
  }
  return wrong.str();
}

/// The same bytes of a vector alone and among others, two heads.
template <class Encoder>
std::string wrong_when_alone(const Encoder& encoder, Dtype dtype, int tokens, int dim, int bits) {
  const int heads = 2, words = words_per_vector(bits, dim);
  const Buffer x = gaussian(size_t(heads) * tokens * dim, dtype);
  const auto g = random_feedback(heads, dim);
  const Encoded together = encoder(x, heads, tokens, dim, bits, g.data());
  std::ostringstream wrong;
  for (int row = 0; row < heads * tokens; ++row) {
    Buffer one(dtype, dim);
    for (int i = 0; i < dim; ++i) one.set(i, x.get(size_t(row) * dim + i));
    const Encoded alone = encoder(one, 1, 1, dim, bits, g.data() + size_t(row / tokens) * dim * dim);
    if (!std::equal(alone.codes.begin(), alone.codes.end(), together.codes.begin() + size_t(row) * words) ||
        alone.scales[0] != together.scales[row]) {
      wrong << "row " << row << " differs; ";
    }
  }
  return wrong.str();
}

/// The feedback of one head for errors that count e' S e (dim x dim, row-major), as docs/algorithm.md derives it.
inline std::vector<uint16_t> feedback_of(std::vector<double> s, int dim, uint64_t seed) {
  // R S R': rows, then columns.
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = 0; i < dim; ++i) rotate(&s[size_t(i) * dim], dim, seed);
    for (int i = 0; i < dim; ++i) {
      for (int j = 0; j < i; ++j) std::swap(s[size_t(i) * dim + j], s[size_t(j) * dim + i]);
    }
  }
  double trace = 0;
  for (int i = 0; i < dim; ++i) trace += s[size_t(i) * dim + i];
  for (int i = 0; i < dim; ++i) s[size_t(i) * dim + i] += 0.1 * trace / dim;
  // s = c c', c upper triangular, from the last column on; then l = (c / its diagonal)', unit lower.
  std::vector<double> l(s.size());
  const auto at = [dim](std::vector<double>& a, int i, int j) -> double& { return a[size_t(i) * dim + j]; };
  for (int j = dim - 1; j >= 0; --j) {
    const double d = at(s, j, j);
    for (int i = 0; i <= j; ++i) at(l, j, i) = at(s, i, j) / d;
    for (int i = 0; i < j; ++i) {
      for (int k = 0; k < j; ++k) at(s, i, k) -= at(l, j, i) * at(l, j, k) * d;
    }
  }
  // G[b, <b] = l[b, b]^-1 l[b, <b], by forward substitution.
  std::vector<uint16_t> g(s.size());
  for (int b = 32; b < dim; b += 32) {
    for (int j = 0; j < b; ++j) {
      for (int i = b; i < b + 32; ++i) {
        for (int k = b; k < i; ++k) at(l, i, j) -= at(l, i, k) * at(l, k, j);
        g[size_t(i) * dim + j] = float_to_half(float(at(l, i, j)));
      }
    }
  }
  return g;
}

}  // namespace turboquant::cases
