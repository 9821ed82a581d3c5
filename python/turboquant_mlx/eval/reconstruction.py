"""How well codes reconstruct a model's real keys and values, per layer and head, beside the theoretical value."""

import mlx.core as mx
import numpy as np

from ..ops import decode, encode
from .modes import FloatCache, affine, to_half

# Mean squared error per coordinate of the best b-bit scalar quantizer of N(0, 1) (Max, 1960).
LLOYD_MAX = {2: 0.117482, 3: 0.034548, 4: 0.009501}


def theoretical(bits):
    """(with the scale of least error, with the length-preserving scale that is stored).

    A Lloyd-Max quantizer's output has energy 1 - D for an input of energy 1 and error D; stretching it to energy 1
    makes the error 2 - 2 sqrt(1 - D), a little more than D."""
    d = LLOYD_MAX[bits]
    return d, 2 - 2 * np.sqrt(1 - d)


def capture(model, tokens, step=512):
    """{slot: (keys, values)} of a text (W, L): float32 arrays (W, H_kv, L, D), read through float16 caches."""
    from ..calibration import _float_caches
    from ..slots import _replace

    made = {}

    def make(path):
        made[path[0] if len(path) == 1 else path] = cache = FloatCache(to_half)
        return cache

    caches = _replace(_float_caches(model), make)
    if not made:
        raise ValueError("[eval] the model has no KVCache slot, so there is nothing to compress")
    tokens = mx.array(tokens)
    for start in range(0, tokens.shape[1], step):
        mx.eval(
            model(tokens[:, start : start + step], cache=caches)[:, -1],
            [c.state for c in caches if hasattr(c, "cache")],
        )
    histories = {slot: c for slot, c in made.items() if c.keys is not None}
    return {
        slot: tuple(x[:, :, : c.offset].astype(mx.float32) for x in (c.keys, c.values)) for slot, c in histories.items()
    }


def relative_error(x, code):
    """Per head: sum |x - x^|^2 / sum |x|^2 of x (W, H, L, D)."""
    error = mx.square(x - code(x)).sum((0, 2, 3)) / mx.square(x).sum((0, 2, 3))
    return np.array(error)


def tq(bits, centre=None):
    """x -> x^ by the package's codes."""
    return lambda x: decode(*encode(x, bits, centre=centre), bits, centre=centre)


def table(captured, bits, calibration=None):
    """Rows (slot, side, head, energy share of the mean, error of TQ, of centred TQ, of affine) for one width."""
    rows = []
    for slot, sides in captured.items():
        for side, x in zip(("keys", "values"), sides, strict=True):
            centre = None if calibration is None else calibration[slot][side == "values"].astype(mx.float32)

            mean = x.mean((0, 2))
            share = np.array(mx.square(mean).sum(-1) / mx.square(x).sum(-1).mean((0, 2)))
            plain = relative_error(x, tq(bits))
            centred = relative_error(x, tq(bits, centre)) if centre is not None else np.full(len(plain), np.nan)
            other = relative_error(x, affine(bits))
            for head in range(len(plain)):
                rows.append(
                    {
                        "slot": slot,
                        "side": side,
                        "head": head,
                        "mean_share": float(share[head]),
                        "tq": float(plain[head]),
                        "tq_centred": float(centred[head]),
                        "affine": float(other[head]),
                    }
                )
    return rows
