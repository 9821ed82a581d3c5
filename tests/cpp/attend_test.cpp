// What the table does not vary: threads, hidden NaN, strides, edge shapes, wrong arguments, instruction sets.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>

#include "support/cases.h"

namespace turboquant {
namespace {

using cases::Buffer;
using cases::Case;
using cases::Inputs;

void run_cpu(const AttendParams& p) { attend(p, Backend::cpu); }

class Attend : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { force_isa(GetParam()); }
  void TearDown() override {
    force_isa("");
    set_num_threads(threads_);
  }
  int threads_ = num_threads();
};

const Case kShapes[] = {
    {.query_heads = 16, .kv_heads = 4, .kv_len = 3000},
    {.head_dim = 96, .batch = 2, .query_heads = 6, .kv_heads = 2, .query_len = 5, .kv_len = 1111, .causal = true},
    {.head_dim = 64, .query_heads = 8, .kv_heads = 1, .query_len = 70, .kv_len = 700, .causal = true, .sinks = true},
    {.query_heads = 16, .kv_heads = 4, .kv_len = 3000, .recent = 128, .first = 4, .ring = 384},
};

TEST_P(Attend, ResultsDoNotDependOnTheNumberOfThreads) {
  for (const Case& c : kShapes) {
    SCOPED_TRACE(c.name());
    Inputs inputs(c);
    set_num_threads(1);
    run_cpu(inputs.params());
    const auto want = inputs.out.bytes;
    for (int threads : {2, 3, 8}) {
      set_num_threads(threads);
      for (int repeat = 0; repeat < 3; ++repeat) {
        std::fill(inputs.out.bytes.begin(), inputs.out.bytes.end(), 0xff);
        run_cpu(inputs.params());
        EXPECT_EQ(inputs.out.bytes, want) << threads << " threads";
      }
    }
  }
}

TEST_P(Attend, CallersOnSeveralThreadsGetTheSameResults) {
  set_num_threads(3);
  Inputs reference(kShapes[1]);
  run_cpu(reference.params());
  std::vector<std::thread> callers;
  std::vector<int> equal(4);
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&, i] {
      Inputs mine(kShapes[1]);
      for (int repeat = 0; repeat < 5; ++repeat) {
        std::fill(mine.out.bytes.begin(), mine.out.bytes.end(), 0xff);
        run_cpu(mine.params());
        equal[i] += mine.out.bytes == reference.out.bytes;
      }
    });
  }
  for (auto& t : callers) t.join();
  EXPECT_EQ(equal, std::vector<int>(4, 5));
}

// Keys that a rule hides hold NaN scales and arbitrary codes; the output must not change by a bit.
TEST_P(Attend, HiddenKeysHaveNoInfluence) {
  const Case shapes[] = {
      {.batch = 3, .query_heads = 4, .kv_heads = 2, .kv_len = 200, .ragged = true},
      {.head_dim = 64, .query_heads = 4, .kv_heads = 2, .kv_len = 333, .causal = true, .window = 50},
      {.head_dim = 128, .query_heads = 2, .kv_heads = 1, .query_len = 3, .kv_len = 150, .mask = MaskKind::boolean},
      {.head_dim = 128, .query_heads = 2, .kv_heads = 1, .query_len = 3, .kv_len = 150, .mask = MaskKind::additive},
  };
  for (const Case& c : shapes) {
    SCOPED_TRACE(c.name());
    Inputs inputs(c);
    if (c.mask != MaskKind::none) {  // the same keys hidden from every query
      for (int i = 1; i < c.query_len; ++i) {
        const size_t row = inputs.mask.bytes.size() / c.query_len;
        std::memcpy(&inputs.mask.bytes[i * row], inputs.mask.bytes.data(), row);
      }
    }
    run_cpu(inputs.params());
    const auto want = inputs.out.bytes;
    int hidden = 0;
    for (int b = 0; b < c.batch; ++b) {
      for (int t = 0; t < c.kv_len; ++t) {
        bool visible = !(c.ragged && t < inputs.starts[b]) && !(c.window && t <= c.kv_len - c.query_len - c.window);
        if (c.mask == MaskKind::boolean) visible = inputs.mask.bytes[t];
        if (c.mask == MaskKind::additive) visible = inputs.mask.get(t) != -INFINITY;
        if (visible) continue;
        ++hidden;
        for (int h = 0; h < c.kv_heads; ++h) {
          for (auto* packed : {&inputs.keys.view, &inputs.values.view}) {
            packed->scales[b * packed->scales_batch_stride + h * packed->scales_head_stride + t] =
                t % 2 ? 0x7e00 : 0x7c00;
            std::memset(packed->codes + b * packed->codes_batch_stride + h * packed->codes_head_stride +
                            int64_t(t) * words_per_vector(packed->bits, c.head_dim),
                        0xa5, 4 * words_per_vector(packed->bits, c.head_dim));
          }
        }
      }
    }
    EXPECT_GT(hidden, 20);
    run_cpu(inputs.params());
    EXPECT_EQ(inputs.out.bytes, want);
  }
}

