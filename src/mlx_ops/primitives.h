// The MLX primitives of the operations on the CPU.  GPUs use MLX's custom kernels instead (gpu.h).
#pragma once

#include <mlx/primitives.h>

#include "turboquant/mlx/ops.h"

namespace turboquant::ops {

/// What the three primitives share: no transformations, no GPU evaluation.
class CorePrimitive : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>&, const std::vector<mx::array>&,
                             const std::vector<int>&) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&,
                             const std::vector<mx::array>&) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>&,
                                                           const std::vector<int>&) override;

 private:
  [[noreturn]] void refuse(const char* what) const;
};

/// x (B, H, N, D)[, centre (H, D)][, feedback (H, D, D)] -> codes, scales.
class Encode : public CorePrimitive {
 public:
  Encode(mx::Stream stream, Width width, uint64_t seed, bool centred)
      : CorePrimitive(stream), width_(width), seed_(seed), centred_(centred) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  const char* name() const override { return "turboquant.encode"; }

 private:
  Width width_;
  uint64_t seed_;
  bool centred_;  // whether the input after x is a centre
};

/// codes, scales (B, H, N)[, centre (H, D)] -> x (B, H, N, D).
class Decode : public CorePrimitive {
 public:
  Decode(mx::Stream stream, Width width, uint64_t seed) : CorePrimitive(stream), width_(width), seed_(seed) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  const char* name() const override { return "turboquant.decode"; }

 private:
  Width width_;
  uint64_t seed_;
};

/// x (B, H, N, D), matrix (H_m, D, D)[, centre (H_m, D)] -> y (B, H, N, D) float32.
class Transform : public CorePrimitive {
 public:
  using CorePrimitive::CorePrimitive;
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  const char* name() const override { return "turboquant.transform"; }
};

/// q, key codes, key scales, value codes, value scales, then the optional arrays that the options hold, in their order
/// there, then the exact copies' four -> out.  The arrays themselves travel as inputs; the options keep only which
/// exist.
class Attention : public CorePrimitive {
 public:
  struct Settings {
    float scale;
    Width keys, values;
    uint64_t seed;
    int kv_len;  // -1: as many as the keys hold, whatever their number when it runs (shapeless compilation)
    int window;
    bool causal, mask, starts, sinks, key_centre, value_centre, exact;
    int recent, first;  // of the exact copies
    bool operator==(const Settings&) const = default;
  };
  Attention(mx::Stream stream, const Settings& settings) : CorePrimitive(stream), settings_(settings) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  /// Also checks that the inputs fit together: a graph compiled without shapes meets others than it was built with.
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  const char* name() const override { return "turboquant.attention"; }

 private:
  Settings settings_;
};

}  // namespace turboquant::ops
