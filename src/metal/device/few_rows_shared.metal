// Threadgroup memory of attention for few queries, and how lanes share its work.

#pragma once

#include "metal/device/unpack.metal"

namespace turboquant {

/// Lanes that share a token: the groups of a vector, rounded up to a power of two.
constexpr int lanes_per_token(int dim) {
  return dim <= 32 ? 1 : dim <= 64 ? 2 : dim <= 128 ? 4 : dim <= 256 ? 8 : 16;
}

/// Shares of a value, eight coordinates each, that a lane takes.
constexpr int value_slices(int dim) { return dim <= 256 ? 1 : 2; }

/// A number for each of R rows, as one access to memory.
template <int R>
struct RowVector {
  typedef float2 type;
  typedef half2 halves;
};
template <>
struct RowVector<4> {
  typedef float4 type;
  typedef half4 halves;
};

/// With scalar codes of 2 bits: pairs of tokens whose values are added at a time; the sign bits of two such codes.
enum Pairs { kPairs = 4, kBothSigns = 10 };

/// Entries of the tables: those of pairs take their place where there are some, and the values may share the keys'.
template <class K>
constexpr int few_rows_table_size() {
  return K::kPairTables ? 1 : table_size<K>();
}
template <class K, class V>
constexpr int value_table_size() {
  return same_coding<K, V>() ? 1 : few_rows_table_size<V>();
}

/// Threadgroup memory.
template <class K, class V, int D, int R>
struct FewRowsShared {
  TQ_ARRAY(half2, key_table, few_rows_table_size<K>());
  TQ_ARRAY(half2, value_table, (value_table_size<K, V>()));
  TQ_ARRAY2(typename RowVector<R>::halves, key_pairs, K::kPairTables ? D / 2 : 1, 16);
  TQ_ARRAY2(typename RowVector<R>::halves, value_pairs, metal_layout::kFewRowsSimdgroups, V::kPairTables ? 16 * kPairs : 1);
  TQ_ARRAY2(half2, q, R, K::kPairTables ? 1 : D / 2);
  TQ_ARRAY(float, factor, R);  // of a dot product with levels
  // Scores are written by several lanes a token, so they are no vectors: storing a component may store them all.
  TQ_ARRAY2(float, scores, metal_layout::kFewRowsSimdgroups, K::kPairTables ? 1 : R * metal_layout::kBlock);
  TQ_ARRAY2(typename RowVector<R>::type, weights, metal_layout::kFewRowsSimdgroups, metal_layout::kBlock);
  TQ_ARRAY2(float, m, metal_layout::kFewRowsSimdgroups, R);
  TQ_ARRAY2(float, sum, metal_layout::kFewRowsSimdgroups, R);
  TQ_ARRAY2(float, x, R, D);  // the queries for key_pairs, then the sums
};

/// The table of the values, which is the keys' own where both are coded alike.
template <class K, class V, class Shared>
auto value_table(Shared shared) {
  return same_coding<K, V>() ? shared->key_table + 0 : shared->value_table + 0;
}

}  // namespace turboquant
