"""The codec and the attention as functions of MLX arrays.  All are lazy and run on the given or default stream."""

from __future__ import annotations

import mlx.core as mx

from . import _core
from .caches.arguments import Code, code_name, code_names


def encode(
    x: mx.array,
    bits: int = 3,
    *,
    seed: int = 0,
    centre: mx.array | None = None,
    feedback: mx.array | None = None,
    code: str | None = None,
    stream: mx.Stream | mx.Device | None = None,
) -> tuple[mx.array, mx.array]:
    """Codes of vectors (TurboQuant's MSE quantizer, arXiv 2504.19874, section 3).

    Args:
        x (mx.array): (..., D) float16, bfloat16 or float32; D a multiple of 32 from 32 to 512.
        bits (int): 2, 3, 4 or 8 bits a coordinate.
        seed (int): of the random signs; decode and attention need the same.
        centre (mx.array): (H, D), taken from every vector of head H before coding; x is then (B, H, N, D).
        feedback (mx.array): (H, D, D) float16, of which the columns in blocks of 32 before a row's own are read: the
            errors of earlier coordinates move later ones (docs/algorithm.md).  Codes decode as without it.
        code (str): "trellis" or "scalar", of 2 and 3 bits; wider codes are scalar.  decode and attention need the same.
            None: trellis.
        stream: an MLX stream or device.

    Returns:
        codes (..., bits * D / 32) uint32 and scales (...) float16: 98 bytes for 3 bits and D = 256.
        A vector with NaN or infinity gets the scale NaN, a zero vector the scale 0.  Scales saturate at 65504: a
        vector whose RMS is beyond it (51,000 at 2 bits) keeps its direction and loses length, and stays finite.

    Raises:
        ValueError: bits, dtype or D out of range; the message gives the value found.
    """
    coding = _core.Coding(bits, code=code_name("encode", code), seed=seed, centre=centre, feedback=feedback)
    return _core.encode(x, coding, stream=stream)


def decode(
    codes: mx.array,
    scales: mx.array,
    bits: int = 3,
    *,
    seed: int = 0,
    centre: mx.array | None = None,
    dtype: mx.Dtype = mx.float32,
    code: str | None = None,
    stream: mx.Stream | mx.Device | None = None,
) -> mx.array:
    """Vectors from their codes: the levels times the scale, rotated back, plus the centre.

    Args:
        codes (mx.array): (..., bits * D / 32) uint32, as `encode` gave them.
        scales (mx.array): (...) float16.
        bits, seed, centre, code: as given to `encode`; with a centre, codes are (B, H, N, bits * D / 32).
        dtype (mx.Dtype): float16, bfloat16 or float32.
        stream: an MLX stream or device.

    Returns:
        (..., D) of `dtype`; NaN where the scale is NaN.

    Raises:
        ValueError: bits, a dtype or a shape out of range; the message gives the value found.
    """
    coding = _core.Coding(bits, code=code_name("decode", code), seed=seed, centre=centre)
    return _core.decode(codes, scales, coding, dtype=dtype, stream=stream)


def attention(
    q: mx.array,
    keys: tuple[mx.array, mx.array],
    values: tuple[mx.array, mx.array],
    *,
    scale: float,
    mask: str | mx.array | None = None,
    key_bits: int = 3,
    value_bits: int = 3,
    seed: int = 0,
    sinks: mx.array | None = None,
    starts: mx.array | None = None,
    window: int = 0,
    key_centre: mx.array | None = None,
    value_centre: mx.array | None = None,
    code: Code = None,
    stream: mx.Stream | mx.Device | None = None,
) -> mx.array:
    """softmax(scale * q K^T + mask) V over packed keys and values, without decoding the history.

    Args:
        q (mx.array): (B, H_q, L, D) float16, bfloat16 or float32.  Query i stands at position N - L + i.
        keys, values: pairs (codes (B, H_kv, N, bits * D / 32), scales (B, H_kv, N)) of `encode`;
            H_q a multiple of H_kv.
        scale (float): of the scores; finite.
        mask: None, "causal", or an array that broadcasts to (B, H_q, L, N): bool (False hides) or a float to add.
        key_bits, value_bits (int): widths of the two sides, each 2, 3, 4 or 8.
        seed (int): as given to `encode`.
        sinks (mx.array): (H_q,) a logit per head that takes weight and has no value.
        starts (mx.array): (B,) first visible token of each row of a left-padded batch.
        window (int): > 0 hides keys `window` or more positions before the query.
        key_centre, value_centre (mx.array): (H_kv, D), as given to `encode`.
        code (str): as given to `encode`, of the sides of 2 and 3 bits; a pair is of keys and of values.

    Returns:
        (B, H_q, L, D) in q's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: a shape, dtype or number out of range; the message names the rule and the value found.
    """
    names = code_names("attention", code)
    key_coding = _core.Coding(key_bits, code=names[0], seed=seed, centre=key_centre)
    value_coding = _core.Coding(value_bits, code=names[1], seed=seed, centre=value_centre)
    return _core.attention(
        q,
        keys,
        values,
        key_coding,
        value_coding,
        scale=scale,
        mask=mask,
        sinks=sinks,
        starts=starts,
        window=window,
        stream=stream,
    )
