"""Means, second moments and feedback of a model's keys and values, added up while it reads a text."""

from __future__ import annotations

import contextlib

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from ..caches.identity import weight_names
from ..caches.slots import leaves, own_caches, replace_kv_caches, slot_name
from ..overlay import sharding
from ..overlay.patch import reach_own_code, watch_queries
from . import feedback as fed
from .files import Calibration, Calibrations


class _Summing(KVCache):
    """A KVCache that adds up, in float64, what it is given and what its keys are asked."""

    def __init__(self):
        super().__init__()
        self.sums = None
        self.queries, self.asked, self.readers, self.updates = 0, 0, 0, 0

    def update_and_fetch(self, keys, values):
        sums = [np.array(x.astype(mx.float32)).sum((0, 2), dtype=np.float64) for x in (keys, values)]
        self.sums = sums if self.sums is None else [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.updates += 1
        return super().update_and_fetch(keys, values)

    def watch(self, queries):
        """Adds up q q' of the queries (B, H_q, L, D) of each KV head."""
        heads, dim = self.sums[0].shape
        if queries.shape[1] % heads or queries.shape[-1] != dim:
            return
        self.readers += 1
        self.queries = self.queries + fed.second_moment(queries, heads)
        self.asked += queries.size // (heads * dim)


def calibrate(model, tokens, *, step=512, seed=0, feedback=True):
    """Means of keys and values over a text, and the feedback for them.

    Args:
        model: a model of mlx-lm; its caches may be packed or not.
        tokens: token ids, (N,) or (B, N): some windows of different texts, each as long as a usual prompt, because the
            rotary part of the keys' mean depends on positions (docs/quality_studies.md).
        step (int): tokens of a row given to the model at a time; without influence on the result beyond rounding.
        seed (int): of the caches that will use the feedback.
        feedback (bool): False makes centres alone.

    Returns:
        {slot index: Calibration}: what `enable(calibration=...)` takes.  The keys' feedback is None where attention
        does not go through mlx-lm's scaled_dot_product_attention; the values' where the way from attention to the
        hidden state is not understood (feedback.Output), or where several layers read one cache.  With D = 32 there is
        nothing to feed back.

    Raises:
        ValueError: no tokens, a model without KVCache slots, or keys that are not (B, H_kv, N, D).
    """
    tokens = mx.array(tokens)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.size == 0:
        raise ValueError("[calibrate] there are no tokens to calibrate with")
    made = {}

    def make(path):
        made[path] = _Summing()
        return made[path]

    def watch(queries, cache):
        if isinstance(cache, _Summing) and cache.sums is not None:
            cache.watch(queries)

    original = own_caches(model)
    caches = replace_kv_caches(original, make)
    if not made:
        kinds = sorted({type(c).__name__ for _, c in leaves(original)})
        raise ValueError(f"[calibrate] the model has no KVCache slot, so there is nothing to centre; it has {kinds}")
    outputs = _outputs(model, caches, made) if feedback else {}
    with contextlib.ExitStack() as stack:
        if feedback:
            stack.enter_context(watch_queries(watch))
            reach_own_code(model)
        for output in outputs.values():
            stack.enter_context(output)
        for start in range(0, tokens.shape[1], step):
            mx.eval(model(tokens[:, start : start + step], cache=caches), [c.state for c in caches])
    found = Calibrations()
    found.weights = frozenset(weight_names(model)) if sharding.of(model).group is None else frozenset()
    for path, cache in made.items():
        if cache.sums is None:
            continue  # a slot that this model shares with another layer
        mean = [(x / tokens.size).astype(np.float32) for x in cache.sums]
        if not all(np.isfinite(x).all() for x in mean):
            raise ValueError(f"[calibrate] keys or values of slot {path[0]} are not finite")
        keys = values = None
        if cache.readers:
            keys = fed.of_metrics(cache.queries / cache.asked, seed)
        if path in outputs and cache.readers == cache.updates:
            values = fed.of_metrics(outputs[path].metrics(*mean[1].shape, tokens.size), seed)
        found[slot_name(path)] = Calibration(*map(mx.array, mean), keys, values, seed)
    return found


def _outputs(model, caches, made):
    """{path: Output} of the slots whose attention module is that of the layer with the same number."""
    if len(caches) != len(model.layers):
        return {}
    layers = {path: model.layers[path[0]] for path in made if len(path) == 1}
    return {path: fed.Output(layer.self_attn) for path, layer in layers.items() if "self_attn" in layer}
