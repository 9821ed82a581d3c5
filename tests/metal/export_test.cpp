// The MLX layer of the Metal backend without Metal: MLX's exporter records custom kernels wherever it runs, which
// checks that every launch has the arrays, names and template arguments that metal_kernel takes.
#include <gtest/gtest.h>
#include <mlx/export.h>
#include <mlx/mlx.h>

#include <filesystem>

#include "primitives/metal.h"

namespace turboquant::ops {
namespace {

using Arrays = std::vector<mx::array>;

/// Exports what `graph` makes of `inputs` and returns the shapes it says.
std::vector<mx::Shape> export_shapes(const std::function<Arrays(const Arrays&)>& graph, const Arrays& inputs) {
  const auto file = std::filesystem::path(testing::TempDir()) / "turboquant_metal.mlxfn";
  std::vector<mx::Shape> shapes;
  mx::export_function(file.string(), std::function<Arrays(const Arrays&)>([&](const Arrays& in) {
                        const auto out = graph(in);
                        shapes.clear();
                        for (const auto& a : out) shapes.push_back(a.shape());
                        return out;
                      }),
                      inputs);
  std::filesystem::remove(file);
  return shapes;
}

const mx::Stream kGpu(0, mx::Device::gpu);

class MetalExport : public testing::Test {
 protected:
  void SetUp() override {
    if (mx::metal::is_available()) GTEST_SKIP() << "the operations themselves can be tested here";
  }
};

TEST_F(MetalExport, Encodes) {
  const auto x = mx::zeros({2, 3, 5, 96}, mx::float16), centre = mx::zeros({3, 96});
  const auto shapes = export_shapes(
      [](const Arrays& in) {
        const auto sides = metal_backend::encode({in[0], in[0]}, {3, 4}, 1, {in[1], std::nullopt}, kGpu);
        return Arrays{sides[0].codes, sides[0].scales, sides[1].codes, sides[1].scales};
      },
      {x, centre});
  EXPECT_EQ(shapes, (std::vector<mx::Shape>{{2, 3, 5, 9}, {2, 3, 5}, {2, 3, 5, 12}, {2, 3, 5}}));
}

TEST_F(MetalExport, Decodes) {
  const auto shapes = export_shapes(
      [](const Arrays& in) {
        return Arrays{metal_backend::decode({in[0], in[1]}, 3, 1, mx::bfloat16, std::nullopt, kGpu)};
      },
      {mx::zeros({2, 3, 5, 9}, mx::uint32), mx::zeros({2, 3, 5}, mx::float16)});
  EXPECT_EQ(shapes, (std::vector<mx::Shape>{{2, 3, 5, 96}}));
}

TEST_F(MetalExport, Attends) {
  for (int query_len : {1, 5, 700}) {
    for (bool rules : {false, true}) {
      const auto shapes = export_shapes(
          [&](const Arrays& in) {
            AttentionOptions o;
            o.kv_len = 1000;
            o.causal = true;
            if (rules) {
              o.mask = in[5];
              o.starts = in[6];
              o.sinks = in[7];
              o.key_centre = in[8];
              o.value_centre = in[8];
            }
            return Arrays{metal_backend::attention(in[0], {in[1], in[2]}, {in[3], in[4]}, o, kGpu)};
          },
          {mx::zeros({2, 8, query_len, 64}, mx::float16), mx::zeros({2, 2, 1024, 6}, mx::uint32),
           mx::zeros({2, 2, 1024}, mx::float16), mx::zeros({2, 2, 1024, 6}, mx::uint32),
           mx::zeros({2, 2, 1024}, mx::float16), mx::zeros({2, 8, query_len, 1000}, mx::bool_),
           mx::zeros({2}, mx::int32), mx::zeros({8}), mx::zeros({2, 64})});
      EXPECT_EQ(shapes, (std::vector<mx::Shape>{{2, 8, query_len, 64}}));
    }
  }
}

}  // namespace
}  // namespace turboquant::ops
