"""Packed caches inside mlx-vlm, which has attention functions and caches of its own.

Its `scaled_dot_product_attention` dispatches as mlx-lm's does, so that the same two functions are replaced, in
`mlx_vlm.models.base` and where they were imported by name.  `make_prompt_cache` is replaced for `max_kv_size`, which
mlx-vlm ignores where a model has a `make_cache`; `generate_step` and `maybe_quantize_kv_cache` refuse what packed
caches cannot do, before the first token; and the loop over tokens of Qwen3-Next's recurrence is replaced by chunks where
`chunked_recurrence` asks for it (Qwen3.5's reads chunks by itself).

Importing this module needs mlx-vlm and loads what models need of it; hosts.py does so only for models of mlx-vlm."""

import contextlib
import functools

import mlx.nn as nn
from mlx_vlm.generate import ar, common
from mlx_vlm.models import base, cache, gated_delta

from ..caches import PackedCache, leaves
from ..caches.slots import DEFAULT_KINDS, REPLACED
from . import patch
from .gated_delta import chunked_gated_delta
from .vlm_caches import VlmTurboQuantKVCache, VlmTurboQuantRotatingKVCache

REPLACED[cache.KVCache] = VlmTurboQuantKVCache
REPLACED[cache.RotatingKVCache] = VlmTurboQuantRotatingKVCache
DEFAULT_KINDS["mlx_vlm"] = cache.KVCache, cache.RotatingKVCache

_POSITIONS = ("_position_ids", "_rope_deltas")  # what multimodal models remember of their last prompt
_outer = base.scaled_dot_product_attention
_quantized = base.quantized_scaled_dot_product_attention
_make_prompt_cache = cache.make_prompt_cache
_maybe_quantize = common.maybe_quantize_kv_cache
_generate_step = ar.generate_step
_recurrence = gated_delta.gated_delta_ops


def owns(model):
    """Whether mlx-vlm runs this model: it is one of its classes, or makes caches of its classes."""
    if any(cls.__module__.startswith("mlx_vlm.") for cls in type(model).__mro__):
        return True
    inner = getattr(model, "language_model", model)
    make = getattr(type(inner), "make_cache", None)
    return make is not None and any(type(c).__module__.startswith("mlx_vlm.") for _, c in leaves(make(inner)))


def language_model(model):
    """The module that mlx-vlm takes the caches of."""
    inner = getattr(model, "language_model", None)
    return inner if isinstance(inner, nn.Module) and owns(model) else model


def named_both_ways(model):
    """The language model, and a module that holds it as `language_model`."""
    inner, outer = language_model(model), nn.Module()
    outer.language_model = inner
    return [inner, outer]


@contextlib.contextmanager
def positions_kept(model):
    """Context: calls of the model leave the positions of its last prompt as they are."""
    kept = {name: getattr(model, name) for name in _POSITIONS if hasattr(model, name)}
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(model, name, value)


@functools.wraps(_maybe_quantize)
def _no_second_quantization(prompt_cache, quantized_kv_start, kv_group_size, kv_bits, *rest, **named):
    patch.refuse_kv_bits(prompt_cache, kv_bits)
    return _maybe_quantize(prompt_cache, quantized_kv_start, kv_group_size, kv_bits, *rest, **named)


@functools.wraps(_generate_step)
def _checked_step(input_ids, model, *rest, **named):
    caches = named.get("prompt_cache")
    if caches is None:
        caches = named["prompt_cache"] = cache.make_prompt_cache(model.language_model, named.get("max_kv_size"))
    if any(isinstance(c, PackedCache) for _, c in leaves(caches)):
        patch.refuse_kv_bits(caches, named.get("kv_bits"))
        if named.get("draft_model") is not None:
            raise ValueError(
                "[generate_step] a draft model of mlx-vlm cuts the history to check its drafts, which packed caches do "
                "not allow: leave draft_model out, or disable(model)"
            )
    return _generate_step(input_ids, model, *rest, **named)


def _chunked_recurrence(q, k, v, g, beta, state=None, mask=None, state_steps=None):
    """One token at a time, decays per coordinate and states that are asked for one by one stay with the loop."""
    if q.shape[1] == 1 or g.ndim != 3 or state_steps is not None:
        return _recurrence(q, k, v, g, beta, state, mask, state_steps)
    return chunked_gated_delta(q, k, v, g, beta, state, mask)


def enable_chunked_recurrence():
    """Makes mlx-vlm read prompts 64 tokens a step wherever it would loop over tokens, for every model of the process."""
    gated_delta.gated_delta_ops = _chunked_recurrence


def disable_chunked_recurrence():
    """Brings mlx-vlm's loop back."""
    gated_delta.gated_delta_ops = _recurrence


_NAMES = {  # name: (mlx-vlm's, ours)
    "scaled_dot_product_attention": (_outer, patch.attention_over(_outer)),
    "quantized_scaled_dot_product_attention": (_quantized, patch.quantized_attention_over(_quantized)),
    "make_prompt_cache": (_make_prompt_cache, patch.prompt_cache_maker_over(_make_prompt_cache)),
    "maybe_quantize_kv_cache": (_maybe_quantize, _no_second_quantization),
    "generate_step": (_generate_step, _checked_step),
}


def apply_patch():
    """Makes mlx-vlm's attention read packed caches.  Idempotent; before or after loading a model."""
    for name, (original, ours) in _NAMES.items():
        patch._rebind(name, original, ours)


def remove_patch():
    """Undoes apply_patch()."""
    for name, (original, ours) in _NAMES.items():
        patch._rebind(name, ours, original)


patch.undo_also.append(remove_patch)
