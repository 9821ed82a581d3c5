#include "turboquant/mlx/exact.h"

#include <algorithm>

#include "mlx_ops/checks.h"

namespace turboquant::ops {
namespace {

/// `rows` encoded as copies are: at 8 bits, without feedback.
Store encode_copies(const CacheCoding& coding, const mx::array& keys, const mx::array& values, mx::StreamOrDevice s) {
  return encode_store(coding_of_copies(coding), keys, values, std::nullopt, s);
}

/// The same from codes.
Store transcode(const CacheCoding& coding, const Store& codes, mx::StreamOrDevice s) {
  return encode_copies(coding, decoded_keys(coding, codes.keys, mx::float32, s),
                       decoded_values(coding, codes.values, mx::float32, s), s);
}

/// Two stores joined along the tokens; either may be empty.
Store joined(const Store& a, const Store& b, mx::StreamOrDevice s) {
  return a.capacity() == 0 ? b : b.capacity() == 0 ? a : concatenate({a, b}, 2, s);
}

/// Slots of the ring of a store of copies.
int ring_slots(const CacheCoding& coding, const Store& held) { return held.capacity() - coding.sink; }
Store ring_of(const CacheCoding& coding, const Store& held, mx::StreamOrDevice s) {
  return held.tokens(0, ring_slots(coding, held), s);
}
Store first_of(const CacheCoding& coding, const Store& held, mx::StreamOrDevice s) {
  return held.tokens(ring_slots(coding, held), held.capacity(), s);
}

/// `held` with a ring of so many slots.  All tokens must be in the smaller ring of the two: then their slots stay.
Store with_ring(const CacheCoding& coding, const Store& held, int slots, mx::StreamOrDevice s) {
  const int ring = ring_slots(coding, held);
  if (slots == ring) return held;
  const Store kept = slots < ring
                         ? held.tokens(0, slots, s)
                         : joined(ring_of(coding, held, s), zeros_like(held, held.batch(), slots - ring, s), s);
  return joined(kept, first_of(coding, held, s), s);
}

/// `held` with `rows`, the tokens from `at` on, in their slots; of more than the ring has slots the last.
Store write_ring(const CacheCoding& coding, Store held, const Store& rows, int at, mx::StreamOrDevice s) {
  const int ring = ring_slots(coding, held), end = at + rows.capacity();
  for (int t = std::max(at, end - ring); t < end;) {
    const int slot = t % ring, n = std::min(end - t, ring - slot);
    held = held.write(rows.tokens(t - at, t - at + n, s), slot, s);
    t += n;
  }
  return held;
}

/// The same for rows that end at `ends`: each row's ring gets the last tokens before its own end.
Store write_ragged(const CacheCoding& coding, const Store& held, const Store& rows, int at,
                   const std::vector<int>& ends, mx::StreamOrDevice s) {
  const int ring = ring_slots(coding, held), batch = held.batch();
  std::vector<int> index;
  for (int end : ends) {
    end = std::min(end, at + rows.capacity());
    for (int slot = 0; slot < ring; ++slot) {
      const int t = end - 1 - ((end - 1 - slot) % ring + ring) % ring;  // the last before the end in this slot
      index.push_back(t >= at ? ring + t - at : slot);
    }
  }
  const auto both = concatenate({ring_of(coding, held, s), rows}, 2, s);
  return joined(both.gather(mx::array(index.data(), {batch, ring}, mx::int32), s), first_of(coding, held, s), s);
}

/// `held` with those of `rows`, the tokens from `at` on, that are among the first of their row.
Store write_first(const CacheCoding& coding, const Store& held, const Store& rows, int at,
                  const std::vector<int>& starts, mx::StreamOrDevice s) {
  const int ring = ring_slots(coding, held), sink = coding.sink, batch = held.batch(), end = at + rows.capacity();
  const auto [least, most] = std::minmax_element(starts.begin(), starts.end());
  if (sink == 0 || starts.empty() || at >= *most + sink) return held;
  if (*least == *most) {
    const int from = std::max(at, *most), to = std::min(end, *most + sink);
    return from < to ? held.write(rows.tokens(from - at, to - at, s), ring + from - *most, s) : held;
  }
  std::vector<int> index;
  for (int start : starts) {
    for (int i = 0; i < sink; ++i) {
      const int t = start + i;
      index.push_back(t >= at && t < end ? sink + t - at : i);
    }
  }
  const auto both = concatenate({first_of(coding, held, s), rows.tokens(0, std::min(end, *most + sink) - at, s)}, 2, s);
  return joined(ring_of(coding, held, s), both.gather(mx::array(index.data(), {batch, sink}, mx::int32), s), s);
}

/// A ring with room for the `recent` tokens before `at` and for `rows`, the tokens from there on.
Store ring_for_chunk(const CacheCoding& coding, const Store& held, const Store& rows, int at, mx::StreamOrDevice s) {
  const int ring = ring_slots(coding, held), before = std::min(at, coding.recent), begin = at - before;
  std::vector<Store> parts;
  for (int t = begin; t < at;) {
    const int slot = t % ring, n = std::min(at - t, ring - slot);
    parts.push_back(held.tokens(slot, slot + n, s));
    t += n;
  }
  parts.push_back(rows);
  const auto tokens = parts.size() == 1 ? rows : concatenate(parts, 2, s);
  const int count = tokens.capacity(), slots = (count + 31) / 32 * 32, place = begin % slots;
  const int head = std::min(count, slots - place), tail = count - head;  // up to the ring's end, and again from slot 0
  const auto zero = [&](int n) { return zeros_like(rows, rows.batch(), n, s); };
  parts.clear();
  for (const auto& part :
       {tokens.tokens(head, count, s), zero(place - tail), tokens.tokens(0, head, s), zero(slots - place - head)}) {
    if (part.capacity() > 0) parts.push_back(part);
  }
  return parts.size() == 1 ? parts[0] : concatenate(parts, 2, s);
}

}  // namespace

int ring_for(const CacheCoding& coding, int tokens) {
  const int full = full_ring(coding);
  for (int slots = 32; slots < full; slots *= 2) {
    if (tokens <= slots) return slots;
  }
  return full;
}

void check_copies(const CacheCoding& coding) {
  for (auto [name, n] : {std::pair{"recent", coding.recent}, {"sink", coding.sink}}) {
    require(n >= 0 && n <= 1 << 20, "[cache] ", name, " must be from 0 to 1048576; got ", n);
  }
}

void check_no_copies(const CacheCoding& coding) {
  require(!has_copies(coding), "[cache] a window holds no exact copies: recent and sink must be 0; got ", coding.recent,
          " and ", coding.sink);
}

Copies append_copies(const CacheCoding& coding, const std::optional<Copies>& copies, int length,
                     const std::vector<int>& starts, const std::vector<int>& ends, const mx::array& keys,
                     const mx::array& values, mx::StreamOrDevice s) {
  const Store rows = encode_copies(coding, keys, values, s);
  const int added = rows.capacity(), end = length + added, asked = ring_for(coding, end);
  Copies out = copies ? *copies : Copies{zeros_like(rows, rows.batch(), asked + coding.sink, s), 0, std::nullopt};
  out.chunk.reset();
  if (added == 0) return out;
  const int ring = std::max(asked, out.ring(coding));
  out.held = with_ring(coding, out.held, ring, s);
  std::optional<Store> chunk;
  if (ring > 0) {
    if (end > ring && added > ring - coding.recent) chunk = ring_for_chunk(coding, out.held, rows, length, s);
    out.held = ends.empty() ? write_ring(coding, out.held, rows, length, s)
                            : write_ragged(coding, out.held, rows, length, ends, s);
    if (ends.empty()) out.from = std::max(out.from, end - ring);  // or front_pads does, once the pads have moved
  }
  out.held = write_first(coding, out.held, rows, length, starts, s);
  // These buffers are new.  The first of these tokens' queries reads the `recent` before it, unless the chunk serves
  // it.
  out.read_from = std::make_shared<int>((chunk ? end : length) - coding.recent);
  if (chunk) out.chunk = joined(*chunk, first_of(coding, out.held, s), s);
  return out;
}

// While the ring holds all tokens, none is overwritten; a ring that must grow for them is a new one.  In a full ring
// they overwrite tokens a ring's length older, which must lie before all that is read.  Other caches' readers are not
// known, and tokens beyond each row's end or among its first go elsewhere.
bool ring_is_free(const CacheCoding& coding, const Copies& copies, int length, const std::vector<int>& starts,
                  const std::vector<int>& ends, int added) {
  const int ring = copies.ring(coding), end = length + added;
  const int start = starts.empty() ? 0 : *std::max_element(starts.begin(), starts.end());
  if (added == 0 || !ends.empty() || ring < ring_for(coding, end) || length < start + coding.sink) return false;
  return copies.read_from.use_count() == 1 && (end <= ring || end - ring <= *copies.read_from);
}

Store append_both(const CacheCoding& coding, const std::optional<Store>& held, std::optional<Copies>& copies,
                  int length, const std::vector<int>& starts, const std::vector<int>& ends, const mx::array& keys,
                  const mx::array& values, mx::StreamOrDevice s) {
  if (!has_copies(coding)) return append_store(coding, held, length, keys, values, s);
  if (copies && keys.ndim() == 4 && ring_is_free(coding, *copies, length, starts, ends, keys.shape(2))) {
    Store ring = copies->held;
    const int added = keys.shape(2);
    Store next = append_store(coding, held, length, keys, values, s, &ring);
    if (same_write(ring, next)) {
      copies->held = std::move(ring);
      copies->chunk.reset();
      copies->from = std::max(copies->from, length + added - copies->ring(coding));
      return next;
    }
    copies = append_copies(coding, copies, length, starts, ends, keys, values, s);
    return next;
  }
  Store next = append_store(coding, held, length, keys, values, s);
  copies = append_copies(coding, copies, length, starts, ends, keys, values, s);
  return next;
}

void tie_both(std::optional<Store>& held, std::optional<Copies>& copies, const mx::array& to) {
  if (!held) return;
  const bool same = copies && same_write(copies->held, *held);
  held = held->tied(to);
  if (same) copies->held.written = held->written;
}

Copies copies_of_codes(const CacheCoding& coding, const Store& codes, int length, const std::vector<int>& starts,
                       mx::StreamOrDevice s) {
  const int ring = ring_for(coding, length);
  const int batch = codes.batch(), heads = codes.heads();
  const Store empty = zeros(coding_of_copies(coding), {batch, heads, 0, codes.head_dim(coding)},
                            {batch, heads, 0, codes.value_dim(coding)}, ring + coding.sink, s);
  Copies out{empty, length, std::nullopt};
  if (coding.sink > 0 && length > 0) {
    std::vector<int> index;
    for (int start : starts) {
      for (int i = 0; i < coding.sink; ++i) index.push_back(std::min(start + i, length - 1));
    }
    const auto first = codes.gather(mx::array(index.data(), {codes.batch(), coding.sink}, mx::int32), s);
    out.held = out.held.write(transcode(coding, first, s), ring, s);
  }
  return trim_copies(coding, std::move(out), codes, length, s);
}

Copies trim_copies(const CacheCoding& coding, Copies copies, const Store& codes, int length, mx::StreamOrDevice s) {
  copies.chunk.reset();
  const int needed = std::max(0, length - coding.recent), end = std::min(copies.from, length);
  if (copies.ring(coding) > 0 && needed < end) {
    copies.held = write_ring(coding, copies.held, transcode(coding, codes.tokens(needed, end, s), s), needed, s);
  }
  copies.from = std::min(copies.from, needed);
  copies.read_from = nullptr;  // views from before read tokens that the next ones overwrite: those get new buffers
  return copies;
}

Copies move_copies(const CacheCoding& coding, const Copies& copies, const std::vector<int>& by, int length,
                   mx::StreamOrDevice s) {
  copies.note_readers();  // lazy ones
  Copies out{copies.held, copies.from, std::nullopt};
  if (copies.ring(coding) == 0) return out;
  const int asked = ring_for(coding, length);
  out.held = with_ring(coding, out.held, std::max(asked, copies.ring(coding)), s);
  if (std::any_of(by.begin(), by.end(), [](int n) { return n != 0; })) {
    if (out.from > 0) out.from = std::max(0, out.from + *std::max_element(by.begin(), by.end()));
    const auto rolled = ring_of(coding, out.held, s).roll(mx::array(by.data(), {int(by.size())}, mx::int32), s);
    out.held = joined(rolled, first_of(coding, out.held, s), s);
  }
  out.held = with_ring(coding, out.held, asked, s);
  return out;
}

Copies front_pads(const CacheCoding& coding, const Copies& copies, const std::vector<int>& pads, int length,
                  mx::StreamOrDevice s) {
  Copies out = move_copies(coding, copies, pads, length, s);
  out.from = std::max(out.from, length - out.ring(coding));
  return out;
}

Copies take_copies(const Copies& copies, const mx::array& rows, mx::StreamOrDevice s) {
  copies.note_readers();  // a lazy one
  return {copies.held.take(rows, s), copies.from, std::nullopt};
}

Copies join_copies(const std::vector<std::optional<Copies>>& parts, const std::vector<int>& batches,
                   mx::StreamOrDevice s) {
  const auto filled = std::find_if(parts.begin(), parts.end(), [](const auto& part) { return part.has_value(); });
  std::vector<Store> stores;
  int from = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Store& like = (*filled)->held;
    stores.push_back(parts[i] ? parts[i]->held : zeros_like(like, batches[i], like.capacity(), s));
    if (parts[i]) from = std::max(from, parts[i]->from);
  }
  return {concatenate(stores, 0, s), from, std::nullopt};
}

void check_restored(const char* op, const CacheCoding& coding, const Copies& copies, const Store& store, int length) {
  const auto eight = coding_of_copies(coding);
  check_store(op, eight, copies.held, 0);
  const int ring = copies.held.capacity() - coding.sink, least = ring_for(coding, length), full = full_ring(coding);
  require(ring >= least && ring <= full && ring % 32 == 0, "[", op, "] the exact copies of ", length,
          " tokens must be a multiple of 32 from ", least, " to ", full, " slots and ", coding.sink, " more; got ",
          copies.held.capacity());
  const mx::Shape want{store.batch(), store.heads(), ring + coding.sink};
  require(copies.held.keys.scales.shape() == want && copies.held.head_dim(eight) == store.head_dim(coding) &&
              copies.held.value_dim(eight) == store.value_dim(coding),
          "[", op, "] the exact copies must have shape ", want, " and the codes' head_dim; got ",
          copies.held.keys.scales.shape());
  require(copies.from >= 0 && copies.from <= std::max(0, length - coding.recent), "[", op, "] the exact copies of ",
          length, " tokens must begin at ", std::max(0, length - coding.recent), " or before; got ", copies.from);
}

}  // namespace turboquant::ops
