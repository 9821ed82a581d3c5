"""A choice of bits for each layer's keys and values, as a value, and the search for one.

Divergence is nearly a sum: of what each layer's keys and each layer's values lose by themselves, which goes with the squared
error of their codes.  Bits are then worth most where a byte takes off most divergence, and the best choices for all
budgets lie on one way: from 2 bits everywhere to 8 bits everywhere, the dearest step first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..caches.rotating import PackedWindow
from ..caches.slots import REPLACED, slot_name

AUTO = "auto"  # what stands for the bits that were chosen
WIDTHS = (2, 3, 4, 8)
SPARE = 256  # tokens by which the copies of exact ones grow


Choice = Mapping[int, tuple[int, int]]


class Policy(NamedTuple):
    """What was chosen for a model's slots, and what it was measured to cost."""

    widths: Choice  # {slot: (bits of keys, of values)}
    recent: int  # newest and first tokens that queries read exactly
    sink: int
    budget: str
    measured: Mapping[str, float]  # on text held out from the choice

    def to_json(self) -> str:
        """As it stands in a calibration file."""
        return json.dumps(self._asdict() | {"widths": {str(slot): list(w) for slot, w in self.widths.items()}})

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """ValueError when `text` is not what to_json() writes."""
        try:
            found = json.loads(text)
            found["widths"] = {int(slot): (k, v) for slot, (k, v) in found["widths"].items()}
            policy = cls(**found)
            known = all(bits in WIDTHS for pair in policy.widths.values() for bits in pair)
            if not known or not all(type(n) is int and n >= 0 for n in (policy.recent, policy.sink)):
                raise ValueError(text)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"[load_calibration] the file's choice of bits cannot be read: {text[:80]!r}") from error
        return policy


def of(calibration, *, key_bits=None, value_bits=None, code=None) -> Policy:
    """The choice of bits that comes with a calibration, for bits="auto"; ValueError where there is none, or where other
    settings contradict it."""
    for name, value in (("key_bits", key_bits), ("value_bits", value_bits)):
        if value is not None:
            raise ValueError(
                f"[enable] bits='auto' takes the bits chosen for each layer: leave {name} out; got {value}"
            )
    if code not in (None, "trellis"):
        raise ValueError(f"[enable] bits='auto' takes bits that were chosen with trellis codes; got code={code!r}")
    policy = getattr(calibration, "policy", None)
    if policy is None:
        raise ValueError(
            "[enable] bits='auto' needs bits that were chosen for this model, and there are none: run python -m "
            "turboquant_mlx calibrate --model FOLDER --budget kld=0.01 once, and give calibration=FOLDER"
        )
    return policy


def by_slot(widths: Choice, slots: Mapping[tuple, type]) -> dict[Any, dict[str, Any]]:
    """{slot: the settings of its cache} of a choice for the `slots` {path: class}; ValueError where it is for others."""
    kinds = {slot_name(path): kind for path, kind in slots.items()}
    if widths.keys() != kinds.keys():
        raise ValueError(
            f"[enable] the chosen bits must be of the slots that are packed, {list(kinds)}; they are of {list(widths)}"
        )
    exact = {slot: {"recent": 0, "sink": 0} for slot, kind in kinds.items() if issubclass(REPLACED[kind], PackedWindow)}
    return {
        slot: {"key_bits": keys, "value_bits": values} | exact.get(slot, {})  # a window keeps the bits chosen for it
        for slot, (keys, values) in widths.items()
    }


class Slot(NamedTuple):
    """The shape of one slot's cache."""

    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None  # tokens held at most

    def token_bytes(self, side: int, bits: int) -> int:
        """Bytes of one token's keys (side 0) or values (1)."""
        return self.heads * ((self.value_dim if side else self.key_dim) * bits // 8 + 2)

    def tokens(self, context: int) -> int:
        """Tokens held after `context` of them."""
        return context if self.window is None else min(context, self.window)

    def copies(self, recent: int, sink: int) -> int:
        """Bytes of the copies of exact tokens at most; windows have none."""
        if self.window is not None or not (recent or sink):
            return 0
        return (recent + sink + SPARE) * self.heads * (self.key_dim + self.value_dim + 4)


def token_bytes(slots: Mapping[int, Slot], widths: Choice) -> int:
    """Bytes that one more token takes, in all slots that grow."""
    growing = {slot: widths[slot] for slot, s in slots.items() if s.window is None}
    return sum(slots[slot].token_bytes(side, bits) for slot, pair in growing.items() for side, bits in enumerate(pair))


def total_bytes(slots: Mapping[int, Slot], widths: Choice, context: int, recent: int, sink: int) -> int:
    """Bytes of all caches after `context` tokens."""
    return sum(
        s.tokens(context) * sum(s.token_bytes(side, bits) for side, bits in enumerate(widths[slot]))
        + s.copies(recent, sink)
        for slot, s in slots.items()
    )


def everywhere(slots: Mapping[int, Slot], bits: int) -> dict[int, tuple[int, int]]:
    """The same bits for all."""
    return {slot: (bits, bits) for slot in slots}


def way(
    slots: Mapping[int, Slot], losses: Mapping[tuple[int, int], float], errors: Mapping[int, float], context: int
) -> Iterator[dict[int, tuple[int, int]]]:
    """Choices from 2 bits everywhere to 8 bits everywhere, each by one step of one side better than the one before.

    Args:
        slots: {slot: its shape}.
        losses: {(slot, side): divergence at a squared error of 1}.
        errors: {bits: squared error of codes of that width}.
        context (int): tokens at which bytes are counted.
    """
    steps = []
    for (slot, side), loss in losses.items():
        for before, after in zip(WIDTHS, WIDTHS[1:], strict=False):
            paid = slots[slot].token_bytes(side, after) - slots[slot].token_bytes(side, before)
            gain = loss * (errors[before] - errors[after])
            steps.append((gain / (paid * slots[slot].tokens(context)), -after, slot, side))
    widths = everywhere(slots, WIDTHS[0])
    yield dict(widths)
    for _, after, slot, side in sorted(steps, reverse=True):
        pair = list(widths[slot])
        pair[side] = -after
        widths[slot] = (pair[0], pair[1])
        yield dict(widths)


def predicted(losses: Mapping[tuple[int, int], float], errors: Mapping[int, float], widths: Choice) -> float:
    """The sum of what each side loses."""
    return sum(loss * errors[widths[slot][side]] for (slot, side), loss in losses.items())
