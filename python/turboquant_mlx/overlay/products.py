"""Matrix products of measuring and calibrating on a Linux CPU, by numpy.

MLX's CPU package for Linux brings the reference BLAS, which does 2 to 6 thousand million operations a second on a core
where numpy's OpenBLAS does 85: a model of 0.5 billion parameters would be calibrated in an hour instead of a minute.  Only
float32 models that `load_model` made are changed, and only what MLX would compute by itself: linear layers, and attention
over float caches.  Packed caches have kernels of their own.
"""

import contextlib
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .patch import float_attention


def _by_numpy(x, weight):
    """x (..., K) times the transpose of weight (N, K)."""
    rows = np.array(x, copy=False).reshape(-1, x.shape[-1])
    return mx.array(rows @ np.array(weight, copy=False).T).reshape(*x.shape[:-1], -1)


class NumpyLinear(nn.Linear):
    """nn.Linear, computed at once."""

    def __call__(self, x):
        y = _by_numpy(x, self.weight)
        return y + self.bias if "bias" in self else y


class NumpyEmbedding(nn.Embedding):
    """nn.Embedding whose `as_linear` is computed at once."""

    def as_linear(self, x):
        return _by_numpy(x, self.weight)


def _attention(queries, keys, values, scale, mask, sinks):
    """Attention over floats, (B, H, L, D) each; mask None, "causal" or an array, sinks (H_q,) or None."""
    q, k, v = (np.array(x.astype(mx.float32), copy=False) for x in (queries, keys, values))
    batch, heads, length, dim = q.shape
    group, tokens = heads // k.shape[1], k.shape[2]
    if isinstance(mask, str):
        mask = np.arange(tokens) <= np.arange(tokens - length, tokens)[:, None]
    elif mask is not None:
        full = mx.broadcast_to(mask, (batch, heads, length, tokens))
        mask = np.array(full if mask.dtype == mx.bool_ else full.astype(mx.float32))
    out = np.empty((batch, heads, length, v.shape[-1]), np.float32)
    for b in range(batch):
        for h in range(heads):
            scores = (q[b, h] * np.float32(scale)) @ k[b, h // group].T
            if mask is not None:
                own = mask if mask.ndim == 2 else mask[b, h]
                scores = np.where(own, scores, -np.inf) if own.dtype == bool else scores + own
            most = scores.max(1, keepdims=True)
            if sinks is not None:
                most = np.maximum(most, float(sinks[h]))
            weights = np.exp(scores - most)
            total = weights.sum(1, keepdims=True)
            if sinks is not None:
                total = total + np.exp(float(sinks[h]) - most)
            out[b, h] = (weights / total) @ v[b, h // group]
    return mx.array(out).astype(queries.dtype)


def needed(model):
    """Whether numpy's products are to be used for this model: on a Linux CPU, when all weights are float32."""
    return (
        sys.platform == "linux"
        and mx.default_device() == mx.Device(mx.cpu)
        and all(x.dtype == mx.float32 for _, x in tree_flatten(model.parameters()))
    )


def use_numpy(model):
    """Makes the linear layers of a model compute with numpy.  Their weights stay where they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = NumpyLinear
        elif type(module) is nn.Embedding:
            module.__class__ = NumpyEmbedding


@contextlib.contextmanager
def fast_attention(model):
    """Context: attention of this thread over float arrays is numpy's where that is needed."""
    with float_attention(_attention) if needed(model) else contextlib.nullcontext():
        yield
