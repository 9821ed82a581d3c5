#include "reference/trellis.h"

#include <algorithm>
#include <limits>

#include "turboquant/format.h"

namespace turboquant::reference {
namespace {

constexpr int kStates = 8;  // the u of the three steps before, the nearest in bit 0
constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// z1 * 2 + z0 of a step that leaves `state` with `u`.
int subset(int state, int u) {
  const int before1 = state & 1, before2 = state >> 1 & 1, before3 = state >> 2;
  return (u ^ before1 ^ before3) * 2 + before2;
}

/// Of each subset the level nearest to a target: its index, and its squared distance.
struct Step {
  int index[4];
  double cost[4];

  Step() = default;
  Step(int bits, double target) {
    for (int z = 0; z < 4; ++z) {
      cost[z] = kInfinity;
      for (int w = 0; w < 1 << (bits - 1); ++w) {
        const double d = target - trellis_level(bits, 4 * w + z);
        if (d * d < cost[z]) cost[z] = d * d, index[z] = 4 * w + z;
      }
    }
  }
};

/// The best path of 32 steps from `start` back to it: its cost, and the u of its steps.
double best_closed_path(const Step* steps, int start, int us[32]) {
  double cost[kStates];
  int from[32][kStates] = {};
  for (int s = 0; s < kStates; ++s) cost[s] = s == start ? 0 : kInfinity;
  for (int t = 0; t < 32; ++t) {
    double next[kStates];
    std::fill_n(next, kStates, kInfinity);
    for (int s = 0; s < kStates; ++s) {
      for (int u = 0; u < 2; ++u) {
        const int to = (s << 1 | u) % kStates;
        const double c = cost[s] + steps[t].cost[subset(s, u)];
        if (c < next[to]) next[to] = c, from[t][to] = s;
      }
    }
    std::copy_n(next, kStates, cost);
  }
  for (int t = 31, s = start; t >= 0; --t) {
    us[t] = s & 1;
    s = from[t][s];
  }
  return cost[start];
}

}  // namespace

double search_trellis(int bits, const double targets[32], int indices[32]) {
  const double limit = trellis_limit(bits);
  Step steps[32];
  for (int i = 0; i < 32; ++i) steps[trellis_step(i)] = Step(bits, std::clamp(targets[i], -limit, limit));
  double least = kInfinity;
  int best[32] = {};
  for (int start = 0; start < kStates; ++start) {
    int us[32];
    const double cost = best_closed_path(steps, start, us);
    if (cost < least) least = cost, std::copy_n(us, 32, best);
  }
  for (int t = 0; t < 32; ++t) {
    const auto before = [&](int n) { return best[(t + 32 - n) % 32]; };
    indices[trellis_coordinate(t)] = steps[t].index[subset(before(1) | before(2) << 1 | before(3) << 2, best[t])];
  }
  return least;
}

void write_group(int bits, const int indices[32], uint32_t* words) {
  std::fill_n(words, bits, 0);
  const auto set = [&](int i, int bit, int value) {
    words[trellis_word(bits, i, bit)] |= uint32_t(value) << trellis_position(bits, i, bit);
  };
  int z0[32], u[32];
  for (int i = 0; i < 32; ++i) z0[trellis_step(i)] = indices[i] & 1;
  for (int t = 0; t < 32; ++t) u[t] = z0[(t + 2) % 32];  // z0 is the u of two steps before
  for (int i = 0; i < 32; ++i) {
    set(i, 0, u[trellis_step(i)]);
    for (int bit = 1; bit < bits; ++bit) set(i, bit, indices[i] >> (bit + 1) & 1);
  }
}

void read_group(int bits, const uint32_t* words, int indices[32]) {
  const auto bit_of = [&](int i, int bit) {
    return int(words[trellis_word(bits, i, bit)] >> trellis_position(bits, i, bit) & 1);
  };
  for (int i = 0; i < 32; ++i) {
    const auto u = [&](int before) { return bit_of(trellis_coordinate((trellis_step(i) + 32 - before) % 32), 0); };
    indices[i] = (u(0) ^ u(1) ^ u(3)) * 2 + u(2);
    for (int bit = 1; bit < bits; ++bit) indices[i] |= bit_of(i, bit) << (bit + 1);
  }
}

}  // namespace turboquant::reference
