// `transform` of few vectors on a GPU against the oracle.
#include "compare.h"
#include "support/vectors.h"

namespace turboquant {
namespace {

using namespace cases;

TEST_F(Gpu, TransformMatchesTheOracle) {
  for (int dim : {32, 96, 256, 512}) {
    for (bool centred : {false, true}) {
      if (short_run() && centred != (dim == 96)) continue;
      SCOPED_TRACE(testing::Message() << dim << (centred ? " centred" : ""));
      const int batch = 3, heads = 4, tokens = 2, matrices = 2;
      const Buffer x = gaussian(size_t(batch) * heads * tokens * dim, centred ? Dtype::float16 : Dtype::float32);
      const Buffer w = gaussian(size_t(matrices) * dim * dim, Dtype::float32, 11);
      const Buffer c = gaussian(size_t(matrices) * dim, Dtype::float32, 12);
      std::vector<float> want(x.size()), got(x.size());
      TransformParams p;
      p.batch = batch, p.heads = heads, p.tokens = tokens, p.head_dim = dim, p.matrices = matrices;
      p.x = contiguous<const void*>(x.bytes.data(), x.dtype, heads, tokens, dim);
      p.matrix = reinterpret_cast<const float*>(w.bytes.data());
      if (centred) p.centre = reinterpret_cast<const float*>(c.bytes.data());
      p.out = contiguous<void*>(want.data(), Dtype::float32, heads, tokens, dim);
      transform(p, Backend::reference);
      const jit::Memory in(x.bytes.data(), x.bytes.size()), matrix(w.bytes.data(), w.bytes.size());
      const jit::Memory centre(c.bytes.data(), c.bytes.size()), out(got.size() * 4);
      const std::vector<int32_t> shape{batch, heads, tokens, dim};
      jit::Launch(cuda::transform_kernel(dim, matrices, centred),
                  {{in.get(), jit::type_name(x.dtype), shape},
                   {matrix.get(), "float", {matrices, dim, dim}},
                   {centre.get(), "float", {matrices, dim}}},
                  {{out.get(), "float", shape}})();
      jit::check(cudaDeviceSynchronize(), "transform");
      out.download(got.data());
      // Sums of dim products of normal numbers, each step rounded.
      const double tolerance = dim * 0x1p-24 * 8 * std::sqrt(double(dim));
      for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], tolerance) << i;
    }
  }
}

}  // namespace
}  // namespace turboquant
