// The oracle of encode and decode: double, scalar, in the paper's order.
#include "reference/codec.h"

#include <cmath>
#include <limits>
#include <vector>

#include "tensor.h"
#include "turboquant/rotation.h"

namespace turboquant::reference {
namespace {

/// The code of the level nearest to a number of levels.
int nearest(int bits, double levels) {
  int m = 0;
  while (m + 1 < magnitudes(bits) && 2 * std::abs(levels) >= double_threshold(bits, m)) ++m;
  return levels < 0 ? m + magnitudes(bits) : m;
}

/// |levels| of codes.
double length_of(int bits, const std::vector<int>& codes) {
  double square = 0;
  for (int code : codes) square += level(bits, code) * level(bits, code);
  return std::sqrt(square);
}

/// Codes of u, in levels, block by block: the errors of the blocks before move what a block's codes are nearest to.
void code_with_feedback(int bits, const std::vector<double>& u, const uint16_t* feedback, std::vector<int>& codes) {
  const int dim = int(u.size());
  std::vector<double> error(dim);
  for (int i = 0; i < dim; ++i) {
    double target = u[i];
    for (int j = 0; j < i / 32 * 32; ++j) target -= double(half_to_float(feedback[i * dim + j])) * error[j];
    codes[i] = nearest(bits, target);
    error[i] = level(bits, codes[i]) - u[i];
  }
}

void write_code(uint32_t* words, int bits, int i, int code) {
  uint32_t* group = words + i / 32 * bits;
  for (int bit = 0; bit < bits; ++bit) {
    group[bit_word(bits, i % 32, bit)] |= uint32_t(code >> bit & 1) << bit_position(bits, i % 32, bit);
  }
}

int read_code(const uint32_t* words, int bits, int i) {
  const uint32_t* group = words + i / 32 * bits;
  int code = 0;
  for (int bit = 0; bit < bits; ++bit) {
    code |= int(group[bit_word(bits, i % 32, bit)] >> bit_position(bits, i % 32, bit) & 1) << bit;
  }
  return code;
}

}  // namespace

uint16_t encode_vector(const double* x, int dim, int bits, uint64_t seed, const uint16_t* feedback, uint32_t* words) {
  std::vector<double> r(x, x + dim);
  for (int w = 0; w < words_per_vector(bits, dim); ++w) words[w] = 0;
  double square = 0;
  for (double v : r) square += v * v;
  if (!std::isfinite(square)) return float_to_half(std::numeric_limits<float>::quiet_NaN());
  if (square == 0) return 0;
  const double norm = std::sqrt(square);
  for (double& v : r) v /= norm;
  rotate(r.data(), dim, seed);
  std::vector<int> codes(dim);
  for (int i = 0; i < dim; ++i) codes[i] = nearest(bits, unit(bits) * r[i] * std::sqrt(double(dim)));
  if (feedback && dim > 32) {
    const double length = length_of(bits, codes);
    for (double& v : r) v *= length;
    code_with_feedback(bits, r, feedback, codes);
  }
  for (int i = 0; i < dim; ++i) write_code(words, bits, i, codes[i]);
  return float_to_half(float(norm / (length_of(bits, codes) * level_step(bits))));
}

void decode_vector(const uint32_t* words, uint16_t scale, int dim, int bits, uint64_t seed, double* x) {
  for (int i = 0; i < dim; ++i) {
    x[i] = double(half_to_float(scale)) * level_step(bits) * level(bits, read_code(words, bits, i));
  }
  unrotate(x, dim, seed);
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
        row_scale(p.out, b, h, t) =
            encode_vector(x.data(), p.head_dim, p.out.bits, p.seed, feedback, row_codes(p.out, p.head_dim, b, h, t));
      }
    }
  }
}

void decode(const DecodeParams& p) {
  std::vector<double> x(p.head_dim);
  for (int b = 0; b < p.batch; ++b) {
    for (int h = 0; h < p.heads; ++h) {
      for (int t = 0; t < p.tokens; ++t) {
        decode_vector(row_codes(p.in, p.head_dim, b, h, t), row_scale(p.in, b, h, t), p.head_dim, p.in.bits, p.seed,
                      x.data());
        const int64_t row = row_offset(p.out, b, h, t);
        for (int i = 0; i < p.head_dim; ++i) {
          store_number(p.out.data, p.out.dtype, row + i, float(x[i] + (p.centre ? p.centre[h * p.head_dim + i] : 0.0)));
        }
      }
    }
  }
}

}  // namespace turboquant::reference
