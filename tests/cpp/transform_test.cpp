// Vectors times a matrix a head: every instruction set against the oracle.
#include <gtest/gtest.h>

#include "support/vectors.h"

namespace turboquant {
namespace {

using namespace cases;

class Transform : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { force_isa(GetParam()); }
  void TearDown() override { force_isa(""); }
};

std::vector<float> floats(size_t count, uint64_t seed) {
  const Buffer x = gaussian(count, Dtype::float32, seed);
  std::vector<float> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = x.get(i);
  return out;
}

/// Vectors [batch, heads, tokens, dim] and what multiplies them.
struct Given {
  int batch, heads, tokens, dim, matrices;
  Buffer x;
  std::vector<float> matrix, centre;  // an empty centre: none
};

std::vector<float> transformed(const Given& g, Backend backend) {
  std::vector<float> y(g.x.size(), NAN);
  TransformParams p;
  p.batch = g.batch, p.heads = g.heads, p.tokens = g.tokens, p.head_dim = g.dim, p.matrices = g.matrices;
  p.x = contiguous<const void*>(g.x.bytes.data(), g.x.dtype, g.heads, g.tokens, g.dim);
  p.matrix = g.matrix.data();
  if (!g.centre.empty()) p.centre = g.centre.data();
  p.out = contiguous<void*>(y.data(), Dtype::float32, g.heads, g.tokens, g.dim);
  transform(p, backend);
  return y;
}

TEST_P(Transform, AgreesWithTheOracle) {
  const int batch = 2, heads = 6;
  for (int dim : {32, 64, 96, 128, 160, 192, 224, 256, 288, 512}) {
    for (auto [matrices, tokens] :
         {std::pair{1, 7}, {2, 7}, {6, 7}, {1, 1}, {2, 1}, {6, 1}}) {  // 7: four and three alone
      for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
        SCOPED_TRACE(testing::Message() << "dim " << dim << " matrices " << matrices << " tokens " << tokens
                                        << " dtype " << int(dtype));
        Given g{batch, heads, tokens, dim, matrices, gaussian(size_t(batch) * heads * tokens * dim, dtype)};
        g.matrix = floats(size_t(matrices) * dim * dim, 7);
        if (dtype != Dtype::bfloat16) g.centre = floats(size_t(matrices) * dim, 8);
        const auto want = transformed(g, Backend::reference), got = transformed(g, Backend::cpu);
        // A sum of dim products of normal numbers is some sqrt(2 dim) large, and rounded dim times.
        const double tolerance = 2 * dim * std::sqrt(2.0 * dim) * 0x1p-24;
        for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], tolerance) << i;
      }
    }
  }
}

// (1, 2, 0, ...) less the centre (0, 1, 0, ...) is (1, 1, 0, ...): the sum of the first two rows.
TEST_P(Transform, ComputedByHand) {
  const int dim = 32;
  Given g{1, 1, 1, dim, 1, Buffer(Dtype::float32, dim), std::vector<float>(dim * dim), std::vector<float>(dim)};
  g.x.set(0, 1), g.x.set(1, 2);
  for (int i = 2; i < dim; ++i) g.x.set(i, 0);
  g.centre[1] = 1;
  for (int j = 0; j < dim; ++j) g.matrix[j] = float(j), g.matrix[dim + j] = 100, g.matrix[2 * dim + j] = 1e6f;
  for (Backend backend : {Backend::reference, Backend::cpu}) {
    const auto y = transformed(g, backend);
    for (int j = 0; j < dim; ++j) EXPECT_EQ(y[j], 100 + j);
  }
}

TEST_P(Transform, DoesNotDependOnTheOthers) {
  const int dim = 192, tokens = 70;
  const Given g{1, 1, tokens, dim, 1, gaussian(size_t(tokens) * dim), floats(size_t(dim) * dim, 7), floats(dim, 8)};
  const auto all = transformed(g, Backend::cpu);
  for (int row = 0; row < tokens; ++row) {
    Given one{1, 1, 1, dim, 1, Buffer(Dtype::float32, dim), g.matrix, g.centre};
    for (int i = 0; i < dim; ++i) one.x.set(i, g.x.get(size_t(row) * dim + i));
    const auto alone = transformed(one, Backend::cpu);
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), all.begin() + size_t(row) * dim)) << row;
  }
}

TEST(TransformErrors, NameTheRule) {
  TransformParams p;
  p.batch = 1, p.heads = 3, p.tokens = 1, p.head_dim = 64, p.matrices = 2;
  const auto message = [&] {
    try {
      transform(p);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message(), "[transform] heads must be a multiple of matrices; got 3 and 2");
  p.matrices = 3;
  EXPECT_EQ(message(), "[transform] x, matrix and out must not be null");
  p.out.dtype = Dtype::float16;
  EXPECT_EQ(message(), "[transform] out must be float32");
  p.head_dim = 80;
  EXPECT_EQ(message(), "[transform] head_dim must be a multiple of 32 from 32 to 512; got 80");
}

INSTANTIATE_TEST_SUITE_P(Isa, Transform, testing::ValuesIn(available_isas()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace turboquant