TEST_P(Attend, NanReachesOnlyTheQueriesThatSeeIt) {
  const Case c{.head_dim = 64, .query_heads = 4, .kv_heads = 2, .query_len = 6, .kv_len = 100, .causal = true};
  enum { key, infinite_key, value, query };
  for (int where : {key, infinite_key, value, query}) {
    SCOPED_TRACE(where);
    Inputs inputs(c);
    run_cpu(inputs.params());
    const Buffer want = inputs.out;
    const int position = 97;  // queries 3, 4 and 5 stand at 97, 98 and 99
    // KV head 0: query heads 0 and 1.  An infinite key scale counts as NaN whatever the sign of its dot product.
    if (where == key) inputs.keys.view.scales[position] = 0x7e00;
    if (where == infinite_key) inputs.keys.view.scales[position] = 0x7c00;
    if (where == value) inputs.values.view.scales[position] = 0x7c00;
    if (where == query) inputs.q.set(size_t(1 * c.query_len + 4) * c.head_dim + 7, NAN);
    run_cpu(inputs.params());
    for (int h = 0; h < 4; ++h) {
      for (int i = 0; i < 6; ++i) {
        const bool poisoned = where == query ? h == 1 && i == 4 : h < 2 && i >= 3;
        for (int d = 0; d < c.head_dim; ++d) {
          const size_t at = (size_t(h) * c.query_len + i) * c.head_dim + d;
          if (poisoned) {
            EXPECT_TRUE(std::isnan(inputs.out.get(at)));
          } else {
            EXPECT_EQ(inputs.out.get(at), want.get(at));
          }
        }
      }
    }
  }
}

TEST_P(Attend, QueriesThatSeeNothingGetZero) {
  for (bool sinks : {false, true}) {
    Inputs inputs(
        {.batch = 2, .query_heads = 4, .kv_heads = 2, .query_len = 2, .kv_len = 90, .sinks = sinks, .centred = true});
    AttendParams p = inputs.params();
    const int32_t starts[] = {90, 12};
    p.starts = starts;
    std::fill(inputs.out.bytes.begin(), inputs.out.bytes.end(), 0xff);
    run_cpu(p);
    const size_t half = inputs.out.size() / 2;
    for (size_t i = 0; i < half; ++i) EXPECT_EQ(inputs.out.get(i), 0);
    EXPECT_NE(inputs.out.get(half), 0);
    p.kv_len = 0;
    p.starts = nullptr;
    std::fill(inputs.out.bytes.begin(), inputs.out.bytes.end(), 0xff);
    run_cpu(p);
    for (size_t i = 0; i < 2 * half; ++i) EXPECT_EQ(inputs.out.get(i), 0);
  }
}

/// Memory whose last byte is followed by a page that may not be touched.
class GuardedBytes {
 public:
  explicit GuardedBytes(size_t size)
      : page_(size_t(sysconf(_SC_PAGESIZE))), mapped_((size + page_ - 1) / page_ * page_) {
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, mapped_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + mapped_, page_, PROT_NONE) != 0) throw std::bad_alloc();
    data = base_ + mapped_ - size;
  }
  ~GuardedBytes() { munmap(base_, mapped_ + page_); }
  GuardedBytes(const GuardedBytes&) = delete;
  uint8_t* data;

 private:
  size_t page_, mapped_;
  uint8_t* base_;
};

