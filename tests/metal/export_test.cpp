// The MLX layer of the Metal backend without Metal: MLX's exporter records custom kernels wherever it runs, which
// checks that every launch has the arrays, names and template arguments that metal_kernel takes.
#include <gtest/gtest.h>
#include <mlx/export.h>
#include <mlx/mlx.h>

#include <filesystem>
#include <map>

#include "metal/plan.h"
#include "mlx_ops/metal.h"

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

/// Expects that the kernel which makes `out` reads these arrays, by the names of its inputs; others are unchecked.
void expect_bound(const mx::array& out, const std::vector<std::string>& names,
                  const std::map<std::string, mx::array>& arrays) {
  ASSERT_TRUE(out.has_primitive());
  ASSERT_EQ(out.inputs().size(), names.size());
  for (size_t i = 0; i < names.size(); ++i) {
    const auto wanted = arrays.find(names[i]);
    if (wanted != arrays.end()) {
      EXPECT_EQ(out.inputs()[i].id(), wanted->second.id()) << names[i];
    }
  }
}

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
        const auto sides =
            metal_backend::encode({in[0], in[2]}, {{.width = 3, .seed = 1, .centre = in[1]}, {4, 1}}, kGpu);
        expect_bound(sides[1].codes, metal::encode_kernel({2, 3, 5, 96, {3, 4}, {true, false}}).inputs,
                     {{"x", in[0]}, {"x_centre", in[1]}, {"y", in[2]}});
        return Arrays{sides[0].codes, sides[0].scales, sides[1].codes, sides[1].scales};
      },
      {x, centre, mx::zeros({2, 3, 5, 96}, mx::float16)});
  EXPECT_EQ(shapes, (std::vector<mx::Shape>{{2, 3, 5, 9}, {2, 3, 5}, {2, 3, 5, 12}, {2, 3, 5}}));
}

TEST_F(MetalExport, EncodesWithFeedback) {
  const auto x = mx::zeros({2, 3, 5, 96}, mx::float16), g = mx::zeros({3, 96, 96}, mx::float16);
  for (int fed : {0, 1, 2}) {  // the first side, the second, both
    const auto shapes = export_shapes(
        [fed](const Arrays& in) {
          const std::optional<mx::array> none, first = in[2], second = in[3];
          const Coding x{3, 1, in[4], fed == 1 ? none : first}, y{4, 1, none, fed == 0 ? none : second};
          const auto sides = metal_backend::encode({in[0], in[1]}, {x, y}, kGpu);
          std::map<std::string, mx::array> arrays{{"x", in[0]}, {"x_centre", in[4]}, {"y", in[1]}};
          if (fed != 1) arrays.emplace("x_feedback", in[2]);
          if (fed != 0) arrays.emplace("y_feedback", in[3]);
          expect_bound(sides[1].codes,
                       metal::encode_kernel({2, 3, 5, 96, {3, 4}, {true, false}, 1, {fed != 1, fed != 0}}).inputs,
                       arrays);
          return Arrays{sides[0].codes, sides[0].scales, sides[1].codes, sides[1].scales};
        },
        {x, mx::zeros({2, 3, 5, 96}, mx::float16), g, mx::zeros({3, 96, 96}, mx::float16), mx::zeros({3, 96})});
    EXPECT_EQ(shapes, (std::vector<mx::Shape>{{2, 3, 5, 9}, {2, 3, 5}, {2, 3, 5, 12}, {2, 3, 5}}));
  }
  const auto one = export_shapes(
      [](const Arrays& in) {
        const auto side = metal_backend::encode({in[0]}, {{.width = 3, .seed = 1, .feedback = in[1]}}, kGpu)[0];
        expect_bound(side.codes, metal::encode_kernel({2, 3, 5, 96, {3}, {false}, 1, {true}}).inputs,
                     {{"x", in[0]}, {"x_feedback", in[1]}});
        return Arrays{side.codes, side.scales};
      },
      {x, g});
  EXPECT_EQ(one, (std::vector<mx::Shape>{{2, 3, 5, 9}, {2, 3, 5}}));
}

