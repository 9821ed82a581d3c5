// Times llama.cpp's ggml_flash_attn_ext on the shape of kernels.cpp, with keys and values contiguous per head.  Built
// and run by llama_cpp.py against a ggml that lies outside this repository.
//
//   llama_cpp_bench THREADS TOKENS...      prints: TYPE TOKENS MEDIAN_MICROSECONDS
#include <ggml-cpu.h>
#include <ggml.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

/// Seconds: CPU time with one thread (see kernels.cpp), else wall-clock time.
static double now(int threads) {
  timespec t;
  clock_gettime(threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

int main(int argc, char** argv) {
  const int threads = std::atoi(argv[1]), dim = 256, query_heads = 16, kv_heads = 4;
  ggml_threadpool_params pool_params = ggml_threadpool_params_default(threads);
  ggml_threadpool* pool = ggml_threadpool_new(&pool_params);
  for (int a = 2; a < argc; ++a) {
    const int64_t tokens = std::atoll(argv[a]);
    for (ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
      const size_t cache = ggml_row_size(type, dim) * tokens * kv_heads;
      ggml_context* ctx = ggml_init({2 * cache + (size_t(64) << 20), nullptr, false});
      ggml_tensor* q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, dim, 1, query_heads, 1);
      ggml_tensor* k = ggml_new_tensor_4d(ctx, type, dim, tokens, kv_heads, 1);
      ggml_tensor* v = ggml_new_tensor_4d(ctx, type, dim, tokens, kv_heads, 1);
      ggml_tensor* out = ggml_flash_attn_ext(ctx, q, k, v, nullptr, 1 / std::sqrt(float(dim)), 0, 0);
      ggml_cgraph* graph = ggml_new_graph(ctx);
      ggml_build_forward_expand(graph, out);
      std::mt19937 rng(1);
      std::normal_distribution<float> normal;
      for (int i = 0; i < dim * query_heads; ++i) static_cast<float*>(q->data)[i] = normal(rng);
      std::vector<float> rows(size_t(dim) * 256);
      for (float& x : rows) x = normal(rng);
      for (ggml_tensor* t : {k, v}) {
        char* to = static_cast<char*>(t->data);
        for (int64_t row = 0; row < tokens * kv_heads; row += 256) {
          const int64_t n = std::min<int64_t>(256, tokens * kv_heads - row);
          ggml_quantize_chunk(type, rows.data(), to + row * ggml_row_size(type, dim), 0, n, dim, nullptr);
        }
      }
      ggml_cplan plan = ggml_graph_plan(graph, threads, pool);
      std::vector<uint8_t> work(plan.work_size);
      plan.work_data = work.data();
      std::vector<double> micros;
      for (int i = 0; i < 11; ++i) {
        const double start = now(threads);
        ggml_graph_compute(graph, &plan);
        micros.push_back(1e6 * (now(threads) - start));
      }
      std::sort(micros.begin() + 1, micros.end());  // the first is a warm-up
      std::printf("%s %lld %.1f\n", ggml_type_name(type), static_cast<long long>(tokens), micros[6]);
      std::fflush(stdout);
      ggml_free(ctx);
    }
  }
  ggml_threadpool_free(pool);
}
