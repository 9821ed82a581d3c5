"""Budgets for a choice of bits: what `calibrate --budget` takes."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..sizes import read_bytes, read_tokens

_FORMS = "kld=0.01, bytes=400 or context=128k,memory=8GB"


class Budget(NamedTuple):
    """What a choice of bits must keep to; exactly one of the three is set.

    kld: mean Kullback-Leibler divergence from float16 caches, nats; the choice then takes the fewest bytes.
    token_bytes: bytes that one more token of a context takes in all layers.
    memory: bytes of all caches at `context` tokens: copies of exact tokens, recurrent states and floats that stay included."""

    kld: float | None = None
    token_bytes: float | None = None
    memory: float | None = None
    context: int | None = None  # tokens; None: the model's own longest

    def __str__(self) -> str:
        if self.kld is not None:
            words = f"kld={self.kld:.15g}"
        elif self.token_bytes is not None:
            words = f"bytes={self.token_bytes:.15g}"
        else:
            return f"context={self.context},memory={self.memory:.15g}"
        return words + (f",context={self.context}" if self.context else "")


def parse_budget(text: str) -> Budget:
    """The Budget of words such as `kld=0.01`, `bytes=400`, `context=128k,memory=8GB`.

    Numbers of tokens may end in k or M (1,024 and its square), bytes in kB, MB, GB (powers of 1,000) or KiB, MiB, GiB.
    `context` may stand beside the other two: which context the bytes are counted at.  ValueError says what is wrong."""
    entries: dict[str, str] = {}
    for part in str(text).split(","):
        name, sign, value = (x.strip() for x in part.partition("="))
        if not sign or name not in ("kld", "bytes", "context", "memory"):
            raise ValueError(f"[budget] a budget is {_FORMS}; got {text!r}")
        if name in entries:
            raise ValueError(f"[budget] {name} stands twice in {text!r}")
        entries[name] = value
    aims = [name for name in ("kld", "bytes", "memory") if name in entries]
    if len(aims) != 1:
        raise ValueError(f"[budget] give one of kld, bytes and memory, as {_FORMS}; got {text!r}")
    if aims == ["memory"] and "context" not in entries:
        raise ValueError(f"[budget] memory needs the context that must fit, as context=128k,memory=8GB; got {text!r}")
    context = _tokens(entries["context"]) if "context" in entries else None
    if "kld" in entries:
        return Budget(kld=_kld(entries["kld"]), context=context)
    if "bytes" in entries:
        return Budget(token_bytes=_bytes("bytes", entries["bytes"]), context=context)
    return Budget(memory=_bytes("memory", entries["memory"]), context=context)


def _kld(text):
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ValueError(f"[budget] kld must be a number of nats above 0; got {text!r}")
    return found


def _bytes(name, text):
    found = read_bytes(text)
    if not 0 < found < math.inf:
        raise ValueError(f"[budget] {name} must be a number of bytes, as 400, 8GB or 8GiB; got {text!r}")
    return found


def _tokens(text):
    found = read_tokens(text)
    if not found:
        raise ValueError(f"[budget] context must be a number of tokens, as 8192 or 128k; got {text!r}")
    return found