TEST_F(MetalExport, Decodes) {
  const auto shapes = export_shapes(
      [](const Arrays& in) {
        const auto out = metal_backend::decode({in[0], in[1]}, {3, 1, in[2]}, mx::bfloat16, kGpu);
        expect_bound(out, metal::decode_kernel({2, 3, 5, 96, {3}, {true}}, Dtype::bfloat16).inputs,
                     {{"codes", in[0]}, {"scales", in[1]}, {"centre", in[2]}});
        return Arrays{out};
      },
      {mx::zeros({2, 3, 5, 9}, mx::uint32), mx::zeros({2, 3, 5}, mx::float16), mx::zeros({3, 96})});
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
              o.keys.centre = in[8];
              o.values.centre = in[9];
            }
            const auto out = metal_backend::attention(in[0], {in[1], in[2]}, {in[3], in[4]}, o, kGpu);
            std::map<std::string, mx::array> arrays{{"q", in[0]},
                                                    {"key_codes", in[1]},
                                                    {"key_scales", in[2]},
                                                    {"value_codes", in[3]},
                                                    {"value_scales", in[4]}};
            if (rules) {
              const char* names[] = {"mask", "starts", "sinks", "key_centre", "value_centre"};
              for (size_t i = 0; i < 5; ++i) arrays.emplace(names[i], in[5 + i]);
            }
            const auto plan = metal::plan_attention({.batch = 2,
                                                     .query_heads = 8,
                                                     .kv_heads = 2,
                                                     .query_len = query_len,
                                                     .kv_len = 1000,
                                                     .head_dim = 64,
                                                     .keys = 3,
                                                     .values = 3,
                                                     .dtype = Dtype::float16});
            if (plan.merged) {
              const auto &partial = out.inputs()[1], &stats = out.inputs()[2];
              EXPECT_EQ(partial.shape(), (mx::Shape{2, 8, query_len, plan.splits, 64}));
              EXPECT_EQ(stats.shape(), (mx::Shape{2, 8, query_len, plan.splits, 3}));
              expect_bound(partial, plan.attend.inputs, arrays);
              arrays.emplace("partial", partial);
              arrays.emplace("stats", stats);
            }
            expect_bound(out, plan.merged ? plan.merge.inputs : plan.attend.inputs, arrays);
            return Arrays{out};
          },
          {mx::zeros({2, 8, query_len, 64}, mx::float16), mx::zeros({2, 2, 1024, 6}, mx::uint32),
           mx::zeros({2, 2, 1024}, mx::float16), mx::zeros({2, 2, 1024, 6}, mx::uint32),
           mx::zeros({2, 2, 1024}, mx::float16), mx::zeros({2, 8, query_len, 1000}, mx::bool_),
           mx::zeros({2}, mx::int32), mx::zeros({8}), mx::zeros({2, 64}), mx::zeros({2, 64})});
      EXPECT_EQ(shapes, (std::vector<mx::Shape>{{2, 8, query_len, 64}}));
    }
  }
}

TEST_F(MetalExport, AttendsToExactCopies) {
  for (int query_len : {1, 700}) {
    const auto shapes = export_shapes(
        [&](const Arrays& in) {
          AttentionOptions o;
          o.kv_len = 1000;
          o.causal = true;
          o.recent = 32, o.first = 4;
          o.exact = ExactArrays{{in[5], in[6]}, {in[7], in[8]}};
          const auto out = metal_backend::attention(in[0], {in[1], in[2]}, {in[3], in[4]}, o, kGpu);
          const auto plan = metal::plan_attention({.batch = 2,
                                                   .query_heads = 8,
                                                   .kv_heads = 2,
                                                   .query_len = query_len,
                                                   .kv_len = 1000,
                                                   .head_dim = 64,
                                                   .keys = 3,
                                                   .values = 3,
                                                   .dtype = Dtype::float16,
                                                   .ring = 64,
                                                   .recent = 32,
                                                   .first = 4});
          const auto sides = [&](size_t first) {
            return std::map<std::string, mx::array>{{"q", in[0]},
                                                    {"key_codes", in[first]},
                                                    {"key_scales", in[first + 1]},
                                                    {"value_codes", in[first + 2]},
                                                    {"value_scales", in[first + 3]}};
          };
          const auto &partial = out.inputs()[1], &copy_partial = out.inputs()[3];
          EXPECT_EQ(copy_partial.shape(-2), plan.copy_params[metal_layout::kSplits]);
          expect_bound(partial, plan.attend.inputs, sides(1));
          expect_bound(copy_partial, plan.attend_copies.inputs, sides(5));
          expect_bound(out, plan.merge.inputs,
                       {{"q", in[0]},
                        {"partial", partial},
                        {"stats", out.inputs()[2]},
                        {"copy_partial", copy_partial},
                        {"copy_stats", out.inputs()[4]}});
          return Arrays{out};
        },
        {mx::zeros({2, 8, query_len, 64}, mx::float16), mx::zeros({2, 2, 1024, 6}, mx::uint32),
         mx::zeros({2, 2, 1024}, mx::float16), mx::zeros({2, 2, 1024, 6}, mx::uint32),
         mx::zeros({2, 2, 1024}, mx::float16), mx::zeros({2, 2, 68, 16}, mx::uint32),
         mx::zeros({2, 2, 68}, mx::float16), mx::zeros({2, 2, 68, 16}, mx::uint32),
         mx::zeros({2, 2, 68}, mx::float16)});
    EXPECT_EQ(shapes, (std::vector<mx::Shape>{{2, 8, query_len, 64}}));
  }
}

}  // namespace
}  // namespace turboquant::ops
