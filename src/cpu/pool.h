// The CPU backend's threads: parallel_for divides a call's tasks among them.
#pragma once

#include <functional>

namespace turboquant::cpu {

/// Calls task(i) once for every i in [0, count); returns when all have run.  The caller takes part, so a call never
/// waits for a thread to wake, and callers on several streams share the same helpers: no more than num_threads()
/// threads work at once unless there are more callers than that.
///
/// When a task throws, no further task is begun, and the first exception is thrown to the caller once those at work
/// have ended.
void parallel_for(int count, const std::function<void(int)>& task);

}  // namespace turboquant::cpu
