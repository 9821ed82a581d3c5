"""The packed cache of a batch of sequences.  The logic is C++ (primitives/batch.h)."""

from . import _core
from .cache import PackedCache, TurboQuantKVCache, coding


def as_list(numbers):
    """Padding, lengths and rows come as lists, tuples or arrays."""
    if numbers is None:
        return []
    return numbers.tolist() if hasattr(numbers, "tolist") else list(numbers)


class BatchTurboQuantKVCache(PackedCache):
    """A `BatchKVCache` of codes: rows of different lengths, right-justified; attention reads the packed batch and skips
    each row's padding by itself, so masks are None or "causal" unless an array is asked for.

    Args:
        left_padding: pads in front of each row's first tokens; its length is the batch size.
        bits and the rest: as for TurboQuantKVCache.
    """

    step = 256

    def __init__(self, left_padding, bits=3, **settings):
        self._core = _core.BatchKVCache(as_list(left_padding), *coding(bits, **settings))
        self._query = None

    @classmethod
    def merge(cls, caches):
        """The batch of these TurboQuantKVCaches; ValueError when their bits, seeds, centres or shapes differ."""
        strange = {type(c).__name__ for c in caches if not isinstance(c, TurboQuantKVCache)}
        if strange:
            raise ValueError(f"[merge] a packed batch is made of TurboQuantKVCache; got {sorted(strange)}")
        return cls._wrap(_core.BatchKVCache.merge([c._core for c in caches]), caches[0].fingerprint)

    @property
    def left_padding(self):
        """(B,) pads in front of each row."""
        return self._core.left_padding

    def size(self):
        return self._core.length

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None):
        self._core.prepare(as_list(left_padding), as_list(right_padding))

    def finalize(self):
        self._core.finalize()

    def filter(self, batch_indices):
        self._core.filter(as_list(batch_indices))

    def extend(self, other):
        self._core.extend(other._core)

    def extract(self, idx):
        """Row `idx` as a TurboQuantKVCache."""
        return TurboQuantKVCache._wrap(self._core.extract(idx), self.fingerprint)

    def _position(self):
        return {"length": self.size(), "left_padding": self.left_padding.tolist()}

    def _restore(self, coding, position, arrays):
        core = _core.BatchKVCache(position["left_padding"], *coding)
        if arrays:
            core.restore(arrays, **position)
        self._core = core
