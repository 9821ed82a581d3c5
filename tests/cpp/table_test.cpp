// Every kernel of every instruction set against the oracle, over the whole table.
#include "support/table.h"

#include <gtest/gtest.h>

namespace turboquant {

// GoogleTest prints parameters by this.
namespace cases {
static void PrintTo(const Case& c, std::ostream* out) { *out << c.name(); }
}  // namespace cases

namespace {

// The project's bound for this backend, several times what rounding can do.  q is rounded to 1 / 32,512 of its largest
// rotated coordinate (about three standard deviations), which moves a score by 3e-5 of its spread; with the scores of
// the table, of spread 1.5, a weight moves by 5e-5 of itself.  A weight is rounded to half of 1 / 32,512 of its block's
// largest: 2e-5 of the output where one weight rules, less where many share it.  A kernel
// that drops the low part of q or of the weights errs by 2e-2.
constexpr double kTolerance = 5e-4;

class Table : public testing::TestWithParam<cases::Case> {
 protected:
  void TearDown() override { force_isa(""); }
};

TEST_P(Table, AttentionMatchesTheOracle) {
  const cases::Case& c = GetParam();
  cases::Inputs inputs(c);
  const cases::Buffer want = cases::oracle(inputs);
  double worst = 0;
  for (const std::string& isa : available_isas()) {
    SCOPED_TRACE(isa);
    force_isa(isa);
    const auto d = cases::compare(inputs, want, [](const AttendParams& p) { attend(p, Backend::cpu); });
    EXPECT_LE(d.overall, kTolerance + cases::rounding(c.dtype));
    EXPECT_LE(d.worst_row, kTolerance + cases::rounding(c.dtype));
    worst = std::max(worst, d.worst_row);
  }
  RecordProperty("worst_row", std::to_string(worst));
}

std::string name_of(const testing::TestParamInfo<cases::Case>& info) {
  return std::to_string(info.index) + "_" + info.param.name();
}
INSTANTIATE_TEST_SUITE_P(Cases, Table, testing::ValuesIn(cases::table(true)), name_of);
INSTANTIATE_TEST_SUITE_P(Trellis, Table, testing::ValuesIn(cases::table_trellis()), name_of);
INSTANTIATE_TEST_SUITE_P(Wide, Table, testing::ValuesIn(cases::table_wide()), name_of);
INSTANTIATE_TEST_SUITE_P(Widths, Table, testing::ValuesIn(cases::table_widths()), name_of);
INSTANTIATE_TEST_SUITE_P(Latent, Table, testing::ValuesIn(cases::table_latent()), name_of);
INSTANTIATE_TEST_SUITE_P(EightBits, Table, testing::ValuesIn(cases::table_8bits()), name_of);
INSTANTIATE_TEST_SUITE_P(Exact, Table, testing::ValuesIn(cases::table_exact()), name_of);

}  // namespace
}  // namespace turboquant
