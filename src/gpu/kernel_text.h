// The text of GPU kernels: as built into the library, or read again from a checkout while somebody works on it.
#pragma once

#include <string>
#include <string_view>

namespace turboquant::gpu {

/// The checkout that the environment variable TURBOQUANT_KERNEL_SOURCES names; empty when it is not set.
std::string source_checkout();

/// `built_in`, or, with TURBOQUANT_KERNEL_SOURCES, the text of `files` in that checkout, read once in a process.
/// `files` are paths from the checkout's root, separated by ";", in the order of the built-in text.
///
/// Throws std::runtime_error when a file cannot be read.
std::string_view kernel_text(std::string_view built_in, std::string_view files);

}  // namespace turboquant::gpu
