// Runs a grid of a kernel: every thread of a threadgroup is a fiber that yields at barriers and SIMD-group functions.
//
// Checked: all lanes of a SIMD-group reach the same SIMD-group function, matrix operation or barrier; all threads of a
// threadgroup reach the same barrier; nobody ends while others wait; shuffles read an existing lane.  SIMD-groups and
// lanes run in a random order between two such points, so that code that lacks a barrier reads stale memory.
#pragma once

#include <cstdint>

namespace emulator {

/// Operations at which a thread waits for others, and operations on matrices, which only must agree.
enum class Op : uint8_t {
  none,
  sum_float,
  sum_int,
  max_float,
  or_uint,
  any,
  all,
  shuffle,
  shuffle_xor,
  simdgroup_barrier,
  threadgroup_barrier,
  matrix_load,
  matrix_store,
  matrix_multiply,
  matrix_multiply_accumulate,
  matrix_fill
};

/// Where the text calls it.
struct Site {
  Op op;
  int line;
};

/// Waits for the SIMD-group (or, at a threadgroup barrier, for the threadgroup); returns the result's bits.
uint32_t wait(Site site, uint32_t value, uint32_t argument);

/// Notes a matrix operation on this address; true for the lane that carries it out.
bool matrix(Site site, const void* address, uint64_t argument);

/// Ends the running thread, and the grid with an error ...
[[noreturn]] void thread_error(const char* what);
/// ... an index outside an array in threadgroup memory.
[[noreturn]] void index_error(long index, long count);

/// Position of the running thread.
struct Position {
  uint32_t group[3];   // threadgroup_position_in_grid
  uint32_t simdgroup;  // simdgroup_index_in_threadgroup
  uint32_t lane;       // thread_index_in_simdgroup
};
extern Position position;

/// A kernel with its arguments unpacked: buffers in the order of their indices.
using Entry = void (*)(void* const* buffers);

/// Runs all threadgroups of a grid (both in threads).  Throws std::runtime_error when a rule is broken.
void run_grid(Entry entry, void* const* buffers, const int grid[3], const int threadgroup[3]);

/// Matches a kernel's full name with its entry; used by generated code.
struct Registration {
  Registration(const char* name, Entry entry);
};
Entry find(const char* name);

}  // namespace emulator
