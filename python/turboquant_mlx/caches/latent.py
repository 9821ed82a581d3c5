"""Packed caches for latent attention (MLA, arXiv 2405.04434): one vector is key and value of all heads.

mlx-lm caches the latent (kv_lora_rank numbers) as keys and the rotary key as values of one `KVCache`, and uses them in ways
of its own: it adds the rotary scores as a mask, reads the latent as key and as value (single tokens), or expands it to
keys and values of every head (prompts).  So these caches hand out what a float cache would: arrays, decoded from the
codes.  They are lazy, and remembered here: where attention is handed such an array, or keys and values that a
`MultiLinear` made of it, it reads the codes instead (attend), and nobody evaluates the array.  Whatever else a model
does with the arrays is right, too: they are then decoded, for one layer at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from .. import _core
from .arguments import Settings, coding, padding, spelled_out
from .kv_cache import BatchTurboQuantKVCache, TurboQuantKVCache

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Read:
    """How a layer reads what its cache handed out last."""

    codes = False  # attention has read the codes
    handed = 0  # id of the array


class _Known(NamedTuple):
    """What an array stands for: a latent history, or what `linear` makes of it for each head."""

    array: weakref.ref
    view: _core.View
    read: _Read
    linear: Callable | None = None
    transpose: bool = True


_known: dict[int, _Known] = {}  # by id, while the array lives


def _remember(array, *what):
    key = id(array)
    _known[key] = _Known(weakref.ref(array, lambda _: _known.pop(key, None)), *what)


def _find(array):
    found = _known.get(id(array))
    return found if found is not None and found.array() is array else None


def expanded(original):
    """A `MultiLinear.__call__` that remembers what it makes of a latent history."""

    def call(self, x, transpose=True):
        out = original(self, x, transpose)
        found = _find(x)
        if found is not None and found.linear is None:
            _remember(out, found.view, found.read, self, transpose)
        return out

    return call


def attend(queries, keys, values, scale, mask, sinks=None):
    """(Attention over codes (B, H, L, D_v), id of the history) where `keys` and `values` stand for a latent history; None
    where they do not.

    With keys c U and values c V of a latent c, attention is that of the queries q U^T over c, and then V: so the
    history is not expanded."""
    k, v = _find(keys), _find(values)
    if k is None or v is None or k.view is not v.view:
        return None
    if k.linear is None and v.linear is None:
        out = k.view.attend(queries, scale, mask, sinks)
    elif k.linear is not None and v.linear is not None and v.transpose and not k.transpose:
        out = v.linear(k.view.attend(k.linear(queries), scale, mask, sinks))
    else:
        return None
    k.read.codes = True
    return out, k.read.handed


class _Latent:
    """What both kinds share."""

    _read = _Read()
    _core: Any  # the C++ cache of this kind
    _last_kernel: Any

    def _hand_out(self, view):
        view.latent = True
        view.last_kernel = self._last_kernel
        latent = view.decode_keys(view.dtype)
        self._read = _Read()
        self._read.handed = id(latent)
        _remember(latent, view, self._read)
        return latent, view.decode_values(view.dtype)

    def _update(self, keys, values):
        return self._hand_out(self._core.update(keys, values, self._last_kernel))

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The latent history (B, 1, N, D) and the rotary keys (B, 1, N, D_r), as `update_and_fetch` hands them out."""
        return self._hand_out(self._core.view())

    def _restore(self, coding, position, arrays, copies=None):
        kind = type(self).__name__
        added = coding.keys.feedback, coding.values.feedback, coding.key_map
        if any(x is not None for x in added) or coding.recent or coding.sink or copies:
            raise ValueError(f"[load] a {kind} has no exact copies, feedback or maps; the saved one has")
        if arrays and arrays[0].ndim == 4 and arrays[0].shape[1] != 1:
            raise ValueError(f"[load] a {kind} has one head; the saved one has {arrays[0].shape[1]}")
        super()._restore(coding, position, arrays)

    @property
    def kernel(self) -> str | None:
        """The kernel that attention over the codes used last, or that the layer decoded the latents; None before."""
        if self._read.codes or not self._read.handed:
            return self._last_kernel.name
        return "mlx (decoded)"


def latent_settings(settings: dict) -> Settings:
    """The settings of a latent cache where `settings` were asked for keys and values of a model.

    One set of codes is key and value: it has the larger width of the two sides.  Centres stay; feedback and maps, which
    are made for keys alone, and exact copies do not."""
    bits = settings.get("bits", 3)
    widths = [bits if own is None else own for own in (settings.get("key_bits"), settings.get("value_bits"))]
    return {
        "key_bits": max(widths),
        "code": settings.get("code"),
        "seed": settings.get("seed", 0),
        "centres": settings.get("centres"),
    }


def _coding(owner, bits, settings):
    key_bits = settings.get("key_bits")
    if settings.get("value_bits") is None:
        settings = {**settings, "value_bits": 4 if (bits if key_bits is None else key_bits) in (2, 3, 4) else 8}
    for name in ("feedback", "key_map", "recent", "sink"):
        if settings.get(name):
            raise ValueError(f"[{owner}] latent caches take no {name}; got {settings[name]!r}")
    return coding(owner, bits, **{**settings, "recent": 0, "sink": 0})


class TurboQuantLatentKVCache(_Latent, TurboQuantKVCache):
    """A `KVCache` for latent attention: the latent as keys (B, 1, N, D), of which the codes are read as keys and as
    values, and the rotary key as values (B, 1, N, D_r), which is decoded for each read.

    TQ3 takes 228 bytes a token of DeepSeek's 512 and 64 numbers (float16: 1,152): a fifth.

    Args:
        bits (int): of the latent: 2, 3, 4 or 8.
        key_bits (int): the same.
        value_bits (int): of the rotary key: by default 4, beside 8 bits 8.
        code, seed, centres: as for TurboQuantKVCache.  There are no exact copies, feedback or maps.

    Raises:
        ValueError: as for TurboQuantKVCache.
    """

    @spelled_out
    def __init__(self, bits: int = 3, **settings: Unpack[Settings]) -> None:
        self._core = _core.KVCache(_coding(type(self).__name__, bits, settings))
        self._last_kernel = _core.LastKernel()

    @classmethod
    def merge(cls, caches: Any) -> Any:
        """A BatchTurboQuantLatentKVCache of these sequences."""
        return BatchTurboQuantLatentKVCache.merge(caches)


class BatchTurboQuantLatentKVCache(_Latent, BatchTurboQuantKVCache):
    """A batch of TurboQuantLatentKVCaches: rows of different lengths, right-justified.

    Args:
        left_padding: as for BatchTurboQuantKVCache.
        bits and the rest: as for TurboQuantLatentKVCache.
    """

    _row = TurboQuantLatentKVCache

    @spelled_out
    def __init__(self, left_padding: list[int] | mx.array, bits: int = 3, **settings: Unpack[Settings]) -> None:
        owner = type(self).__name__
        self._core = _core.BatchKVCache(padding(owner, left_padding), _coding(owner, bits, settings))
        self._last_kernel = _core.LastKernel()
