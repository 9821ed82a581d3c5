// Modelled cost of the Metal decode kernel: instructions, threadgroup and device accesses counted in the emulator, and
// the bounds that follow for three chips.  No Apple GPU was used.        metal_cost
//
// Chips: bandwidth and GPU cores from Apple's press releases and specifications (M1 Max 400 GB/s, 32 cores; M3 Max
// 400 GB/s, 40 cores; M4 Max 546 GB/s, 40 cores).  Clocks and the throughput of each kind of instruction per core and
// cycle: github.com/philipturner/metal-benchmarks, README (measured there for Apple 7 and 8: 128 simple float, integer
// and bitwise operations, 32 shifts, conversions and special functions, SIMD shuffles of 256 bytes; the threadgroup
// memory's rate is unknown there, 128 bytes are assumed as on other GPUs).  M3 and M4 issue float and integer work side
// by side, which is not counted on; clocks of M3 Max and M4 Max are those reported by users.
#include <algorithm>
#include <cstdio>

#include "emulator/counts.h"
#include "launches.h"

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

void report(int bits) {
  const Case c = cost_case(bits);
  turboquant::cases::Inputs inputs(c);
  reset_counts();
  emulator::attend(inputs.params(), c.kv_len / 1024);  // a context of 40K over 4 KV heads has splits of 1024 tokens
  const double codes = 2.0 * c.kv_heads * c.kv_len * c.head_dim;
  const double packed = 2.0 * c.kv_heads * c.kv_len * turboquant::bytes_per_vector(bits, c.head_dim);
  const auto per_code = [&](Kind k) { return double(counts.of[int(k)]) / codes; };
  const double slow = per_code(Kind::shift) + per_code(Kind::convert) + per_code(Kind::special);
  const double memory = per_code(Kind::device_access) + per_code(Kind::threadgroup_access);
  const double all = per_code(Kind::simple) + slow + per_code(Kind::shuffle) + memory;
  const auto device = device_bytes();
  std::printf(
      "TQ%d  per code: simple %.2f, shift %.2f, convert %.3f, special %.3f, shuffle %.3f, device %.3f, "
      "threadgroup %.2f (%.2f bytes); all %.2f\n",
      bits, per_code(Kind::simple), per_code(Kind::shift), per_code(Kind::convert), per_code(Kind::special),
      per_code(Kind::shuffle), per_code(Kind::device_access), per_code(Kind::threadgroup_access),
      double(counts.threadgroup_bytes) / codes, all);
  std::printf("     device bytes / packed size: %.4f read, %.4f written\n", double(device.read) / packed,
              double(device.written) / packed);
  for (const auto& chip : kChips) {
    const double lanes = chip.cores * chip.clock * 128;
    const double memory_ns = packed / chip.bytes_per_second * 1e9 / codes;
    const double issue_ns = all / lanes * 1e9;
    const double slow_ns = 4 * slow / lanes * 1e9;
    const double serial_ns = (all + 3 * slow) / lanes * 1e9;
    const double threadgroup_ns = double(counts.threadgroup_bytes) / codes / (lanes / 128 * 128) * 1e9;
    std::printf(
        "     %-7s ns per 1000 codes: bandwidth %.3f, issue %.3f, slow pipeline %.3f, threadgroup %.3f, "
        "all serial %.3f -> %s (ALU / bandwidth %.2f; serial %.2f)\n",
        chip.name, 1000 * memory_ns, 1000 * issue_ns, 1000 * slow_ns, 1000 * threadgroup_ns, 1000 * serial_ns,
        std::max(issue_ns, slow_ns) < memory_ns ? "bandwidth bound" : "ALU bound",
        std::max(issue_ns, slow_ns) / memory_ns, serial_ns / memory_ns);
  }
}

}  // namespace

int main() {
  for (int bits : {2, 3, 4}) report(bits);
}
