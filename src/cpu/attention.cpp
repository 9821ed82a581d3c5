// attend on the CPU: divides the work into tasks, each a tile of query rows over a chunk of tokens, and merges the
// chunks of a tile in order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "cpu/driver.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "tensor.h"
#include "turboquant/rotation.h"
#include "turboquant/softmax.h"

namespace turboquant::cpu {
namespace {

constexpr float kLog2E = 1.44269504f;

/// How the work is cut, from the shape alone: results must not depend on the number of threads.
struct Split {
  int group, rows;       // query heads of a KV head; query rows of a KV head, i.e. query * group + head
  int tiles, tile_rows;  // of rows
  int chunks, chunk_tokens;

  explicit Split(const AttendParams& p) : group(p.query_heads / p.kv_heads), rows(group * p.query_len) {
    tiles = (rows + kTileRows - 1) / kTileRows;
    tile_rows = (rows + tiles - 1) / tiles;
    const int64_t work = int64_t(p.batch) * p.kv_heads * tiles;
    // Some 64 tasks, of 512 to 2048 tokens (each prepares its queries anew) unless there are tiles enough, and at most
    // 4 MiB of partial results.
    int64_t most = std::max<int64_t>(1, (4 << 20) / (4 * int64_t(p.value_dim) * p.batch * p.query_heads * p.query_len));
    if (work >= 32) most = 1;
    int64_t tokens = std::clamp<int64_t>(p.kv_len * work / 64, 512, 2048);
    tokens = std::max(tokens, (p.kv_len + most - 1) / most);
    chunk_tokens = int((tokens + kBlock - 1) / kBlock * kBlock);
    chunks = std::max(1, (p.kv_len + chunk_tokens - 1) / chunk_tokens);
  }
};

/// A thread's scratch memory, kept between calls: one for each use.
template <int use>
std::byte* workspace(size_t bytes) {
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<std::byte, Free> memory;
  thread_local size_t capacity = 0;
  if (capacity < bytes) {
    memory.reset();
    memory.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t(64))));
    capacity = bytes;
  }
  return memory.get();
}

/// What a tile's mask callback needs.
struct MaskContext {
  const AttendParams& p;
  int batch, first_head, first_row, group;
};

void add_mask(const void* context, int row, int t, int n, float* scores) {
  const MaskContext& c = *static_cast<const MaskContext*>(context);
  const AttendParams& p = c.p;
  const int flat = c.first_row + row;
  const int64_t at = mask_offset(p, c.batch, c.first_head + flat % c.group, flat / c.group, t);
  const int64_t stride = p.mask_strides[3];
  if (p.mask_kind == MaskKind::boolean) {
    const uint8_t* mask = static_cast<const uint8_t*>(p.mask) + at;
    for (int i = 0; i < n; ++i) scores[i] = mask[i * stride] ? scores[i] : -INFINITY;
  } else {
    for (int i = 0; i < n; ++i) {
      const float bias = load_number(p.mask, p.mask_dtype, at + i * stride);
      scores[i] = bias == -INFINITY ? bias : scores[i] + bias * kLog2E;
    }
  }
}

/// OnlineSoftmax in base 2.
struct Base2Softmax {
  float max = -INFINITY, sum = 0;
  struct Factors {
    float old_part, new_part;
  };
  Factors merge(float other_max, float other_sum) {
    const float top = std::fmax(max, other_max);
    auto weight = [top](float m) { return m == -INFINITY ? 0.0f : std::exp2(m - top); };
    const Factors f{weight(max), weight(other_max)};
    sum = sum * f.old_part + other_sum * f.new_part;
    max = top;
    return f;
  }
};

class Attention {
 public:
  explicit Attention(const AttendParams& p) : p_(p), split_(p), kernels_(kernels()) {
    fill_signs(p.seed, std::max(p.key_dim, p.value_dim), signs_);
    const size_t rows = size_t(p.batch) * p.kv_heads * split_.rows * split_.chunks;
    max_.resize(rows);
    sum_.resize(rows);
    acc_.reset(new float[rows * p.value_dim]);
    const size_t tiles = size_t(p.batch) * p.kv_heads * split_.tiles;
    left_.reset(new std::atomic<int>[tiles]);
    for (size_t i = 0; i < tiles; ++i) left_[i] = split_.chunks;
  }

