// The `params` argument of the Metal kernels: small integers that the host writes and the kernels read.
// Compiled by C++ and by Metal.
#pragma once

namespace turboquant {
namespace metal_layout {

/// Positions in `params`.
enum Param {
  kKvLen,
  kQueryLen,
  kQueryHeads,
  kKvHeads,
  kSplits,
  kFlags,
  kWindow,
  kScale,       // the bits of a float
  kVectors,     // codec: vectors of one side
  kTokens,      // codec: tokens of a head
  kHeads,       // codec
  kRing,        // exact copies: slots of the ring, whose copies the newest kRecent tokens of a query are read from,
  kRecent,      // and behind which the first kFirst tokens of a row are
  kFirst,       // (ExactTier in turboquant.h)
  kCopySplits,  // of the launch that reads the copies
  kSigns,       // sixteen words of `sign_word`
  kParamCount = kSigns + 16
};

/// Bits of params[kFlags].
enum Flag {
  kCausal = 1,
  kStarts = 2,
  kSinks = 4,
  kKeyCentre = 8,
  kValueCentre = 16,
  kBooleanMask = 32,
  kAdditiveMask = 64,
  kCentre = 128,           // codec: the first side has a centre
  kSecondCentre = 256,     // codec: and the second
  kFeedback = 512,         // codec: the first side has feedback
  kSecondFeedback = 1024,  // codec: and the second
  kCopies = 2048           // attention reads exact copies: keys are slots
};

/// Threads of a threadgroup: of decoding attention, and of every other kernel.
enum Threads {
  kSimdgroups = 4,
  kThreads = 32 * kSimdgroups,
  kFewRowsSimdgroups = 8,
  kFewRowsThreads = 32 * kFewRowsSimdgroups
};

/// Numbers in a split's `stats` of a row: the largest score, the sum of weights, the largest number of `partial`.
enum Stats { kMaximum, kSum, kLargest, kStats };

/// Rows of attention (query, head) that a threadgroup of the prefill kernel serves, and tokens of a block of either
/// attention kernel.
enum Tile { kTileRows = 32, kBlock = 32 };

/// Threadgroup memory that every Apple7 GPU has.
enum Limit { kThreadgroupBytes = 32768 };

}  // namespace metal_layout
}  // namespace turboquant
