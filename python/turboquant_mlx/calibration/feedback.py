"""Feedback: matrices by which the encoder turns its errors into directions that attention hardly sees.

An error e of a key reaches a softmax as q . e, so it counts e' S e with S the mean of q q' over the queries that the KV
head answers.  One of a value reaches the hidden state through the gate g and the output projection Wo, so it counts
e' M e with M = sum over those query heads h of E[g_h g_h'] (elementwise*) (Wo_h' Wo_h).  docs/algorithm.md has the rest.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import _core

BLOCK = 32  # coordinates that are coded at once
DAMPING = 0.1  # of the metric's mean diagonal, added to it: errors are not pushed where a text never looked
_UNKNOWN = ("gate", "g_proj", "sub_norm")  # names of layers between attention and o_proj that are not understood


def rotation(dim, seed):
    """The package's rotation R (D, D) as a matrix, float64."""
    return np.array(_core.rotation(dim, seed)).reshape(dim, dim).T


def of_metric(metric, seed):
    """The feedback (D, D) for errors that count e' S e, float64, zero outside its blocks below the diagonal."""
    dim = len(metric)
    turn = rotation(dim, seed)
    turned = turn @ metric @ turn.T
    turned = (turned + turned.T) / 2 + DAMPING * np.trace(turned) / dim * np.eye(dim)
    upper = np.linalg.cholesky(turned[::-1, ::-1])[::-1, ::-1]  # turned = upper upper'
    lower = (upper / np.diag(upper)).T
    out = np.zeros_like(lower)
    for start in range(BLOCK, dim, BLOCK):
        rows = slice(start, start + BLOCK)
        out[rows, :start] = np.linalg.solve(lower[rows, rows], lower[rows, :start])
    return out


def of_metrics(metrics, seed):
    """The feedback (H, D, D) float16 of one side, or None: without a metric, or when one block is all there is."""
    if metrics is None or metrics.shape[-1] == BLOCK:
        return None
    if not (np.isfinite(metrics).all() and all(np.trace(m) > 0 for m in metrics)):
        return None
    return mx.array(np.stack([of_metric(m, seed) for m in metrics]).astype(np.float16))


def second_moment(x, heads):
    """Sum of x x' over the numbers (B, H, N, D), for each of `heads` equal groups of H: (heads, D, D) float64."""
    x = np.array(x.astype(mx.float32)).astype(np.float64)
    x = x.transpose(1, 0, 2, 3).reshape(heads, -1, x.shape[-1])
    return x.swapaxes(1, 2) @ x


class Gate(nn.Module):
    """A query projection that adds up the second moments of the gate beside the queries (qwen3_next, qwen3_5)."""

    def __init__(self, inner, heads):
        super().__init__()
        self.inner, self.heads, self.moment = inner, heads, 0

    def __call__(self, x):
        y = self.inner(x)
        gate = mx.split(y.reshape(*y.shape[:-1], self.heads, -1), 2, axis=-1)[1]
        self.moment = self.moment + second_moment(mx.sigmoid(gate).swapaxes(1, 2), self.heads)
        return y


def matrix(linear):
    """The weights of a linear layer as float64, or None."""
    if isinstance(linear, nn.QuantizedLinear):
        weight = mx.dequantize(
            linear.weight,
            linear.scales,
            linear.get("biases"),
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    elif isinstance(linear, nn.Linear):
        weight = linear.weight
    else:
        return None
    return np.array(weight.astype(mx.float32)).astype(np.float64)


class Output:
    """The way from a layer's attention to its hidden state, watched while a text is read.

    `known` says whether it was understood: an o_proj (hidden, H * D), with nothing before it or with the gate of
    Qwen3-Next and Qwen3.5, whose query projection gives queries and gates."""

    def __init__(self, attention):
        self.attention, self.gate = attention, None
        self.heads = getattr(attention, "num_attention_heads", None) or getattr(attention, "n_heads", None)
        weight = matrix(getattr(attention, "o_proj", None))
        query, fused = (matrix(getattr(attention, name, None)) for name in ("q_proj", "qkv_proj"))
        self.known = weight is not None and (query is not None or fused is not None) and bool(self.heads)
        if not self.known:
            return
        size = weight.shape[1]
        self.gated = query is not None and len(query) == 2 * size
        if self.gated:
            self.known = type(attention).__name__ == "Qwen3NextAttention"
        else:
            children = " ".join(attention.children())
            self.known = not any(name in children for name in _UNKNOWN)
            self.known = self.known and (len(fused) <= 3 * size if query is None else len(query) == size)
        if not self.known:
            return
        by_head = weight.reshape(len(weight), self.heads, -1).transpose(1, 0, 2)
        self.products = by_head.swapaxes(1, 2) @ by_head

    def __enter__(self):
        if self.known and self.gated:
            self.gate = Gate(self.attention.q_proj, self.heads)
            self.attention.q_proj = self.gate
        return self

    def __exit__(self, *_):
        if self.gate:
            self.attention.q_proj = self.gate.inner

    def metrics(self, heads, dim, positions):
        """M of each of `heads` KV heads (heads, dim, dim) after `positions` tokens, or None."""
        if not self.known or self.heads % heads or self.products.shape[-1] != dim:
            return None
        seen = self.gate.moment / positions if self.gate else 1.0
        return (seen * self.products).reshape(heads, -1, dim, dim).sum(1)
