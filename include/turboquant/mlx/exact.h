// The exact copies of a cache's newest and first tokens: 8-bit codes beside the codes of all tokens (ExactTier in
// turboquant/turboquant.h), which always hold every token that a query may ask them for.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "turboquant/mlx/store.h"

namespace turboquant::ops {

/// Copies of the newest tokens, in a ring, and of the first `sink` of each row, in one store of 8 bits:
/// (B, H_kv, ring + sink, ...). Token t of the codes is in slot t % ring for every row, first token i of a row in slot
/// ring + i. While the ring holds all tokens it grows with them (ring_for).
struct Copies {
  Store held;
  int from = 0;                // tokens from here on are in the ring; at most max(0, length - recent)
  std::optional<Store> chunk;  // after many tokens at once: the same in a ring that all of their queries can read
  /// Who may read the ring's buffers, now or later, reads no token before this one; null when that is not known. Caches
  /// that share the buffers share it.
  std::shared_ptr<int> read_from = nullptr;

  int ring(const CacheCoding& coding) const { return held.capacity() - coding.sink; }
  size_t nbytes() const { return held.nbytes() + (chunk ? chunk->nbytes() : 0); }
  /// What attention reads.
  const Store& readable() const { return chunk ? *chunk : held; }
  /// Notes that all tokens of the ring may be read.
  void note_readers() const {
    if (read_from) *read_from = std::min(*read_from, from);
  }
};

/// Slots of the ring of a long cache: its `recent` tokens and room for those of a few calls, a multiple of 128.
inline int full_ring(const CacheCoding& coding) {
  return coding.recent > 0 ? (coding.recent + kGrowth) / 128 * 128 : 0;
}
/// Slots of the ring that `tokens` tokens ask for: the full one, or the first of 32, 64, 128, ... that holds all of
/// them.
int ring_for(const CacheCoding& coding, int tokens);

inline bool has_copies(const CacheCoding& coding) { return coding.recent > 0 || coding.sink > 0; }

/// Throws std::invalid_argument unless recent and sink are at least 0 and of a size that rings have.
void check_copies(const CacheCoding& coding);

/// Throws std::invalid_argument when a coding asks for copies, which windows do not have.
void check_no_copies(const CacheCoding& coding);

/// The codes and copies of a cache after keys and values (B, H_kv, N, D): append_store and append_copies, by one kernel
/// where both can be written in place.  Arguments are theirs; `copies` is changed last, when nothing can throw.
Store append_both(const CacheCoding& coding, const std::optional<Store>& held, std::optional<Copies>& copies,
                  int length, const std::vector<int>& starts, const std::vector<int>& ends, const mx::array& keys,
                  const mx::array& values, mx::StreamOrDevice s = {});

/// Store::tied of a cache's codes.  Copies that the same kernel wrote stay so: who waits for the codes waits for both.
void tie_both(std::optional<Store>& held, std::optional<Copies>& copies, const mx::array& to);

/// Whether the next `added` tokens may be written into the ring in place: nobody can notice.  Arguments are those of
/// append_copies.
bool ring_is_free(const CacheCoding& coding, const Copies& copies, int length, const std::vector<int>& starts,
                  const std::vector<int>& ends, int added);

/// The copies after keys and values (B, H_kv, N, D) followed `length` tokens; `starts` has each row's first token.
/// `ends`, if not empty, has each row's end among the tokens: what is behind it are pads that will move to the front.
Copies append_copies(const CacheCoding& coding, const std::optional<Copies>& copies, int length,
                     const std::vector<int>& starts, const std::vector<int>& ends, const mx::array& keys,
                     const mx::array& values, mx::StreamOrDevice s = {});

/// Copies of `length` tokens of `codes`, made from the codes: as exact as those are.
Copies copies_of_codes(const CacheCoding& coding, const Store& codes, int length, const std::vector<int>& starts,
                       mx::StreamOrDevice s = {});

/// The copies after tokens behind `length` were forgotten; what the ring lost before is made from the codes.
Copies trim_copies(const CacheCoding& coding, Copies copies, const Store& codes, int length, mx::StreamOrDevice s = {});

/// The copies after each row's tokens moved by its own amount, in the ring that `length` tokens ask for, which is how
/// many there are then; tokens below 0 are forgotten.
Copies move_copies(const CacheCoding& coding, const Copies& copies, const std::vector<int>& by, int length,
                   mx::StreamOrDevice s = {});

/// The copies of `length` tokens, once the pads behind each row have moved to its front: the end of append_copies with
/// `ends`.
Copies front_pads(const CacheCoding& coding, const Copies& copies, const std::vector<int>& pads, int length,
                  mx::StreamOrDevice s = {});

/// Rows of the batch, in the order given.
Copies take_copies(const Copies& copies, const mx::array& rows, mx::StreamOrDevice s = {});

/// Batches joined: for each its copies, all moved to the same length, or none where its rows hold no token.
Copies join_copies(const std::vector<std::optional<Copies>>& parts, const std::vector<int>& batches,
                   mx::StreamOrDevice s = {});

/// Throws std::invalid_argument naming `op` unless `copies` are of this coding and belong to `length` tokens of
/// `store`.
void check_restored(const char* op, const CacheCoding& coding, const Copies& copies, const Store& store, int length);

}  // namespace turboquant::ops
