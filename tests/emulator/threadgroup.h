// Threadgroup memory: it holds garbage when a threadgroup starts, and barriers alone order what is done to it.
//
// Checked: between a thread's write to an element and another's read or write, or a read and another's write, stands a
// barrier of their SIMD-group, or of the threadgroup if theirs differ.  SIMD-group functions order nothing.
#pragma once

#include <cstddef>

#include "runtime.h"

namespace emulator {

/// Makes this memory of the kernel that runs, whose arrays follow each other, and fills it with garbage.
void threadgroup_memory(void* data, size_t bytes);

/// Who reads or writes.
enum class Who { thread, simdgroup };
/// Notes an access of the running thread, or by a matrix operation of its SIMD-group; what no barrier orders is an
/// error.
void threadgroup_read(const void* element, Who who = Who::thread);
void threadgroup_write(const void* element, Who who = Who::thread);

/// For the scheduler: a threadgroup of this kernel starts; barriers that were passed.
void start_threadgroup_memory(Entry entry);
void pass_simdgroup_barrier(uint32_t simdgroup);
void pass_threadgroup_barrier();

}  // namespace emulator
