"""The packed cache of one attention layer, in mlx-lm's cache protocol.  The logic is C++ (primitives/cache.h)."""

import mlx.core as mx
from mlx_lm.models.cache import KVCache, _BaseCache, create_attention_mask

from . import _core


class TurboQuantKVCache(_BaseCache):
    """A `KVCache` whose keys and values live as codes.

    Keys are coded as they come (after RoPE), each once; attention reads the codes, so no float history exists.
    TQ3 takes 98 bytes per vector of 256 numbers, TQ4 130, TQ2 66 (float16: 512).

    Args:
        bits (int): 2, 3 or 4, for keys and values.
        key_bits, value_bits (int): instead of `bits`, each side's own width.
        seed (int): of the random signs.
        centres: a pair (keys, values) of (H_kv, D) arrays, taken from every vector before coding; see calibration.

    Raises:
        ValueError: a width out of range; from `update_and_fetch`, a wrong dtype, rank or head_dim, or a batch that
            changes size.  A failed call leaves the cache as it was.
    """

    step = 256
    group_size = None  # mlx-lm passes it on to the attention hook, which has no use for it

    def __init__(self, bits=3, *, key_bits=None, value_bits=None, seed=0, centres=None):
        key_centre, value_centre = centres or (None, None)
        self.key_bits = bits if key_bits is None else key_bits
        self.value_bits = bits if value_bits is None else value_bits
        self.seed = seed
        self.centres = centres
        self._core = _core.KVCache(self.key_bits, self.value_bits, seed, key_centre, value_centre)
        self._query = None  # (query_len, head_dim) of the last append

    @property
    def bits(self):
        """Width of the keys; its presence makes mlx-lm send attention to the hook that apply_patch() installs."""
        return self.key_bits

    @property
    def offset(self):
        """Tokens held."""
        return self._core.offset

    @property
    def nbytes(self):
        """Resident bytes of codes and scales, the spare room of the buffers included."""
        return self._core.nbytes

    @property
    def route(self):
        """Which kernel attention used last, as words; None before it ran."""
        return self._query and _core.attention_route(*self._query, mx.default_device())

    def update_and_fetch(self, keys, values):
        """Appends (B, H_kv, N, D) keys and values; returns the packed history twice, as keys and as values."""
        self._core.append(keys, values)
        self._query = keys.shape[2:]
        view = self._core.view()
        return view, view

    def make_mask(self, *args, **kwargs):
        return create_attention_mask(*args, offset=self.offset, **kwargs)

    def size(self):
        return self.offset

    def empty(self):
        return self._core.empty

    def is_trimmable(self):
        return True

    def trim(self, n):
        return self._core.trim(n)

    def to_float(self, dtype=mx.float16):
        """A `KVCache` with the decoded history: materialises all of it."""
        cache = KVCache()
        if not self.empty():
            cache.keys, cache.values = self._core.view().decode(dtype)
            cache.offset = self.offset
        return cache

    def inspect(self):
        """What the cache holds, for people: bits, tokens, resident bytes, what float16 would take, last kernel."""
        shape = None if self.empty() else self._core.view().shape
        return {
            "kind": type(self).__name__,
            "key_bits": self.key_bits,
            "value_bits": self.value_bits,
            "tokens": self.offset,
            "resident_bytes": self.nbytes,
            "float16_bytes": 0 if shape is None else 2 * 2 * shape[0] * shape[1] * shape[2] * shape[3],
            "kernel": self.route,
        }


CACHE_CLASSES = (TurboQuantKVCache,)
