// Times the CPU kernels on the tests' inputs (cases.h).  Shape, unless named otherwise: 16 query heads, 4 KV heads,
// head_dim 256, one query.
//
//   turboquant_kernels [Google Benchmark flags]
//
// Names: attend/CODES/TOKENS/QUERIES/ISA, where CODES is a width, with a t for trellis codes.  `cache_GB/s` is the
// packed bytes read a second; `x_fp16_read` is how many times faster a call is than reading the same keys and values as
// fp16 at the bandwidth that `read_fp16` measures in the same run, with the same threads (TURBOQUANT_NUM_THREADS). With
// one thread all times are CPU time, which other programs on the machine disturb least; with more they are wall-clock
// time.
#include <benchmark/benchmark.h>
#include <time.h>

#include <algorithm>
#include <map>
#include <memory>
#include <thread>

#include "support/cases.h"
#include "support/feedback.h"

using namespace turboquant;

namespace {

constexpr int kQueryHeads = 16, kKvHeads = 4, kHeadDim = 256;

double now() {
  timespec t;
  clock_gettime(num_threads() == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

double fp16_bytes(int tokens) { return 2.0 * 2 * kKvHeads * kHeadDim * tokens; }

/// Codes as they are named.
struct Kind {
  int bits;
  Code code = Code::scalar;
  std::string name() const { return std::to_string(bits) + (code == Code::trellis ? "t" : ""); }
  bool operator==(const Kind&) const = default;
};

/// Inputs for a long context: the packed rows of a short one, repeated.
struct LongInputs {
  cases::Inputs base;
  cases::PackedBuffer keys, values;
  AttendParams params;

  static cases::Case short_case(Kind kind, int tokens, int queries) {
    cases::Case c;
    c.key_bits = c.value_bits = kind.bits;
    c.key_code = c.value_code = kind.code;
    c.query_heads = kQueryHeads, c.kv_heads = kKvHeads, c.head_dim = kHeadDim;
    c.query_len = queries, c.kv_len = std::min(tokens, 2048), c.causal = true;
    return c;
  }

  LongInputs(Kind kind, int tokens, int queries)
      : base(short_case(kind, tokens, queries)),
        keys(1, kKvHeads, tokens, kHeadDim, kind.bits, kind.code),
        values(1, kKvHeads, tokens, kHeadDim, kind.bits, kind.code),
        params(base.params()) {
    repeat(base.keys, keys, tokens);
    repeat(base.values, values, tokens);
    params.kv_len = tokens;
    params.keys = keys.packed();
    params.values = values.packed();
  }

  void repeat(const cases::PackedBuffer& from, cases::PackedBuffer& to, int tokens) {
    const int words = words_per_vector(from.view.bits, kHeadDim);
    for (int h = 0; h < kKvHeads; ++h) {
      for (int t = 0; t < tokens; ++t) {
        const int s = t % base.c.kv_len;
        std::copy_n(from.view.codes + h * from.view.codes_head_stride + int64_t(s) * words, words,
                    to.view.codes + h * to.view.codes_head_stride + int64_t(t) * words);
        to.view.scales[h * to.view.scales_head_stride + t] = from.view.scales[h * from.view.scales_head_stride + s];
      }
    }
  }
};

/// Bytes a second of reading `bytes` with all threads: the median of nine passes.
double read_bandwidth(size_t bytes) {
  const size_t count = bytes / 8;
  const std::unique_ptr<uint64_t[]> data(new uint64_t[count]);
  std::fill_n(data.get(), count, 1);
  std::vector<double> seconds;
  for (int pass = 0; pass < 9; ++pass) {
    const double start = now();
    std::vector<std::thread> threads;
    std::vector<uint64_t> sums(num_threads() * 8);
    for (int t = 0; t < num_threads(); ++t) {
      threads.emplace_back([&, t] {
        uint64_t lanes[64] = {};
        const size_t begin = count / 64 * t / num_threads() * 64, end = count / 64 * (t + 1) / num_threads() * 64;
        for (size_t i = begin; i < end; i += 64) {
          for (int k = 0; k < 64; ++k) lanes[k] += data[i + k];
        }
        for (uint64_t x : lanes) sums[t * 8] += x;
      });
    }
    for (auto& t : threads) t.join();
    benchmark::DoNotOptimize(sums.data());
    seconds.push_back(now() - start);
  }
  std::nth_element(seconds.begin(), seconds.begin() + 4, seconds.end());
  return bytes / seconds[4];
}

double fp16_read_seconds(int tokens) {
  static const double bandwidth = read_bandwidth(size_t(256) << 20);
  return fp16_bytes(tokens) / bandwidth;
}

void read_fp16(benchmark::State& state) {
  const int tokens = int(state.range(0));
  for (auto _ : state) state.SetIterationTime(fp16_read_seconds(tokens));
  state.counters["GB/s"] = fp16_bytes(tokens) / fp16_read_seconds(tokens) / 1e9;
}

/// One set of inputs at a time: at 128K tokens they are large.
LongInputs& inputs(Kind kind, int tokens, int queries) {
  static std::tuple<Kind, int, int> held;
  static std::unique_ptr<LongInputs> p;
  if (!p || held != std::tuple(kind, tokens, queries)) {
    p.reset();
    p = std::make_unique<LongInputs>(kind, tokens, queries);
    held = {kind, tokens, queries};
  }
  return *p;
}

void attend_benchmark(benchmark::State& state, Kind kind, int tokens, int queries, const std::string& isa) {
  force_isa(isa);
  LongInputs& in = inputs(kind, tokens, queries);
  double all = 0;
  for (auto _ : state) {
    const double start = now();
    attend(in.params);
    const double s = now() - start;
    state.SetIterationTime(s);
    all += s;
  }
  const double seconds = all / double(state.iterations());
  state.counters["cache_GB/s"] = 2.0 * kKvHeads * tokens * bytes_per_vector(kind.bits, kHeadDim) / seconds / 1e9;
  state.counters["x_fp16_read"] = fp16_read_seconds(tokens) / seconds;
  force_isa("");
}

void encode_benchmark(benchmark::State& state, Kind kind, Dtype dtype, const std::string& isa, bool feedback) {
  force_isa(isa);
  const int tokens = 8192;
  std::mt19937_64 rng(1);
  std::normal_distribution<float> normal;
  cases::Buffer x(dtype, size_t(tokens) * kHeadDim);
  for (size_t i = 0; i < x.size(); ++i) x.set(i, normal(rng));
  cases::PackedBuffer out(1, 1, tokens, kHeadDim, kind.bits, kind.code);
  EncodeParams p;
  p.batch = p.heads = 1, p.tokens = tokens, p.head_dim = kHeadDim;
  p.x = cases::contiguous<const void*>(x.bytes.data(), dtype, 1, tokens, kHeadDim);
  p.out = out.view;
  const auto g = cases::random_feedback(1, kHeadDim);
  if (feedback) p.feedback = g.data();
  double all = 0;
  for (auto _ : state) {
    const double start = now();
    encode(p);
    const double s = now() - start;
    state.SetIterationTime(s);
    all += s;
  }
  state.counters["vectors/s/core"] = double(state.iterations()) * tokens / all / num_threads();
  force_isa("");
}

constexpr Kind kKinds[] = {{3, Code::trellis}, {3}, {2, Code::trellis}, {2}, {4}, {8}};

void register_attend(Kind kind, int tokens, int queries, const std::string& isa) {
  const std::string name =
      "attend/" + kind.name() + "/" + std::to_string(tokens) + "/" + std::to_string(queries) + "/" + isa;
  benchmark::RegisterBenchmark(name.c_str(), attend_benchmark, kind, tokens, queries, isa)
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

void register_encode(const std::string& name, Kind kind, Dtype dtype, const std::string& isa, bool feedback) {
  benchmark::RegisterBenchmark(name.c_str(), encode_benchmark, kind, dtype, isa, feedback)
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  const auto isas = available_isas();
  for (int tokens : {1024, 4096, 32768, 131072}) {
    benchmark::RegisterBenchmark(("read_fp16/" + std::to_string(tokens)).c_str(), read_fp16)
        ->Arg(tokens)
        ->UseManualTime()
        ->Iterations(1)
        ->Unit(benchmark::kMicrosecond);
    for (const auto& isa : isas) {
      for (Kind kind : kKinds) {
        for (int queries : {1, 4, 8}) {
          if (isa != isas.front() && (queries != 1 || (isa == "scalar" && tokens > 4096))) continue;
          register_attend(kind, tokens, queries, isa);
        }
      }
    }
  }
  for (Kind kind : {kKinds[0], kKinds[1]}) register_attend(kind, 8192, 512, isas.front());
  for (const auto& isa : isas) {
    for (Kind kind : kKinds) {
      for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
        const char* names[] = {"f32", "f16", "bf16"};
        register_encode("encode/" + kind.name() + "/" + names[int(dtype)] + "/" + isa, kind, dtype, isa, false);
      }
      register_encode("encode_feedback/" + kind.name() + "/f16/" + isa, kind, Dtype::float16, isa, true);
    }
  }
  benchmark::RunSpecifiedBenchmarks();
}
