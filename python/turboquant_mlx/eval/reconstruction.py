"""How well codes reconstruct a model's real keys and values, per layer and head, beside the theoretical value."""

import mlx.core as mx
import numpy as np

from ..caches.slots import kv_slots, own_caches, slot_name
from ..calibration import as_calibration
from ..ops import decode, encode
from .model import recurrent_states
from .modes import AFFINE_GROUP, affine, float_caches, to_half

# Mean squared error per coordinate of the best b-bit scalar quantizer of N(0, 1) (Max, 1960).
# Of 8 bits and of trellis codes, which have no such optimum: what the codes of this package measure at D = 256.
LLOYD_MAX = {2: 0.117482, 3: 0.034548, 4: 0.009501, 8: 0.000048}
TRELLIS = {2: 0.08483, 3: 0.02315}


def theoretical(bits, code):
    """(with the scale of least error, with the length-preserving scale that is stored).

    A Lloyd-Max quantizer's output has energy 1 - D for an input of energy 1 and error D; stretching it to energy 1
    makes the error 2 - 2 sqrt(1 - D), a little more than D."""
    d = (TRELLIS if code == "trellis" and bits in TRELLIS else LLOYD_MAX)[bits]
    return d, 2 - 2 * np.sqrt(1 - d)


def capture(model, tokens, step=512):
    """{slot: (keys, values)} of a text (W, L): float32 arrays (W, H_kv, L, D), read through float16 caches."""
    made = {}

    def recorder(path, side):
        parts = made.setdefault(path, ([], []))[side]

        def record(x):
            parts.append(to_half(x))
            return parts[-1]

        return record

    kv_slots(own_caches(model), "eval")  # raises when there is none
    caches = float_caches(model, lambda path: (recorder(path, 0), recorder(path, 1)))
    tokens = mx.array(tokens)
    for start in range(0, tokens.shape[1], step):
        mx.eval(model(tokens[:, start : start + step], cache=caches)[:, -1], recurrent_states(caches))
    return {  # a slot that reads another layer's cache was given nothing
        slot_name(path): tuple(mx.concatenate(x, axis=2).astype(mx.float32) for x in sides)
        for path, sides in made.items()
        if sides[0]
    }


def relative_error(x, code):
    """Per head: sum |x - x^|^2 / sum |x|^2 of x (W, H, L, D)."""
    error = mx.square(x - code(x)).sum((0, 2, 3)) / mx.square(x).sum((0, 2, 3))
    return np.array(error)


def tq(bits, centre=None, feedback=None, seed=0, code=None):
    """x -> x^ by the package's codes."""
    return lambda x: decode(
        *encode(x, bits, seed=seed, centre=centre, feedback=feedback, code=code),
        bits,
        seed=seed,
        centre=centre,
        code=code,
    )


def table(captured, bits, calibration=None, code=None):
    """Rows (slot, side, head, energy share of the mean, error of TQ, of centred TQ, of TQ with feedback, of affine) for
    one width; nan where a code does not exist."""
    rows = []
    for slot, sides in captured.items():
        found = as_calibration((calibration or {}).get(slot))
        for side, x in enumerate(sides):
            centre, feedback = found.centres[side], (found.feedback or (None, None))[side]
            mean = x.mean((0, 2))
            codes = {"tq": tq(bits, code=code)}
            if centre is not None:
                centre = centre.astype(mx.float32)
                codes["tq_centred"] = tq(bits, centre, code=code)
            if feedback is not None:
                codes["tq_feedback"] = tq(bits, centre, feedback, found.seed, code)
            if x.shape[-1] % AFFINE_GROUP == 0:
                codes["affine"] = affine(bits)
            share = np.array(mx.square(mean).sum(-1) / mx.square(x).sum(-1).mean((0, 2)))
            errors = {name: relative_error(x, code) for name, code in codes.items()}
            for head in range(x.shape[1]):
                row = {"slot": slot, "side": ("keys", "values")[side], "head": head, "mean_share": float(share[head])}
                for name in ("tq", "tq_centred", "tq_feedback", "affine"):
                    row[name] = float(errors[name][head]) if name in errors else float("nan")
                rows.append(row)
    return rows
