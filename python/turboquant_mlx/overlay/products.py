"""Matrix products of measuring and calibrating on a Linux CPU, by numpy.

MLX's CPU package for Linux brings the reference BLAS, which does 2 to 6 thousand million operations a second on a core
where numpy's OpenBLAS does 85: a model of 0.5 billion parameters would be calibrated in an hour instead of a minute.  Only
what MLX would compute by itself is changed: linear layers, for good in the float32 models that `load_model` made and for
as long as it takes in others (`fast_products`), and attention over float caches.  Packed caches have kernels of their own.
"""

import contextlib
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .patch import float_attention


def _by_numpy(x, weight):
    """x (..., K) times the transpose of weight (N, K), as float32 and then in x's dtype."""
    rows = np.array(x.astype(mx.float32), copy=False).reshape(-1, x.shape[-1])
    y = rows @ np.array(weight.astype(mx.float32), copy=False).T
    return mx.array(y).astype(x.dtype).reshape(*x.shape[:-1], -1)


def _dequantised(module):
    """The weights of a quantised layer, as floats."""
    parts = module.weight, module.scales, module.get("biases")
    return mx.dequantize(*parts, group_size=module.group_size, bits=module.bits, mode=module.mode)


class NumpyLinear(nn.Linear):
    """nn.Linear, computed at once."""

    def __call__(self, x):
        y = _by_numpy(x, self.weight)
        return y + self.bias if "bias" in self else y


class NumpyEmbedding(nn.Embedding):
    """nn.Embedding whose `as_linear` is computed at once."""

    def as_linear(self, x):
        return _by_numpy(x, self.weight)


class _QuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x):
        y = _by_numpy(x, _dequantised(self))
        return y + self.bias if "bias" in self else y


class _QuantizedEmbedding(nn.QuantizedEmbedding):
    def as_linear(self, x):
        return _by_numpy(x, _dequantised(self))


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


_BY_NUMPY = {
    nn.Linear: NumpyLinear,
    nn.Embedding: NumpyEmbedding,
    nn.QuantizedLinear: _QuantizedLinear,
    nn.QuantizedEmbedding: _QuantizedEmbedding,
}


def slow_here():
    """Whether MLX's own products are the reference BLAS's: on a Linux CPU."""
    return sys.platform == "linux" and mx.default_device() == mx.Device(mx.cpu)


def needed(model):
    """Whether numpy's products are to be used for this model for good: where MLX's are slow, when all weights are
    float32."""
    return slow_here() and all(x.dtype == mx.float32 for _, x in tree_flatten(model.parameters()))


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


@contextlib.contextmanager
def fast_products(model):
    """Context: the model's linear layers and its attention over float arrays compute with numpy where MLX's products are
    slow, whatever the weights' dtype.  Afterwards the layers are as they were."""
    if not slow_here():
        yield
        return
    changed = [(module, type(module)) for module in model.modules() if type(module) in _BY_NUMPY]
    for module, kind in changed:
        module.__class__ = _BY_NUMPY[kind]
    try:
        with float_attention(_attention):
            yield
    finally:
        for module, kind in changed:
            module.__class__ = kind
