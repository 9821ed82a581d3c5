// The CUDA kernels as text, with names of arguments and sizes of launches: all that MLX's cuda_kernel needs to compile
// and launch one.  The tests compile and launch the same.
#pragma once

#include <array>
#include <compare>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/plan.h"
#include "turboquant/turboquant.h"

namespace turboquant::cuda {

/// The device sources that a kernel needs (format.h, codec.cu.h, ...) as one text without includes and comments.
enum class Source { encode, transform, merge, few_rows, many_rows, prefill };
std::string_view source_text(Source source);
/// The file of that text, without ".cuh", among those that the build leaves in src/cuda/kernels.
std::string_view source_name(Source source);

/// A kernel: `source` is the body of a __global__ function whose parameters are the inputs (const pointers, with
/// NAME_shape and NAME_strides after each whose name appears so in the body), then the outputs.
struct Kernel {
  std::string name;
  Source header;
  std::vector<std::string> inputs, outputs;
  std::string source;
  std::array<int, 3> grid{1, 1, 1}, block{1, 1, 1};  // grid in threads, as MLX counts
  int shared_bytes = 0;
  int max_threads = 0;  // of a block, if the compiler must know
};
/// What goes between the header and the function, and the function's body.  MLX writes `__global__ void` by itself and
/// takes no launch bounds, so the word is defined to bring them, and defined back within the body.
std::string before_kernel(const Kernel& kernel);
std::string body(const Kernel& kernel);

/// Threads of a launch.
struct Extent {
  std::array<int, 3> grid, block;  // grid in threads, as MLX counts
};
Extent scan_extent(const AttentionPlan& plan);
Extent merge_extent(const AttentionShape& shape);

struct EncodeSide {
  int bits;
  bool centred, feedback = false;
  Code code = Code::scalar;
  auto operator<=>(const EncodeSide&) const = default;
};
/// One or two sides of `rows` = batch * heads rows of `tokens` vectors each.
Extent encode_extent(const std::vector<EncodeSide>& sides, int head_dim, int64_t rows, int tokens);
Kernel encode_kernel(const std::vector<EncodeSide>& sides, int head_dim, uint64_t seed, int64_t rows, int tokens);
/// The sides of an append: two, and with exact copies the same two at 8 bits.
std::vector<EncodeSide> append_sides(std::vector<EncodeSide> sides, bool copies);
/// The same into the buffers of a cache, in place (plan.h).  `first` >= 0: also into the rings of exact copies, behind
/// which there are `first` slots for first tokens.
Kernel append_kernel(const std::vector<EncodeSide>& sides, int head_dim, uint64_t seed, int64_t rows, int tokens,
                     int first = -1);
/// `transform` of few vectors, which one block goes through for each 32 columns of a matrix.
Extent transform_extent(int head_dim, int matrices);
Kernel transform_kernel(int head_dim, int matrices, bool centred);
Extent decode_extent(int head_dim, int64_t vectors);
Kernel decode_kernel(const EncodeSide& side, int head_dim, uint64_t seed, int64_t vectors);

/// What an attention kernel is compiled for, beside its shape.
struct AttentionSettings {
  float scale = 1;
  uint64_t seed = 0;
  bool causal = false;
  int window = 0;
  MaskKind mask = MaskKind::none;
  bool starts = false, sinks = false, key_centre = false, value_centre = false;
  auto operator<=>(const AttentionSettings&) const = default;
};
Kernel partial_kernel(const AttentionShape& shape, const AttentionSettings& settings, const AttentionPlan& plan);
Kernel merge_kernel(const AttentionShape& shape, const AttentionSettings& settings, const AttentionPlan& plan);
Kernel whole_kernel(const AttentionShape& shape, const AttentionSettings& settings, const AttentionPlan& plan);

}  // namespace turboquant::cuda
