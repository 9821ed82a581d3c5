// The shared table: the cases of attention that every backend is held against.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "support/cases.h"

namespace turboquant::cases {

/// The table every backend is held against.  `long_contexts` adds the slow rows.
inline std::vector<Case> table(bool long_contexts = false) {
  std::vector<Case> rows;
  for (int bits : {2, 3, 4}) {
    for (int dim : {32, 64, 96, 128, 160, 192, 224, 256}) {
      for (int n : {1, 5, 33, 300})
        rows.push_back({.key_bits = bits, .value_bits = bits, .head_dim = dim, .kv_len = n});
    }
  }
  for (int kb : {2, 3, 4}) {
    for (int vb : {2, 3, 4}) rows.push_back({.key_bits = kb, .value_bits = vb, .head_dim = 128, .kv_len = 130});
  }
  for (auto [hq, hkv] : {std::pair{1, 1}, {2, 2}, {6, 2}, {8, 1}, {10, 2}, {16, 4}, {16, 1}, {24, 1}}) {
    rows.push_back({.head_dim = 128, .query_heads = hq, .kv_heads = hkv, .kv_len = 97});
    rows.push_back({.key_bits = 4, .value_bits = 4, .query_heads = hq, .kv_heads = hkv, .kv_len = 260});
  }
  for (int len : {2, 3, 4, 5, 8, 9, 17, 64, 70}) {
    for (int dim : {64, 96, 256}) {
      rows.push_back(
          {.head_dim = dim, .query_heads = 8, .kv_heads = 2, .query_len = len, .kv_len = 190, .causal = true});
    }
    rows.push_back({.key_bits = 4, .value_bits = 2, .head_dim = 128, .query_len = len, .kv_len = len, .causal = true});
    rows.push_back({.batch = 3,
                    .query_heads = 4,
                    .kv_heads = 2,
                    .query_len = len,
                    .kv_len = 150,
                    .causal = true,
                    .ragged = true,
                    .window = 40});
  }
  for (int len : {1, 4, 40}) {
    for (MaskKind mask : {MaskKind::boolean, MaskKind::additive}) {
      for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
        rows.push_back({.head_dim = 128,
                        .batch = 2,
                        .query_heads = 4,
                        .kv_heads = 2,
                        .query_len = len,
                        .kv_len = 111,
                        .mask = mask,
                        .dtype = dtype});
      }
    }
    for (bool centred : {false, true}) {
      rows.push_back({.batch = 2,
                      .query_heads = 8,
                      .kv_heads = 2,
                      .query_len = len,
                      .kv_len = 77,
                      .causal = true,
                      .sinks = true,
                      .centred = centred});
      rows.push_back({.head_dim = 64,
                      .batch = 3,
                      .query_heads = 8,
                      .kv_heads = 1,
                      .query_len = len,
                      .kv_len = 345,
                      .causal = true,
                      .ragged = true,
                      .sinks = centred,
                      .centred = true,
                      .dtype = Dtype::bfloat16});
    }
  }
  for (int len : {1, 5, 40}) {  // scales that saturate, and float16 outputs too
    for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
      for (int bits : {2, 3, 4}) {
        rows.push_back({.key_bits = bits,
                        .value_bits = 6 - bits,
                        .head_dim = bits == 2 ? 64 : 128,
                        .query_len = len,
                        .kv_len = 90,
                        .causal = true,
                        .dtype = dtype,
                        .saturated = true});
      }
    }
  }
  for (int n : {1023, 2049, 4100}) {
    rows.push_back({.query_heads = 16, .kv_heads = 4, .kv_len = n});
    rows.push_back({.key_bits = 4, .value_bits = 4, .batch = 2, .kv_len = n, .ragged = true});
  }
  for (int len : {1, 5}) {  // more rows than a warp has lanes
    rows.push_back({.head_dim = 64,
                    .batch = 40,
                    .query_heads = 4,
                    .kv_heads = 1,
                    .query_len = len,
                    .kv_len = 150,
                    .causal = true,
                    .ragged = true});
  }
  if (long_contexts) {
    for (int bits : {2, 3, 4}) {
      rows.push_back({.key_bits = bits, .value_bits = bits, .query_heads = 16, .kv_heads = 4, .kv_len = 40001});
    }
    rows.push_back({.query_heads = 8, .kv_heads = 2, .query_len = 130, .kv_len = 9000, .causal = true});
  }
  return rows;
}