// A cache filled to its capacity ends where its memory may end.
TEST_P(Attend, NothingIsReadBeyondTheLastRow) {
  for (int bits : {2, 3, 4}) {
    for (int dim : {32, 96, 160, 256}) {
      for (int n : {1, 4, 63, 64, 65, 131}) {
        Inputs inputs({.key_bits = bits, .value_bits = bits, .head_dim = dim, .query_heads = 2, .kv_len = n});
        run_cpu(inputs.params());
        const auto want = inputs.out.bytes;
        const size_t code_bytes = size_t(n) * 4 * words_per_vector(bits, dim), scale_bytes = size_t(n) * 2;
        GuardedBytes codes[2] = {GuardedBytes(code_bytes), GuardedBytes(code_bytes)};
        GuardedBytes scales[2] = {GuardedBytes(scale_bytes), GuardedBytes(scale_bytes)};
        AttendParams p = inputs.params();
        for (int i = 0; i < 2; ++i) {
          Packed& packed = i ? p.values : p.keys;
          std::memcpy(codes[i].data, packed.codes, code_bytes);
          std::memcpy(scales[i].data, packed.scales, scale_bytes);
          packed.codes = reinterpret_cast<const uint32_t*>(codes[i].data);
          packed.scales = reinterpret_cast<const uint16_t*>(scales[i].data);
        }
        run_cpu(p);
        EXPECT_EQ(inputs.out.bytes, want);
      }
    }
  }
}

// q and out as a model has them, [batch, length, heads, dim]; a mask of its own for every head, read backwards.
TEST_P(Attend, AnyStridesOfQueriesOutputAndMask) {
  const Case c{.head_dim = 96, .batch = 2, .query_heads = 4, .kv_heads = 2, .query_len = 3, .kv_len = 75};
  for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
    Case typed = c;
    typed.dtype = dtype;
    Inputs inputs(typed);
    std::mt19937 rng(2);
    std::vector<uint8_t> mask(size_t(2) * 4 * 3 * 75);
    for (auto& m : mask) m = rng() % 2;
    AttendParams p = inputs.params();
    p.mask_kind = MaskKind::boolean;
    p.mask = mask.data() + mask.size() - 1;
    p.mask_strides[0] = -4 * 3 * 75, p.mask_strides[1] = -75, p.mask_strides[2] = -4 * 75, p.mask_strides[3] = -1;
    Buffer want(Dtype::float32, inputs.q.size());
    p.out = cases::contiguous<void*>(want.bytes.data(), Dtype::float32, 4, 3, 96);
    attend(p, Backend::reference);
    Buffer q(dtype, inputs.q.size()), out(dtype, inputs.q.size());
    auto moved = [](int b, int h, int i, int d) { return size_t(((b * 3 + i) * 4 + h) * 96 + d); };
    auto dense = [](int b, int h, int i, int d) { return size_t(((b * 4 + h) * 3 + i) * 96 + d); };
    auto each = [](auto f) {
      for (int n = 0; n < 2 * 4 * 3 * 96; ++n) f(n / (4 * 3 * 96), n / (3 * 96) % 4, n / 96 % 3, n % 96);
    };
    each([&](int b, int h, int i, int d) { q.set(moved(b, h, i, d), inputs.q.get(dense(b, h, i, d))); });
    p.q = {q.bytes.data(), dtype, 3 * 4 * 96, 96, 4 * 96};
    p.out = {out.bytes.data(), dtype, 3 * 4 * 96, 96, 4 * 96};
    run_cpu(p);
    double error = 0, square = 0;
    each([&](int b, int h, int i, int d) {
      const double a = out.get(moved(b, h, i, d)), w = want.get(dense(b, h, i, d));
      error += (a - w) * (a - w);
      square += w * w;
    });
    EXPECT_LE(std::sqrt(error / square), 5e-4 + cases::rounding(dtype));
  }
}

