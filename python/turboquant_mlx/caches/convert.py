"""From float caches to packed ones: a filled cache at once, or a cache that packs itself at a given length."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache

from .. import _core
from .arguments import Settings, spelled_out, whole, window_coding
from .kv_cache import TurboQuantKVCache
from .packed import PackedCache
from .rotating import TurboQuantRotatingKVCache

if TYPE_CHECKING:
    from typing_extensions import Unpack


@spelled_out
def to_turboquant(
    cache: KVCache | RotatingKVCache, bits: int = 3, **settings: Unpack[Settings]
) -> TurboQuantKVCache | TurboQuantRotatingKVCache:
    """The packed copy of a filled float cache, which stays as it is; `to_float()` of the result goes back.

    Args:
        cache: mlx-lm's KVCache or RotatingKVCache.
        bits and the rest: as for TurboQuantKVCache; a window has no copies: with `recent` one of at most 1,024 tokens is
            held at 8 bits instead.

    Raises:
        ValueError: another kind of cache, or vectors that cannot be packed.
    """
    if type(cache) not in (KVCache, RotatingKVCache):
        raise ValueError(f"[to_turboquant] cache must be a KVCache or a RotatingKVCache; got {type(cache).__name__}")
    if isinstance(cache, RotatingKVCache):
        settings = window_coding("to_turboquant", cache.max_size, settings)
    packed = TurboQuantKVCache(bits, **settings)
    if not cache.empty() and cache.offset > 0:
        packed.update_and_fetch(*cache.keys_and_values())
    if not isinstance(cache, RotatingKVCache):
        return packed
    window = TurboQuantRotatingKVCache(cache.max_size, cache.keep, bits, **settings)
    if not packed.empty():
        window._core.restore(packed._core.view().arrays, cache.offset, cache._idx)
    return window


class DelayedTurboQuantKVCache(TurboQuantKVCache):
    """A cache that holds plain floats until it has more than `start` tokens, and codes from then on.

    It has no `merge`, as a batch would mix rows before and after: mlx-lm then serves requests one at a time.

    Args:
        start (int): tokens held as floats at most, at least 0.
        bits and the rest: as for TurboQuantKVCache.
    """

    @spelled_out
    def __init__(self, start: int, bits: int = 3, **settings: Unpack[Settings]) -> None:
        self.start = whole(type(self).__name__, "start", start)
        self._floats: Any = KVCache()  # None once packed
        super().__init__(bits, **settings)

    @property
    def merge(self) -> Any:
        raise AttributeError("[merge] a cache that is packed later cannot be batched")

    @property
    def packed(self) -> bool:
        """Whether the cache holds codes by now."""
        return self._floats is None

    def __copy__(self) -> DelayedTurboQuantKVCache:
        other = super().__copy__()
        other._floats = copy.deepcopy(self._floats)  # mlx-lm's cache writes into its arrays
        return other

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """As for TurboQuantKVCache; returns arrays (B, H_kv, tokens, D) until the cache packs itself."""
        return super().update_and_fetch(keys, values)

    def _update(self, keys: mx.array, values: mx.array) -> Any:
        if self.packed:
            return super()._update(keys, values)
        if self._floats.offset + keys.shape[2] <= self.start:
            return self._floats.update_and_fetch(keys, values)
        if self._floats.offset:
            self._core.append(*self._floats.keys_and_values())
        self._floats = None
        return super()._update(keys, values)

    @property
    def keys(self) -> mx.array | None:
        """As for TurboQuantKVCache; the keys themselves while the cache holds floats."""
        return super().keys if self.packed else self._floats.keys

    @keys.setter
    def keys(self, array: Any) -> None:
        if self.packed:
            PackedCache.keys.fset(self, array)  # type: ignore[attr-defined]
        else:
            self._floats.keys = array

    def keys_and_values(self) -> tuple[Any, Any]:
        """What update_and_fetch returned last."""
        return super().keys_and_values() if self.packed else self._floats.keys_and_values()

    @property
    def offset(self) -> int:
        """Tokens held."""
        return self._core.offset if self.packed else self._floats.offset

    @property
    def nbytes(self) -> int:
        """Resident bytes of the floats or of the codes, the spare room of the buffers included."""
        return self._core.nbytes if self.packed else self._floats.nbytes

    def empty(self) -> bool:
        """Whether nothing was appended yet."""
        return self._core.empty if self.packed else self._floats.empty()

    def trim(self, n: int) -> int:
        """Drops the latest `n` tokens, or all there are; returns how many that were.  Codes stay codes."""
        return self._core.trim(n) if self.packed else self._floats.trim(n)

    def to_float(self, dtype: mx.Dtype = mx.float16) -> KVCache:
        """A `KVCache` with the history: decoded to `dtype`, or a copy of the floats in their own dtype."""
        return super().to_float(dtype) if self.packed else copy.deepcopy(self._floats)

    def inspect(self) -> dict[str, Any]:
        """As for TurboQuantKVCache; while the cache holds floats, the bits are theirs (None of an empty cache)."""
        note = super().inspect()
        if self.packed:
            return note
        key_bits, value_bits = (None if x is None else 8 * x.itemsize for x in (self._floats.keys, self._floats.values))
        return note | {"key_bits": key_bits, "value_bits": value_bits, "kernel": "mlx (not packed yet)"}

    def _shape(self) -> Any:
        if self.packed:
            return super()._shape()
        keys, values = self._floats.keys_and_values()
        return (*keys.shape[:3], keys.shape[3] + values.shape[3])

    def _arrays(self) -> list[Any]:
        if self.packed or self.empty():
            return super()._arrays()
        return [*self._floats.keys_and_values(), None, None]

    def _position(self) -> Any:
        return {"start": self.start, "packed": self.packed, "offset": self.offset}

    def _restore(self, coding: _core.CacheCoding, position: Any, arrays: Any, copies: Any = None) -> Any:
        packed, start, offset = position["packed"], position["start"], position["offset"]
        held = arrays[0].shape[2] if arrays else 0
        if not isinstance(packed, bool) or (not packed and offset != held):
            raise ValueError(f"[load] a cache of {held} tokens cannot stand at {position}")
        floats: Any = None if packed else KVCache()
        if arrays and not packed:
            (floats.keys, floats.values), floats.offset = arrays[:2], offset
        super()._restore(coding, position, arrays if packed else None, copies)
        self.start, self._floats = start, floats
