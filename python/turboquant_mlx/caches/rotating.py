"""Packed caches of a sliding window.  The logic is C++ (turboquant/mlx/rotating_kv_cache.h)."""

from __future__ import annotations

import copy
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from .. import _core
from .arguments import Settings, as_list, coding, padding, spelled_out, whole
from .kv_cache import PackedBatch
from .packed import PackedCache

if TYPE_CHECKING:
    from typing_extensions import Unpack

NO_COPIES: Settings = {"recent": 0, "sink": 0}  # windows have no exact copies
drafting = ContextVar("drafting", default=False)  # while this thread decodes speculatively (drafts.py)


class PackedWindow(PackedCache):
    """What packed sliding windows share."""

    @property
    def max_size(self) -> int:
        """Tokens held of a row at most."""
        return self._core.max_size

    def size(self) -> int:
        """Tokens that the window holds now."""
        return self._core.size

    def is_trimmable(self) -> bool:
        """Whether the latest tokens can be taken back: only until the window has moved on."""
        return self._core.can_trim


class TurboQuantRotatingKVCache(PackedWindow):
    """A `RotatingKVCache` of codes: the first `keep` tokens and the latest max_size - keep.

    Args:
        max_size (int): tokens held, at least 1.
        keep (int): first tokens that are never dropped, less than max_size.
        bits and the rest: as for TurboQuantKVCache.
    """

    @spelled_out
    def __init__(self, max_size: int, keep: int = 0, bits: int = 3, **settings: Unpack[Settings]) -> None:
        owner = type(self).__name__
        sizes = whole(owner, "max_size", max_size, 1), whole(owner, "keep", keep)
        self._core = _core.RotatingKVCache(*sizes, coding(owner, bits, **NO_COPIES | settings))
        self._last_kernel = _core.LastKernel()

    _before: tuple[Any, ...] = ()  # while drafting: this cache before each of the latest appends of a full window

    def is_trimmable(self) -> bool:
        """Whether the latest tokens can be taken back: only until the window has moved on, or while drafts are checked."""
        return super().is_trimmable() or drafting.get()

    def _update(self, keys: mx.array, values: mx.array) -> _core.View:
        tokens = keys.shape[2] if keys.ndim == 4 else 0
        if drafting.get() and tokens in (1, 2) and self.offset + tokens >= self.max_size:
            self._before = (*self._before, copy.deepcopy(self._core))  # a single token overwrites the oldest
        return super()._update(keys, values)

    def trim(self, n: int) -> int:
        """Drops the latest `n` tokens, or all there are, and returns how many that were: none once the window has moved
        on, and while drafts are checked those of the latest round."""
        before, self._before = self._before, ()
        if not self.is_trimmable():
            return 0
        if n > 0 and not self._core.can_trim:
            to = self.offset - n
            for core in before:
                if core.offset == to or (core.offset > to and core.can_trim):
                    core.trim(core.offset - to)
                    self._core = core
                    return n
        return super().trim(n)

    @property
    def keep(self) -> int:
        """First tokens that are never dropped."""
        return self._core.keep

    @classmethod
    def merge(cls, caches: list[TurboQuantRotatingKVCache]) -> BatchTurboQuantRotatingKVCache:
        """A BatchTurboQuantRotatingKVCache of these sequences; ValueError with keep > 0, which batches do not have."""
        return BatchTurboQuantRotatingKVCache._merged(_core.BatchRotatingKVCache, caches)

    def to_float(self, dtype: mx.Dtype = mx.float16) -> RotatingKVCache:
        """A `RotatingKVCache` with the decoded window in `dtype`."""
        cache = RotatingKVCache(self.max_size, self.keep)
        if not self.empty():
            cache.keys, cache.values = self._core.view().decode(dtype)
            cache.offset, cache._idx = self.offset, self._core.index
        return cache

    def _position(self) -> Any:
        return {
            "max_size": self.max_size,
            "keep": self.keep,
            "offset": self.offset,
            "index": self._core.index,
        }

    def _restore(self, coding: _core.CacheCoding, position: Any, arrays: Any) -> Any:
        core = _core.RotatingKVCache(position["max_size"], position["keep"], coding)
        if arrays:
            core.restore(arrays, position["offset"], position["index"])
        self._core = core


class BatchTurboQuantRotatingKVCache(PackedWindow, PackedBatch):
    """A `BatchRotatingKVCache` of codes.

    Args:
        max_size (int): tokens held of each row.
        left_padding: as for BatchTurboQuantKVCache.
        bits and the rest: as for TurboQuantKVCache.
    """

    @spelled_out
    def __init__(
        self, max_size: int, left_padding: list[int] | mx.array, bits: int = 3, **settings: Unpack[Settings]
    ) -> None:
        owner = type(self).__name__
        sizes = whole(owner, "max_size", max_size, 1), padding(owner, left_padding)
        self._core = _core.BatchRotatingKVCache(*sizes, coding(owner, bits, **NO_COPIES | settings))
        self._last_kernel = _core.LastKernel()

    merge = TurboQuantRotatingKVCache.merge
    _row = TurboQuantRotatingKVCache

    def prepare(self, *, left_padding: Any = None, lengths: Any = None, right_padding: Any = None) -> None:
        """Before a padded prompt is appended.

        Args:
            left_padding: pads in front of each row, only while the batch is empty.
            lengths: real tokens of each row of the prompt, needed with right_padding.
            right_padding: pads after each row; `finalize` moves them to the front.

        Raises:
            ValueError: numbers below 0, or not one a row; left padding when tokens are held.
        """
        self._core.prepare(as_list(left_padding), as_list(lengths), as_list(right_padding))

    def _position(self) -> Any:
        return {"max_size": self.max_size, **self._core.position}

    def _restore(self, coding: _core.CacheCoding, position: Any, arrays: Any) -> Any:
        position = dict(position)
        max_size, padding = position.pop("max_size"), position["left_padding"]
        # Padding counts down as the window moves on, below zero at last; a fresh batch takes none of that.
        core = _core.BatchRotatingKVCache(max_size, [0] * len(padding) if arrays else padding, coding)
        if arrays:
            core.restore(arrays, **position)
        self._core = core
