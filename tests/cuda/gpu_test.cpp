// The CUDA kernels on a GPU against the reference backend.  Skipped where there is no GPU.
#include "gpu.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <thread>

#include "compare.h"

namespace turboquant {
namespace {

// The table's caches are short; each kernel that a long one would choose is forced on short ones here.
TEST_F(Gpu, EveryPlanMatchesTheOracle) {
  for (const auto& planner : kPlanners) {
    std::vector<cases::Case> table;
    constexpr int lens[] = {1, 2, 4}, kv_lens[] = {1, 300, 2500};
    for (int bits : {2, 3, 4}) {
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
          // Every width with every length, and either with every context; a context of one takes one query.
          if (short_run() && (j == 0 ? i != 0 : (bits + i + j) % 2 != 0)) continue;
          table.push_back({.key_bits = bits,
                           .value_bits = 2 + (bits + lens[i]) % 3,
                           .query_len = std::min(lens[i], kv_lens[j]),
                           .kv_len = kv_lens[j],
                           .causal = lens[i] > 1});
        }
      }
    }
    for (int dim : {160, 192, 224}) table.push_back({.head_dim = dim, .query_len = 2, .kv_len = 700, .causal = true});
    table.push_back({.query_len = 1, .kv_len = 700, .sinks = true, .centred = true, .mask = MaskKind::additive});
    table.push_back({.query_len = 3, .kv_len = 700, .mask = MaskKind::boolean, .dtype = Dtype::bfloat16});
    expect_oracle(table, planner, kTolerance, "plan " + std::to_string(&planner - kPlanners));
  }
}

TEST_F(Gpu, AttentionMatchesTheOracle) {
  auto table = cases::table(!short_run());
  if (short_run()) {
    size_t kept = 0;
    for (size_t i = 0; i < table.size(); ++i) {
      if (i % 5 == 0 || table[i].batch > 32) table[kept++] = table[i];
    }
    table.resize(kept);
  }
  const auto found = compare(table, cuda::plan_attention);
  double worst[2] = {};
  for (size_t i = 0; i < table.size(); ++i) {
    const auto& c = table[i];
    SCOPED_TRACE(c.name());
    const cuda::AttentionShape shape{c.batch,    c.query_heads, c.kv_heads,   c.query_len, c.kv_len,
                                     c.head_dim, c.key_bits,    c.value_bits, c.ragged};
    const bool int8 = cuda::plan_attention(shape, jit::current_device()).int8();
    const double limit = (int8 ? kTolerance : kPrefillTolerance) + cases::rounding(c.dtype);
    EXPECT_LE(found[i].overall, limit);
    EXPECT_LE(found[i].worst_row, limit);
    double& w = worst[!int8];
    if (!(found[i].worst_row - cases::rounding(c.dtype) <= w)) w = found[i].worst_row - cases::rounding(c.dtype);
  }
  std::printf("%zu cases; worst row %.2e of int8, %.2e of fp16\n", table.size(), worst[0], worst[1]);
}

/// Vectors [batch, heads, tokens, dim] and room for their codes.
struct Vectors {
  cases::Buffer x;
  cases::PackedBuffer packed;
  std::vector<float> centre;
  int batch, heads, tokens, dim;
  Vectors(int batch, int heads, int tokens, int dim, int bits, Dtype dtype, bool centred)
      : x(dtype, size_t(batch) * heads * tokens * dim),
        packed(batch, heads, tokens, dim, bits),
        batch(batch),
        heads(heads),
        tokens(tokens),
        dim(dim) {
    std::mt19937_64 rng(bits * 1000 + dim);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < x.size(); ++i) x.set(i, 3 * normal(rng));
    for (int i = 0; centred && i < heads * dim; ++i) centre.push_back(normal(rng));
  }
  EncodeParams params() {
    EncodeParams p;
    p.batch = batch, p.heads = heads, p.tokens = tokens, p.head_dim = dim, p.seed = 7;
    p.x = cases::contiguous<const void*>(x.bytes.data(), x.dtype, heads, tokens, dim);
    p.centre = centre.empty() ? nullptr : centre.data();
    p.out = packed.view;
    return p;
  }
};

