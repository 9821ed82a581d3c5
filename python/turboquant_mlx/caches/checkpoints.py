"""Recurrent states that can go back.

A recurrent layer (mlx-lm's `ArraysCache`) keeps one state, which each token overwrites: taking tokens back is impossible.
`CheckpointedArraysCache` keeps copies of its state, checkpoints, at the end of each chunk of a prompt.  They are arrays that
MLX has computed anyway and that nobody writes to, so keeping one costs its bytes and no time.  `thinned` bounds their
number, and with them `trim_prompt_cache` takes a whole prompt cache back to the nearest one.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .packed import leaves
from .stepped import Arrays, SteppedArraysCache, stepping

LEAST = 4  # checkpoints that a byte budget leaves whatever the context


@dataclass(frozen=True)
class Limits:
    """How many checkpoints a sequence keeps.

    Attributes:
        most: at most this many, whatever they take; None: what `tokens_each` says.
        tokens_each: tokens whose packed keys and values take as many bytes as one checkpoint of all layers; 0: unknown.
    """

    most: int | None = None
    tokens_each: float = 0.0

    def at(self, position: int) -> int:
        """The most checkpoints of a sequence of `position` tokens: they grow with its logarithm, and take no more bytes
        than its packed keys and values, but may be LEAST."""
        if self.most is not None:
            return self.most
        affordable = int(position / self.tokens_each) if self.tokens_each else LEAST
        return max(LEAST, min(affordable, LEAST + int(2 * math.log2(1 + position / 512))))


def thinned(positions: Sequence[int], end: int, most: int) -> list[int]:
    """Which of the ascending `positions` to keep, at most `most` of them, for a sequence of `end` tokens.

    Going back by d tokens is taken to be as likely as 1 / d.  The position that is dropped is the one without which the
    fewest tokens are read again on average; the last one always stays."""
    kept = list(positions)
    while len(kept) > max(most, 1):
        costs = []
        for i, (position, following) in enumerate(zip(kept, kept[1:], strict=False)):
            before = kept[i - 1] if i else 0
            likely = math.log((end - position + 1) / (end - following + 1))
            costs.append((position - before) * likely)
        del kept[costs.index(min(costs))]
    return kept


class _Row:
    """Where one sequence of a batch stands, and its states of before: {position: arrays}, ascending."""

    def __init__(self, position: int | None = 0) -> None:
        self.position = position  # tokens read; None: unknown, so that there is no way back
        self.checkpoints: dict[int, Arrays] = {}

    def copy(self) -> _Row:
        other = _Row(self.position)
        other.checkpoints = dict(self.checkpoints)
        return other

    def forget_after(self, position: int) -> None:
        self.checkpoints = {at: arrays for at, arrays in self.checkpoints.items() if at <= position}
        self.position = position


class CheckpointedArraysCache(SteppedArraysCache):
    """An `ArraysCache` that can go back to its checkpoints: of one sequence, or of the rows of a batch.

    A checkpoint is kept wherever more than one token was read at once.  The layer must call `advance` after it has set
    its arrays; `enable` makes sure of it.

    Args:
        size (int): arrays of a state.
        left_padding (list[int]): pads in front of each row.
        limits: how many checkpoints a sequence keeps.
    """

    def __init__(self, size: int, left_padding: list[int] | None = None, limits: Limits | None = None) -> None:
        super().__init__(size, left_padding)
        self.limits = limits or Limits()
        self._rows = [_Row() for _ in left_padding or (0,)]
        self._lengths: list[int] | None = None
        self._padding = list(left_padding) if left_padding else None

    @property
    def position(self) -> int | None:
        """Tokens read, of a single sequence; None where that is unknown."""
        return self._rows[0].position if len(self._rows) == 1 else None

    @property
    def checkpoints(self) -> list[int]:
        """The positions to which a single sequence can go back, ascending; the beginning, 0, is not among them."""
        return list(self._rows[0].checkpoints) if len(self._rows) == 1 else []

    def nearest(self, position: int) -> int:
        """The last position, at or before this one, to which a single sequence can go back."""
        found = [at for at in (*self.checkpoints, self.position) if at is not None and at <= position]
        return max(found, default=0)

    def is_trimmable(self) -> bool:
        """Whether there is a way back: for a single sequence whose tokens were counted."""
        return self.position is not None

    def trim(self, n: int) -> int:
        """Takes exactly `n` tokens back, or all there are, and returns how many that were.

        Raises:
            ValueError: there is no checkpoint.  `trim_prompt_cache` goes back to the nearest instead.
        """
        if self.position is None:
            return 0
        target = max(self.position - n, 0)
        if target == self.position:
            return 0
        taken = self.position - target
        if self.take_back(taken):
            return taken
        state = self._rows[0].checkpoints.get(target)
        if state is None and target:
            raise ValueError(
                f"[{type(self).__name__}] trim goes to a checkpoint; got {n} tokens before {self.position}, and the "
                f"checkpoints are at {[0, *self.checkpoints]}: use trim_prompt_cache, which takes all slots to the nearest"
            )
        self.forget_steps()
        self.cache = list(state) if state else [None] * len(self.cache)
        self._rows[0].forget_after(target)
        return taken

    def take_back(self, n: int) -> bool:
        """Goes back by `n` tokens if that state is kept, and says whether it was."""
        done = super().take_back(n)
        if done and n and self.position is not None:
            self._rows[0].forget_after(self.position - n)
        return done

    def advance(self, N: int) -> None:
        """Counts `N` more tokens of each row, pads included, whose states the layer has set."""
        super().advance(N)
        if len(self._rows) != self.batch_size and all(row.position == 0 for row in self._rows):
            self._rows = [_Row() for _ in range(self.batch_size)]
        real = [N] * len(self._rows)
        if self._padding is not None:
            real = [n - min(max(pads, 0), n) for n, pads in zip(real, self._padding, strict=True)]
            self._padding = [pads - N for pads in self._padding]
        if self._lengths is not None:
            real = [min(max(left, 0), n) for n, left in zip(real, self._lengths, strict=True)]
            self._lengths = [left - N for left in self._lengths]
        for i, (row, n) in enumerate(zip(self._rows, real, strict=True)):
            if row.position is None or not n:
                continue
            row.position += n
            if N > 1 and not stepping():
                self._keep(i, row)

    def _keep(self, i, row):
        """Makes the state that row i has now a checkpoint, and drops the one that is missed least."""
        row.checkpoints[row.position] = tuple(self._row_arrays(i))
        wanted = thinned(list(row.checkpoints), row.position, self.limits.at(row.position))
        row.checkpoints = {at: row.checkpoints[at] for at in wanted}

    def _row_arrays(self, i):
        """The arrays of row i, which hold its own bytes alone."""
        if len(self._rows) == 1:
            return list(self.cache)
        return [None if c is None else mx.contiguous(c[i : i + 1]) for c in self.cache]

    def prepare(self, lengths: list[int] | None = None, **kwargs: Any) -> None:
        """Announces the real tokens of each row of a right-padded prompt."""
        super().prepare(lengths=lengths, **kwargs)
        self._lengths = None if lengths is None else [int(n) for n in lengths]

    def finalize(self) -> None:
        """Ends a padded prompt."""
        super().finalize()
        self._lengths = self._padding = None

    @classmethod
    def merge(cls, caches: Any) -> Any:
        """A batch of these sequences, with their checkpoints; those of plain `ArraysCache`s cannot go back."""
        merged = super().merge(caches)
        merged.limits = next(c.limits for c in caches if isinstance(c, cls))
        merged._rows = [c._rows[0].copy() if isinstance(c, cls) else _Row(None) for c in caches]
        merged._padding = None  # mlx-lm sets zeros in an empty batch
        return merged

    def extend(self, other: Any) -> None:
        """Adds the rows of `other` to this batch."""
        sizes = self.batch_size, other.batch_size
        super().extend(other)
        theirs = other._rows if isinstance(other, CheckpointedArraysCache) else [_Row(None)] * sizes[1]
        self._rows = [*self._rows, *(row.copy() for row in theirs)]
        for name in ("_lengths", "_padding"):
            ours, more = getattr(self, name), getattr(other, name, None)
            if ours is not None or more is not None:
                setattr(self, name, [*(ours or [0] * sizes[0]), *(more or [0] * sizes[1])])

    def filter(self, batch_indices: Any) -> None:
        """Keeps these rows, in this order."""
        super().filter(batch_indices)
        rows: Any = batch_indices.tolist() if isinstance(batch_indices, mx.array) else batch_indices
        keep = [int(i) for i in rows]
        self._rows = [self._rows[i] for i in keep]
        self._lengths = self._lengths and [self._lengths[i] for i in keep]
        self._padding = self._padding and [self._padding[i] for i in keep]

    def extract(self, idx: int) -> Any:
        """Row `idx` as a cache of its own."""
        cache = type(self)(len(self.cache), limits=self.limits)
        cache.cache = self._row_arrays(idx)
        cache._rows = [self._rows[idx].copy()]
        return cache

    def __deepcopy__(self, memo):
        """A copy that shares the arrays, which nobody writes to."""
        other = copy.copy(self)
        other.forget_steps()
        other.cache, other._rows = list(self.cache), [row.copy() for row in self._rows]
        for name in ("lengths", "left_padding"):  # mlx-lm subtracts from these in place
            array = getattr(self, name)
            setattr(other, name, None if array is None else mx.array(array))
        return other

    @property
    def state(self) -> Any:
        """(arrays, left_padding, lengths, where the rows stand as JSON, arrays of all checkpoints), as mlx-lm saves it."""
        fields = {
            "most": self.limits.most,
            "tokens_each": self.limits.tokens_each,
            "rows": [[row.position, list(row.checkpoints)] for row in self._rows],
        }
        held = [[*arrays] for row in self._rows for arrays in row.checkpoints.values()]
        return (self.cache, self.left_padding, self.lengths, json.dumps(fields), held)

    @state.setter
    def state(self, state: Any) -> None:
        try:
            arrays, left_padding, lengths, text, *held = state
            held = list(held[0]) if held else []
            fields = json.loads(text)
            rows = []
            for position, places in fields["rows"]:
                row = _Row(position)
                row.checkpoints = {at: tuple(held.pop(0)) for at in places}
                rows.append(row)
            limits = Limits(fields["most"], fields["tokens_each"])
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise ValueError(f"[load] this is not the state of a {type(self).__name__}: {error}") from error
        self.cache, self.left_padding, self.lengths = list(arrays), left_padding, lengths
        self.limits, self._rows = limits, rows
        self._lengths = None if lengths is None else lengths.tolist()
        self._padding = None if left_padding is None else left_padding.tolist()

    @classmethod
    def from_state(cls, state: Any, meta_state: Any = "") -> CheckpointedArraysCache:
        """The cache that had this `state`.  mlx-lm 0.31.3 also gives the `meta_state`, which is empty."""
        made = cls.__new__(cls)
        made.state = state
        return made

    @property
    def nbytes(self) -> int:
        """Resident bytes of the state and of its checkpoints."""
        kept = [arrays for row in self._rows for arrays in row.checkpoints.values()]
        arrays = {id(c): c.nbytes for group in (self.cache, *kept) for c in group if c is not None}
        return sum(arrays.values())

    @property
    def state_nbytes(self) -> int:
        """Resident bytes of the state alone."""
        return super().nbytes


def checkpointed(caches: list[Any]) -> list[CheckpointedArraysCache]:
    """The slots with checkpoints, those of a CacheList included."""
    return [c for _, c in leaves(caches) if isinstance(c, CheckpointedArraysCache)]


def tokens_held(cache: Any) -> int | None:
    """Tokens that one slot has read; None where it does not know, or is a batch."""
    if isinstance(cache, CheckpointedArraysCache):
        return cache.position
    offset = getattr(cache, "offset", None)
    return offset if isinstance(offset, int) else None


def nearest_checkpoint(caches: list[Any], position: int) -> int | None:
    """The last position, at or before this one, to which all slots of a prompt cache can go back.

    Returns:
        A number of tokens from 0 to `position`; None when the cache cannot go back, because of a window that has moved
        on, say.
    """
    fixed = [tokens_held(c) for _, c in leaves(caches) if not c.is_trimmable()]
    slots = checkpointed(caches)
    while True:
        reached = min((c.nearest(position) for c in slots), default=position)
        if reached == position:
            return position if caches and all(held == position for held in fixed) else None
        position = reached


def rewind(caches: list[Any], position: int) -> int:
    """Takes every slot of a prompt cache back to the last position, at or before this one, that all can go back to.

    Returns:
        That position.

    Raises:
        ValueError: the cache cannot go back.  It stays as it was.
    """
    reached = nearest_checkpoint(caches, position)
    if reached is None:
        names = sorted({type(c).__name__ for _, c in leaves(caches) if not c.is_trimmable()})
        raise ValueError(f"[rewind] a prompt cache goes back when all of its slots can; got {', '.join(names)}")
    for _, c in leaves(caches):
        held = tokens_held(c)
        if held is not None and held > reached:
            c.trim(held - reached)
    return reached


def trim_prompt_cache(caches: list[Any], num_tokens: int) -> int:
    """Takes back the latest `num_tokens` tokens of a prompt cache, and as many more as its checkpoints ask for.

    Where every slot holds keys and values that is exactly `num_tokens`, as in mlx-lm.  Recurrent states go back to the
    nearest checkpoint, so that more tokens go: whoever wants the rest reads it again (`rewind_and_read`).

    Returns:
        How many tokens were taken back; 0 when the cache cannot go back.
    """
    if not caches or not all(c.is_trimmable() for c in caches):
        return 0
    slots = checkpointed(caches)
    if not slots:
        return [c.trim(num_tokens) for c in caches][0]
    before = slots[0].position or 0
    return before - rewind(caches, max(before - num_tokens, 0))


def rewind_and_read(model: Any, caches: list[Any], tokens: Sequence[int], length: int, step: int = 2048) -> int:
    """Takes a prompt cache to exactly `length` tokens: back to a checkpoint, then forward over the tokens in between.

    Args:
        model: the model that filled the cache.
        caches: a prompt cache that has read `tokens`.
        tokens: what it has read, from the first token on.
        length: tokens that it is to hold afterwards, from 0 to what it holds.
        step: tokens read at a time.

    Returns:
        How many tokens were read again.

    Raises:
        ValueError: `length` is more than the cache holds or than there are tokens, or the cache cannot go back.
    """
    held = next((n for _, c in leaves(caches) if (n := tokens_held(c)) is not None), 0)
    if not 0 <= length <= min(held, len(tokens)):
        raise ValueError(
            f"[rewind_and_read] length must be from 0 to the {min(held, len(tokens))} tokens held and given; got {length}"
        )
    start = rewind(caches, length)
    for at in range(start, length, step):
        model(mx.array([list(tokens[at : min(at + step, length)])]), cache=caches)
        mx.eval([c.state for c in caches])
    return length - start


def limits_for(checkpoints: bool | int | str, tokens_each: float) -> Limits | None:
    """The Limits of what `enable` takes; None: no checkpoints.  ValueError for what it does not take."""
    if checkpoints is False or checkpoints is None:
        return None
    if checkpoints is True or checkpoints == "auto":
        return Limits(tokens_each=tokens_each)
    if isinstance(checkpoints, int) and checkpoints >= 1:
        return Limits(most=checkpoints)
    raise ValueError(
        f"[enable] checkpoints must be True, False, 'auto' or how many to keep, 1 or more; got {checkpoints!r}"
    )
