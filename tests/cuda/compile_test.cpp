// The kernels' text compiles for every architecture served, whatever the machine; no GPU is used.
#include <gtest/gtest.h>

#include "attend.h"
#include "cases.h"

namespace turboquant {
namespace {

TEST(Plan, FitsTheDeviceAndCoversTheCache) {
  const std::vector<cuda::Device> devices{{132, 232448}, {108, 166912}, {84, 101376}, {16, 101376}};
  for (const auto& device : devices) {
    for (int dim : {32, 64, 96, 128, 160, 192, 224, 256}) {
      for (int bits : {2, 3, 4}) {
        for (int len : {1, 2, 3, 4, 5, 6, 8, 40, 2048}) {
          for (int batch : {1, 7, 300}) {
            const cuda::AttentionShape shape{batch, 16, 4, len, 131072, dim, bits, bits, batch == 7};
            const auto plan = cuda::plan_attention(shape, device);
            SCOPED_TRACE(testing::Message() << plan.name() << " dim " << dim << " bits " << bits << " queries " << len
                                            << " batch " << batch << " shared " << device.shared_bytes);
            EXPECT_LE(plan.shared_bytes, device.shared_bytes);
            const int64_t segments = int64_t(batch) * 4 * ((shape.rows() + plan.rows - 1) / plan.rows);
            if (plan.method == cuda::AttentionPlan::whole) {
              EXPECT_EQ(plan.blocks, segments);
              continue;
            }
            EXPECT_EQ(plan.slots, plan.parts ? plan.parts * segments : plan.blocks + segments);
            if (plan.parts) EXPECT_EQ(plan.blocks, plan.parts * segments);
            const int64_t workspace = int64_t(plan.slots) * plan.rows * plan.partial_floats(dim) * 4;
            if (plan.method == cuda::AttentionPlan::split) {
              EXPECT_LE(workspace, 64 << 20);
            } else if (plan.method == cuda::AttentionPlan::many) {  // 32-bit sums of weights times signed bytes
              EXPECT_LE((segments * 131072 / plan.blocks + 64) * 255 * 104, INT64_C(1) << 31);
            } else {  // 32-bit sums of weights up to 255 times bytes up to 232
              EXPECT_LE((segments * 131072 / plan.blocks + 32 * plan.warps) / plan.warps * 255 * 232, INT64_C(1) << 31);
            }
          }
        }
      }
    }
  }
}

TEST(Plan, AGridHasNoMoreColumnsThanItMay) {
  for (int batch : {1, 4, 5000}) {
    const cuda::AttentionShape shape{batch, 32, 8, 8192, 200000, 256, 4, 4, false};
    const auto plan = cuda::plan_attention(shape, {128, 101376});
    EXPECT_LE(cuda::scan_extent(plan).grid[1], 65535);
  }
}

class Compile : public testing::TestWithParam<std::string> {
 protected:
  void attention(const cases::Case& c, const cuda::Device& device = {}) {
    SCOPED_TRACE(c.name());
    cases::Inputs inputs(c);
    const auto call = jit::attention_call(inputs.params(), device, false);
    for (size_t k = 0; k < call.kernels.size(); ++k) {
      EXPECT_FALSE(
          jit::compile(jit::whole_source(call.kernels[k], call.inputs[k], call.outputs[k]), GetParam()).empty());
    }
  }
};

TEST_P(Compile, Attention) {
  for (int len : {2, 6, 8}) attention({.query_len = len, .kv_len = 40, .causal = true});
  for (int len : {1, 4, 40}) {
    for (int bits : {2, 3, 4}) {
      attention({.key_bits = bits, .value_bits = bits, .query_len = len, .kv_len = 40});
    }
    attention({.key_bits = 4, .value_bits = 2, .head_dim = 96, .query_len = len, .kv_len = 40, .causal = true});
    attention({.head_dim = 224, .query_len = len, .kv_len = 40, .mask = MaskKind::additive, .dtype = Dtype::bfloat16});
    attention({.head_dim = 128, .query_len = len, .kv_len = 40, .mask = MaskKind::boolean, .dtype = Dtype::float16});
    attention({.head_dim = 64,
               .query_len = len,
               .kv_len = 40,
               .sinks = true,
               .centred = true,
               .mask = MaskKind::additive,
               .dtype = Dtype::bfloat16});
    attention({.head_dim = 128, .query_len = len, .kv_len = 40}, {.multiprocessors = 84, .shared_bytes = 101376});
  }
}

TEST_P(Compile, Codec) {
  const jit::Array array;
  for (int dim : {32, 96, 160, 224, 256}) {
    for (const char* type : {"float", "__half", "__nv_bfloat16"}) {
      const jit::Array x(nullptr, type, {1, 1, 1, dim}), codes(nullptr, "uint32_t", {1, 1, 1, 1}),
          scales(nullptr, "__half", {1, 1, 1});
      for (const bool feedback : {false, true}) {
        if (feedback && (x.type != "__half" || (dim != 96 && dim != 256))) continue;  // it compiles slowly
        const std::vector<cuda::EncodeSide> sides{{3, true, feedback}, {4, false, feedback}};
        const auto encode = cuda::encode_kernel(sides, dim, 7, 1, 1);
        EXPECT_FALSE(
            jit::compile(jit::whole_source(encode, {x, array, array, x, array, array}, {codes, scales, codes, scales}),
                         GetParam())
                .empty());
        const auto append = cuda::append_kernel(sides, dim, 7, 1, 1);
        EXPECT_FALSE(jit::compile(jit::whole_source(
                                      append, {x, array, array, codes, scales, x, array, array, codes, scales, array},
                                      {{nullptr, "uint8_t", {1}}}),
                                  GetParam())
                         .empty());
      }
      const auto decode = cuda::decode_kernel(2, true, dim, 7, 1);
      EXPECT_FALSE(jit::compile(jit::whole_source(decode, {codes, scales, array}, {x}), GetParam()).empty());
    }
  }
}

TEST_P(Compile, KernelsWithLaunchBoundsAreFoundByName) {
  const cuda::AttentionShape shape{1, 16, 4, 1, 20000, 256, 3, 3, false};
  const auto plan = cuda::plan_attention(shape, {});
  const auto kernel = cuda::partial_kernel(shape, {}, plan);
  ASSERT_EQ(kernel.max_threads, 512);
  const jit::Array any(nullptr, "__half", {1, 1, 1, 1}), codes(nullptr, "uint32_t", {1, 1, 1, 1}), none;
  const auto source =
      jit::whole_source(kernel, {any, codes, any, codes, any, {nullptr, "uint8_t", {1}}, none, none}, {none});
  EXPECT_NE(source.find("__launch_bounds__(512)"), std::string::npos);
  EXPECT_NE(jit::name_as_mlx_does(kernel, source, GetParam()).find("custom_kernel_" + kernel.name), std::string::npos);
}

TEST_P(Compile, ErrorsShowTheCompilersLog) {
  try {
    jit::compile("__global__ void f() { undeclared(); }", GetParam());
    FAIL() << "compiled";
  } catch (const std::runtime_error& e) {
    EXPECT_NE(std::string(e.what()).find("undeclared"), std::string::npos);
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, Compile, testing::Values("sm_80", "sm_90a"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace turboquant
