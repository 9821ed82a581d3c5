"""Packed caches in mlx-lm's cache protocol.  Nothing here replaces a name of another program (see overlay)."""

from . import older as older
from .checkpoints import CheckpointedArraysCache
from .convert import DelayedTurboQuantKVCache, to_turboquant
from .kv_cache import BatchTurboQuantKVCache, PackedBatch, TurboQuantKVCache
from .latent import BatchTurboQuantLatentKVCache, TurboQuantLatentKVCache
from .packed import PackedCache, layer_name, leaves
from .rotating import BatchTurboQuantRotatingKVCache, TurboQuantRotatingKVCache

__all__ = [
    "BatchTurboQuantKVCache",
    "BatchTurboQuantLatentKVCache",
    "BatchTurboQuantRotatingKVCache",
    "CheckpointedArraysCache",
    "DelayedTurboQuantKVCache",
    "PackedBatch",
    "PackedCache",
    "TurboQuantKVCache",
    "TurboQuantLatentKVCache",
    "TurboQuantRotatingKVCache",
    "layer_name",
    "leaves",
    "to_turboquant",
]
