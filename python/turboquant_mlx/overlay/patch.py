"""Attention over packed caches inside mlx-lm.

mlx-lm's `scaled_dot_product_attention` hands every cache that has `.bits` to
`base.quantized_scaled_dot_product_attention`, looked up when called: replacing that one global reaches every model.  It
refuses attention sinks before it gets there, so the outer function is replaced too, in `base` and in the modules that
imported it by name.  `make_prompt_cache` is replaced likewise: with a `make_cache` on the model, mlx-lm would ignore
`max_kv_size` without a word; `maybe_quantize_kv_cache`, so that `kv_bits` is refused with the first tokens rather than
after 5,000; `save_prompt_cache` and `load_prompt_cache`, to check the slots beside packed ones;
`speculative_generate_step`, which windows and caches that pack later need to know of (drafts.py); and, so that a batch
of float and packed caches is refused by name, `merge` and `extend` of mlx-lm's caches.

A model with code of its own (`model_file`) lies in no module of sys.modules: `enable` and `calibrate` reach it through
the model (reach_own_code).
"""

import functools
import sys
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx
from mlx_lm.generate import maybe_quantize_kv_cache as _maybe_quantize
from mlx_lm.models import base, mla
from mlx_lm.models import cache as mlx_lm_cache

from .. import _core
from ..caches import (
    BatchTurboQuantKVCache,
    BatchTurboQuantLatentKVCache,
    BatchTurboQuantRotatingKVCache,
    CheckpointedArraysCache,
    DelayedTurboQuantKVCache,
    PackedCache,
    TurboQuantKVCache,
    TurboQuantLatentKVCache,
    TurboQuantRotatingKVCache,
    leaves,
)
from ..caches import latent as latent_caches
from ..caches.checkpoints import trim_prompt_cache
from ..caches.kv_cache import one_kind
from ..caches.maker import CacheMaker
from . import drafts, other_slots, prefixes

_OURS = __name__.partition(".")[0]  # the package, whose own modules keep mlx-lm's functions
CACHE_CLASSES = (
    TurboQuantKVCache,
    BatchTurboQuantKVCache,
    TurboQuantRotatingKVCache,
    BatchTurboQuantRotatingKVCache,
    DelayedTurboQuantKVCache,
    TurboQuantLatentKVCache,
    BatchTurboQuantLatentKVCache,
)
original_quantized_attention = base.quantized_scaled_dot_product_attention
_outer = base.scaled_dot_product_attention
_make_prompt_cache = mlx_lm_cache.make_prompt_cache
_seen = ContextVar("_seen", default=None)  # while this thread probes a model: ids of the histories attention read
_watch = ContextVar("_watch", default=None)  # while this thread calibrates: is given every query
_floats = ContextVar("_floats", default=None)  # while this thread measures: attention over float arrays


def _attend(view, queries, scale, mask, sinks=None):
    if (seen := _seen.get()) is not None:
        seen.add(id(view))
    return view.attend(queries, scale, mask, sinks)


def quantized_attention_over(original):
    """A `quantized_scaled_dot_product_attention` that reads packed caches, and leaves the rest to `original`."""

    def attention(queries, q_keys, q_values, scale, mask, group_size=64, bits=8):
        if isinstance(q_keys, _core.View):
            return _attend(q_keys, queries, scale, mask)
        if isinstance(q_keys, mx.array):  # a cache that has not begun to pack
            return mx.fast.scaled_dot_product_attention(queries, q_keys, q_values, scale=scale, mask=mask)
        return original(queries, q_keys, q_values, scale=scale, mask=mask, group_size=group_size, bits=bits)

    return attention


def attention_over(original):
    """A `scaled_dot_product_attention` that reads packed caches, and leaves the rest to `original`."""

    def attention(queries, keys, values, cache, scale, mask, sinks=None):
        if (watch := _watch.get()) is not None:
            watch(queries, cache)
        if isinstance(keys, _core.View):
            return _attend(keys, queries, scale, mask, sinks)
        if (found := latent_caches.attend(queries, keys, values, scale, mask, sinks)) is not None:
            out, handed = found
            if (seen := _seen.get()) is not None:
                seen.add(handed)
            return out
        if (floats := _floats.get()) is not None and isinstance(keys, mx.array):
            return floats(queries, keys, values, scale, mask, sinks)
        if sinks is not None and isinstance(cache, CACHE_CLASSES):
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        return original(queries, keys, values, cache, scale, mask, sinks)

    return attention


def prompt_cache_maker_over(original):
    """A `make_prompt_cache` whose packed caches heed `max_kv_size`, and that leaves other models to `original`."""

    def make_prompt_cache(model, max_kv_size=None):
        maker = vars(model).get("make_cache")
        if isinstance(maker, CacheMaker):
            maker = maker.of(model)
            return maker.sized(max_kv_size) if max_kv_size is not None and hasattr(maker, "sized") else maker()
        return original(model, max_kv_size)

    return make_prompt_cache


def refuse_kv_bits(caches, kv_bits):
    """ValueError where packed caches are to be quantised once more."""
    if kv_bits is not None:
        for _, c in leaves(caches):
            if isinstance(c, PackedCache):
                c.to_quantized()  # raises


def _patched_maybe_quantize(prompt_cache, quantized_kv_start, kv_group_size, kv_bits):
    refuse_kv_bits(prompt_cache, kv_bits)
    return _maybe_quantize(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)


