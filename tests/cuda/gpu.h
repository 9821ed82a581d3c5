// The fixture of tests that run kernels: skipped where there is no GPU.
#pragma once

#include <gtest/gtest.h>

#include "support/cuda_jit.h"

namespace turboquant {

class Gpu : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU";
  }
};

}  // namespace turboquant
