// The cache over MLX arrays as a C++ program uses it.
#include <gtest/gtest.h>

#include "turboquant/mlx/batch_kv_cache.h"
#include "turboquant/mlx/kv_cache.h"
#include "turboquant/mlx/rotating_kv_cache.h"
#include "turboquant/turboquant.h"

namespace turboquant::ops {
namespace {

mx::array random(int tokens, int batch = 1, mx::Dtype dtype = mx::float16) {
  return mx::astype(mx::random::normal({batch, 2, tokens, 64}), dtype);
}

class Cache : public testing::Test {
 protected:
  void SetUp() override { mx::set_default_device(mx::Device::cpu); }
};

TEST_F(Cache, AttendsOverWhatWasAppended) {
  KVCache cache({.keys = {4, 5}, .values = {3, 5}});
  EXPECT_TRUE(cache.empty());
  for (int n : {300, 1, 20}) cache.append(random(n), random(n));
  EXPECT_EQ(cache.offset(), 321);
  const auto view = cache.view();
  const auto q = random(3, 1, mx::float32);
  const mx::Shape grouped{1, 2, 3, 64};
  const auto [k, v] = view.decode(mx::float32);
  const auto want = mx::fast::scaled_dot_product_attention(q, k, v, 0.125f, "causal");
  const auto got = view.attend(q, 0.125f, true);
  EXPECT_EQ(got.shape(), grouped);
  EXPECT_LT(mx::linalg::norm(got - want).item<float>(), 5e-4f * mx::linalg::norm(want).item<float>());
}

TEST_F(Cache, TellsWhichKernelAttended) {
  KVCache cache;
  cache.append(random(10), random(10));
  auto view = cache.view();
  view.last_kernel = std::make_shared<LastKernel>();
  EXPECT_EQ(view.last_kernel->name, nullptr);
  EXPECT_THROW(view.attend(random(1, 2), 0.125f, true), std::invalid_argument);
  EXPECT_EQ(view.last_kernel->name, nullptr);
  view.attend(random(3), 0.125f, true);
  EXPECT_EQ(view.last_kernel->name, "cpu " + current_isa());
}

TEST_F(Cache, IsAValue) {
  KVCache a;
  a.append(random(10), random(10));
  KVCache b = a;
  b.trim(4);
  b.append(random(4), random(4));
  EXPECT_EQ(a.offset(), 10);
  EXPECT_FALSE(mx::array_equal(a.view().store.keys.codes, b.view().store.keys.codes).item<bool>());
}

// Only CUDA writes in place, but the rule is checked everywhere.
TEST_F(Cache, ARingIsWrittenInPlaceOnlyWhereNobodyReads) {
  KVCache cache({.keys = {4, 5}, .values = {3, 5}, .recent = 128, .sink = 4});  // a ring of 384
  const auto is_free = [](const KVCache& c, int added) {
    return ring_is_free(c.coding(), *c.copies(), c.offset(), {0}, {}, added);
  };
  cache.append(random(200), random(200));
  EXPECT_TRUE(is_free(cache, 56));
  EXPECT_FALSE(is_free(cache, 57));  // the ring of 256 grows
  cache.append(random(200), random(200));
  // The first of the last 200 queries, which may still be lazy, reads from token 200 - 128 = 72 on.
  EXPECT_TRUE(is_free(cache, 384 + 72 - 400));
  EXPECT_FALSE(is_free(cache, 384 + 72 - 400 + 1));
  {
    const KVCache copy = cache;
    EXPECT_FALSE(is_free(cache, 1));
  }
  EXPECT_TRUE(is_free(cache, 1));
  KVCache restored(cache.coding());
  restored.restore(*cache.store(), 400, cache.copies());
  EXPECT_FALSE(is_free(restored, 1));
  EXPECT_TRUE(is_free(cache, 1));
  const auto merged = BatchKVCache::merge({cache});  // lazily: it reads the whole ring, from token 16 on
  EXPECT_FALSE(is_free(cache, 1));
  cache.append(random(1), random(1));
  EXPECT_TRUE(is_free(cache, 1));
  cache.append(random(1000), random(1000));  // whose queries read a chunk of their own
  EXPECT_TRUE(is_free(cache, 256));
  EXPECT_FALSE(is_free(cache, 257));
  cache.trim(1);
  EXPECT_FALSE(is_free(cache, 1));
}

TEST_F(Cache, CodesAndCopiesWaitForTheSameWriteWhenTied) {
  KVCache cache({.recent = 128, .sink = 4});
  cache.append(random(20), random(20));
  std::optional<Store> store = cache.store();
  std::optional<Copies> copies = cache.copies();
  tie_both(store, copies, mx::array(1.f));
  EXPECT_FALSE(copies->held.written);  // neither was written in place
  store->written = copies->held.written = nothing_to_wait_for(20);
  tie_both(store, copies, mx::array(1.f));
  EXPECT_TRUE(same_write(*store, copies->held));
  copies->held.written = nothing_to_wait_for(20);  // by another kernel
  tie_both(store, copies, mx::array(1.f));
  EXPECT_FALSE(same_write(*store, copies->held));
}

// Files may say anything.
TEST_F(Cache, RestoreRefusesWhatNoCacheHolds) {
  KVCache cache;
  cache.append(random(10), random(10));
  const auto dim = cache.store()->head_dim(cache.coding()), heads = cache.store()->heads();
  for (const mx::Shape& shape : {mx::Shape{heads + 1, dim}, mx::Shape{heads, dim + 32}}) {
    CacheCoding coding = cache.coding();
    coding.keys.centre = mx::zeros(shape);
    EXPECT_THROW(KVCache(coding).restore(*cache.store(), 10), std::invalid_argument) << shape;
    coding = cache.coding();
    coding.values.centre = mx::zeros(shape);
    EXPECT_THROW(KVCache(coding).restore(*cache.store(), 10), std::invalid_argument) << shape;
  }
  CacheCoding mapped = cache.coding();
  mapped.key_map = mapped.query_map = mx::zeros({heads + 1, dim, dim});
  EXPECT_THROW(KVCache(mapped).restore(*cache.store(), 10), std::invalid_argument);
  BatchKVCache batch({0}, cache.coding());
  batch.restore(*cache.store(), 10, {3});
  for (int padding : {-1, (1 << 30) + 1}) {
    EXPECT_THROW(batch.restore(*cache.store(), 10, {padding}), std::invalid_argument) << padding;
  }
  EXPECT_EQ(batch.offsets(), std::vector<int>{7});
}

TEST_F(Cache, WindowsRefusePositionsThatNoneHas) {
  RotatingKVCache window(8, 2, {});
  window.append(random(8), random(8));
  window.append(random(1), random(1));
  RotatingKVCache other(8, 2, window.coding());
  EXPECT_THROW(other.restore(*window.store(), 9, 1), std::invalid_argument);  // among the tokens that stay
  EXPECT_THROW(other.restore(*window.store(), (1 << 30) + 1, 3), std::invalid_argument);
  EXPECT_NO_THROW(other.restore(*window.store(), 9, 3));
}

TEST_F(Cache, AFailedAppendChangesNothing) {
  KVCache cache;
  cache.append(random(10), random(10));
  EXPECT_THROW(cache.append(random(1, 2), random(1, 2)), std::invalid_argument);
  EXPECT_THROW(cache.append(random(1, 1, mx::int32), random(1)), std::invalid_argument);
  EXPECT_THROW(cache.append(random(1), random(2)), std::invalid_argument);
  EXPECT_EQ(cache.offset(), 10);
  cache.append(random(1), random(1));
  EXPECT_EQ(cache.offset(), 11);
}

TEST_F(Cache, RefusesWrongCodings) {
  EXPECT_THROW(KVCache({.keys = {5}}), std::invalid_argument);
  EXPECT_THROW(KVCache({.keys = {.centre = mx::zeros({64})}}), std::invalid_argument);
  EXPECT_THROW(KVCache().view(), std::invalid_argument);
}

TEST_F(Cache, CentresAreAddedBack) {
  const auto centre = mx::full({2, 64}, 10.0f);
  KVCache plain({.keys = {4}, .values = {4}}),
      centred({.keys = {.width = 4, .centre = centre}, .values = {.width = 4, .centre = centre}});
  const auto x = mx::random::normal({1, 2, 50, 64}) + 10.0f;
  plain.append(x, x);
  centred.append(x, x);
  const auto error = [&](const KVCache& cache) {
    return mx::linalg::norm(cache.view().decode(mx::float32).first - x).item<float>();
  };
  EXPECT_LT(error(centred), error(plain) / 5) << "what is left after the centre is ten times shorter";
}

}  // namespace
}  // namespace turboquant::ops