// Other vectors as copies, of the codes' own width: then a query reads what a plain history reads that has the copies'
// rows where the rule says so.  Nothing but that history is computed here by the rule.
TEST(ExactTier, TheOracleReadsTheCopiesWhereTheRuleSaysSo) {
  const Case c{.head_dim = 64,
               .batch = 2,
               .query_heads = 2,
               .kv_heads = 1,
               .query_len = 40,
               .kv_len = 100,
               .causal = true,
               .ragged = true,
               .recent = 9,
               .first = 3,
               .ring = 32,
               .exact_bits = 3};
  Case other = c;
  other.seed = 7;
  Inputs inputs(c), strange(other);
  const int words = words_per_vector(3, 64), slots = 35;
  inputs.exact_keys.codes = strange.exact_keys.codes, inputs.exact_values.codes = strange.exact_values.codes;
  inputs.exact_keys.scales = strange.exact_keys.scales, inputs.exact_values.scales = strange.exact_values.scales;
  AttendParams p = inputs.params();
  p.exact.keys = inputs.exact_keys.packed(), p.exact.values = inputs.exact_values.packed();
  attend(p, Backend::reference);
  const auto got = inputs.out;
  int from_ring = 0, from_first = 0;
  for (int i = 0; i < c.query_len; ++i) {
    Inputs mixed(c);
    const int position = c.kv_len - c.query_len + i;
    for (int b = 0; b < c.batch; ++b) {
      for (int t = 0; t <= position; ++t) {
        const int start = inputs.starts[b];
        const bool recent = t > position - 9 && t >= 100 - 32, first = t < start + 3 && t >= start;
        if (!recent && !first) continue;
        ++(recent ? from_ring : from_first);
        const int slot = b * slots + (recent ? t % 32 : 32 + t - start), row = b * (c.kv_len + 7) + t;
        for (auto [to, from] : {std::pair{&mixed.keys, &inputs.exact_keys}, {&mixed.values, &inputs.exact_values}}) {
          std::copy_n(&from->codes[size_t(slot) * words], words, &to->codes[size_t(row) * words]);
          to->scales[row] = from->scales[slot];
        }
      }
    }
    AttendParams plain = mixed.params();
    plain.exact = {};
    attend(plain, Backend::reference);
    for (int h = 0; h < c.batch * c.query_heads; ++h) {
      for (int d = 0; d < 64; ++d) {
        const size_t at = (size_t(h) * c.query_len + i) * 64 + d;
        ASSERT_EQ(got.get(at), mixed.out.get(at)) << "query " << i << " head " << h;
      }
    }
  }
  EXPECT_GT(from_ring, 0);
  EXPECT_GT(from_first, 0);
}

