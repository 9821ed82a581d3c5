"""The gated delta recurrence of Qwen3.5's linear-attention layers, 64 tokens a step.

Off Metal, mlx-lm runs this recurrence as a Python loop over tokens (`mlx_lm.models.gated_delta.gated_delta_ops`), and
a long prompt spends most of its time there.  The same function is computed here from matrix products over chunks of 64
tokens (Yang et al., "Gated Delta Networks", arXiv 2412.06464, section 3.3).

One token does, for the state S [Dv, Dk] of a head, with decay g, rate beta, key k, value v and query q:

    S <- g S;   S <- S + beta (v - S k) k^T;   y = S q

Let P[j, i] be the product of the decays of tokens j+1 .. i of a chunk, c_i that of its first i+1 tokens, and S the
state before it.  What token i adds is delta_i k_i^T, and the deltas solve a unit triangular system:

    (I + A) delta = beta (V - c K S^T),    A[i, j] = beta_i P[j, i] (k_i . k_j) for j < i
    y_i = c_i S q_i + sum over j <= i of P[j, i] (k_j . q_i) delta_j
    S'  = c_last S + sum over j of P[j, last] delta_j k_j^T

With T = (I + A)^-1, U = T (beta V) and W = T (beta c K) the step from chunk to chunk is one product, S' = S M + N, and
everything else is computed for all chunks at once.

Decays are multiplied, never divided and never taken through logarithms, so a decay of 0 is exact.  The inverse is
made by halving blocks: the doubling product (I - A)(I + A^2)(I + A^4)... meets binomial coefficients up to 9e17 when
keys repeat, and loses every digit.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import gated_delta as _mlx_lm

from . import hosts

CHUNK = 64
# Prompts longer than this go through in parts, which bounds the memory of the chunks' matrices.
MAX_TOKENS = 2048

_loop = _mlx_lm.gated_delta_ops


@cache
def _block_mask(chunk: int, half: int) -> mx.array:
    """1 where row j and column i lie in the first and the second half of the same block of 2 * half."""
    j, i = np.indices((chunk, chunk))
    same = j // (2 * half) == i // (2 * half)
    return mx.array((same & (j % (2 * half) < half) & (i % (2 * half) >= half)).astype(np.float32))


@cache
def _upper(chunk: int, diagonal: int) -> mx.array:
    return mx.array(np.triu(np.ones((chunk, chunk), bool), diagonal))


def _unit_upper_inverse(a: mx.array, leaf: int = 16) -> mx.array:
    """(I + the strictly upper triangle of a)^-1 for the last two axes, whose size is a power of two.

    The inverses X and Y of neighbouring diagonal blocks, with the block B above Y, combine to -X B Y, for all blocks
    at once.  Blocks up to `leaf` are cut out first: whole matrices would do 2.5 times the work."""
    chunk = a.shape[-1]
    half = 1
    if chunk > leaf:
        count = chunk // leaf
        parts = [slice(i * leaf, (i + 1) * leaf) for i in range(count)]
        x = _unit_upper_inverse(mx.stack([a[..., part, part] for part in parts], axis=-3))
        x = (x[..., None, :] * mx.eye(count)[:, None, :, None]).reshape(a.shape)
        half = leaf
    else:
        x = mx.broadcast_to(mx.eye(chunk), a.shape)
    while half < chunk:
        x = x - x @ (a * _block_mask(chunk, half)) @ x
        half *= 2
    return x


def chunked_gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What mlx-lm's `gated_delta_ops` computes, for one decay a head.

    q, k (B, T, Hk, Dk); v (B, T, Hv, Dv), Hv a multiple of Hk; g, beta (B, T, Hv); state (B, Hv, Dv, Dk) or None for
    zeros; mask (B, T) of booleans: False leaves the state as it is.  Any float dtype; arithmetic is float32.

    Returns y (B, T, Hv, Dv) in q's dtype (0 where the mask is False, as from mlx-lm's Metal kernel) and the state in
    float32.  On CUDA, MLX multiplies float32 matrices in TF32 unless MLX_ENABLE_TF32=0 is set before it starts.

    Raises ValueError for shapes that do not fit together."""
    batch, tokens, key_heads, key_dim = k.shape
    heads, value_dim = v.shape[-2:]
    if q.shape != k.shape or v.shape[:2] != k.shape[:2] or heads % key_heads:
        raise ValueError(
            f"[chunked_gated_delta] q and k must be (B, T, Hk, Dk) and v (B, T, a multiple of Hk, Dv); "
            f"got {q.shape}, {k.shape} and {v.shape}"
        )
    if g.shape != (batch, tokens, heads) or beta.shape != g.shape:
        raise ValueError(
            f"[chunked_gated_delta] g and beta must be (B, T, Hv) = {(batch, tokens, heads)}; "
            f"got {g.shape} and {beta.shape}"
        )
    if state is None:
        state = mx.zeros((batch, heads, value_dim, key_dim))
    state = state.astype(mx.float32)
    ys = []
    for start in range(0, tokens, MAX_TOKENS):
        part = slice(start, start + MAX_TOKENS)
        seen = None if mask is None else mask[:, part]
        y, state = _chunks(q[:, part], k[:, part], v[:, part], g[:, part], beta[:, part], state, seen)
        ys.append(y)
    y = ys[0] if len(ys) == 1 else mx.concatenate(ys, axis=1)
    return y.astype(q.dtype), state


