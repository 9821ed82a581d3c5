"""Drafts without a second model: what followed the last time that the text's latest tokens occurred (prompt lookup)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

MOST = 64  # drafts of a round at most: a recurrent layer keeps a state for each


class PromptLookup:
    """Drafts from the text itself, in the place of a draft model: `generate(..., draft_model=PromptLookup(8))`.

    A round looks for the latest tokens further up in the prompt and the answer, four of them, else three, else two, and
    drafts what followed there.  Where they never occurred, nothing is drafted, and the step is one of plain decoding.  After
    a refusal drafts are shorter, after a full round longer again.

    Args:
        num_draft_tokens (int): drafts of a round at most, from 1 to 64; a call's own num_draft_tokens has no effect.
    """

    def __init__(self, num_draft_tokens: int = 8) -> None:
        from .patch import apply_patch

        if isinstance(num_draft_tokens, bool) or not isinstance(num_draft_tokens, int):
            raise TypeError(f"[PromptLookup] num_draft_tokens must be an int; got {num_draft_tokens!r}")
        if not 1 <= num_draft_tokens <= MOST:
            raise ValueError(f"[PromptLookup] num_draft_tokens must be from 1 to {MOST}; got {num_draft_tokens}")
        self.num_draft_tokens = num_draft_tokens
        apply_patch()  # mlx-lm's own loop takes models alone

    @property
    def layers(self) -> list[Any]:
        """None: mlx-lm counts the slots of a draft model's caches by its layers."""
        return []

    def make_cache(self) -> list[Any]:
        """No caches."""
        return []

    def __repr__(self) -> str:
        return f"PromptLookup({self.num_draft_tokens})"


class LookupDrafter:
    """What PromptLookup does for one answer."""

    SIZES = (4, 3, 2)

    def __init__(self, prompt: list[int], most: int) -> None:
        self._tokens = list(prompt)
        self._after: dict[tuple[int, ...], int] = {}  # tokens in a row -> where what followed them last lies
        self._noted = 0  # of self._tokens, those that are a follower in _after
        self._most = self._trusted = most

    def room(self) -> int:
        """The most drafts of the next round."""
        return self._trusted

    def propose(self, n: int) -> mx.array:
        """At most `n` drafts (uint32)."""
        tokens, drafts = self._tokens, list[int]()
        for at in range(max(self._noted, min(self.SIZES)), len(tokens)):
            for size in self.SIZES:
                if at >= size:
                    self._after[tuple(tokens[at - size : at])] = at
        self._noted = len(tokens)
        for size in self.SIZES:
            found = self._after.get(tuple(tokens[-size:]))
            if n and found is not None:
                for i in range(found, found + n):  # what repeats itself goes on from the drafts
                    drafts.append(tokens[i] if i < len(tokens) else drafts[i - len(tokens)])
                break
        return mx.array(drafts, mx.uint32)

    def settle(self, read: list[int], kept: int, token: int) -> None:
        """After a round that read `read`, its first token and the drafts, of which `kept` stay; `token` came after these."""
        self._tokens += [*read[1:kept], token]
        drafts = len(read) - 1
        if drafts:
            self._trusted = min(2 * self._trusted, self._most) if kept == len(read) else kept

    def finish(self) -> None:
        """The end of the answer."""
