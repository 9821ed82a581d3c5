// Modelled cost of the Metal decode kernel: instructions, threadgroup and device accesses counted in the emulator, and
// the bounds that follow for three chips.  No Apple GPU was used.        metal_cost
//
// Chips: bandwidth and GPU cores from Apple's press releases and specifications (M1 Max 400 GB/s, 32 cores; M3 Max
// 400 GB/s, 40 cores; M4 Max 546 GB/s, 40 cores).  Rates of a core and cycle: github.com/philipturner/metal-benchmarks
// (README at commit dc2adc6, measured there for Apple 7 and 8): "ALU Layout" and "Instruction Throughputs" give 128
// FADD32, FFMA32, FFMA16, IADD32, BITWISE32, compare-selects; 32 shifts, bit extractions, conversions, EXP2, on a
// pipeline of their own ("Mixed workload performance": EXP2 with 2 FMUL32 takes 4.08 cycles, EXP2 alone 4.00); "On-Chip
// Memory" gives 256 bytes of SIMD shuffles and no rate for threadgroup memory, for which 128 bytes are assumed, as on
// other GPUs.  M1 Max's clock is that page's; those of M3 Max and M4 Max are what users report.  M3 and M4 issue float
// and integer work side by side, which is not counted on; nor is index arithmetic (docs/metal.md).
#include <algorithm>
#include <cstdio>
#include <string>

#include "emulator/counts.h"
#include "support/feedback.h"
#include "support/metal_launches.h"