  void run() {
    parallel_for(p_.batch * p_.kv_heads * split_.tiles * split_.chunks, [&](int task) {
      const int chunk = task % split_.chunks, tile = task / split_.chunks;
      attend(tile, chunk);
      if (--left_[tile] == 0) finish(tile);
    });
  }

 private:
  int tile_begin(int tile) const { return tile % split_.tiles * split_.tile_rows; }
  int tile_end(int tile) const { return std::min(split_.rows, tile_begin(tile) + split_.tile_rows); }
  /// Where the partial results of a tile's chunk begin.
  size_t partial(int tile, int chunk) const {
    const size_t head = tile / split_.tiles;
    const int begin = tile_begin(tile);
    return (head * split_.rows + begin) * split_.chunks + size_t(chunk) * (tile_end(tile) - begin);
  }

  void attend(int tile, int chunk) {
    const int head = tile / split_.tiles, b = head / p_.kv_heads, kv = head % p_.kv_heads;
    const int begin = tile_begin(tile);
    const size_t out = partial(tile, chunk);
    const MaskContext context{p_, b, kv * split_.group, begin, split_.group};
    Tile t;
    t.rows = tile_end(tile) - begin;
    t.keys = packed_head(p_.keys, p_.key_dim, b, kv);
    t.values = packed_head(p_.values, p_.value_dim, b, kv);
    t.scale = p_.scale;
    t.q_dtype = p_.q.dtype;
    t.signs = signs_;
    for (int r = 0; r < t.rows; ++r) {
      const int i = (begin + r) / split_.group, h = kv * split_.group + (begin + r) % split_.group;
      t.q[r] = static_cast<const std::byte*>(p_.q.data) + row_offset(p_.q, b, h, i) * size_of(p_.q.dtype);
    }
    t.add_mask = p_.mask_kind == MaskKind::none ? nullptr : add_mask;
    t.context = &context;
    const Partial result{&max_[out], &sum_[out], &acc_[out * p_.value_dim]};
    const int chunk_begin = chunk * split_.chunk_tokens;
    const int chunk_end = std::min(p_.kv_len, chunk_begin + split_.chunk_tokens);
    t.ranges = 1;
    fill(t.range[0], t.rows, chunk_begin, chunk_end, [&](int r) {
      const int i = (begin + r) / split_.group;
      const KeyRange seen = visible_keys(p_, b, i);
      const ExactRange exact = exact_keys(p_, b, i);
      return KeyRange{std::max(seen.first, exact.first_end), std::min(seen.last, exact.recent_begin)};
    });
    t.range[0].shift = 0, t.range[0].kv_len = p_.kv_len;
    run_kernel(t, result);
    // One task reads the copies, so that they are not cut: there are few of them.
    if (chunk == split_.chunks - 1 && (p_.exact.recent > 0 || p_.exact.first > 0))
      attend_copies(t, b, kv, begin, result);
  }

  /// Softmaxes of a tile's rows, and the values that they accumulate.
  struct Partial {
    float *max, *sum, *acc;
  };

  void run_kernel(Tile& t, const Partial& out) {
    t.workspace = workspace<0>(kernels_.workspace_bytes(t));
    t.max = out.max, t.sum = out.sum, t.acc = out.acc;
    kernels_.attend(t);
  }

  /// The tokens from `begin` to `end`; each row sees those in visible(row).
  template <class Visible>
  static void fill(Range& range, int rows, int begin, int end, const Visible& visible) {
    range.begin = begin, range.end = end;
    for (int r = 0; r < rows; ++r) {
      const KeyRange keys = visible(r);
      range.first[r] = keys.first, range.last[r] = keys.last;
    }
  }