/// Of each feature of the table some rows, for another kind of codes: what differs is unpacking and levels alone.
inline std::vector<Case> table_of_codes(int key_bits, Code key_code, int value_bits, Code value_code) {
  std::vector<Case> rows;
  for (int dim : {32, 64, 96, 128, 160, 192, 224, 256}) {
    for (int n : {1, 5, 33, 300}) rows.push_back({.head_dim = dim, .kv_len = n});
  }
  for (auto [hq, hkv] : {std::pair{1, 1}, {6, 2}, {8, 1}, {24, 1}}) {
    rows.push_back({.head_dim = 128, .query_heads = hq, .kv_heads = hkv, .kv_len = 97});
  }
  for (int len : {2, 5, 17, 70}) {
    rows.push_back({.head_dim = 96, .query_heads = 8, .kv_heads = 2, .query_len = len, .kv_len = 190, .causal = true});
    rows.push_back({.batch = 3,
                    .query_heads = 4,
                    .kv_heads = 2,
                    .query_len = len,
                    .kv_len = 150,
                    .causal = true,
                    .ragged = true,
                    .window = 40});
  }
  rows.push_back({.head_dim = 128,
                  .batch = 2,
                  .query_heads = 4,
                  .kv_heads = 2,
                  .query_len = 4,
                  .kv_len = 111,
                  .mask = MaskKind::boolean,
                  .dtype = Dtype::float16});
  rows.push_back({.batch = 2,
                  .query_heads = 8,
                  .kv_heads = 2,
                  .query_len = 4,
                  .kv_len = 77,
                  .causal = true,
                  .sinks = true,
                  .centred = true,
                  .dtype = Dtype::bfloat16});
  rows.push_back({.query_heads = 16, .kv_heads = 4, .kv_len = 2049});
  for (Case& c : rows) {
    c.key_bits = key_bits, c.key_code = key_code;
    c.value_bits = value_bits, c.value_code = value_code;
  }
  return rows;
}

/// Rows with trellis codes on both sides, and on one side beside every scalar width.
inline std::vector<Case> table_trellis() {
  std::vector<Case> rows;
  for (int bits : {2, 3}) {
    const auto more = table_of_codes(bits, Code::trellis, bits, Code::trellis);
    rows.insert(rows.end(), more.begin(), more.end());
    for (int other : {2, 3, 4}) {
      rows.push_back({.key_bits = bits, .value_bits = other, .kv_len = 130, .key_code = Code::trellis});
      rows.push_back({.key_bits = other, .value_bits = bits, .kv_len = 130, .value_code = Code::trellis});
    }
    rows.push_back({.key_bits = bits,
                    .value_bits = 5 - bits,
                    .kv_len = 130,
                    .key_code = Code::trellis,
                    .value_code = Code::trellis});
  }
  return rows;
}

/// Rows of head dimensions beyond 256, for backends that have them: every one, and at 512 every feature.
inline std::vector<Case> table_wide() {
  std::vector<Case> rows;
  for (int dim : {288, 320, 352, 384, 416, 448, 480, 512}) {
    for (int n : {1, 33, 300})
      rows.push_back({.head_dim = dim, .query_heads = 2, .kv_len = n, .key_code = Code::trellis});
    rows.push_back({.head_dim = dim, .query_heads = 4, .kv_heads = 2, .query_len = 19, .kv_len = 90, .causal = true});
  }
  for (auto [bits, code] : {std::pair{2, Code::scalar}, {4, Code::scalar}, {8, Code::scalar}, {2, Code::trellis}}) {
    for (auto [hq, hkv] : {std::pair{1, 1}, {8, 4}, {8, 1}}) {
      rows.push_back({.key_bits = bits,
                      .value_bits = bits,
                      .head_dim = 512,
                      .query_heads = hq,
                      .kv_heads = hkv,
                      .kv_len = 290,
                      .key_code = code,
                      .value_code = code});
    }
  }
  for (int len : {2, 5, 17, 70}) {
    rows.push_back({.head_dim = 512,
                    .batch = 2,
                    .query_heads = 4,
                    .kv_heads = 2,
                    .query_len = len,
                    .kv_len = 150,
                    .causal = true,
                    .ragged = true,
                    .sinks = true,
                    .centred = true,
                    .window = 40,
                    .dtype = len % 2 ? Dtype::bfloat16 : Dtype::float16,
                    .key_code = Code::trellis,
                    .value_code = Code::trellis});
  }
  rows.push_back(
      {.head_dim = 512, .query_len = 4, .kv_len = 111, .mask = MaskKind::additive, .value_code = Code::trellis});
  rows.push_back({.head_dim = 512, .query_heads = 8, .kv_heads = 4, .kv_len = 2049});
  return rows;
}