namespace {

using namespace emulator;

struct Chip {
  const char* name;
  double bytes_per_second;
  int cores;
  double clock;
};
constexpr Chip kChips[] = {
    {"M1 Max", 400e9, 32, 1.296e9}, {"M3 Max", 400e9, 40, 1.38e9}, {"M4 Max", 546e9, 40, 1.578e9}};

const char* met(bool yes) { return yes ? "met" : "MISSED"; }

std::string name_of(const metal::Coding& coding) {
  return "TQ" + std::to_string(coding.bits) + (coding.code == turboquant::Code::trellis ? " trellis" : "");
}

/// The splits of four KV heads.
int splits_of(const Case& c, const metal::Coding& coding) {
  return turboquant::metal::plan_attention({.batch = 1,
                                            .query_heads = 4 * c.query_heads,
                                            .kv_heads = 4,
                                            .query_len = 1,
                                            .kv_len = c.kv_len,
                                            .head_dim = c.head_dim,
                                            .keys = coding,
                                            .values = coding,
                                            .dtype = c.dtype})
      .splits;
}

/// One KV head of four, in the splits that the plan takes for all four.
void report(const metal::Coding& coding, int kv_len, int head_dim) {
  Case c = cost_case(coding, head_dim);
  c.kv_len = kv_len;
  const int splits = splits_of(c, coding);
  turboquant::cases::Inputs inputs(c);
  reset_counts();
  emulator::attend(inputs.params(), splits);
  const double codes = 2.0 * c.kv_len * c.head_dim;
  const double packed = 2.0 * c.kv_len * turboquant::bytes_per_vector(coding.bits, c.head_dim);
  const auto per_code = [&](Kind k) { return double(counts.of[int(k)]) / codes; };
  const double slow = per_code(Kind::shift) + per_code(Kind::convert) + per_code(Kind::special);
  const double memory = per_code(Kind::device_access) + per_code(Kind::threadgroup_access);
  const double all = per_code(Kind::simple) + slow + per_code(Kind::shuffle) + memory;
  const auto device = device_bytes();
  const double ratio = double(device.read + device.written) / packed;
  std::printf("%s, D = %d, %d tokens in %d splits\n", name_of(coding).c_str(), c.head_dim, kv_len, splits);
  std::printf(
      "  instructions of a lane per code: simple %.2f, shift %.2f, convert %.3f, special %.3f, shuffle %.3f, device "
      "%.3f, threadgroup %.2f (%.2f bytes); all %.2f\n",
      per_code(Kind::simple), per_code(Kind::shift), per_code(Kind::convert), per_code(Kind::special),
      per_code(Kind::shuffle), per_code(Kind::device_access), per_code(Kind::threadgroup_access),
      double(counts.threadgroup_bytes) / codes, all);
  std::printf("  device bytes / packed size: %.4f read + %.4f written = %.3f; goal 1.05 %s\n",
              double(device.read) / packed, double(device.written) / packed, ratio, met(ratio <= 1.05));
  for (const auto& chip : kChips) {
    const double lanes = chip.cores * chip.clock * 128;
    const double memory_ns = packed / chip.bytes_per_second * 1e9 / codes;
    const double issue_ns = all / lanes * 1e9;
    const double slow_ns = 4 * slow / lanes * 1e9;
    const double serial_ns = (all + 3 * slow) / lanes * 1e9;
    const double threadgroup_ns = double(counts.threadgroup_bytes) / codes / lanes * 1e9;
    const double alu = std::max(issue_ns, slow_ns) / memory_ns;
    std::printf(
        "  %-7s ns per 1000 codes: bandwidth %.3f, issue %.3f, slow pipeline %.3f, threadgroup %.3f, all serial %.3f; "
        "ALU / bandwidth %.2f (serial %.2f), fp16's bytes alone take %.1f times as long%s%s\n",
        chip.name, 1000 * memory_ns, 1000 * issue_ns, 1000 * slow_ns, 1000 * threadgroup_ns, 1000 * serial_ns, alu,
        serial_ns / memory_ns, 2e12 / chip.bytes_per_second / (1000 * memory_ns * std::max(1.0, alu)),
        &chip == &kChips[1] ? "; goal below 1 " : "", &chip == &kChips[1] ? met(alu < 1) : "");
  }
}

/// What exact copies of the newest 128 and the first 4 tokens cost.
void report_exact(const metal::Coding& coding, int kv_len) {
  double instructions[2], bytes[2];
  for (bool exact : {false, true}) {
    Case c = exact ? cost_exact_case(coding) : cost_case(coding);
    c.kv_len = kv_len;
    const int splits = splits_of(c, coding);
    turboquant::cases::Inputs inputs(c);
    reset_counts();
    emulator::attend(inputs.params(), splits);
    instructions[exact] = 0;
    for (const uint64_t n : counts.of) instructions[exact] += double(n);
    bytes[exact] = double(device_bytes().read + device_bytes().written);
  }
  const double packed = 2.0 * kv_len * turboquant::bytes_per_vector(coding.bits, 256);
  const double lanes = kChips[1].cores * kChips[1].clock * 128;
  double time[2];
  for (int i : {0, 1})
    time[i] = std::max(instructions[i] / lanes, packed * bytes[i] / bytes[0] / kChips[1].bytes_per_second);
  std::printf(
      "%s, %d tokens, with exact copies: %.3f times the instructions, %.3f times the bytes, on %s %.3f times the "
      "time\n",
      name_of(coding).c_str(), kv_len, instructions[1] / instructions[0], bytes[1] / bytes[0], kChips[1].name,
      time[1] / time[0]);
}

/// Encoding of Gaussian vectors of 256.
void report_encode(const metal::Coding& coding, bool feedback) {
  constexpr int tokens = 8, dim = 256;
  const auto x = turboquant::cases::gaussian(tokens * dim, turboquant::Dtype::float16);
  const auto g = turboquant::cases::random_feedback(1, dim);
  turboquant::cases::Encoded out(1, tokens, dim, coding.bits, coding.code);
  auto p = cost_encode(coding, tokens, feedback);
  p.x = turboquant::cases::contiguous<const void*>(x.bytes.data(), x.dtype, 1, tokens, dim);
  p.out = out.view();
  if (feedback) p.feedback = g.data();
  reset_counts();
  emulator::encode({p});
  double all = 0;
  for (const uint64_t n : counts.of) all += double(n) / (32 * tokens);
  const auto of_lane = [&](Kind k) { return double(counts.of[int(k)]) / (32 * tokens); };
  std::printf(
      "encode %s%s: instructions of a lane per vector of 256: simple %.0f, slow %.0f, shuffle %.0f, memory %.0f; all "
      "%.0f\n",
      name_of(coding).c_str(), feedback ? " with feedback" : "", of_lane(Kind::simple),
      of_lane(Kind::shift) + of_lane(Kind::convert) + of_lane(Kind::special), of_lane(Kind::shuffle),
      of_lane(Kind::device_access) + of_lane(Kind::threadgroup_access), all);
}

}  // namespace

int main() {
  for (int kv_len : {4096, 16384, 40960}) {
    for (const auto& coding : all_codings()) report(coding, kv_len, 256);
  }
  for (const auto& coding : all_codings()) report(coding, 16384, 512);
  for (int kv_len : {4096, 16384}) {
    for (const auto& coding : all_codings()) report_exact(coding, kv_len);
  }
  for (const auto& coding : all_codings()) {
    for (bool feedback : {false, true}) report_encode(coding, feedback);
  }
}