_patched_quantized = quantized_attention_over(original_quantized_attention)
_patched_outer = attention_over(_outer)
_REPLACED = {  # name: (mlx-lm's, ours)
    "scaled_dot_product_attention": (_outer, _patched_outer),
    "make_prompt_cache": (_make_prompt_cache, prompt_cache_maker_over(_make_prompt_cache)),
    "maybe_quantize_kv_cache": (_maybe_quantize, _patched_maybe_quantize),
    "save_prompt_cache": (other_slots.save_original, other_slots.save_prompt_cache),
    "load_prompt_cache": (other_slots.load_original, other_slots.load_prompt_cache),
    "trim_prompt_cache": (mlx_lm_cache.trim_prompt_cache, trim_prompt_cache),
    "speculative_generate_step": (drafts.original, drafts.speculative_generate_step),
    "gated_delta_update": (drafts.original_gated_delta, drafts.gated_delta_update),
}
undo_also: list[Callable[[], None]] = []  # what remove_patch calls beside: vlm.py's
_own_code: list = []  # globals of models' own code that were changed, for remove_patch


def reach_own_code(model):
    """Replaces mlx-lm's functions where the code of this very model's classes has imported them."""
    for found in _globals_of(model):
        changed = False
        for old, new in _REPLACED.values():
            for name in [name for name, value in found.items() if value is old]:
                found[name], changed = new, True
        if changed and not any(known is found for known in _own_code):
            _own_code.append(found)


def _globals_of(model):
    """The globals of the functions of the classes of a model's modules."""
    seen = {}
    for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
        for value in vars(cls).values():
            function = getattr(value, "__func__", value)
            found = getattr(function, "__globals__", None)
            if found is not None and found.get("__name__", "").partition(".")[0] not in ("mlx", _OURS):
                seen[id(found)] = found
    return list(seen.values())


def _refusing(operation, original):
    """mlx-lm's `merge` or `extend`, which refuses packed caches by name."""
    if operation == "merge":

        @functools.wraps(original.__func__)
        def merge(cls, caches):
            if any(isinstance(c, PackedCache) for c in caches):
                raise ValueError(one_kind(operation, caches))
            return original.__func__(cls, caches)

        return classmethod(merge)

    @functools.wraps(original)
    def extend(self, other):
        if isinstance(other, PackedCache):
            raise ValueError(one_kind(operation, [self, other]))
        return original(self, other)

    return extend


_METHODS = {  # (class, name): (mlx-lm's, ours)
    (cls, name): (vars(cls)[name], _refusing(name, vars(cls)[name]))
    for cls in vars(mlx_lm_cache).values()
    if isinstance(cls, type) and cls.__module__ == mlx_lm_cache.__name__ and cls is not mlx_lm_cache.CacheList
    for name in ("merge", "extend")
    if name in vars(cls)
}

_METHODS |= {  # the prompt cache of mlx-lm's server
    (mlx_lm_cache.LRUPromptCache, name): (vars(mlx_lm_cache.LRUPromptCache)[name], ours)
    for name, ours in prefixes.METHODS.items()
}
_METHODS |= {  # what expands a latent history for its heads
    (cls, "__call__"): (vars(cls)["__call__"], latent_caches.expanded(vars(cls)["__call__"]))
    for cls in (mla.MultiLinear, mla.QuantizedMultiLinear)
}
_LOADABLE = (*CACHE_CLASSES, CheckpointedArraysCache)  # kinds that load_prompt_cache looks up by name


def _rebind(name, old, new):
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != _OURS and getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def apply_patch() -> None:
    """Makes mlx-lm's attention read packed caches.  Idempotent; before or after loading a model."""
    base.quantized_scaled_dot_product_attention = _patched_quantized
    for name, (original, ours) in _REPLACED.items():
        _rebind(name, original, ours)
    for (cls, name), (_, ours) in _METHODS.items():
        setattr(cls, name, ours)
    for cls in _LOADABLE:  # load_prompt_cache looks classes up there
        setattr(mlx_lm_cache, cls.__name__, cls)


def remove_patch() -> None:
    """Undoes apply_patch()."""
    base.quantized_scaled_dot_product_attention = original_quantized_attention
    for name, (original, ours) in _REPLACED.items():
        _rebind(name, ours, original)
    for undo in undo_also:
        undo()
    for (cls, name), (original, _) in _METHODS.items():
        setattr(cls, name, original)
    while _own_code:
        found = _own_code.pop()
        for old, new in _REPLACED.values():
            found.update({name: old for name, value in found.items() if value is new})
    for cls in _LOADABLE:
        if getattr(mlx_lm_cache, cls.__name__, None) is cls:
            delattr(mlx_lm_cache, cls.__name__)


@contextmanager
def _during(variable, value):
    """Context: the patch is applied and a variable of this thread is set."""
    applied = base.scaled_dot_product_attention is _patched_outer
    if not applied:  # applied already, the inner function may be somebody's own, as in a study
        apply_patch()
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
        if not applied:
            remove_patch()


def watch_queries(watch):
    """Context: calls watch(queries, cache) before each attention of this thread, as the model hands them over."""
    return _during(_watch, watch)


def float_attention(function):
    """Context: attention of this thread over float arrays is function(queries, keys, values, scale, mask, sinks)."""
    return _during(_floats, function)


class record_reads:
    """Context: collects the ids of the histories that attention reads while a model's graph is built."""

    def __enter__(self):
        seen = set()
        self._token = _seen.set(seen)
        return seen

    def __exit__(self, *_):
        _seen.reset(self._token)