  /// Adds the exact copies that a tile's rows see to `result`: first tokens and at most two pieces of the ring, which
  /// holds nothing older than its own size.
  void attend_copies(Tile& t, int b, int kv, int first_row, const Partial& result) {
    const int rows = t.rows, ring = p_.exact.ring;
    KeyRange seen[kTileRows];
    ExactRange exact[kTileRows];
    int begin = p_.kv_len;
    for (int r = 0; r < rows; ++r) {
      seen[r] = visible_keys(p_, b, (first_row + r) / split_.group);
      exact[r] = exact_keys(p_, b, (first_row + r) / split_.group);
      if (seen[r].first < seen[r].last) begin = std::min(begin, std::max(seen[r].first, exact[r].recent_begin));
    }
    t.keys = packed_head(p_.exact.keys, p_.key_dim, b, kv);
    t.values = packed_head(p_.exact.values, p_.value_dim, b, kv);
    t.ranges = 0;
    const auto add = [&](int from, int to, int slot, const auto& visible) {
      Range& range = t.range[t.ranges];
      fill(range, rows, from, to, visible);
      range.shift = slot - from;
      range.kv_len = from - slot + ring + p_.exact.first;
      t.ranges += from < to;
    };
    const int start = exact[0].first_end - p_.exact.first;
    add(start, std::min(exact[0].first_end, p_.kv_len), ring, [&](int r) {
      return KeyRange{seen[r].first, std::min({seen[r].last, exact[r].first_end, exact[r].recent_begin})};
    });
    for (int from = begin; from < p_.kv_len;) {
      const int to = std::min(p_.kv_len, from - from % ring + ring);  // where the ring begins anew
      add(from, to, from % ring, [&](int r) {
        return KeyRange{std::max(seen[r].first, exact[r].recent_begin), seen[r].last};
      });
      from = to;
    }
    const int dim = p_.value_dim;
    float* const more = reinterpret_cast<float*>(workspace<1>(size_t(rows) * (dim + 2) * sizeof(float)));
    const Partial copies{more, more + rows, more + 2 * rows};
    run_kernel(t, copies);
    for (int r = 0; r < rows; ++r) {
      Base2Softmax softmax{result.max[r], result.sum[r]};
      const auto [old_part, new_part] = softmax.merge(copies.max[r], copies.sum[r]);
      result.max[r] = softmax.max, result.sum[r] = softmax.sum;
      float* const x = result.acc + size_t(r) * dim;
      const float* const y = copies.acc + size_t(r) * dim;
      for (int d = 0; d < dim; ++d) x[d] = x[d] * old_part + y[d] * new_part;
    }
  }

  /// Merges the chunks of a tile, rotates back and writes the output.
  void finish(int tile) {
    const int head = tile / split_.tiles, b = head / p_.kv_heads, kv = head % p_.kv_heads;
    const int begin = tile_begin(tile), rows = tile_end(tile) - begin, dim = p_.value_dim;
    for (int r = 0; r < rows; ++r) {
      const int i = (begin + r) / split_.group, h = kv * split_.group + (begin + r) % split_.group;
      Base2Softmax softmax;
      alignas(64) float x[kMaxDim] = {};
      for (int c = 0; c < split_.chunks; ++c) {
        const size_t at = partial(tile, c) + r;
        const auto [old_part, new_part] = softmax.merge(max_[at], sum_[at]);
        const float* acc = &acc_[at * dim];
        for (int d = 0; d < dim; ++d) x[d] = x[d] * old_part + acc[d] * new_part;
      }
      const float seen = softmax.sum;
      float norm = seen == 0 ? 0 : 1 / seen;
      if (p_.sinks) {
        // Against a sink the keys' common part counts: scores are q . (k - centre), so q . centre is still due.
        float due = 0;
        if (p_.key_centre) {
          const int64_t row = row_offset(p_.q, b, h, i);
          for (int d = 0; d < p_.key_dim; ++d)
            due += load_number(p_.q.data, p_.q.dtype, row + d) * p_.key_centre[kv * p_.key_dim + d];
        }
        const auto [old_part, new_part] = softmax.merge((p_.sinks[h] - p_.scale * due) * kLog2E, 1);
        norm = old_part == 0 && seen == 0 ? 0 : old_part / softmax.sum;
      }
      kernels_.hadamard(x, dim);
      const float weight = seen * norm;  // of all the values together: 1 unless a sink takes some
      const int64_t row = row_offset(p_.out, b, h, i);
      for (int d = 0; d < dim; ++d) {
        float y = x[d] * signs_[d] * norm;
        if (p_.value_centre) y += weight * p_.value_centre[kv * dim + d];
        store_number(p_.out.data, p_.out.dtype, row + d, y);
      }
    }
  }

  const AttendParams& p_;
  const Split split_;
  const Kernels& kernels_;
  alignas(64) float signs_[kMaxDim];
  std::vector<float> max_, sum_;
  std::unique_ptr<float[]> acc_;
  std::unique_ptr<std::atomic<int>[]> left_;
};

}  // namespace

void attend(const AttendParams& p) { Attention(p).run(); }

}  // namespace turboquant::cpu
