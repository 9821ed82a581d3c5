"""Packed caches of a sliding window.  The logic is C++ (primitives/rotating.h)."""

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from . import _core
from .batch import as_list
from .cache import PackedCache, coding


class TurboQuantRotatingKVCache(PackedCache):
    """A `RotatingKVCache` of codes: the first `keep` tokens and the latest max_size - keep.

    Args:
        max_size (int): tokens held, at least 1.
        keep (int): first tokens that are never dropped, less than max_size.
        bits and the rest: as for TurboQuantKVCache.
    """

    step = 256

    def __init__(self, max_size, keep=0, bits=3, **settings):
        self._core = _core.RotatingKVCache(max_size, keep, *coding(bits, **settings))
        self._query = None

    @property
    def max_size(self):
        return self._core.max_size

    @property
    def keep(self):
        return self._core.keep

    def size(self):
        return self._core.size

    def is_trimmable(self):
        return self._core.can_trim

    @classmethod
    def merge(cls, caches):
        """A BatchTurboQuantRotatingKVCache of these sequences; ValueError with keep > 0, which batches do not have."""
        strange = {type(c).__name__ for c in caches if not isinstance(c, TurboQuantRotatingKVCache)}
        if strange:
            raise ValueError(f"[merge] a packed window is made of TurboQuantRotatingKVCache; got {sorted(strange)}")
        core = _core.BatchRotatingKVCache.merge([c._core for c in caches])
        return BatchTurboQuantRotatingKVCache._wrap(core, caches[0].fingerprint)

    def to_float(self, dtype=mx.float16):
        """A `RotatingKVCache` with the decoded window."""
        cache = RotatingKVCache(self.max_size, self.keep)
        if not self.empty():
            cache.keys, cache.values = self._core.view().decode(dtype)
            cache.offset, cache._idx = self.offset, self._core.index
        return cache

    def _position(self):
        return {
            "max_size": self.max_size,
            "keep": self.keep,
            "offset": self.offset,
            "index": self._core.index,
        }

    def _restore(self, coding, position, arrays):
        core = _core.RotatingKVCache(position["max_size"], position["keep"], *coding)
        if arrays:
            core.restore(arrays, position["offset"], position["index"])
        self._core = core


class BatchTurboQuantRotatingKVCache(PackedCache):
    """A `BatchRotatingKVCache` of codes.

    Args:
        max_size (int): tokens held of each row.
        left_padding: as for BatchTurboQuantKVCache.
        bits and the rest: as for TurboQuantKVCache.
    """

    step = 256

    def __init__(self, max_size, left_padding, bits=3, **settings):
        self._core = _core.BatchRotatingKVCache(max_size, as_list(left_padding), *coding(bits, **settings))
        self._query = None

    merge = TurboQuantRotatingKVCache.merge

    @property
    def max_size(self):
        return self._core.max_size

    @property
    def left_padding(self):
        return self._core.left_padding

    def size(self):
        return self._core.size

    def is_trimmable(self):
        return self._core.can_trim

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None):
        self._core.prepare(as_list(left_padding), as_list(lengths), as_list(right_padding))

    def finalize(self):
        self._core.finalize()

    def filter(self, batch_indices):
        self._core.filter(as_list(batch_indices))

    def extend(self, other):
        self._core.extend(other._core)

    def extract(self, idx):
        """Row `idx` as a TurboQuantRotatingKVCache."""
        return TurboQuantRotatingKVCache._wrap(self._core.extract(idx), self.fingerprint)

    def _position(self):
        return {"max_size": self.max_size, **self._core.position}

    def _restore(self, coding, position, arrays):
        position = dict(position)
        max_size, padding = position.pop("max_size"), position["left_padding"]
        # Padding counts down as the window moves on, below zero at last; a fresh batch takes none of that.
        core = _core.BatchRotatingKVCache(max_size, [0] * len(padding) if arrays else padding, *coding)
        if arrays:
            core.restore(arrays, **position)
        self._core = core
