"""The packed cache of one attention layer, in mlx-lm's cache protocol.  The logic is C++ (primitives/cache.h)."""

import copy

import mlx.core as mx
from mlx_lm.models.cache import KVCache, _BaseCache, create_attention_mask

from . import _core
from .identity import CODEBOOK, Identity, read


def coding(bits=3, *, key_bits=None, value_bits=None, seed=0, centres=None):
    """The arguments that every cache takes, as the extension's; see TurboQuantKVCache."""
    key_centre, value_centre = centres or (None, None)
    return (
        bits if key_bits is None else key_bits,
        bits if value_bits is None else value_bits,
        seed,
        key_centre,
        value_centre,
    )


class PackedCache(_BaseCache):
    """What all packed caches share: a C++ cache in `_core`, and everything that only reads it."""

    group_size = None  # mlx-lm passes it on to the attention hook, which has no use for it
    fingerprint = ""  # of the model that fills the cache; enable() sets it

    @classmethod
    def _wrap(cls, core, fingerprint=""):
        self = cls.__new__(cls)
        self._core = core
        self._query = None  # (query_len, head_dim) of the last append
        self.fingerprint = fingerprint
        return self

    def __copy__(self):
        """A copy that shares no later write; the buffers are shared until one of the two writes."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._core = copy.deepcopy(self._core)
        return other

    def __deepcopy__(self, memo):
        return copy.copy(self)

    @property
    def bits(self):
        """Width of the keys; its presence makes mlx-lm send attention to the hook that apply_patch() installs."""
        return self._core.key_bits

    @property
    def key_bits(self):
        return self._core.key_bits

    @property
    def value_bits(self):
        return self._core.value_bits

    @property
    def seed(self):
        return self._core.seed

    @property
    def centres(self):
        """(keys, values) as given, or None."""
        pair = self._core.centres
        return None if pair == (None, None) else pair

    @property
    def offset(self):
        """Tokens seen: an int, or one number a row (B,) of a batch."""
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
        view, _ = self.keys_and_values()
        view.dtype = values.dtype
        return view, view

    def keys_and_values(self):
        """The packed history twice, for layers that read the cache of another."""
        view = self._core.view()
        return view, view

    def make_mask(self, N, return_array=False, window_size=None):
        return self._core.mask(N, window_size, return_array)

    def empty(self):
        return self._core.empty

    def is_trimmable(self):
        return True

    def trim(self, n):
        return self._core.trim(n)

    def to_quantized(self, *_, **__):
        """What mlx-lm calls when `kv_bits` is given; without it, mlx-lm would ignore that argument in silence."""
        raise ValueError(f"[to_quantized] {type(self).__name__} holds codes already; leave kv_bits out")

    def _arrays(self):
        """What is held, as four arrays, without spare room."""
        return [None] * 4 if self.empty() else self._core.view().arrays

    def _position(self):
        """What `_restore` needs besides the arrays, as JSON values."""
        raise NotImplementedError

    def _restore(self, coding, position, arrays):
        """Sets `_core` once all else went well; `arrays` are four, or None when nothing was appended."""
        raise NotImplementedError

    @property
    def state(self):
        """Codes and scales of keys and values, the centres, and the Identity: all that from_state needs."""
        arrays = (*self._arrays(), *self._core.centres)
        fields = {
            "format": _core.FORMAT_VERSION,
            "kind": type(self).__name__,
            "key_bits": self.key_bits,
            "value_bits": self.value_bits,
            "seed": self.seed,
            "codebook": CODEBOOK,
            "model": self.fingerprint,
            "position": self._position(),
        }
        return (*arrays, Identity(fields, arrays))

    @state.setter
    def state(self, state):
        try:
            *arrays, identity = state
        except (TypeError, ValueError) as error:
            raise ValueError(f"[load] this is not the state of a {type(self).__name__}") from error
        fields = read(identity, arrays, type(self).__name__)
        if len(arrays) != 6:
            raise ValueError(f"[load] a {type(self).__name__} has six arrays; got {len(arrays)}")
        coding = (fields["key_bits"], fields["value_bits"], fields["seed"], *arrays[4:])
        self._restore(coding, fields["position"], None if arrays[0] is None else arrays[:4])
        self._query = None
        self.fingerprint = fields["model"]

    def _shape(self):
        """(B, H_kv, tokens held, D)."""
        return self._core.view().shape

    def inspect(self):
        """What the cache holds, for people: bits, tokens, resident bytes, what float16 would take, last kernel."""
        shape = None if self.empty() else self._shape()
        return {
            "kind": type(self).__name__,
            "key_bits": self.key_bits,
            "value_bits": self.value_bits,
            "tokens": self.size(),
            "resident_bytes": self.nbytes,
            "float16_bytes": 0 if shape is None else 2 * 2 * shape[0] * shape[1] * shape[2] * shape[3],
            "kernel": self.route,
        }


class TurboQuantKVCache(PackedCache):
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

    def __init__(self, bits=3, **settings):
        self._core = _core.KVCache(*coding(bits, **settings))
        self._query = None

    def make_mask(self, N, return_array=False, window_size=None):
        return create_attention_mask(N, offset=self.offset, return_array=return_array, window_size=window_size)

    def size(self):
        return self.offset

    def _position(self):
        return {"offset": self.offset}

    def _restore(self, coding, position, arrays):
        core = _core.KVCache(*coding)
        if arrays:
            core.restore(arrays, position["offset"])
        self._core = core

    @classmethod
    def merge(cls, caches):
        """A BatchTurboQuantKVCache of these sequences."""
        from .batch import BatchTurboQuantKVCache

        return BatchTurboQuantKVCache.merge(caches)

    def to_float(self, dtype=mx.float16):
        """A `KVCache` with the decoded history: materialises all of it."""
        cache = KVCache()
        if not self.empty():
            cache.keys, cache.values = self._core.view().decode(dtype)
            cache.offset = self.offset
        return cache