int read_code(const uint32_t* row, int bits, int i) {
  int code = 0;
  for (int bit = 0; bit < bits; ++bit) {
    code |= int(row[i / 32 * bits + bit_word(bits, i % 32, bit)] >> bit_position(bits, i % 32, bit) & 1) << bit;
  }
  return code;
}

TEST_F(Gpu, EncodeMatchesTheOracle) {
  for (int dim : {32, 64, 96, 128, 160, 192, 224, 256}) {
    for (int bits : {2, 3, 4}) {
      for (int i = 0; i < (short_run() ? 1 : 2); ++i) {
        const auto dtype = Dtype((dim / 32 + bits + i) % 3);
        SCOPED_TRACE(testing::Message() << "dim " << dim << " bits " << bits << " dtype " << int(dtype));
        const int other = bits == 4 ? 2 : bits + 1;
        Vectors k(2, 3, 13, dim, bits, dtype, false), v(2, 3, 13, dim, other, dtype, true);
        Vectors k_want = k, v_want = v;
        for (Vectors* x : {&k, &v, &k_want, &v_want}) {
          const int width = x == &k || x == &k_want ? bits : other;
          const int64_t row = int64_t(x->tokens) * words_per_vector(width, dim);
          x->packed.view = {x->packed.codes.data(),
                            x->packed.scales.data(),
                            width,
                            x->heads * row,
                            row,
                            int64_t(x->heads) * x->tokens,
                            x->tokens};
        }
        const EncodeParams values = v.params();
        jit::encode_on_gpu(k.params(), &values);
        encode(k_want.params(), Backend::reference);
        encode(v_want.params(), Backend::reference);
        for (auto [got, want] : {std::pair{&k, &k_want}, {&v, &v_want}}) {
          const int width = got->packed.view.bits, words = words_per_vector(width, dim);
          int differ = 0, total = 0;
          for (size_t row = 0; row < got->packed.scales.size(); ++row) {
            const int before = differ;
            for (int i = 0; i < dim; ++i, ++total) {
              const int a = read_code(&got->packed.codes[row * words], width, i);
              const int b = read_code(&want->packed.codes[row * words], width, i);
              differ += a != b;
              // Rounding can only move a coordinate across one threshold.
              EXPECT_LE(std::abs(std::abs(level(width, a)) - std::abs(level(width, b))), 25);
            }
            // One step of fp16; a code across a threshold moves |levels| with it.
            const double tolerance = differ == before ? 0x1p-10 : 0.02;
            EXPECT_NEAR(half_to_float(got->packed.scales[row]) / half_to_float(want->packed.scales[row]), 1, tolerance);
          }
          EXPECT_LE(differ, 2 + total / 20000);
        }
      }
    }
  }
}

/// A buffer of an append: codes and scales [batch, heads, rows], filled with a pattern.
struct AppendBuffer {
  int heads, rows, words;  // of both
  jit::Memory codes, scales;
  AppendBuffer(int heads, int rows, int words)
      : heads(heads),
        rows(rows),
        words(words),
        codes(std::vector<uint8_t>(size_t(heads) * rows * words * 4, 0xa5).data(), size_t(heads) * rows * words * 4),
        scales(std::vector<uint8_t>(size_t(heads) * rows * 2, 0xa5).data(), size_t(heads) * rows * 2) {}
  void add_to(std::vector<jit::Array>& inputs, int batch) const {
    inputs.emplace_back(codes.get(), "uint32_t", std::vector<int32_t>{batch, heads / batch, rows, words});
    inputs.emplace_back(scales.get(), "__half", std::vector<int32_t>{batch, heads / batch, rows});
  }
  /// Expects token i of `want` [heads, tokens] in row place(i), and the pattern in all others.
  void expect(const cases::PackedBuffer& want, int tokens, const std::function<int(int)>& place) const {
    std::vector<uint32_t> got(size_t(heads) * rows * words);
    std::vector<uint16_t> got_scales(size_t(heads) * rows);
    codes.download(got.data()), scales.download(got_scales.data());
    std::vector<int> token_of(size_t(rows), -1);
    for (int t = 0; t < tokens; ++t) token_of[size_t(place(t))] = t;
    for (int head = 0; head < heads; ++head) {
      for (int row = 0; row < rows; ++row) {
        SCOPED_TRACE(testing::Message() << "head " << head << " row " << row);
        const int t = token_of[size_t(row)];
        const int64_t from = int64_t(head) * tokens + t, to = int64_t(head) * rows + row;
        EXPECT_EQ(got_scales[to], t < 0 ? 0xa5a5 : want.scales[from]);
        for (int w = 0; w < words; ++w) {
          EXPECT_EQ(got[to * words + w], t < 0 ? 0xa5a5a5a5u : want.codes[from * words + w]);
        }
      }
    }
  }
};

