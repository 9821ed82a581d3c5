"""Balance: a linear map of keys before they are coded, and its inverse transpose on queries.

A rotation spreads a vector's error evenly over all directions, so codes are worst where keys vary most in directions that
queries hardly ask for, or queries ask most in directions where keys hardly vary.  With keys k A and queries q A^-T the
scores stay, and the error of a score has the mean square |k A|^2 |q A^-T|^2 / D^2, up to the codes' distortion.  Over a
text that is smallest when A A' is the geometric mean of S, the queries' second moment, and V^-1, the inverse of the keys'
covariance: both sides are then spread in the same way.  docs/algorithm.md has the rest.
"""

import mlx.core as mx
import numpy as np

QUERY_RIDGE = 0.01  # of a moment's mean diagonal, added to it: a short text did not look everywhere
KEY_RIDGE = 0.001
OWN = 4.0


def _power(matrix, exponent):
    """A symmetric positive matrix to a power."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, values[-1] * 1e-9) ** exponent) @ vectors.T


def _with_ridge(moment, part):
    moment = (moment + moment.T) / 2
    return moment + part * np.trace(moment) / len(moment) * np.eye(len(moment))


def of_moments(queries, keys):
    """The map A (D, D) float64, symmetric, of one head.

    Args:
        queries (D, D): mean of q' q over the queries that the head answers.
        keys (D, D): covariance of its keys.

    Returns:
        A, scaled so that keys keep their mean square length."""
    s, v = _with_ridge(queries, QUERY_RIDGE), _with_ridge(keys, KEY_RIDGE)
    root = _power(s, 0.5)
    mean = root @ _power(root @ v @ root, -0.5) @ root  # of s and v^-1
    a = _power(mean, 0.5)
    return a * np.sqrt(np.trace(v) / np.trace(a @ v @ a.T))


def turns(attention, dim, offsets):
    """What a layer's RoPE does to a vector that moves on by so many positions: matrices T (n, D, D) float64, x -> x T, or
    None when the layer has no RoPE that is known to be one."""
    rope = getattr(attention, "rope", None)
    if rope is None:
        return None
    rotary = getattr(attention, "qk_rope_head_dim", dim)
    if rotary != dim:  # multi-head latent attention: RoPE turns the end of an expanded key, and nothing of a latent
        if dim != rotary + getattr(attention, "qk_nope_head_dim", dim):
            return None
        return _at_the_end(_turns(rope, rotary, offsets), dim)
    return _turns(rope, dim, offsets)


def _at_the_end(found, dim):
    """Turns of a vector's last coordinates as those of the vector."""
    if found is None:
        return None
    whole = np.tile(np.eye(dim), (len(found), 1, 1))
    whole[:, -found.shape[1] :, -found.shape[1] :] = found
    return whole


def _turns(rope, dim, offsets):
    unit = mx.eye(dim)[:, None, None]  # dim sequences of one token
    try:
        found = [np.array(rope(unit, offset=int(offset)).astype(mx.float32))[:, 0, 0] for offset in offsets]
    except (TypeError, ValueError):
        return None
    found = np.stack(found).astype(np.float64)
    found = found / np.sqrt(np.square(found).sum((1, 2)) / dim)[:, None, None]  # some ropes scale as well
    if not np.allclose(found @ found.swapaxes(1, 2), np.eye(dim), atol=1e-3):
        return None
    return found


def offsets(length, positions):
    """(how far to move windows of `length` tokens on, the weight of each), to cover a context of `positions`.

    0, L, 3L, 7L, ...: each stands for twice the positions of the one before.  The windows' own count OWN times, since short
    contexts are the usual ones; longer ones must not fail, though (docs/quality_studies.md)."""
    found = [0]
    while 2 * found[-1] + length < positions:
        found.append(2 * found[-1] + length)
    weights = np.array([OWN] + [1.0] * (len(found) - 1))
    return found, weights / weights.sum()


def turned(turn, weights, moments, means=None):
    """Second moments (H, D, D), and means (H, D), averaged over the turns (n, D, D)."""
    over = sum(w * t.T @ moments @ t for w, t in zip(weights, turn, strict=True))
    return over, None if means is None else sum(w * means @ t for w, t in zip(weights, turn, strict=True))
