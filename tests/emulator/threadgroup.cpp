// Threadgroup memory.
#include "threadgroup.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace emulator {
namespace {

constexpr uint32_t kSeveral = ~0u;
constexpr size_t kSmallest = 2;  // bytes of an element

/// The last access to an element: after which barrier of the threadgroup and of the SIMD-group, and by whom.
struct Access {
  uint32_t turn = 0, simdgroup = 0, simdgroup_turn = 0, lane = 0;
};
struct Element {
  Access read, write;
};
struct Memory {
  char *begin = nullptr, *end = nullptr;
  std::vector<Element> elements;
};
std::map<Entry, Memory> memories;
Memory* memory = nullptr;  // of the kernel that runs

uint32_t turn = 0;  // never set back: elements need no clearing
std::array<uint32_t, 32> simdgroup_turns{};
std::mt19937 garbage{1};

/// NaN, which a comparison may pass over, or large numbers, which it may not; in half and in float.
void fill_with_garbage(void* data, size_t bytes) { std::memset(data, garbage() % 2 ? 0xff : 0x7b, bytes); }

bool ordered(const Access& before, const Access& now) {
  if (before.turn != now.turn) return true;
  if (before.simdgroup != now.simdgroup) return false;
  return before.simdgroup_turn != now.simdgroup_turn || (before.lane == now.lane && now.lane != kSeveral);
}

[[noreturn]] void race(const char* what, const Access& before, const char* done) {
  const auto number = [](uint32_t n) { return n == kSeveral ? "several" : std::to_string(n); };
  thread_error((std::string("no barrier before threadgroup memory is ") + what + " that was " + done +
                " by SIMD-group " + number(before.simdgroup) + ", lane " + number(before.lane))
                   .c_str());
}

Element& find_element(const void* at) {
  return memory->elements[size_t(static_cast<const char*>(at) - memory->begin) / kSmallest];
}

Access access(Who who) {
  const uint32_t s = position.simdgroup;
  return {turn, s, simdgroup_turns[s], who == Who::thread ? position.lane : kSeveral};
}

}  // namespace

void threadgroup_memory(void* data, size_t bytes) {
  Memory& m = *memory;
  char* begin = static_cast<char*>(data);
  m.begin = m.begin ? std::min(m.begin, begin) : begin;
  m.end = std::max(m.end, begin + bytes);
  m.elements.resize(size_t(m.end - m.begin) / kSmallest + 1);
  fill_with_garbage(data, bytes);
}

void threadgroup_read(const void* at, Who who) {
  Element& e = find_element(at);
  const Access now = access(who);
  if (!ordered(e.write, now)) race("read", e.write, "written");
  if (e.read.turn != now.turn) {
    e.read = now;
  } else if (e.read.simdgroup != now.simdgroup) {
    e.read.simdgroup = kSeveral;
  } else if (e.read.simdgroup_turn != now.simdgroup_turn) {
    e.read = now;
  } else if (e.read.lane != now.lane) {
    e.read.lane = kSeveral;
  }
}

void threadgroup_write(const void* at, Who who) {
  Element& e = find_element(at);
  const Access now = access(who);
  if (!ordered(e.write, now)) race("written", e.write, "written");
  if (!ordered(e.read, now)) race("written", e.read, "read");
  e.write = now;
}

void start_threadgroup_memory(Entry entry) {
  memory = &memories[entry];
  if (memory->begin) fill_with_garbage(memory->begin, size_t(memory->end - memory->begin));
  pass_threadgroup_barrier();
}

void pass_simdgroup_barrier(uint32_t simdgroup) { ++simdgroup_turns[simdgroup]; }
void pass_threadgroup_barrier() { ++turn; }

}  // namespace emulator
