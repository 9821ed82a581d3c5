// The kernels' text compiles for every architecture served, whatever the machine; no GPU is used.
#include <elf.h>
#include <gtest/gtest.h>

#include <cstring>

#include "support/cases.h"
#include "support/cuda_attend.h"

namespace turboquant {
namespace {

using cases::Case;

TEST(Plan, FitsTheDeviceAndCoversTheCache) {
  const std::vector<cuda::Device> devices{{132, 232448}, {108, 166912}, {84, 101376}, {16, 101376}};
  for (const auto& device : devices) {
    for (int dim : {32, 64, 96, 128, 160, 192, 224, 256, 384, 512}) {
      for (int bits : {2, 3, 4, 8}) {
        for (int len : {1, 2, 3, 4, 5, 6, 8, 40, 2048}) {
          for (int batch : {1, 7, 300}) {
            const cuda::AttentionShape shape{batch, 16, 4, len, 131072, dim, bits, bits, batch == 7};
            const auto plan = cuda::plan_attention(shape, device);
            SCOPED_TRACE(testing::Message() << plan.kernel_name() << " dim " << dim << " bits " << bits << " queries "
                                            << len << " batch " << batch << " shared " << device.shared_bytes);
            EXPECT_LE(plan.shared_bytes, device.shared_bytes);
            const int64_t segments = int64_t(batch) * 4 * ((shape.rows() + plan.rows - 1) / plan.rows);
            if (plan.method == cuda::AttentionPlan::whole) {
              EXPECT_EQ(plan.blocks, segments);
              continue;
            }
            EXPECT_EQ(plan.slots, plan.splits ? plan.splits * segments : plan.blocks + segments);
            if (plan.splits) EXPECT_EQ(plan.blocks, plan.splits * segments);
            const int64_t workspace = int64_t(plan.slots) * plan.rows * plan.partial_floats(dim) * 4;
            if (plan.method == cuda::AttentionPlan::split) {
              EXPECT_LE(workspace, 64 << 20);
            } else if (plan.method == cuda::AttentionPlan::many_rows) {  // 32-bit sums of weights times signed bytes
              EXPECT_LE((segments * 131072 / plan.blocks + 64) * 255 * 127, INT64_C(1) << 31);
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

/// Asynchronous copies to a register plus a uniform register in the machine code of a compiled kernel.  With a cache
/// policy ptxas encodes them wrongly (copy16 of ptx.cu.h), and a GPU that meets one ends the program.
int copies_with_uniform_addresses(const std::string& cubin) {
  const auto at = [&](auto& to, size_t offset) { std::memcpy(&to, cubin.data() + offset, sizeof to); };
  Elf64_Ehdr file;
  at(file, 0);
  const auto section = [&](int i) {
    Elf64_Shdr header;
    at(header, file.e_shoff + i * file.e_shentsize);
    return header;
  };
  const size_t names = section(file.e_shstrndx).sh_offset;
  int found = 0, copies = 0;
  for (int i = 0; i < file.e_shnum; ++i) {
    const Elf64_Shdr header = section(i);
    if (std::strncmp(cubin.data() + names + header.sh_name, ".text.", 6)) continue;
    for (size_t place = 0; place < header.sh_size; place += 16) {
      uint64_t word;  // the first of an instruction's two: its low twelve bits are the operation and its form
      at(word, header.sh_offset + place);
      copies += (word & 0xfff) == 0xfae, found += (word & 0xfff) == 0xdae;
    }
  }
  EXPECT_GT(copies, 0) << "the code of copies has changed";
  return found;
}

class Compile : public testing::TestWithParam<std::string> {
 protected:
  void attention(const cases::Case& c, const cuda::Device& device = {}) {
    SCOPED_TRACE(c.name());
    cases::Inputs inputs(c);
    const auto call = jit::attention_call(inputs.params(), device, false);
    for (size_t k = 0; k < call.kernels.size(); ++k) {
      const auto source = jit::whole_source(call.kernels[k], call.inputs[k], call.outputs[k]);
      const auto code = jit::compile(source, GetParam());
      EXPECT_FALSE(code.empty());
      const bool copies =
          source.find("run_few_rows<") != std::string::npos || source.find("run_many_rows<") != std::string::npos;
      if (copies && GetParam() == "sm_90a") EXPECT_EQ(copies_with_uniform_addresses(code), 0);
    }
  }
};

TEST_P(Compile, Attention) {
  for (int len : {2, 6, 8}) attention({.query_len = len, .kv_len = 40, .causal = true});
  // Widths differ in no instruction that only some architectures have: one will do for the older.
  const std::vector<int> widths = GetParam() == "sm_90a" ? std::vector{2, 3, 4} : std::vector{3};
  for (int bits : widths) {  // long contexts for a small GPU: rows with sixteen warps, and decoding
    for (int len : {1, 4}) attention({.key_bits = bits, .value_bits = bits, .query_len = len, .kv_len = 200}, {1});
    attention({.key_bits = bits, .value_bits = bits, .query_len = 1, .kv_len = 700}, {1});
  }
  for (int len : {1, 6, 40}) {  // other kinds of codes
    for (int dim : {64, 256}) {
      cases::Case c{.head_dim = dim, .query_len = len, .kv_len = 200};
      c.key_code = c.value_code = Code::trellis;
      attention(c, {1});
      if (GetParam() != "sm_90a") continue;
      c.key_bits = 2, c.value_bits = 8, c.value_code = Code::scalar;
      attention(c);
    }
  }
  for (int len : {1, 4, 40}) {
    for (int bits : widths) {
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

TEST_P(Compile, AttentionOverExactCopies) {
  for (int len : {1, 6, 40}) {
    Case c{.query_len = len, .kv_len = 200, .recent = 128, .first = 4, .ring = 384};
    c.key_code = c.value_code = Code::trellis;
    attention(c);
  }
  attention({.head_dim = 128, .kv_len = 200, .recent = 128, .first = 4, .ring = 384});
}

TEST_P(Compile, AttentionOfOtherWidths) {
  Case c{.head_dim = 512, .query_len = 4, .kv_len = 200};
  c.key_code = c.value_code = Code::trellis;
  attention(c);
  attention({.head_dim = 192, .kv_len = 200, .recent = 128, .first = 4, .ring = 384, .value_dim = 128});
}

TEST_P(Compile, Codec) {
  const jit::Array array;
  for (int dim : {32, 96, 160, 224, 256}) {
    for (const char* type : {"float", "__half", "__nv_bfloat16"}) {
      const jit::Array x(nullptr, type, {1, 1, 1, dim}), codes(nullptr, "uint32_t", {1, 1, 1, 1}),
          scales(nullptr, "__half", {1, 1, 1});
      for (const bool feedback : {false, true}) {
        if (feedback && (x.type != "__half" || (dim != 96 && dim != 256))) continue;  // it compiles slowly
        std::vector<cuda::EncodeSide> sides{{3, true, feedback}, {4, false, feedback}};
        if (dim != 160) sides[0].code = Code::trellis;
        if (dim == 96) sides[1].bits = 8;
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
      const auto decode = cuda::decode_kernel({2, true}, dim, 7, 1);
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
