// What counted numbers report.
#pragma once

#include <cstdint>

namespace emulator {

/// Kinds of instructions, by the pipeline that runs them.
enum class Kind : uint8_t {
  simple,   // float and integer arithmetic, comparisons, bitwise operations, selects
  shift,    // shifts and bit extraction
  convert,  // between float, half and integers
  special,  // exp2, log2, sqrt, division
  shuffle,  // one exchange between lanes; a reduction is five and five simple ones
  device_access,
  threadgroup_access,
  kinds
};

struct Counts {
  uint64_t of[int(Kind::kinds)] = {};  // instructions of one lane
  uint64_t threadgroup_bytes = 0;
};
extern Counts counts;

inline void count(Kind kind, uint64_t n = 1) { counts.of[int(kind)] += n; }

/// An access; nothing happens unless the address is in device or threadgroup memory.
void read(const void* address, unsigned bytes);
void write(const void* address, unsigned bytes);

uint16_t round_to_half(float f);
float widen_half(uint16_t bits);

/// Forgets all counts and all device memory.
void reset_counts();
/// Makes this range device memory.
void watch(const void* begin, uint64_t bytes);
/// Bytes of device memory: distinct ones that were read, and all that were written.
struct DeviceBytes {
  uint64_t read, written;
};
DeviceBytes device_bytes();

}  // namespace emulator
