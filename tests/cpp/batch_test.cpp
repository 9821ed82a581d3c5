// Batches and windows over MLX arrays as a C++ program uses them.
#include <gtest/gtest.h>

#include "turboquant/mlx/batch_kv_cache.h"
#include "turboquant/mlx/rotating_kv_cache.h"

namespace turboquant::ops {
namespace {

mx::array random(int tokens, int batch = 1) {
  return mx::astype(mx::random::normal({batch, 2, tokens, 64}), mx::float16);
}

bool same(const Store& a, const Store& b) {
  return mx::array_equal(a.keys.codes, b.keys.codes).item<bool>() &&
         mx::array_equal(a.keys.scales, b.keys.scales).item<bool>() &&
         mx::array_equal(a.values.codes, b.values.codes).item<bool>() &&
         mx::array_equal(a.values.scales, b.values.scales).item<bool>();
}

Store held(const KVCache& cache) { return cache.store()->tokens(0, cache.offset()); }

class Batch : public testing::Test {
 protected:
  void SetUp() override { mx::set_default_device(mx::Device::cpu); }
  // extract() leaves work under way, and MLX's own exit handlers do not wait for it: its allocator's destructor then
  // frees buffers that its worker still gives back (1 of 100 runs of any program that ends after mx::async_eval).
  void TearDown() override { mx::synchronize(); }
};

TEST_F(Batch, RowsKeepTheirBytesThroughMergeAndExtract) {
  std::vector<KVCache> rows;
  for (int n : {30, 300, 1}) {
    rows.emplace_back(CacheCoding{.keys = {4, 5}, .values = {3, 5}});
    rows.back().append(random(n), random(n));
  }
  auto batch = BatchKVCache::merge(rows);
  EXPECT_EQ(batch.length(), 300);
  EXPECT_EQ(batch.offsets(), (std::vector<int>{30, 300, 1}));
  for (int b = 0; b < 3; ++b) EXPECT_TRUE(same(held(batch.extract(b)), held(rows[b])));
  batch.filter({2, 0});
  EXPECT_EQ(batch.length(), 30);
  EXPECT_EQ(batch.left_padding(), (std::vector<int>{29, 0}));
  EXPECT_TRUE(same(held(batch.extract(1)), held(rows[0])));
}

TEST_F(Batch, AttentionSkipsEachRowsPadding) {
  std::vector<KVCache> rows(2);
  rows[0].append(random(7), random(7));
  rows[1].append(random(40), random(40));
  const auto batch = BatchKVCache::merge(rows);
  const auto q = mx::random::normal({2, 4, 1, 64});
  const auto together = batch.view().attend(q, 0.125f, false);
  for (int b = 0; b < 2; ++b) {
    const auto alone = rows[b].view().attend(mx::slice(q, {b, 0, 0, 0}, {b + 1, 4, 1, 64}), 0.125f, false);
    const auto row = mx::slice(together, {b, 0, 0, 0}, {b + 1, 4, 1, 64});
    EXPECT_LT(mx::max(mx::abs(row - alone)).item<float>(), 1e-5f);
  }
}

TEST_F(Batch, AnnouncedPadsMoveToTheFront) {
  BatchKVCache batch({0, 0});
  const auto k = random(6, 2), v = random(6, 2);
  batch.prepare({}, {4, 0});
  batch.append(k, v);
  batch.finalize();
  EXPECT_EQ(batch.offsets(), (std::vector<int>{2, 6}));
  KVCache first;
  first.append(mx::slice(k, {0, 0, 0, 0}, {1, 2, 2, 64}), mx::slice(v, {0, 0, 0, 0}, {1, 2, 2, 64}));
  EXPECT_TRUE(same(held(batch.extract(0)), held(first)));
}

TEST_F(Batch, ABatchWithoutRowsGoesOn) {
  BatchKVCache batch({1, 0}, {.recent = 128, .sink = 4});
  batch.append(random(5, 2), random(5, 2));
  batch.filter({});
  batch.append(random(1, 0), random(1, 0));
  EXPECT_EQ(batch.length(), 6);
  const auto out = batch.view().attend(random(1, 0), 0.125f, true);
  EXPECT_EQ(out.shape(), (mx::Shape{0, 2, 1, 64}));
  mx::eval(out);
}

TEST_F(Batch, AFailedCallChangesNothing) {
  BatchKVCache batch({1, 0});
  batch.append(random(5, 2), random(5, 2));
  EXPECT_THROW(batch.append(random(1, 3), random(1, 3)), std::invalid_argument);
  EXPECT_THROW(batch.filter({0, 2}), std::invalid_argument);
  EXPECT_THROW(batch.extract(2), std::invalid_argument);
  EXPECT_THROW(batch.prepare({1, 1}, {}), std::invalid_argument);
  EXPECT_THROW(batch.extend(BatchKVCache({0}, {.keys = {4}})), std::invalid_argument);
  EXPECT_THROW(BatchKVCache({-1}), std::invalid_argument);
  EXPECT_EQ(batch.length(), 5);
  EXPECT_EQ(batch.offsets(), (std::vector<int>{4, 5}));
}

TEST_F(Batch, AWindowHoldsTheFirstAndTheLatest) {
  KVCache all;
  RotatingKVCache window(8, 2);
  const auto k = random(30), v = random(30);
  all.append(k, v);
  for (int at = 0, n; at < 30; at += n) {
    n = at == 3 ? 12 : 1;
    const auto part = [&](const mx::array& x) { return mx::slice(x, {0, 0, at, 0}, {1, 2, at + n, 64}); };
    window.append(part(k), part(v));
  }
  EXPECT_EQ(window.offset(), 30);
  EXPECT_EQ(window.size(), 8);
  EXPECT_EQ(window.view().length, 8);
  EXPECT_FALSE(window.can_trim());
  EXPECT_EQ(window.trim(3), 0);
  EXPECT_TRUE(same(*window.ordered(), concatenate({held(all).tokens(0, 2), held(all).tokens(24, 30)}, 2)));
  EXPECT_FALSE(window.mask(1, 0, false).array.has_value());
  EXPECT_EQ(window.mask(4, 0, false).array->shape(), (mx::Shape{4, 11}));
}

TEST_F(Batch, WindowsOfDifferentLengthsFormABatch) {
  std::vector<RotatingKVCache> rows(2, RotatingKVCache(8));
  rows[0].append(random(20), random(20));
  rows[1].append(random(3), random(3));
  auto batch = BatchRotatingKVCache::merge(rows);
  EXPECT_EQ(batch.offsets(), (std::vector<int>{20, 3}));
  for (int i = 0; i < 10; ++i) batch.append(random(1, 2), random(1, 2));
  EXPECT_EQ(batch.offsets(), (std::vector<int>{30, 13}));
  EXPECT_EQ(batch.view().length, 8);
  EXPECT_EQ(batch.extract(1).size(), 8);
  EXPECT_THROW(BatchRotatingKVCache::merge({RotatingKVCache(8), RotatingKVCache(9)}), std::invalid_argument);
  EXPECT_THROW(RotatingKVCache(8, 8), std::invalid_argument);
}

}  // namespace
}  // namespace turboquant::ops
