"""Perplexity, and Kullback-Leibler divergence from the float16 caches' distribution, position by position.

All caches walk over the windows side by side, some positions at a time, so no more than a few positions' logits exist
at once.  Windows are rows of one batch.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .model import recurrent_states


@dataclass
class Record:
    """What was measured for one kind of cache; float32 arrays (windows, positions)."""

    nll: np.ndarray  # of the true next token, nats; one position fewer
    kld: np.ndarray  # from the first kind's distribution to this one's, nats
    agree: np.ndarray  # whether both have the same most likely token


def _log_probs(logits):
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def compare(model, windows, caches, *, step=256, progress=lambda tokens: None):
    """Records of each kind of cache; the first is what the others are compared with.

    Args:
        model: a model of mlx-lm.
        windows: token ids (W, L).
        caches: {name: list of fresh caches}.
        step (int): positions given to the model at a time.
        progress: called with the number of tokens just done.

    Returns:
        {name: Record}.
    """
    windows = mx.array(windows)
    length = windows.shape[1]
    parts = {name: ([], [], []) for name in caches}
    for start in range(0, length, step):
        tokens = windows[:, start : start + step]
        following = windows[:, start + 1 : start + step + 1]
        first = None
        for name, cache in caches.items():
            log_p = _log_probs(model(tokens, cache=cache))
            first = log_p if first is None else first
            nll = -mx.take_along_axis(log_p[:, : following.shape[1]], following[..., None], axis=-1)[..., 0]
            kld = (mx.exp(first) * (first - log_p)).sum(-1)
            agree = mx.argmax(first, -1) == mx.argmax(log_p, -1)
            mx.eval(nll, kld, agree, recurrent_states(cache))
            for done, x in zip(parts[name], (nll, kld, agree), strict=True):
                done.append(np.array(x.astype(mx.float32)))
            progress(tokens.size)
    return {name: Record(*(np.concatenate(x, axis=1) for x in done)) for name, done in parts.items()}


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


def summarise(record, reference, start=0, stop=None):
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
