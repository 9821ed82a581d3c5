// The text of the GPU kernels: built in, and read from a checkout.
#include "gpu/kernel_text.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "metal/plan.h"

namespace turboquant {
namespace {

class KernelText : public testing::Test {
 protected:
  void TearDown() override { unsetenv("TURBOQUANT_KERNEL_SOURCES"); }
  static void use(const std::string& checkout) { setenv("TURBOQUANT_KERNEL_SOURCES", checkout.c_str(), 1); }
};

TEST_F(KernelText, OfTheCheckoutIsTheBuiltInOne) {
  for (auto source : {cuda::Source::encode, cuda::Source::merge, cuda::Source::few_rows, cuda::Source::many_rows}) {
    const std::string built_in(cuda::source_text(source));
    use(TURBOQUANT_SOURCE);
    const std::string read(cuda::source_text(source));
    TearDown();
    EXPECT_FALSE(built_in.empty());
    EXPECT_EQ(read, built_in) << cuda::source_name(source);
  }
  for (auto source : {metal::Source::codec, metal::Source::few_rows, metal::Source::prefill}) {
    const std::string built_in(metal::source_text(source));
    use(TURBOQUANT_SOURCE);
    const std::string read(metal::source_text(source));
    TearDown();
    EXPECT_FALSE(built_in.empty());
    EXPECT_EQ(read, built_in) << int(source);
  }
}

TEST_F(KernelText, AMissingFileIsNamed) {
  use("/nowhere");
  try {
    gpu::kernel_text("built in", "include/there_is_none.h");
    FAIL() << "no exception";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("/nowhere/include/there_is_none.h cannot be read"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace turboquant
