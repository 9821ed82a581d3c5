// The oracle of transform: double, scalar.
#include <vector>

#include "reference/codec.h"
#include "tensor.h"

namespace turboquant::reference {

void transform(const TransformParams& p) {
  const int dim = p.head_dim;
  std::vector<double> y(dim);
  for (int b = 0; b < p.batch; ++b) {
    for (int h = 0; h < p.heads; ++h) {
      const int64_t m = h / (p.heads / p.matrices);
      const float* matrix = p.matrix + m * dim * dim;
      for (int t = 0; t < p.tokens; ++t) {
        const int64_t row = row_offset(p.x, b, h, t);
        for (double& v : y) v = 0;
        for (int i = 0; i < dim; ++i) {
          const double x = load_number(p.x.data, p.x.dtype, row + i) - (p.centre ? double(p.centre[m * dim + i]) : 0.0);
          for (int j = 0; j < dim; ++j) y[j] += x * matrix[i * dim + j];
        }
        const int64_t to = row_offset(p.out, b, h, t);
        for (int j = 0; j < dim; ++j) store_number(p.out.data, p.out.dtype, to + j, float(y[j]));
      }
    }
  }
}

}  // namespace turboquant::reference