// With exact copies too: there token t goes into row t % ring, and nothing into the rows behind.
TEST_F(Gpu, AppendWritesWhatEncodeGivesAndNothingElse) {
  constexpr int kBatch = 2, kHeads = 3, kTokens = 5, kCapacity = 74, kAt = 62, kRing = 64, kFirst = 3;
  for (int dim : {64, 96, 256}) {
    for (bool copies : {false, true}) {
      SCOPED_TRACE(testing::Message() << dim << (copies ? " with copies" : ""));
      std::vector<Vectors> want;
      for (int bits : {3, 4, 8, 8}) want.emplace_back(kBatch, kHeads, kTokens, dim, bits, Dtype::float16, bits != 4);
      want[1].x = want[3].x = want[0].x, want[2].x = want[0].x;
      want[2].centre = want[0].centre, want[3].centre.clear();
      for (int i : {0, 2}) {
        const auto keys = want[i].params(), values = want[i + 1].params();
        jit::encode_on_gpu(keys, &values);
      }
      std::vector<jit::Memory> memory;
      std::vector<AppendBuffer> buffers;
      std::vector<jit::Array> inputs;
      for (int i = 0; i < (copies ? 4 : 2); ++i) {
        const Vectors& side = want[i];
        if (i < 2) {
          memory.emplace_back(side.x.bytes.data(), side.x.bytes.size());
          inputs.emplace_back(memory.back().get(), "__half", std::vector<int32_t>{kBatch, kHeads, kTokens, dim});
          memory.emplace_back(side.centre.data(), side.centre.size() * 4);
          inputs.emplace_back(memory.back().get(), "float", std::vector<int32_t>{kHeads, dim});
          inputs.emplace_back();  // no feedback
        }
        buffers.emplace_back(kBatch * kHeads, i < 2 ? kCapacity : kRing + kFirst,
                             words_per_vector(side.packed.view.bits, dim));
        buffers.back().add_to(inputs, kBatch);
      }
      inputs.emplace_back(nullptr, "uint8_t", std::vector<int32_t>{kAt + 1});
      jit::Launch(cuda::append_kernel({{3, true}, {4, false}}, dim, 7, kBatch * kHeads, kTokens, copies ? kFirst : -1),
                  inputs, {{nullptr, "uint8_t", {kAt + kTokens + 1}}})();
      jit::check(cudaDeviceSynchronize(), "append");
      for (size_t i = 0; i < buffers.size(); ++i) {
        SCOPED_TRACE(testing::Message() << "side " << i);
        buffers[i].expect(want[i].packed, kTokens, [&](int t) { return i < 2 ? kAt + t : (kAt + t) % kRing; });
      }
    }
  }
}

