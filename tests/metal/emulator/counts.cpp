#include "counts.h"

#include <vector>

#include "turboquant/half.h"

// The program's own variables, among them the kernels' threadgroup memory.
extern "C" char __data_start, _end;

namespace emulator {

Counts counts;

namespace {

struct Range {
  const char* begin;
  std::vector<bool> seen;
};
std::vector<Range> ranges;
uint64_t written = 0;

Range* range_of(const char* address) {
  for (auto& r : ranges) {
    if (address >= r.begin && address < r.begin + r.seen.size()) return &r;
  }
  return nullptr;
}

bool in_threadgroup(const char* address) { return address >= &__data_start && address < &_end; }

}  // namespace

void read(const void* address, unsigned bytes) {
  const char* at = static_cast<const char*>(address);
  if (in_threadgroup(at)) {
    count(Kind::threadgroup_access);
    counts.threadgroup_bytes += bytes;
  } else if (Range* r = range_of(at)) {
    count(Kind::device_access);
    for (unsigned i = 0; i < bytes; ++i) r->seen[at - r->begin + i] = true;
  }
}

void write(const void* address, unsigned bytes) {
  const char* at = static_cast<const char*>(address);
  if (in_threadgroup(at)) {
    count(Kind::threadgroup_access);
    counts.threadgroup_bytes += bytes;
  } else if (range_of(at)) {
    count(Kind::device_access);
    written += bytes;
  }
}

uint16_t round_to_half(float f) { return turboquant::float_to_half(f); }
float widen_half(uint16_t bits) { return turboquant::half_to_float(bits); }

void reset_counts() {
  counts = {};
  ranges.clear();
  written = 0;
}

void watch(const void* begin, uint64_t bytes) {
  const char* at = static_cast<const char*>(begin);
  if (bytes && !range_of(at)) ranges.push_back({at, std::vector<bool>(bytes)});
}

DeviceBytes device_bytes() {
  DeviceBytes d{0, written};
  for (const auto& r : ranges) {
    for (const bool seen : r.seen) d.read += seen;
  }
  return d;
}

}  // namespace emulator