def _chunks(q, k, v, g, beta, state, mask):
    batch, tokens, key_heads, key_dim = k.shape
    heads, value_dim = v.shape[-2:]
    chunk = min(CHUNK, 1 << (tokens - 1).bit_length())
    count = -(-tokens // chunk)
    if mask is not None:
        # A hidden token neither decays nor writes.  Its key and value may hold anything, so they go as well.
        g = mx.where(mask[..., None], g, 1)
        beta = mx.where(mask[..., None], beta, 0)
        k, v = (mx.where(mask[..., None, None], x, 0) for x in (k, v))

    def split(x, groups, fill=0):
        """(B, T, H, ...) to (B, Hk, H / Hk or 1, chunks, chunk, ...) in float32; added tokens hold `fill`."""
        x = x.astype(mx.float32)
        if count * chunk > tokens:
            x = mx.pad(x, [(0, 0), (0, count * chunk - tokens)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        x = x.reshape(batch, count, chunk, key_heads, groups, *x.shape[3:])
        return mx.contiguous(x.transpose(0, 3, 4, 1, 2, *range(5, x.ndim)))

    groups = heads // key_heads
    q, k, v = split(q, 1), split(k, 1), split(v, groups)
    g, beta = split(g, groups, fill=1), split(beta, groups)

    decay = mx.cumprod(mx.where(_upper(chunk, 1), g[..., None, :], 1), axis=-1)  # P[j, i]; 1 below the diagonal
    from_start = mx.cumprod(g, axis=-1)
    keys_t = k.swapaxes(-1, -2)
    # Everything triangular is kept transposed, [j, i], so that no product needs a copy.
    inverse = _unit_upper_inverse((k @ keys_t) * decay * beta[..., None, :])
    inverse = inverse * beta[..., :, None]
    u = inverse.swapaxes(-1, -2) @ v
    w = (inverse * from_start[..., :, None]).swapaxes(-1, -2) @ k
    weighted_keys = decay[..., -1:] * k
    add = u.swapaxes(-1, -2) @ weighted_keys
    carry = from_start[..., -1:, None] * mx.eye(key_dim) - w.swapaxes(-1, -2) @ weighted_keys

    state = state.reshape(batch, key_heads, groups, value_dim, key_dim)
    before = []
    for n in range(count):
        before.append(state)
        state = mx.addmm(add[..., n, :, :], state, carry[..., n, :, :])
    before_t = mx.stack(before, axis=3).swapaxes(-1, -2)

    delta = u - w @ before_t
    scores = mx.where(_upper(chunk, 0), decay * (k @ q.swapaxes(-1, -2)), 0)
    y = from_start[..., None] * (q @ before_t) + scores.swapaxes(-1, -2) @ delta
    y = y.transpose(0, 3, 4, 1, 2, 5).reshape(batch, count * chunk, heads, value_dim)[:, :tokens]
    if mask is not None:
        y = mx.where(mask[..., None, None], y, 0)
    return y, state.reshape(batch, heads, value_dim, key_dim)


def _gated_delta_ops(q, k, v, g, beta, state=None, mask=None):
    """Takes the place of mlx-lm's loop.  One token at a time, and decays per coordinate, stay with the loop."""
    if q.shape[1] == 1 or g.ndim != 3:
        return _loop(q, k, v, g, beta, state, mask)
    return chunked_gated_delta(q, k, v, g, beta, state, mask)


def uses_recurrence(model: Any) -> bool:
    """Whether some layer of an mlx-lm model calls the recurrence (its file imports `gated_delta_update`)."""
    import sys

    update = _mlx_lm.gated_delta_update
    return any(
        getattr(sys.modules.get(type(module).__module__), "gated_delta_update", None) is update
        for module in model.modules()
    )


def enable_chunked_recurrence(model: Any = None) -> bool:
    """Makes mlx-lm use `chunked_gated_delta` wherever it would loop over tokens, for every model of the process.

    mlx-lm's own Metal kernel is left alone: it is not reached through the loop.  Idempotent; models loaded before or
    after are served alike, since `gated_delta_update` looks the loop up when called.  Returns whether `model` uses
    the recurrence at all (True when no model is given)."""
    _mlx_lm.gated_delta_ops = _gated_delta_ops
    hosts.enable_chunked_recurrence()
    return model is None or uses_recurrence(model)


def disable_chunked_recurrence() -> None:
    """Brings mlx-lm's loop back."""
    _mlx_lm.gated_delta_ops = _loop
    hosts.disable_chunked_recurrence()
