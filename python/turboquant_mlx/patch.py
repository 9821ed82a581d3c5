"""Putting packed caches into models of mlx-lm, and attention over them into mlx-lm itself.

mlx-lm's `scaled_dot_product_attention` hands every cache that has `.bits` to
`mlx_lm.models.base.quantized_scaled_dot_product_attention`, looked up when called; replacing that one global reaches
models imported before and after.
"""

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache

from . import _core
from .cache import TurboQuantKVCache

_original = base.quantized_scaled_dot_product_attention


def _attention(queries, q_keys, q_values, scale, mask, group_size=64, bits=8):
    """mlx-lm's quantised attention, with packed histories sent to their own kernel."""
    if not isinstance(q_keys, _core.View):
        return _original(queries, q_keys, q_values, scale=scale, mask=mask, group_size=group_size, bits=bits)
    return q_keys.attend(queries, scale, mask)


def apply_patch():
    """Makes mlx-lm's attention read packed caches.  Idempotent; before or after loading a model."""
    base.quantized_scaled_dot_product_attention = _attention
    mlx_lm_cache.TurboQuantKVCache = TurboQuantKVCache  # load_prompt_cache looks classes up there


def remove_patch():
    """Undoes apply_patch()."""
    base.quantized_scaled_dot_product_attention = _original
    if getattr(mlx_lm_cache, "TurboQuantKVCache", None) is TurboQuantKVCache:
        del mlx_lm_cache.TurboQuantKVCache
