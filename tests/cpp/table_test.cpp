// Every kernel of every instruction set against the oracle, over the whole table.
#include <gtest/gtest.h>

#include "cases.h"

namespace turboquant {
namespace {

// q and the softmax weights are kept to 15 bits (a high and a low int8 part): errors near 1e-4, never 5e-4.
constexpr double kTolerance = 5e-4;

class Table : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { force_isa(GetParam()); }
  void TearDown() override { force_isa(""); }
};

TEST_P(Table, AttentionMatchesTheOracle) {
  for (const auto& c : cases::table(true)) {
    SCOPED_TRACE(c.name());
    const auto d = cases::compare(c, [](const AttendParams& p) { attend(p, Backend::cpu); });
    EXPECT_LE(d.overall, kTolerance + cases::rounding(c.dtype));
    EXPECT_LE(d.worst_row, kTolerance + cases::rounding(c.dtype));
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, Table, testing::ValuesIn(available_isas()), [](const auto& info) { return info.param; });

}  // namespace
}  // namespace turboquant