TEST_F(Gpu, EncodeKeepsZeroAndSpoilsNothingButBadVectors) {
  for (int bits : {2, 3, 4}) {
    for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
      Vectors v(1, 1, 8, 128, bits, dtype, false);
      for (int i = 0; i < 128; ++i) v.x.set(i, 0);
      v.x.set(128 + 5, NAN);
      v.x.set(2 * 128 + 9, INFINITY);
      const bool wide = dtype != Dtype::float16;
      for (int i = 0; i < 128; ++i)
        v.x.set(3 * 128 + i, wide ? 1e30f : 60000.f);  // beyond a fp16 scale (float16: at 2 bits)
      for (int i = 0; i < 128; ++i) v.x.set(4 * 128 + i, wide ? 1e-30f : 6e-8f);
      Vectors want = v;
      want.packed.view.codes = want.packed.codes.data(), want.packed.view.scales = want.packed.scales.data();
      v.packed.view.codes = v.packed.codes.data(), v.packed.view.scales = v.packed.scales.data();
      jit::encode_on_gpu(v.params(), nullptr);
      encode(want.params(), Backend::reference);
      for (int t = 0; t < 8; ++t) {
        SCOPED_TRACE(testing::Message() << "bits " << bits << " dtype " << int(dtype) << " token " << t);
        const float a = half_to_float(v.packed.scales[t]), b = half_to_float(want.packed.scales[t]);
        if (t == 3 && (wide || bits == 2)) EXPECT_EQ(v.packed.scales[t], 0x7bff) << "must saturate";
        if (std::isfinite(b) && b > 0) {
          EXPECT_NEAR(a, b, std::max(2e-3f * b, 1e-7f));
        } else {
          EXPECT_TRUE(a == b || (std::isnan(a) && std::isnan(b))) << a << " " << b;
        }
        if (t <= 2) {  // zero, NaN, infinity
          const int words = words_per_vector(bits, 128);
          EXPECT_EQ(std::memcmp(&v.packed.codes[t * words], &want.packed.codes[t * words], words * 4), 0);
        }
      }
    }
  }
}

TEST_F(Gpu, DecodeMatchesTheOracle) {
  for (int dim : {32, 96, 128, 160, 256}) {
    for (int bits : {2, 3, 4}) {
      Vectors v(2, 2, 19, dim, bits, Dtype::float32, true);
      v.packed.view.codes = v.packed.codes.data(), v.packed.view.scales = v.packed.scales.data();
      encode(v.params(), Backend::reference);
      DecodeParams p;
      p.batch = 2, p.heads = 2, p.tokens = 19, p.head_dim = dim, p.seed = 7;
      p.in = v.packed.packed();
      p.centre = v.centre.data();
      std::vector<float> got(v.x.size()), want(v.x.size());
      p.out = cases::contiguous<void*>(got.data(), Dtype::float32, 2, 19, dim);
      jit::decode_on_gpu(p);
      p.out.data = want.data();
      decode(p, Backend::reference);
      for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-4) << dim << " " << bits << " " << i;
    }
  }
}

/// Runs a case whose packed keys or values are spoilt at one token, and counts outputs that are no numbers.
int spoilt_outputs(cases::Case c, bool values, int token) {
  cases::Inputs inputs(c);
  (values ? inputs.values : inputs.keys).scales[token] = 0x7e00;
  for (size_t i = 0; i < inputs.out.size(); ++i) inputs.out.set(i, 0);
  jit::attend_on_gpu(inputs.params());
  int count = 0;
  for (size_t i = 0; i < inputs.out.size(); ++i) count += std::isnan(inputs.out.get(i));
  return count;
}

TEST_F(Gpu, HiddenTokensHaveNoInfluenceAndVisibleNaNPropagates) {
  for (int dim : {128, 256}) {
    for (int len : {1, 3, 20}) {
      cases::Case c{.head_dim = dim, .query_heads = 2, .query_len = len, .kv_len = 90, .causal = true, .window = 40};
      for (bool values : {false, true}) {
        SCOPED_TRACE(testing::Message() << "head_dim " << dim << " queries " << len << " values " << values);
        EXPECT_EQ(spoilt_outputs(c, values, 0), 0) << "outside every window";
        EXPECT_EQ(spoilt_outputs(c, values, 89), 2 * dim) << "seen by the last query of both heads";
      }
    }
  }
}

