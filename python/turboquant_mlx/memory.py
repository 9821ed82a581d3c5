"""Bytes that a model's caches take at a context, from shapes alone: nothing is computed and no weights are read.

A sequence takes its packed keys and values (buffers grow by 256 tokens), the exact copies, its recurrent states and their
checkpoints.  A prompt takes a workspace beside: the activations of one layer for a chunk of it, and the exact copies of the
chunk.  The workspace is an estimate, from above, of what MLX holds at once; the rest is counted."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn import Linear, QuantizedLinear
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache

from .caches import CheckpointedArraysCache, PackedCache, leaves
from .overlay.gated_delta import CHUNK, MAX_TOKENS, uses_recurrence

GROWTH = 256  # tokens that buffers grow by


class Unnamed:
    """Stands in for the Names of a model whose weights are not to be read."""

    latest = "unnamed"

    def current(self, fresh: bool = False) -> str:
        """No fingerprint."""
        return self.latest


@dataclass(frozen=True)
class _Slot:
    token: float  # bytes of each token that the buffers have room for
    fixed: int  # bytes whatever the context: a recurrent state
    window: int | None = None  # tokens held at most
    checkpoints: Callable[[int], int] | None = None  # how many more of `fixed` a sequence of so many tokens keeps
    copied: float = 0.0  # bytes of the exact copies of a token
    recent: int = 0  # newest and first tokens that have some
    sink: int = 0

    def at(self, context: int) -> int:
        room = -(-context // GROWTH) * GROWTH
        room = room if self.window is None else min(room, self.window)
        states = 1 + (self.checkpoints(context) if self.checkpoints else 0)
        copies = int(self.copied) * (_ring(self.recent, context) + self.sink)
        return int(self.token * room) + states * self.fixed + copies


def _ring(recent, context):
    """Slots of the ring of exact copies of so many tokens, as ring_for in turboquant/mlx/exact.h says."""
    full = (recent + GROWTH) // 128 * 128 if recent else 0
    slots = 32
    while slots < min(full, context):
        slots *= 2
    return min(slots, full)


class CacheSizes:
    """What the caches of one sequence take.

    Args:
        model: a model of mlx-lm; its weights may be unread.
        make_cache: makes its caches, as `enable` or mlx-lm has it; the model's graph of two tokens is built with them.
    """

    def __init__(self, model: Any, make_cache: Callable[[], list[Any]]) -> None:
        caches = make_cache()
        for _, c in leaves(caches):
            if isinstance(c, PackedCache):
                c._names = None
        model(mx.zeros((1, 2), mx.int32), cache=caches)  # shapes; nobody evaluates it
        self._slots = {path: _slot(c) for path, c in leaves(caches)}
        self._layer = _widest_layer(model)
        state: Any = max((c for _, c in leaves(caches) if isinstance(c, ArraysCache)), key=_state_bytes, default=None)
        self._recurrent = 0.0
        if state is not None and uses_recurrence(model) and not mx.metal.is_available():
            arrays: list[Any] = [a for a in state.cache if a is not None and a.ndim == 4]
            if arrays:
                _, heads, value_dim, key_dim = arrays[0].shape
                each = 10 * CHUNK + 8 * (value_dim + key_dim) + 2 * value_dim * key_dim / CHUNK
                self._recurrent = 4.0 * heads * each

    def at(self, context: int, without: Collection[tuple[int, ...]] = ()) -> int:
        """Bytes of the caches of one sequence of `context` tokens, those at the paths `without` left out."""
        return sum(slot.at(context) for path, slot in self._slots.items() if path not in without)

    def workspace(self, step: int) -> int:
        """Bytes beside the caches while a chunk of `step` tokens is read: an estimate from above.

        A tenth on top is for what waits to be freed while MLX's threads lag behind."""
        copied = sum(
            slot.copied + (slot.token if slot.window else 0) for slot in self._slots.values()
        )  # windows hold a chunk beside
        return int(1.1 * (step * (self._layer + copied) + min(step, MAX_TOKENS) * self._recurrent))

    def longest(self, limit: int, most: int) -> int:
        """The longest context, `most` at most, whose caches take no more than `limit` bytes."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(middle) <= limit else (low, middle - 1)
        return low


def _state_bytes(c):
    return sum(a.nbytes for a in c.cache if a is not None)


def _slot(c):
    if isinstance(c, CheckpointedArraysCache):
        return _Slot(0, _state_bytes(c), checkpoints=c.limits.at)
    if isinstance(c, ArraysCache):
        return _Slot(0, _state_bytes(c))
    if isinstance(c, PackedCache) and getattr(c, "packed", True):
        arrays = [a for a in c._core.arrays if a is not None]
        token = sum(a.nbytes for a in arrays) / arrays[0].shape[2]
        copies = getattr(c._core, "copies_nbytes", 0)
        copied = copies / (_ring(c.recent, 2) + c.sink) if copies else 0  # two tokens were read
        return _Slot(token, 0, getattr(c, "max_size", None), copied=copied, recent=c.recent, sink=c.sink)
    tokens = getattr(c, "keys", None)
    room = tokens.shape[2] if isinstance(tokens, mx.array) else GROWTH
    return _Slot(c.nbytes / room, 0, getattr(c, "max_size", None))


def _widest_layer(model):
    """Bytes of activations of a token in one layer: what its products give, and four times what goes through."""
    layers, floats = {}, 4
    for path, module in model.named_modules():
        if isinstance(module, (Linear, QuantizedLinear)):
            head, found, tail = path.partition("layers.")
            layers.setdefault(tail.partition(".")[0] if found else "", []).append(module.weight.shape[0])
    for _, x in tree_flatten(model.parameters()):
        if mx.issubdtype(x.dtype, mx.floating):
            floats = 4 if mx.default_device() == mx.Device(mx.cpu) else x.dtype.size
            break
    layers.pop("", None)  # logits: of the last token alone
    widths = [sum(found) + 4 * max(found) for found in layers.values()]
    return floats * max(widths, default=0)
