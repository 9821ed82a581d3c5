"""The packed cache of one attention layer, and that of a batch of sequences.  The logic is C++ (turboquant/mlx/kv_cache.h,
batch_kv_cache.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, create_attention_mask

from .. import _core
from .arguments import Settings, as_list, coding, padding, spelled_out
from .packed import PackedCache

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TurboQuantKVCache(PackedCache):
    """A `KVCache` whose keys and values live as codes.

    Keys are coded as they come (after RoPE), each once; attention reads the codes, so no float history exists.
    TQ3 takes 98 bytes per vector of 256 numbers, TQ4 130, TQ2 66, 8 bits 258 (float16: 512).

    Args:
        bits (int): 2, 3, 4 or 8, for keys and values.
        key_bits, value_bits (int): instead of `bits`, each side's own width.
        code (str): "trellis" or "scalar", of widths of 2 and 3 bits: the first errs by a third less in the same bytes
            and takes longer to encode; wider codes are scalar.  A pair is of keys and of values.  None: trellis.
        seed (int): of the random signs, from 0 to 2^64 - 1.
        centres: a pair (keys, values) of (H_kv, D) arrays, taken from every vector before coding; see calibration.
        feedback: a pair (keys, values) of (H_kv, D, D) float16 arrays, which feed errors forward; made for one seed.
        key_map: (H_kv, D, D) float32, W: what is coded of a key is (key - centre) W, and queries go through the transpose
            of W's inverse, so that their products stay; see calibration.
        recent (int): a query reads this many of the newest tokens, its own included, from 8-bit copies instead of the
            codes; (recent + sink + 256) * 2 * (D + 2) bytes a KV head at most.  None: 128, which takes off most of
            the codes' divergence (docs/quality.md); 0: none.
        sink (int): likewise this many of a row's first tokens.  None: 4, which models attend to most; 0: none.

    Raises:
        ValueError: a width or seed that is no whole number or out of range, centres or feedback that are no pair; from
            `update_and_fetch`, a wrong dtype, rank or head_dim, or a batch that changes size.  A failed call leaves
            the cache as it was.
    """

    @spelled_out
    def __init__(self, bits: int = 3, **settings: Unpack[Settings]) -> None:
        self._core = _core.KVCache(coding(type(self).__name__, bits, **settings))
        self._last_kernel = _core.LastKernel()

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """As for PackedCache: None, "causal", or a bool array (N, tokens held after appending)."""
        return create_attention_mask(N, offset=self.size(), return_array=return_array, window_size=window_size)

    def size(self) -> int:
        """Tokens held."""
        return self._core.offset

    def _position(self) -> Any:
        return {"offset": self.offset}

    def _restore(self, coding: _core.CacheCoding, position: Any, arrays: Any, copies: Any = None) -> Any:
        core = _core.KVCache(coding)
        if arrays:
            core.restore(arrays, position["offset"], copies)
        self._core = core

    @classmethod
    def merge(cls, caches: list[TurboQuantKVCache]) -> BatchTurboQuantKVCache:
        """A BatchTurboQuantKVCache of these sequences."""
        return BatchTurboQuantKVCache.merge(caches)

    def to_float(self, dtype: mx.Dtype = mx.float16) -> KVCache:
        """A `KVCache` with the decoded history in `dtype`: materialises all of it."""
        cache = KVCache()
        if not self.empty():
            cache.keys, cache.values = self._core.view().decode(dtype)
            cache.offset = self.offset
        return cache


def one_kind(operation: str, caches: Any, kind: str = "of one kind that can be batched") -> str:
    """Why these caches make no batch, as words."""
    kinds = sorted({type(c).__name__ for c in caches})
    return (
        f"[{operation}] the rows of a batch must be caches {kind}; got {', '.join(kinds)}: to_turboquant(cache) packs a "
        "float cache, and to_float() of a packed one goes back"
    )


class PackedBatch(PackedCache):
    """What packed batches share: rows that come, go and are padded."""

    _row: type[PackedCache] = TurboQuantKVCache  # the kind of cache that a row is

    @property
    def left_padding(self) -> mx.array:
        """(B,) int32: pads in front of each row; those of a window count down below 0 as it moves on."""
        return self._core.left_padding

    def finalize(self) -> None:
        """After a right-padded prompt: moves each row's pads to its front."""
        self._core.finalize()

    def filter(self, batch_indices: Any) -> None:
        """Keeps these rows, in this order; ValueError for rows that do not exist."""
        self._core.filter(as_list(batch_indices))

    def extend(self, other: PackedBatch) -> None:
        """Appends the rows of another batch of this kind; ValueError when bits, seeds, centres, feedback or shapes
        differ, or windows' sizes."""
        if type(other) is not type(self):
            raise ValueError(one_kind("extend", [self, other]))
        self._core.extend(other._core)
        self._name_rows(other)

    def _name_rows(self, other: PackedBatch) -> None:
        if other.fingerprint != self.fingerprint:
            both = {*self.fingerprint.split("+"), *other.fingerprint.split("+")}
            self.fingerprint = "+".join(sorted(both - {""}))

    def extract(self, idx: int) -> PackedCache:
        """Row `idx` as a cache of its own: a TurboQuantKVCache, of a window a TurboQuantRotatingKVCache."""
        return self._row._wrap(self._core.extract(idx), self)

    @classmethod
    def _merged(cls, core: Any, caches: Any) -> Any:
        """The batch of caches of the kind `_row`; ValueError names other kinds."""
        if any(type(c) is not cls._row for c in caches):
            raise ValueError(one_kind("merge", caches, f"of the kind {cls._row.__name__}"))
        batch = cls._wrap(core.merge([c._core for c in caches]), caches[0])
        for c in caches[1:]:
            batch._name_rows(c)
        return batch


