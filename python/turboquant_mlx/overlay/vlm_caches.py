"""Packed caches in mlx-vlm's protocol, which has grown apart from mlx-lm's.

mlx-vlm asks a cache for its batch (`to_batch`), where mlx-lm names the class of each kind; it keeps prefixes as trees
of arrays and JSON values (`prefix_cache_snapshot` and its like); and where the class of a batch has `merge`, Qwen3.5
takes the batch apart into float rows for each prompt and builds it anew.  So the batches here have none."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx

from .. import _core
from ..caches import (
    BatchTurboQuantKVCache,
    BatchTurboQuantRotatingKVCache,
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
)
from ..caches.identity import Identity
from ..caches.kv_cache import PackedBatch
from ..caches.packed import PackedCache


class _Sequence(PackedCache):
    """What mlx-vlm asks of the cache of one sequence."""

    _batch: Any  # the class of its batches
    meta_state = ""  # `state` has all

    def prefix_cache_snapshot(self) -> dict[str, Any]:
        """What `prefix_cache_restore` takes: the arrays of `state`, and the fields of its identity as JSON values."""
        *arrays, identity = self.state
        return {"arrays": arrays, "fields": dict(identity.fields)}

    def prefix_cache_restore(self, snapshot: dict[str, Any]) -> None:
        """Takes the place of what is held; ValueError when the snapshot is of another kind of cache."""
        arrays = snapshot["arrays"]
        self.state = (*arrays, Identity(snapshot["fields"], arrays))

    def prefix_cache_reserve(self, min_capacity_tokens: int) -> tuple[mx.array, ...]:
        """Buffers grow when tokens come; nothing is reserved."""
        return ()

    def prefix_cache_merge(self, rows: list[Any], prefix_lens: list[int]) -> PackedBatch | None:
        """The batch of these rows; rows without tokens may be float caches.  None when a row is of another kind."""
        packed = [row if isinstance(row, PackedCache) or not row.empty() else self._nothing() for row in rows]
        return self.merge(packed) if all(type(row) is type(self) for row in packed) else None

    @classmethod
    def merge(cls, caches: list[Any], prefix_lens: list[int] | None = None) -> PackedBatch:
        """The batch of these sequences; mlx-vlm may tell how long they are, which they know."""
        return cls._batch._merged(cls._batch._core_kind, caches)

    def to_batch(self, left_padding: list[int]) -> PackedBatch:
        """An empty batch of the same settings, with these pads in front of its rows."""
        batch: Any = self.merge([self._nothing()] * len(left_padding))
        batch.prepare(left_padding=list(left_padding))
        return batch

    def _nothing(self):
        """An empty cache of the same settings and name."""
        other = copy.copy(self)
        if not self.empty():
            other._restore(self._core.coding, self._position(), None)
            other._last_kernel = _core.LastKernel()
        return other


class _Batch(PackedBatch):
    """What mlx-vlm asks of a batch."""

    _core_kind: type

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.left_padding.size

    def is_single_row(self) -> bool:
        """Whether there is one row."""
        return self.batch_size == 1


class VlmBatchTurboQuantKVCache(_Batch):
    """A BatchTurboQuantKVCache for mlx-vlm."""

    _core_kind = _core.BatchKVCache
    __init__ = BatchTurboQuantKVCache.__init__
    size = BatchTurboQuantKVCache.size
    prepare = BatchTurboQuantKVCache.prepare
    _position = BatchTurboQuantKVCache._position
    _restore = BatchTurboQuantKVCache._restore

    @property
    def _idx(self) -> int:
        """Tokens of each row, its pads included: models that cut an array mask to the history ask for it."""
        return self._core.length


class VlmTurboQuantKVCache(_Sequence, TurboQuantKVCache):  # type: ignore[misc]
    """A TurboQuantKVCache for mlx-vlm."""

    _batch = VlmBatchTurboQuantKVCache


class VlmBatchTurboQuantRotatingKVCache(_Batch):
    """A BatchTurboQuantRotatingKVCache for mlx-vlm."""

    _core_kind = _core.BatchRotatingKVCache
    __init__ = BatchTurboQuantRotatingKVCache.__init__
    max_size = BatchTurboQuantRotatingKVCache.max_size
    size = BatchTurboQuantRotatingKVCache.size
    is_trimmable = BatchTurboQuantRotatingKVCache.is_trimmable
    prepare = BatchTurboQuantRotatingKVCache.prepare
    _position = BatchTurboQuantRotatingKVCache._position
    _restore = BatchTurboQuantRotatingKVCache._restore

    @property
    def _offset(self) -> int:
        """Tokens of each row so far, its pads included."""
        return self._core.position["length"]


class VlmTurboQuantRotatingKVCache(_Sequence, TurboQuantRotatingKVCache):  # type: ignore[misc]
    """A TurboQuantRotatingKVCache for mlx-vlm."""

    _batch = VlmBatchTurboQuantRotatingKVCache


for _row, _of in (
    (VlmTurboQuantKVCache, VlmBatchTurboQuantKVCache),
    (VlmTurboQuantRotatingKVCache, VlmBatchTurboQuantRotatingKVCache),
):
    _of._row = _row
