"""The gated delta rule over the few tokens of a step that checks drafts, with the state after each token.

Off Metal, the tokens' deltas are computed from the state before the step (the equations of gated_delta.py, a chunk of up to
16 tokens), and a state from these, once somebody asks for it:

    S_i = c_i S + sum over j <= i of P[j, i] delta_j k_j^T

So of all the states only the one that the step is rewound to is ever computed.  On Metal mlx-lm's kernel, which plain decoding
runs too, reads one token after the other."""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import gated_delta as mlx_lm_gated_delta

from ..caches.stepped import step_tokens
from .gated_delta import _unit_upper_inverse, _upper

_FEW = 16  # tokens whose triangular system is solved at once


def stepwise(original: Callable[..., Any]) -> Callable[..., Any]:
    """A `gated_delta_update` of mlx-lm that, while states are kept (caches/stepped.py), returns one state a token, as a tuple
    of arrays or of functions that make them, in place of the last state."""

    @functools.wraps(original)
    def gated_delta_update(q, k, v, a, b, A_log, dt_bias, state=None, mask=None, **settings):
        tokens = q.shape[1]
        if step_tokens() != tokens or tokens == 1:
            return original(q, k, v, a, b, A_log, dt_bias, state, mask, **settings)
        if a.ndim == 3 and tokens <= _FEW and not mx.metal.is_available() and not settings.get("allow_neg_eigval"):
            bound = settings.get("lower_bound")
            if bound is None:
                g = mlx_lm_gated_delta.compute_g(A_log, a, dt_bias)
            else:
                g = mlx_lm_gated_delta.compute_lower_bound_g(A_log, a, dt_bias, bound)
            return few_tokens(q, k, v, g, mx.sigmoid(b), state)
        ys, states = [], []
        for i in range(tokens):
            at = slice(i, i + 1)
            y, state = original(
                q[:, at], k[:, at], v[:, at], a[:, at], b[:, at], A_log, dt_bias, state, None, **settings
            )
            ys.append(y)
            states.append(state)
        return mx.concatenate(ys, axis=1), tuple(states)

    return gated_delta_update


def few_tokens(q, k, v, g, beta, state=None):
    """At most 16 tokens of the gated delta rule.

    Args:
        q, k (B, T, Hk, Dk); v (B, T, Hv, Dv); g, beta (B, T, Hv); state (B, Hv, Dv, Dk) float32 or None for zeros.

    Returns:
        y (B, T, Hv, Dv) in q's dtype, and a tuple of T functions without arguments: each makes the state after its token.
    """
    batch, tokens, key_heads, key_dim = k.shape
    heads, value_dim = v.shape[-2:]
    groups, size = heads // key_heads, 1 << (tokens - 1).bit_length()
    shape = (batch, heads, value_dim, key_dim)
    before = mx.zeros(shape, mx.float32) if state is None else state.astype(mx.float32)
    before = before.reshape(batch, key_heads, groups, value_dim, key_dim)

    def split(x, groups, fill=0):
        """(B, T, H, ...) to (B, Hk, H / Hk or 1, size, ...) in float32; tokens that are added hold `fill`."""
        x = x.astype(mx.float32)
        if size > tokens:
            x = mx.pad(x, [(0, 0), (0, size - tokens)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return mx.moveaxis(x.reshape(batch, size, key_heads, groups, *x.shape[3:]), 1, 3)

    queries, keys, values = split(q, 1), split(k, 1), split(v, groups)
    g, beta = split(g, groups, fill=1), split(beta, groups)
    decay = mx.cumprod(mx.where(_upper(size, 1), g[..., None, :], 1), axis=-1)  # P[j, i]; 1 below the diagonal
    from_start = mx.cumprod(g, axis=-1)[..., None]
    keys_t, before_t = keys.swapaxes(-1, -2), before.swapaxes(-1, -2)
    inverse = _unit_upper_inverse((keys @ keys_t) * decay * beta[..., None, :])
    delta = inverse.swapaxes(-1, -2) @ (beta[..., None] * (values - from_start * (keys @ before_t)))
    scores = mx.where(_upper(size, 0), decay * (keys @ queries.swapaxes(-1, -2)), 0)
    y = from_start * (queries @ before_t) + scores.swapaxes(-1, -2) @ delta
    y = mx.moveaxis(y, 3, 1).reshape(batch, size, heads, value_dim)[:, :tokens]

    def after(i):
        weighted = decay[..., : i + 1, i, None] * delta[..., : i + 1, :]
        found = from_start[..., i : i + 1, :] * before + weighted.swapaxes(-1, -2) @ keys[..., : i + 1, :]
        return found.reshape(shape)

    return y.astype(q.dtype), tuple(functools.partial(after, i) for i in range(tokens))
