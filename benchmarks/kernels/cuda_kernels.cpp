// Times the CUDA kernels: medians of replayed CUDA graphs, microseconds a call.  Every graph makes 100 calls or more,
// so that launching it does not count, and walks over enough copies of its inputs to leave the L2 cache (256 MiB), so a
// call finds its data in device memory.
//
//   cuda_kernels [NAME...]    decode, longest (one line of decode, for profilers), tiers (exact copies), queries,
//   ragged,
//                             encode, prefill, wide (heads of 512); all by default
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>

#include "support/cuda_attend.h"

using namespace turboquant;

namespace {

constexpr size_t kFootprint = size_t(256) << 20;
constexpr std::pair<int, Code> kCodes[] = {{3, Code::trellis}, {2, Code::trellis}, {3, Code::scalar},
                                           {4, Code::scalar},  {2, Code::scalar},  {8, Code::scalar}};

/// Median microseconds of one of `calls` calls.
double time_graph(int calls, const std::function<void(int, cudaStream_t)>& enqueue) {
  cudaStream_t stream;
  jit::check(cudaStreamCreate(&stream), "cudaStreamCreate");
  enqueue(0, stream);
  jit::check(cudaStreamSynchronize(stream), "first call");
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  jit::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < calls; ++i) enqueue(i, stream);
  jit::check(cudaStreamEndCapture(stream, &graph), "capture");
  jit::check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  std::vector<float> times;
  for (int repeat = 0; repeat < 23; ++repeat) {
    cudaEventRecord(start, stream);
    jit::check(cudaGraphLaunch(executable, stream), "launch");
    cudaEventRecord(stop, stream);
    jit::check(cudaEventSynchronize(stop), "replay");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    if (repeat >= 3) times.push_back(ms);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  cudaGraphExecDestroy(executable), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
  return 1000.0 * times[times.size() / 2] / calls;
}

/// Packed vectors with random codes and plausible scales, on the device.
struct Cache {
  jit::Memory codes, scales;
  static Cache random(int64_t vectors, int dim, int bits, std::mt19937_64& rng) {
    const int64_t words = vectors * words_per_vector(bits, dim);
    std::vector<uint32_t> codes(words);
    for (auto& x : codes) x = uint32_t(rng());
    std::vector<uint16_t> scales(vectors);
    for (auto& x : scales) x = 0x3800 + rng() % 0x800;  // 0.5 to 2
    return {jit::Memory(codes.data(), words * 4), jit::Memory(scales.data(), vectors * 2)};
  }
  Cache copy() const {
    Cache c{jit::Memory(codes.size()), jit::Memory(scales.size())};
    cudaMemcpy(c.codes.get(), codes.get(), codes.size(), cudaMemcpyDeviceToDevice);
    cudaMemcpy(c.scales.get(), scales.get(), scales.size(), cudaMemcpyDeviceToDevice);
    return c;
  }
};

struct Shape {
  int batch = 1, query_heads = 16, kv_heads = 4, query_len = 1, kv_len = 1024, head_dim = 256, bits = 3;
  bool causal = false;
  std::vector<int> starts = {};
  Code code = Code::scalar;
  int recent = 0, first = 0;  // exact copies
  int ring() const { return recent ? (recent + 256) / 128 * 128 : 0; }
};

/// Numbers in fp16 between 0.25 and 1, of either sign.
std::vector<uint16_t> random_halves(size_t count, std::mt19937_64& rng) {
  std::vector<uint16_t> x(count);
  for (auto& v : x) v = uint16_t((0x3400 + rng() % 0x800) | (rng() & 1) << 15);
  return x;
}

/// Microseconds of one attention call, and the packed bytes that it must read.
double time_attention(const Shape& s, double* bytes) {
  std::mt19937_64 rng(1);
  const auto q = random_halves(size_t(s.batch) * s.query_heads * s.query_len * s.head_dim, rng);
  const jit::Memory q_device(q.data(), q.size() * 2), out(q.size() * 2), starts(s.starts.data(), s.starts.size() * 4);
  const int64_t vectors = int64_t(s.batch) * s.kv_heads * s.kv_len;
  std::vector<Cache> keys, values;
  keys.push_back(Cache::random(vectors, s.head_dim, s.bits, rng));
  values.push_back(Cache::random(vectors, s.head_dim, s.bits, rng));
  const size_t each = 2 * (keys[0].codes.size() + keys[0].scales.size());
  const int slots = s.ring() + s.first;
  std::vector<Cache> exact_keys, exact_values;
  const int copies = int(std::min<size_t>(256, kFootprint / each + 2));
  while (int(keys.size()) < copies) keys.push_back(keys[0].copy()), values.push_back(values[0].copy());
  for (int i = 0; i < copies && slots > 0; ++i) {
    for (auto* side : {&exact_keys, &exact_values}) {
      side->push_back(i ? (*side)[0].copy() : Cache::random(int64_t(s.batch) * s.kv_heads * slots, s.head_dim, 8, rng));
    }
  }
  std::vector<std::vector<jit::Launch>> calls;
  std::vector<jit::AttentionCall> kept;
  for (int i = 0; i < copies; ++i) {
    AttendParams p;
    p.batch = s.batch, p.query_heads = s.query_heads, p.kv_heads = s.kv_heads, p.query_len = s.query_len;
    p.kv_len = s.kv_len, p.key_dim = p.value_dim = s.head_dim, p.scale = 1 / std::sqrt(float(s.head_dim)), p.seed = 1;
    p.causal = s.causal;
    p.q = {q_device.get(), Dtype::float16, int64_t(s.query_heads) * s.query_len * s.head_dim,
           int64_t(s.query_len) * s.head_dim, s.head_dim};
    p.out.data = out.get();
    if (!s.starts.empty()) p.starts = static_cast<const int32_t*>(starts.get());
    const auto packed = [&](const Cache& cache, int tokens, int bits, Code code) {
      const int64_t row = int64_t(tokens) * words_per_vector(bits, s.head_dim);
      return Packed{static_cast<const uint32_t*>(cache.codes.get()),
                    static_cast<const uint16_t*>(cache.scales.get()),
                    bits,
                    s.kv_heads * row,
                    row,
                    int64_t(s.kv_heads) * tokens,
                    tokens,
                    code};
    };
    p.keys = packed(keys[i], s.kv_len, s.bits, s.code), p.values = packed(values[i], s.kv_len, s.bits, s.code);
    if (slots > 0) {
      p.exact = {packed(exact_keys[i], slots, 8, Code::scalar), packed(exact_values[i], slots, 8, Code::scalar),
                 s.ring(), s.recent, s.first};
    }
    kept.push_back(jit::attention_call(p, jit::current_device()));
    auto& launches = calls.emplace_back();
    for (size_t k = 0; k < kept.back().kernels.size(); ++k) {
      launches.emplace_back(kept.back().kernels[k], kept.back().inputs[k], kept.back().outputs[k]);
    }
  }
  double tokens = double(s.batch) * s.kv_len;
  for (int start : s.starts) tokens -= start;
  *bytes = tokens * s.kv_heads * 2 * bytes_per_vector(s.bits, s.head_dim);
  return time_graph(std::max(100, copies), [&](int i, cudaStream_t stream) {
    for (const auto& launch : calls[i % copies]) launch(stream);
  });
}

double report(const char* what, const Shape& s) {
  double bytes;
  const double us = time_attention(s, &bytes);
  std::printf("%-26s TQ%d%s batch %d, %d queries x %d heads of %d, %6d tokens: %9.2f us  %6.3f TB/s\n", what, s.bits,
              s.code == Code::trellis ? " trellis" : "", s.batch, s.query_len, s.query_heads, s.head_dim, s.kv_len, us,
              bytes / us * 1e-6);
  std::fflush(stdout);
  return us;
}

void decode() {
  for (auto [bits, code] : kCodes) {
    for (int n : {1024, 4096, 16384, 32768, 131072}) report("decode", {.kv_len = n, .bits = bits, .code = code});
  }
  report("decode", {.query_heads = 32, .kv_heads = 8, .kv_len = 32768, .head_dim = 128});
}

/// Exact copies of the newest 128 and the first 4 tokens, by turns with codes alone.
void tiers() {
  for (auto [bits, code] : {kCodes[0], kCodes[2]}) {
    for (int n : {1024, 4096, 16384, 32768, 131072}) {
      std::vector<double> without, with, more;
      for (int i = 0; i < 3; ++i) {
        double bytes;
        Shape s{.kv_len = n, .bits = bits, .code = code};
        without.push_back(time_attention(s, &bytes));
        s.recent = 128, s.first = 4;
        with.push_back(time_attention(s, &bytes));
        more.push_back(with[i] - without[i]);
      }
      for (auto* x : {&without, &with, &more}) std::sort(x->begin(), x->end());
      std::printf("tiers TQ%d%s, %6d tokens: %.2f us, with copies %.2f, more by %.2f (%.2f to %.2f)\n", bits,
                  code == Code::trellis ? " trellis" : "", n, without[1], with[1], more[1], more[0], more[2]);
      std::fflush(stdout);
    }
  }
}

constexpr Code kBoth[] = {Code::trellis, Code::scalar};

void longest() {
  for (Code code : kBoth) report("longest", {.kv_len = 131072, .code = code});
}

void queries() {
  for (Code code : kBoth) {
    for (int len : {1, 2, 4, 8}) report("queries", {.query_len = len, .kv_len = 32768, .causal = true, .code = code});
  }
}

void ragged() {
  std::vector<int> starts;
  int total = 0;
  for (int i = 0; i < 8; ++i) {
    starts.push_back(32768 - (1024 + i * (32768 - 1024) / 7));
    total += 32768 - starts.back();
  }
  report("ragged, 1K to 32K", {.batch = 8, .kv_len = 32768, .starts = starts});
  report("one row of the same total", {.kv_len = (total + 255) / 256 * 256});  // rows aligned, as a cache's are
}

/// Microseconds of encoding keys and values of 4 heads, on fresh memory each time.
double time_encode(int tokens, int bits, Code code, bool feedback) {
  const int heads = 4, dim = 256, words = words_per_vector(bits, dim);
  const int copies = int(std::max<int64_t>(8, int64_t(kFootprint) / (int64_t(4) * heads * tokens * dim)));
  std::mt19937_64 rng(1);
  const auto x = random_halves(size_t(heads) * tokens * dim, rng);
  std::vector<uint16_t> g(size_t(heads) * dim * dim);
  for (auto& v : g) v = uint16_t(0x2400 + rng() % 0x400);
  const jit::Memory feedback_device(g.data(), g.size() * 2);
  const jit::Array given(feedback_device.get(), "__half", {heads, dim, dim});
  std::vector<jit::Memory> memory;
  std::vector<jit::Launch> launches;
  for (int i = 0; i < std::min(copies, 64); ++i) {
    std::vector<jit::Array> inputs, outputs;
    for (int side = 0; side < 2; ++side) {
      memory.emplace_back(x.data(), x.size() * 2);
      inputs.emplace_back(memory.back().get(), "__half", std::vector<int32_t>{1, heads, tokens, dim});
      inputs.push_back(inputs.back());
      inputs.push_back(given);
      memory.emplace_back(size_t(heads) * tokens * words * 4);
      outputs.emplace_back(memory.back().get(), "uint32_t", std::vector<int32_t>{1, heads, tokens, words});
      memory.emplace_back(size_t(heads) * tokens * 2);
      outputs.emplace_back(memory.back().get(), "__half", std::vector<int32_t>{1, heads, tokens});
    }
    launches.emplace_back(
        cuda::encode_kernel({{bits, false, feedback, code}, {bits, false, feedback, code}}, dim, 1, heads, tokens),
        inputs, outputs);
  }
  return time_graph(100, [&](int i, cudaStream_t s) { launches[i % launches.size()](s); });
}

void encode() {
  for (int tokens : {1, 2048}) {
    for (auto [bits, code] : kCodes) {
      const double us = time_encode(tokens, bits, code, false), with = time_encode(tokens, bits, code, true);
      std::printf("encode TQ%d%s, %d tokens x 4 heads, keys and values: %.2f us, with feedback %.2f us\n", bits,
                  code == Code::trellis ? " trellis" : "", tokens, us, with);
    }
  }
  const size_t bytes = size_t(2) * 4 * 2048 * 256 * 2;
  std::vector<jit::Memory> from, to;
  for (int i = 0; i < 32; ++i) from.emplace_back(bytes), to.emplace_back(bytes);
  const double us = time_graph(100, [&](int i, cudaStream_t s) {
    cudaMemcpyAsync(to[i % 32].get(), from[i % 32].get(), bytes, cudaMemcpyDeviceToDevice, s);
  });
  std::printf("copy of 2048 tokens' FP16 data: %.2f us\n", us);
}

/// Heads of 512 coordinates, eight of them over four and over one KV head, and 128 over one (latent attention).
void wide() {
  for (auto [heads, kv_heads] : {std::pair{8, 4}, {8, 1}, {128, 1}}) {
    for (int n : {32768, 131072}) {
      for (auto [bits, code] : {std::pair{3, Code::trellis}, {4, Code::scalar}}) {
        report("wide",
               {.query_heads = heads, .kv_heads = kv_heads, .kv_len = n, .head_dim = 512, .bits = bits, .code = code});
      }
    }
  }
}

void prefill() {
  for (auto [bits, code] : {std::pair{3, Code::trellis}, {3, Code::scalar}, {4, Code::scalar}, {8, Code::scalar}}) {
    for (int n : {32768, 2048}) {
      report("prefill", {.query_len = 2048, .kv_len = n, .bits = bits, .causal = true, .code = code});
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::pair<const char*, void (*)()> all[] = {{"decode", decode},   {"longest", longest}, {"tiers", tiers},
                                                    {"queries", queries}, {"ragged", ragged},   {"encode", encode},
                                                    {"prefill", prefill}, {"wide", wide}};
  try {
    for (auto [name, run] : all) {
      const bool wanted = std::any_of(argv + 1, argv + argc, [n = name](char* a) { return !std::strcmp(a, n); });
      if (argc == 1 || wanted) run();
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "cuda_kernels: %s\n", e.what());
    return 1;
  }
}