/// Rows whose keys and values have different head dimensions, either the larger.
inline std::vector<Case> table_widths() {
  std::vector<Case> rows;
  for (auto [dk, dv] : {std::pair{192, 128}, {96, 64}, {64, 96}, {128, 256}, {256, 32}, {512, 64}, {64, 512}}) {
    for (int n : {1, 33, 300}) {
      rows.push_back({.head_dim = dk,
                      .query_heads = 2,
                      .kv_len = n,
                      .key_code = Code::trellis,
                      .value_code = Code::trellis,
                      .value_dim = dv});
    }
    for (int len : {1, 5, 40}) {
      rows.push_back({.key_bits = 8,
                      .value_bits = 4,
                      .head_dim = dk,
                      .batch = 2,
                      .query_heads = 8,
                      .kv_heads = 2,
                      .query_len = len,
                      .kv_len = 150,
                      .causal = true,
                      .ragged = true,
                      .sinks = true,
                      .centred = true,
                      .dtype = len == 5 ? Dtype::bfloat16 : Dtype::float32,
                      .value_dim = dv});
    }
  }
  for (auto [kb, vb] : {std::pair{3, 8}, {2, 3}, {4, 2}}) {
    rows.push_back({.key_bits = kb, .value_bits = vb, .head_dim = 192, .kv_len = 1200, .value_dim = 128});
    rows.push_back({.key_bits = kb,
                    .value_bits = vb,
                    .head_dim = 192,
                    .query_len = 3,
                    .kv_len = 200,
                    .causal = true,
                    .recent = 20,
                    .first = 3,
                    .ring = 64,
                    .value_dim = 128});
  }
  return rows;
}

/// Rows of latent attention: the keys' codes are the values too, one KV head, the rotary part's scores as a mask of
/// each query head.
inline std::vector<Case> table_latent() {
  std::vector<Case> rows;
  for (int dim : {32, 256, 512}) {
    for (auto [bits, code] :
         {std::pair{2, Code::scalar}, {3, Code::scalar}, {4, Code::scalar}, {8, Code::scalar}, {3, Code::trellis}}) {
      rows.push_back({.key_bits = bits,
                      .value_bits = bits,
                      .head_dim = dim,
                      .query_heads = 16,
                      .kv_len = 300,
                      .mask = MaskKind::additive,
                      .key_code = code,
                      .value_code = code,
                      .latent = true,
                      .head_mask = true});
    }
  }
  for (int heads : {1, 4, 20, 128}) {
    for (int len : {1, 3}) {
      rows.push_back({.head_dim = 512,
                      .batch = 2,
                      .query_heads = heads,
                      .query_len = len,
                      .kv_len = 97,
                      .ragged = true,
                      .centred = true,
                      .mask = MaskKind::additive,
                      .dtype = len == 1 ? Dtype::bfloat16 : Dtype::float16,
                      .key_code = Code::trellis,
                      .value_code = Code::trellis,
                      .latent = true,
                      .head_mask = true});
    }
  }
  rows.push_back({.head_dim = 512,
                  .query_heads = 16,
                  .kv_len = 2500,
                  .mask = MaskKind::additive,
                  .key_code = Code::trellis,
                  .value_code = Code::trellis,
                  .latent = true,
                  .head_mask = true});
  rows.push_back({.head_dim = 512,
                  .query_heads = 8,
                  .query_len = 2,
                  .kv_len = 200,
                  .mask = MaskKind::additive,
                  .recent = 20,
                  .first = 3,
                  .ring = 64,
                  .latent = true,
                  .head_mask = true});
  return rows;
}

/// Rows with codes of 8 bits on both sides, and on one side beside every other kind.
inline std::vector<Case> table_8bits() {
  auto rows = table_of_codes(8, Code::scalar, 8, Code::scalar);
  for (int other : {2, 3, 4}) {
    rows.push_back({.key_bits = 8, .value_bits = other, .kv_len = 130});
    rows.push_back({.key_bits = other, .value_bits = 8, .kv_len = 130});
    if (other == 4) continue;
    rows.push_back({.key_bits = 8, .value_bits = other, .kv_len = 130, .value_code = Code::trellis});
    rows.push_back({.key_bits = other, .value_bits = 8, .kv_len = 130, .key_code = Code::trellis});
  }
  return rows;
}

