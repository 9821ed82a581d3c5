"""Perplexity, and Kullback-Leibler divergence from the float16 caches' distribution, position by position.

All caches walk over the windows side by side, some positions at a time, so no more than a few positions' logits exist
at once.  Windows are rows of one batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..caches import leaves
from ..calibration.moments import without_head
from ..overlay.products import fast_attention
from .model import recurrent_states


@dataclass
class Record:
    """What was measured for one kind of cache; float32 arrays (windows, positions)."""

    nll: np.ndarray  # of the true next token, nats; one position fewer
    kld: np.ndarray  # from the first kind's distribution to this one's, nats
    agree: np.ndarray  # whether both have the same most likely token


_AT_ONCE = 1 << 18  # numbers of logits in work at a time: they stay in a processor's cache


def _normalised(logits):
    """Logits (N, V) as log-probabilities."""
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def figures(first, logits, following):
    """(KLD in nats, negative log-likelihood, same most likely token) of positions, each (N,) float32.

    Args:
        first, logits (N, V): of the reference and of what is compared with it, float32.
        following (N,): the true next tokens.

    numpy's elementwise functions take a tenth of the time that MLX's take on a CPU: a vocabulary of 262,144 needs it."""
    kld, nll, agree = (np.empty(len(first), np.float32) for _ in range(3))
    rows = max(1, _AT_ONCE // first.shape[1])
    for start in range(0, len(first), rows):
        at = slice(start, start + rows)
        p, q = _normalised(first[at]), _normalised(logits[at])
        kld[at] = (np.exp(p) * (p - q)).sum(1)
        nll[at] = -np.take_along_axis(q, following[at, None], 1)[:, 0]
        agree[at] = p.argmax(1) == q.argmax(1)
    return kld, nll, agree


def compare(
    model: Any,
    windows: Any,
    caches: dict[str, list[Any]],
    *,
    step: int = 256,
    prompt: int = 0,
    progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Record]:
    """Records of each kind of cache, of the positions from `prompt` on; the first is what the others are compared with.

    Args:
        model: a model of mlx-lm.
        windows: token ids (W, L).
        caches: {name: list of fresh caches}.
        step (int): positions given to the model at a time.
        prompt (int): tokens of each window that are read into the caches first; their logits are not computed.
        progress: called with the number of tokens just done.

    Returns:
        {name: Record}.
    """
    windows = np.asarray(windows)
    rows, length = windows.shape
    following = np.pad(windows[:, 1:], ((0, 0), (0, 1)))  # the last position's is left out at the end
    parts: dict[str, Any] = {name: ([], [], []) for name in caches}
    for cache in caches.values():
        for start in range(0, prompt, step):
            tokens = windows[:, start : min(start + step, prompt)]
            with fast_attention(model), without_head(model):
                model(mx.array(tokens), cache=cache)
            mx.eval([c.state for _, c in leaves(cache)])
            progress(tokens.size)
    for start in range(prompt, length, step):
        tokens, after = windows[:, start : start + step], following[:, start : start + step]
        first = None
        for name, cache in caches.items():
            with fast_attention(model):
                logits = model(mx.array(tokens), cache=cache).astype(mx.float32)
            mx.eval(logits, recurrent_states(cache))
            logits = np.array(logits).reshape(tokens.size, -1)
            first = logits if first is None else first
            for done, x in zip(parts[name], figures(first, logits, after.reshape(-1)), strict=True):
                done.append(x.reshape(tokens.shape))
            progress(tokens.size)
    records = {name: [np.concatenate(x, axis=1) for x in done] for name, done in parts.items()}
    return {name: Record(nll[:, :-1], kld, agree) for name, (kld, nll, agree) in records.items()}


def joined(records):
    """One Record of several that hold different windows."""
    return Record(*(np.concatenate([getattr(r, name) for r in records]) for name in ("nll", "kld", "agree")))


def bands(length):
    """Position ranges that double: [(0, 256), (256, 512), (512, 1024), ...] up to `length`.

    The last has at least two positions, because the last position of all has no next token."""
    edges = [0, 256]
    while edges[-1] + 1 < length:
        edges.append(2 * edges[-1])
    edges[-1] = length
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]


def summarise(record: Any, reference: Any, start: int = 0, stop: int | None = None) -> dict[str, Any]:
    """Figures of the positions [start, stop): a dict of floats.

    perplexity and its change against the reference's (ratio - 1), mean KLD, both with standard errors over windows (of
    the change: over the windows' own differences, which vary much less than perplexities do; nan for one window), the
    99th percentile and the maximum of KLD, and the share of positions whose most likely token is the same."""
    at = np.s_[:, start:stop]
    kld, nll = record.kld[at], record.nll[at]

    def error(per_window):
        return float(per_window.std(ddof=1) / np.sqrt(len(per_window))) if len(per_window) > 1 else float("nan")

    changes = (nll - reference.nll[at]).mean(1, dtype=np.float64)
    change = changes.mean()
    return {
        "positions": int(kld.size),
        "perplexity": float(np.exp(nll.mean(dtype=np.float64))),
        "perplexity_change": float(np.expm1(change)),
        "perplexity_change_stderr": float(np.exp(change)) * error(changes),
        "mean_kld": float(kld.mean(dtype=np.float64)),
        "mean_kld_stderr": error(kld.mean(1, dtype=np.float64)),
        "p99_kld": float(np.quantile(kld, 0.99)),
        "max_kld": float(kld.max()),
        "top1_agreement": float(record.agree[at].mean(dtype=np.float64)),
    }
