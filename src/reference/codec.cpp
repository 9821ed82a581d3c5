// The oracle of encode and decode: scalar code in double, step by step as in the paper (section 3).
#include "reference/codec.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/trellis.h"
#include "tensor.h"
#include "turboquant/rotation.h"

namespace turboquant::reference {
namespace {

/// The code of the level nearest to a number of levels.
int nearest(int bits, double levels) {
  if (bits == 8) return int(std::lround(std::clamp(levels, -127.0, 127.0))) & 255;
  int m = 0;
  while (m + 1 < magnitudes(bits) && 2 * std::abs(levels) >= double_threshold(bits, m)) ++m;
  return levels < 0 ? m + magnitudes(bits) : m;
}

double length_of(const double* x, int dim) {
  double square = 0;
  for (int i = 0; i < dim; ++i) square += x[i] * x[i];
  return std::sqrt(square);
}

void write_code(uint32_t* group, int bits, int i, int code) {
  for (int bit = 0; bit < bits; ++bit) {
    group[bit_word(bits, i, bit)] |= uint32_t(code >> bit & 1) << bit_position(bits, i, bit);
  }
}

int read_code(const uint32_t* group, int bits, int i) {
  int code = 0;
  for (int bit = 0; bit < bits; ++bit) {
    code |= int(group[bit_word(bits, i, bit)] >> bit_position(bits, i, bit) & 1) << bit;
  }
  return code;
}

/// Writes the codes nearest to the targets of a group of 32 coordinates, in levels, and the levels they stand for.
void code_group(const Coding& c, const double* targets, uint32_t* words, double* levels) {
  std::fill_n(words, c.bits, 0);
  if (c.code == Code::trellis) {
    int indices[32];
    search_trellis(c.bits, targets, indices);
    write_group(c.bits, indices, words);
    for (int i = 0; i < 32; ++i) levels[i] = trellis_level(c.bits, indices[i]);
  } else {
    for (int i = 0; i < 32; ++i) {
      const int code = nearest(c.bits, targets[i]);
      write_code(words, c.bits, i, code);
      levels[i] = level(c.bits, code);
    }
  }
}

/// Codes of a vector u, in levels, group by group.  With feedback the errors of the groups before move what a group's
/// codes are nearest to.
void code_vector(const Coding& c, const std::vector<double>& u, const uint16_t* feedback, uint32_t* words,
                 std::vector<double>& levels) {
  const int dim = int(u.size());
  levels.resize(dim);
  for (int g = 0; g < dim / 32; ++g) {
    double targets[32];
    for (int i = 0; i < 32; ++i) {
      const int row = 32 * g + i;
      targets[i] = u[row];
      for (int j = 0; feedback && j < 32 * g; ++j) {
        targets[i] -= double(half_to_float(feedback[row * dim + j])) * (levels[j] - u[j]);
      }
    }
    code_group(c, targets, words + g * c.bits, &levels[32 * g]);
  }
}

std::vector<double> times(const std::vector<double>& x, double factor) {
  std::vector<double> y(x);
  for (double& v : y) v *= factor;
  return y;
}

}  // namespace

uint16_t encode_vector(const double* x, int dim, const Coding& c, const uint16_t* feedback, uint32_t* words) {
  std::fill_n(words, words_per_vector(c.bits, dim), 0);
  const double norm = length_of(x, dim);
  if (!std::isfinite(norm)) return float_to_half(std::numeric_limits<float>::quiet_NaN());
  if (norm == 0) return 0;
  std::vector<double> r(x, x + dim), levels;
  for (double& v : r) v /= norm;
  rotate(r.data(), dim, c.seed);
  if (dim == 32) feedback = nullptr;  // one group has none before it
  if (feedback && c.code == Code::trellis) {
    code_vector(c, times(r, feedback_unit(c.bits) * std::sqrt(double(dim))), feedback, words, levels);
  } else {
    double largest = 0;
    for (double v : r) largest = std::max(largest, std::abs(v));
    const double plain = c.bits == 8 ? 127 / largest : unit(c.bits, int(c.code)) * std::sqrt(double(dim));
    code_vector(c, times(r, plain), nullptr, words, levels);
    if (feedback) code_vector(c, times(r, length_of(levels.data(), dim)), feedback, words, levels);
  }
  const double scale = norm / (length_of(levels.data(), dim) * level_step(c.bits, int(c.code)));
  return float_to_half(float(std::min(scale, double(largest_scale()))));
}

void decode_vector(const uint32_t* words, uint16_t scale, int dim, const Coding& c, double* x) {
  const double step = double(half_to_float(scale)) * level_step(c.bits, int(c.code));
  for (int g = 0; g < dim / 32; ++g) {
    const uint32_t* group = words + g * c.bits;
    int indices[32];
    if (c.code == Code::trellis) read_group(c.bits, group, indices);
    for (int i = 0; i < 32; ++i) {
      x[32 * g + i] = step * (c.code == Code::trellis ? trellis_level(c.bits, indices[i])
                                                      : level(c.bits, read_code(group, c.bits, i)));
    }
  }
  unrotate(x, dim, c.seed);
}

void encode(const EncodeParams& p) {
  std::vector<double> x(p.head_dim);
  for (int b = 0; b < p.batch; ++b) {
    for (int h = 0; h < p.heads; ++h) {
      for (int t = 0; t < p.tokens; ++t) {
        const int64_t row = row_offset(p.x, b, h, t);
        for (int i = 0; i < p.head_dim; ++i) {
          x[i] = load_number(p.x.data, p.x.dtype, row + i) - (p.centre ? p.centre[h * p.head_dim + i] : 0.0);
        }
        const uint16_t* feedback = p.feedback ? p.feedback + int64_t(h) * p.head_dim * p.head_dim : nullptr;
        row_scale(p.out, b, h, t) = encode_vector(x.data(), p.head_dim, {p.out.bits, p.out.code, p.seed}, feedback,
                                                  row_codes(p.out, p.head_dim, b, h, t));
      }
    }
  }
}

void decode(const DecodeParams& p) {
  std::vector<double> x(p.head_dim);
  for (int b = 0; b < p.batch; ++b) {
    for (int h = 0; h < p.heads; ++h) {
      for (int t = 0; t < p.tokens; ++t) {
        decode_vector(row_codes(p.in, p.head_dim, b, h, t), row_scale(p.in, b, h, t), p.head_dim,
                      {p.in.bits, p.in.code, p.seed}, x.data());
        const int64_t row = row_offset(p.out, b, h, t);
        for (int i = 0; i < p.head_dim; ++i) {
          store_number(p.out.data, p.out.dtype, row + i, float(x[i] + (p.centre ? p.centre[h * p.head_dim + i] : 0.0)));
        }
      }
    }
  }
}

}  // namespace turboquant::reference
