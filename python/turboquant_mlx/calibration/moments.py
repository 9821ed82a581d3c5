"""What a text tells about each cache slot: means and second moments of keys, values and queries."""

import contextlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ..caches.slots import leaves, own_caches, replace_slots
from ..overlay.patch import reach_own_code, watch_queries
from ..overlay.products import fast_products
from . import feedback as fed

SINKS = 4  # first tokens of a window that are not counted: attention's sinks, whose keys are like no others


class Moments:
    """Sums over the tokens that one slot was given, in float64, and over the queries that its keys were asked."""

    def __init__(self):
        self.tokens, self.updates = 0, 0  # tokens and calls
        self.key_sum = self.value_sum = self.keys = 0  # (H_kv, D) twice, (H_kv, D, D)
        self.asked, self.readers, self.queries = 0, 0, 0  # queries and calls, (H_kv, D, D)

    def add(self, keys, values):
        """Keys and values (B, H_kv, N, D)."""
        self.key_sum = self.key_sum + _sum(keys)
        self.value_sum = self.value_sum + _sum(values)
        self.keys = self.keys + fed.second_moment(keys, keys.shape[1])
        self.tokens += keys.shape[0] * keys.shape[2]
        self.updates += 1

    def watch(self, queries):
        """Queries (B, H_q, L, D) of the layers that read the slot; what does not fit its heads is left out."""
        heads, dim = self.key_sum.shape
        if queries.shape[1] % heads or queries.shape[-1] != dim:
            return
        self.queries = self.queries + fed.second_moment(queries, heads)
        self.asked += queries.size // (heads * dim)
        self.readers += 1


def _sum(x):
    return np.array(x.astype(mx.float32)).sum((0, 2), dtype=np.float64)


class _Watched:
    """A cache that tells Moments what it is given."""

    def __init__(self, moments, *size):
        super().__init__(*size)
        self.moments = moments

    def update_and_fetch(self, keys, values):
        first = max(0, SINKS - self.offset)
        if keys.shape[2] > first:
            self.moments.add(keys[:, :, first:], values[:, :, first:])
        return super().update_and_fetch(keys, values)

    def watch(self, queries):
        first = max(0, SINKS - (self.offset - queries.shape[2]))
        if queries.shape[2] > first and self.moments.tokens:
            self.moments.watch(queries[:, :, first:])


class _WatchedCache(_Watched, KVCache):
    pass


class _WatchedWindow(_Watched, RotatingKVCache):
    pass


@contextlib.contextmanager
def without_head(model):
    """Context: the model returns hidden states where it would compute logits, which nobody needs here."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    heads = [(m, m.lm_head) for m in model.modules() if "lm_head" in m]
    for embedding in embeddings:
        embedding.as_linear = lambda x: x
    for module, _ in heads:
        module.lm_head = nn.Identity()
    try:
        yield
    finally:
        for embedding in embeddings:
            del embedding.as_linear
        for module, head in heads:
            module.lm_head = head


def gather(model, windows, *, step, feedback, progress=lambda tokens: None):
    """Reads windows (W, N) of tokens one after the other and returns {path: Moments}, {path: feedback.Output}.

    Nothing outlives a window but the sums."""

    found = {}

    def make(path, c):
        if type(c) is KVCache:
            return _WatchedCache(found.setdefault(path, Moments()))
        if type(c) is RotatingKVCache:
            return _WatchedWindow(found.setdefault(path, Moments()), c.max_size, c.keep)
        return None

    def watch(queries, cache):
        if isinstance(cache, _Watched):
            cache.watch(queries)

    original = own_caches(model)
    replace_slots(original, make)
    if not found:
        kinds = sorted({type(c).__name__ for _, c in leaves(original)})
        raise ValueError(f"[calibrate] the model has no KVCache slot, so there is nothing to centre; it has {kinds}")
    outputs = {}
    if feedback:
        outputs = {path: fed.Output(attention) for path, attention in attentions(model, found).items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_head(model))
        stack.enter_context(fast_products(model))
        if feedback:
            stack.enter_context(watch_queries(watch))
            reach_own_code(model)
        for output in outputs.values():
            stack.enter_context(output)
        for window in windows:
            caches = replace_slots(own_caches(model), make)
            for start in range(0, len(window), step):
                tokens = window[None, start : start + step]
                model(tokens, cache=caches)  # its output is dropped: only what the caches need is evaluated
                mx.eval([c.state for _, c in leaves(caches) if not c.empty()])
                progress(tokens.size)
    return found, outputs


def attentions(model, slots):
    """{path: attention module} of the slots whose layer has the same number, as far as that can be told."""

    if len(own_caches(model)) != len(model.layers):
        return {}
    layers = {path: model.layers[path[0]] for path in slots if len(path) == 1}
    return {path: layer.self_attn for path, layer in layers.items() if "self_attn" in layer}