// The copies' buffer ends where its memory may end, and so does the ring before the first tokens.
TEST_P(Attend, NothingIsReadBeyondTheCopies) {
  for (int dim : {32, 96, 256}) {
    for (int n : {1, 40, 95, 96, 131, 200}) {
      Inputs inputs({.head_dim = dim, .query_heads = 2, .kv_len = n, .recent = 32, .first = 3, .ring = 96});
      run_cpu(inputs.params());
      const auto want = inputs.out.bytes;
      const size_t code_bytes = inputs.exact_keys.codes.size() * 4, scale_bytes = inputs.exact_keys.scales.size() * 2;
      GuardedBytes codes[2] = {GuardedBytes(code_bytes), GuardedBytes(code_bytes)};
      GuardedBytes scales[2] = {GuardedBytes(scale_bytes), GuardedBytes(scale_bytes)};
      AttendParams p = inputs.params();
      for (int i = 0; i < 2; ++i) {
        Packed& packed = i ? p.exact.values : p.exact.keys;
        std::memcpy(codes[i].data, packed.codes, code_bytes);
        std::memcpy(scales[i].data, packed.scales, scale_bytes);
        packed.codes = reinterpret_cast<const uint32_t*>(codes[i].data);
        packed.scales = reinterpret_cast<const uint16_t*>(scales[i].data);
      }
      run_cpu(p);
      EXPECT_EQ(inputs.out.bytes, want);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, Attend, testing::ValuesIn(available_isas()), [](const auto& info) { return info.param; });

/// The message of what `call` throws.
template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "nothing was thrown";
}

TEST(Arguments, ErrorsNameOperationRuleAndValue) {
  Inputs inputs({.head_dim = 64, .query_heads = 4, .kv_heads = 2, .kv_len = 9});
  auto attend_with = [&](auto change) {
    AttendParams p = inputs.params();
    change(p);
    return error_of([&] { attend(p); });
  };
  using P = AttendParams;
  EXPECT_EQ(attend_with([](P& p) { p.key_dim = 80; }),
            "[attend] key_dim must be a multiple of 32 from 32 to 512; got 80");
  EXPECT_EQ(attend_with([](P& p) { p.value_dim = 544; }),
            "[attend] value_dim must be a multiple of 32 from 32 to 512; got 544");
  EXPECT_EQ(attend_with([](P& p) { p.keys.bits = 5; }), "[attend] bits must be 2, 3, 4 or 8; got 5");
  EXPECT_EQ(attend_with([](P& p) { p.values.bits = 1; }), "[attend] bits must be 2, 3, 4 or 8; got 1");
  EXPECT_EQ(attend_with([](P& p) { p.query_heads = 5; }),
            "[attend] query_heads must be a multiple of kv_heads; got 5 and 2");
  EXPECT_EQ(attend_with([](P& p) { p.kv_len = -1; }), "[attend] kv_len must be at least 0; got -1");
  EXPECT_EQ(attend_with([](P& p) { p.kv_heads = 0; }), "[attend] kv_heads must be at least 1; got 0");
  EXPECT_EQ(attend_with([](P& p) { p.scale = INFINITY; }), "[attend] scale must be finite; got inf");
  EXPECT_EQ(attend_with([](P& p) { p.mask_kind = MaskKind::boolean; }), "[attend] mask must not be null");
  EXPECT_EQ(attend_with([](P& p) { p.q.data = nullptr; }), "[attend] q and out must not be null");
  const auto exact_with = [&](int ring, int recent, int first) {
    return attend_with([&](P& p) { p.exact = {p.keys, p.values, ring, recent, first}; });
  };
  EXPECT_EQ(exact_with(32, -1, 0), "[attend] exact.recent must be at least 0; got -1");
  EXPECT_EQ(exact_with(32, 1, -2), "[attend] exact.first must be at least 0; got -2");
  EXPECT_EQ(exact_with(0, 33, 0), "[attend] exact.ring must be at least 9; got 0");
  EXPECT_EQ(attend_with([](P& p) {
              p.kv_len = 40;
              p.exact = {p.keys, p.values, 32, 33, 0};
            }),
            "[attend] exact.ring must be at least 33; got 32");
  EXPECT_EQ(exact_with(33, 1, 0), "[attend] exact.ring must be a multiple of 32; got 33");
  EXPECT_EQ(attend_with([](P& p) {
              p.exact = {{}, {}, 32, 1, 0};
            }),
            "[attend] codes and scales of the exact copies must not be null");
  EncodeParams e;
  e.batch = e.heads = e.tokens = 1, e.head_dim = 100;
  EXPECT_EQ(error_of([&] { encode(e); }), "[encode] head_dim must be a multiple of 32 from 32 to 512; got 100");
  e.head_dim = 64;
  EXPECT_EQ(error_of([&] { encode(e); }), "[encode] x, codes and scales must not be null");
  DecodeParams d;
  d.batch = d.heads = d.tokens = 1, d.head_dim = 64, d.in.bits = 7;
  EXPECT_EQ(error_of([&] { decode(d); }), "[decode] bits must be 2, 3, 4 or 8; got 7");
  d.in.bits = 4, d.in.code = Code::trellis;
  EXPECT_EQ(error_of([&] { decode(d); }), "[decode] bits must be 2 or 3 with a trellis; got 4");
  EXPECT_EQ(error_of([] { set_num_threads(0); }), "[set_num_threads] n must be at least 1; got 0");
  EXPECT_NE(error_of([] { force_isa("sse1"); }).find("got \"sse1\""), std::string::npos);
}

TEST(Isas, TheForcedOneIsUsedAndTheLastIsScalar) {
  const std::string best = current_isa();
  for (const std::string& isa : available_isas()) {
    force_isa(isa);
    EXPECT_EQ(current_isa(), isa);
  }
  force_isa("");
  EXPECT_EQ(current_isa(), best);
  EXPECT_EQ(available_isas().back(), "scalar");
}

}  // namespace
}  // namespace turboquant
