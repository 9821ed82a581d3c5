// Softmax as a value: scores are pushed one at a time, partial results of split ranges merge, and `finish` gives the
// weighted mean (Milakov & Gimelshein, arXiv 1805.02867).  The reference and the tests use it; the kernels have forms
// of their own.
#pragma once

#include <cmath>
#include <limits>

namespace turboquant {

/// Running maximum and sum of exponentials.  An accumulator of weighted values belongs to it and is kept by the
/// caller: whenever `push` or `merge` returns factors, the caller scales by them.
template <class Real>
struct OnlineSoftmax {
  Real max = -std::numeric_limits<Real>::infinity();
  Real sum = 0;

  /// What to multiply the old accumulator and the new value by.
  struct Factors {
    Real old_part, new_part;
  };

  /// Adds a score.  A score of minus infinity adds nothing; NaN poisons the sum.
  Factors push(Real score) { return merge({score, Real(1)}); }

  /// Adds the scores of another range.
  Factors merge(const OnlineSoftmax& other) {
    const Real top = std::fmax(max, other.max);
    const Real old_part = weight(max, top), new_part = weight(other.max, top);
    sum = sum * old_part + other.sum * new_part;
    max = top;
    return {old_part, new_part};
  }

  /// Multiplier that turns the accumulator into the output; 0 when nothing was visible.
  Real finish() const { return sum == 0 ? Real(0) : Real(1) / sum; }

 private:
  static Real weight(Real m, Real top) {
    return m == -std::numeric_limits<Real>::infinity() ? Real(0) : std::exp(m - top);
  }
};

}  // namespace turboquant
