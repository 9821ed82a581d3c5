// The core library alone: keys and values of one head are coded, and a query attends over the codes.
#include <turboquant/turboquant.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace tq = turboquant;

int main() {
  constexpr int kTokens = 1000, kDim = 256, kBits = 3;
  const int words = tq::words_per_vector(kBits, kDim);

  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  std::vector<float> keys(kTokens * kDim), values(kTokens * kDim), query(kDim), out(kDim);
  for (auto* x : {&keys, &values, &query}) {
    for (float& v : *x) v = normal(rng);
  }

  // Codes and scales of both sides: 98 bytes a vector.
  std::vector<uint32_t> key_codes(kTokens * words), value_codes(kTokens * words);
  std::vector<uint16_t> key_scales(kTokens), value_scales(kTokens);
  const auto pack = [&](const std::vector<float>& x, std::vector<uint32_t>& codes, std::vector<uint16_t>& scales) {
    tq::EncodeParams p;
    p.batch = 1, p.heads = 1, p.tokens = kTokens, p.head_dim = kDim;
    p.x = {x.data(), tq::Dtype::float32, 0, 0, kDim};
    p.out = {codes.data(), scales.data(), kBits, 0, 0, 0, 0};  // one head: no batch or head stride
    tq::encode(p);
  };
  pack(keys, key_codes, key_scales);
  pack(values, value_codes, value_scales);

  tq::AttendParams p;
  p.batch = 1, p.query_heads = 1, p.kv_heads = 1, p.query_len = 1, p.kv_len = kTokens, p.key_dim = p.value_dim = kDim;
  p.scale = 1 / std::sqrt(float(kDim));
  p.q = {query.data(), tq::Dtype::float32, 0, 0, kDim};
  p.keys = {key_codes.data(), key_scales.data(), kBits, 0, 0, 0, 0};
  p.values = {value_codes.data(), value_scales.data(), kBits, 0, 0, 0, 0};
  p.out = {out.data(), tq::Dtype::float32, 0, 0, kDim};
  tq::attend(p);

  std::printf("%d tokens in %zu bytes (float16: %d), %s\nout[0..3] = %.4f %.4f %.4f %.4f\n", kTokens,
              2 * kTokens * size_t(tq::bytes_per_vector(kBits, kDim)), 2 * kTokens * kDim * 2,
              tq::current_isa().c_str(), out[0], out[1], out[2], out[3]);
}
