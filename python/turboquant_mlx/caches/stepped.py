"""Recurrent states after each of the latest tokens, so that refused drafts can be taken back.

A step that checks drafts reads some tokens at once, and a recurrent layer keeps only its state after the last of them.
`SteppedArraysCache` gets the state after each.  For the convolution it announces a batch of as many rows as there are
tokens: row i asks for the state of a sequence that ends after token i (mlx-lm's `lengths`, made for padded batches), and
the layer cuts each from the same inputs.  A recurrence hands over a tuple of states instead of one (overlay/steps.py).
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

Arrays = tuple[
    Any, ...
]  # the arrays of one state, (1, ...) each, None where there is none yet; or functions that make them
_stepping: ContextVar[int] = ContextVar("_stepping", default=0)  # tokens of this thread's step, while it keeps states


class SteppedArraysCache(ArraysCache):
    """An `ArraysCache` of one sequence that goes back by any of the latest tokens, those read in `keeping_steps`."""

    lengths: Any
    _steps: tuple[Arrays, ...] = ()  # states after each of the latest tokens, the last one's excluded, oldest first

    def _begin_step(self, tokens: int) -> None:
        """Before a step of `tokens` tokens whose states are to be kept."""
        self._steps = (*self._steps, tuple(self.cache))
        if tokens > 1:
            self.lengths = mx.arange(1, tokens + 1)

    def _end_step(self, tokens: int) -> bool:
        """After it: takes the layer's arrays apart, and says whether they were one state a token."""
        if tokens == 1:
            return True
        self.lengths = None
        slots: list[Any] = []
        for held in self.cache:
            if isinstance(held, mx.array) and held.shape[0] == tokens:
                held = tuple(partial(_row, held, i) for i in range(tokens))
            if not isinstance(held, tuple) or len(held) != tokens:
                return False
            slots.append(held)
        states = list(zip(*slots, strict=True))
        self._steps = (*self._steps, *states[:-1])
        self.cache = _made(states[-1])
        return True

    def make_mask(self, N: int):
        """The mask of a padded batch; None while the states of one sequence are kept."""
        return None if stepping() else super().make_mask(N)

    @property
    def batch_size(self):
        """Rows; one while states are kept."""
        return 1 if stepping() else super().batch_size

    def forget_steps(self) -> None:
        """Drops the kept states: nobody goes back behind the latest token any more."""
        self._steps = ()

    def take_back(self, n: int) -> bool:
        """Goes back by `n` tokens if that state is kept, and says whether it was."""
        if not 0 < n <= len(self._steps):
            return n == 0
        self.cache = _made(self._steps[-n])
        self._steps = self._steps[:-n]
        return True


def _row(held, i):
    return held[i : i + 1]


def _made(state):
    return [held() if callable(held) else held for held in state]


def step_tokens() -> int:
    """Tokens of the step that this thread is in and of which it keeps the states; 0 while it keeps none."""
    return _stepping.get()


def stepping() -> bool:
    """Whether this thread keeps the states of the step that it is in."""
    return _stepping.get() > 0


@contextmanager
def keeping_steps(slots: list[SteppedArraysCache], tokens: int):
    """Context: one call of a model with `tokens` tokens, after which each of `slots` can go back to any of them.

    Raises:
        ValueError: a layer gave no state after each token.
    """
    token = _stepping.set(tokens)
    try:
        for c in slots:
            c._begin_step(tokens)
        yield
        if failed := [i for i, c in enumerate(slots) if not c._end_step(tokens)]:
            raise ValueError(f"recurrent layer {failed[0]} of {len(slots)} gives no state after each token of a step")
    finally:
        _stepping.reset(token)