/// Fills the shared memory of all multiprocessors, where later kernels find it.
void fill_shared_memory(uint32_t word) {
  const cuda::Device device = jit::current_device();
  cuda::Kernel k;
  k.name = "tq_fill";
  k.header = cuda::Source::merge;
  k.inputs = {"dummy"}, k.outputs = {"out"};
  k.source =
      "  extern __shared__ unsigned words[];\n  volatile unsigned* all = words;\n  for (int i = threadIdx.x; i < " +
      std::to_string(device.shared_bytes / 4) + "; i += blockDim.x) all[i] = " + std::to_string(word) +
      "u;\n  __syncthreads();\n  if (all[threadIdx.x] != " + std::to_string(word) + "u) *out = 1;\n";
  k.grid = {1024 * device.multiprocessors, 1, 1}, k.block = {1024, 1, 1};
  k.shared_bytes = device.shared_bytes;
  const jit::Memory out(4);
  jit::Launch(k, {{}}, {{out.get(), "float", {1}}})();
}

// Tiles are copied whole but for the last, so scales of tokens beyond the end are whatever lay in shared memory.
TEST_F(Gpu, WhatSharedMemoryHeldHasNoInfluence) {
  for (int len : {1, 2, 8, 40}) {
    for (int kv_len : {41, 300}) {
      cases::Case c{.query_heads = 8, .kv_heads = 2, .query_len = len, .kv_len = kv_len, .causal = true};
      cases::Inputs inputs(c);
      const auto want = cases::oracle(inputs);
      for (uint32_t word : {0xfc00fc00u, 0x7c007c00u, 0x7e007e00u, 0xffffffffu, 0xfbfffbffu, 0u}) {
        SCOPED_TRACE(testing::Message() << c.name() << " " << std::hex << word);
        std::vector<jit::Planner> planners{cuda::plan_attention};
        if (len <= 2) planners.insert(planners.end(), std::begin(kPlanners), std::end(kPlanners));
        for (const auto planner : planners) {
          const auto found = cases::compare(inputs, want, [&](const AttendParams& p) {
            fill_shared_memory(word);
            jit::attend_on_gpu(p, planner);
          });
          EXPECT_LE(found.worst_row, kPrefillTolerance);
        }
      }
    }
  }
}

TEST_F(Gpu, QueriesOfAnySizeKeepTheirPrecision) {
  const cases::Case shapes[] = {
      {.head_dim = 64, .kv_len = 50}, {.kv_len = 50}, {.query_len = 8, .kv_len = 50}, {.query_len = 40, .kv_len = 50}};
  for (const auto& c : shapes) {
    for (float size : {1e-41f, 1e-35f, 1e-6f, 1e6f}) {  // numbers whose inverse, or its multiple, is infinite
      SCOPED_TRACE(testing::Message() << c.name() << " times " << size);
      cases::Inputs inputs(c);
      for (size_t i = 0; i < inputs.q.size(); ++i) inputs.q.set(i, inputs.q.get(i) * size);
      for (auto& s : inputs.keys.scales) s = float_to_half(std::min(6e4f, half_to_float(s) / size));
      const auto run = [](const AttendParams& p) { jit::attend_on_gpu(p); };
      EXPECT_LE(cases::compare(inputs, cases::oracle(inputs), run).worst_row, kPrefillTolerance);
    }
  }
}

TEST_F(Gpu, QueriesThatSeeNothingGiveZero) {
  for (int len : {1, 12}) {
    cases::Case c{.head_dim = 64, .batch = 2, .query_len = len, .kv_len = 50, .ragged = true, .centred = true};
    for (bool sinks : {false, true}) {
      c.sinks = sinks;
      cases::Inputs inputs(c);
      inputs.starts = {0, 50};
      for (size_t i = 0; i < inputs.out.size(); ++i) inputs.out.set(i, 1);
      jit::attend_on_gpu(inputs.params());
      const size_t half = inputs.out.size() / 2;
      for (size_t i = 0; i < inputs.out.size(); ++i) {
        if (i >= half) ASSERT_EQ(inputs.out.get(i), 0) << i;
        ASSERT_TRUE(std::isfinite(inputs.out.get(i)));
      }
    }
  }
}

}  // namespace
}  // namespace turboquant