class BatchTurboQuantKVCache(PackedBatch):
    """A `BatchKVCache` of codes: rows of different lengths, right-justified; attention reads the packed batch and skips
    each row's padding by itself, so masks are None or "causal" unless an array is asked for.

    Args:
        left_padding: pads in front of each row's first tokens; its length is the batch size.
        bits and the rest: as for TurboQuantKVCache.
    """

    @spelled_out
    def __init__(self, left_padding: list[int] | mx.array, bits: int = 3, **settings: Unpack[Settings]) -> None:
        owner = type(self).__name__
        self._core = _core.BatchKVCache(padding(owner, left_padding), coding(owner, bits, **settings))
        self._last_kernel = _core.LastKernel()

    @classmethod
    def merge(cls, caches: list[TurboQuantKVCache]) -> BatchTurboQuantKVCache:
        """The batch of these TurboQuantKVCaches; ValueError when their bits, seeds, centres, feedback or
        shapes differ."""
        return cls._merged(_core.BatchKVCache, caches)

    def size(self) -> int:
        """Tokens held of each row, its pads included."""
        return self._core.length

    def prepare(self, *, left_padding: Any = None, lengths: Any = None, right_padding: Any = None) -> None:
        """Before a padded prompt is appended.

        Args:
            left_padding: pads in front of each row, only while the batch is empty.
            lengths: real tokens of each row of the prompt; with right padding, so that the newest of them stay exact.
            right_padding: pads after each row; `finalize` moves them to the front.

        Raises:
            ValueError: numbers below 0, or not one a row; left padding when tokens are held.
        """
        self._core.prepare(as_list(left_padding), as_list(right_padding), as_list(lengths))

    def _position(self) -> Any:
        return {"length": self.size(), "left_padding": self.left_padding.tolist()}

    def _restore(self, coding: _core.CacheCoding, position: Any, arrays: Any, copies: Any = None) -> Any:
        core = _core.BatchKVCache(position["left_padding"], coding)
        if arrays:
            core.restore(arrays, **position, copies=copies)
        self._core = core