/// Rows with exact copies: where the ring begins and ends, what of it each query may read, all the other rules beside
/// it.
inline std::vector<Case> table_exact() {
  std::vector<Case> rows;
  for (int dim : {32, 64, 96, 128, 256}) {
    for (int n : {1, 5, 31, 32, 33, 129, 300}) {  // shorter than both kinds, between, and longer than the ring
      rows.push_back({.head_dim = dim, .kv_len = n, .recent = 32, .first = 4, .ring = 96});
    }
  }
  for (int bits : {2, 3, 4}) {  // one kind alone
    rows.push_back({.key_bits = bits, .value_bits = bits, .kv_len = 500, .recent = 128, .ring = 384});
    rows.push_back({.key_bits = bits, .value_bits = bits, .kv_len = 500, .first = 4});
    rows.push_back(
        {.key_bits = 4, .value_bits = bits, .head_dim = 128, .kv_len = 130, .recent = 1, .first = 1, .ring = 32});
  }
  for (Code code : {Code::scalar, Code::trellis}) {
    rows.push_back({.kv_len = 700, .key_code = code, .value_code = code, .recent = 128, .first = 4, .ring = 384});
  }
  for (int n : {1023, 1024, 1100, 2049, 4100}) {  // what a cache hands over while it decodes
    rows.push_back({.query_heads = 16, .kv_heads = 4, .kv_len = n, .recent = 128, .first = 4, .ring = 384});
  }
  for (int len : {2, 3, 5, 9, 17, 70}) {  // several queries, each with a boundary of its own
    for (int dim : {64, 256}) {
      rows.push_back({.head_dim = dim,
                      .query_heads = 8,
                      .kv_heads = 2,
                      .query_len = len,
                      .kv_len = 190,
                      .causal = true,
                      .recent = 40,
                      .first = 4,
                      .ring = 128});
    }
    rows.push_back({.key_bits = 4,
                    .value_bits = 2,
                    .head_dim = 128,
                    .query_len = len,
                    .kv_len = len,
                    .causal = true,
                    .recent = 8,
                    .first = 2,
                    .ring = 96});
    // A window that begins within the copies; rows that begin behind them; fewer tokens in the ring than are meant.
    rows.push_back({.batch = 3,
                    .query_heads = 4,
                    .kv_heads = 2,
                    .query_len = len,
                    .kv_len = 150,
                    .causal = true,
                    .ragged = true,
                    .window = 40,
                    .recent = 24,
                    .first = 50,
                    .ring = 32});
    rows.push_back({.head_dim = 64,
                    .batch = 3,
                    .query_heads = 8,
                    .kv_heads = 1,
                    .query_len = len,
                    .kv_len = 345,
                    .causal = true,
                    .ragged = true,
                    .sinks = true,
                    .centred = true,
                    .dtype = Dtype::bfloat16,
                    .recent = 128,
                    .first = 4,
                    .ring = 256});
  }
  for (int len : {1, 4, 40}) {
    for (MaskKind mask : {MaskKind::boolean, MaskKind::additive}) {
      rows.push_back({.head_dim = 128,
                      .batch = 2,
                      .query_heads = 4,
                      .kv_heads = 2,
                      .query_len = len,
                      .kv_len = 111,
                      .mask = mask,
                      .dtype = Dtype::float16,
                      .recent = 20,
                      .first = 3,
                      .ring = 64});
    }
  }
  // A short cache, whose ring holds all tokens and is smaller than `recent`.
  for (auto [n, len, ring] :
       {std::tuple{1, 1, 32}, {20, 1, 32}, {32, 1, 32}, {33, 1, 64}, {20, 20, 32}, {100, 70, 128}}) {
    for (bool ragged : {false, true}) {
      rows.push_back({.batch = ragged ? 3 : 1,
                      .query_heads = 8,
                      .kv_heads = 2,
                      .query_len = len,
                      .kv_len = n,
                      .causal = true,
                      .ragged = ragged,
                      .recent = 128,
                      .first = 4,
                      .ring = ring});
    }
  }
  // A chunk of a prompt, in a ring that holds it.
  rows.push_back({.query_heads = 8,
                  .kv_heads = 2,
                  .query_len = 300,
                  .kv_len = 700,
                  .causal = true,
                  .recent = 128,
                  .first = 4,
                  .ring = 512});
  return rows;
}

}  // namespace turboquant::cases
