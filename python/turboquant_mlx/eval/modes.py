"""The caches that are compared, by name.

fp16         keys and values rounded to float16
affine4      MLX's affine codes, groups of 64 (QuantizedKVCache's numbers)
tq3          TurboQuant, 3 bits
tq3t, tq3s   the same in trellis codes, in scalar codes
k4v3         TurboQuant, keys 4 and values 3 bits
tq3c, k4v3c  the same with the model's centres
tq3f, k4v3f  with its centres and its feedback
auto         the bits, and the exact tokens, that `calibrate --budget` chose
tq3r128s4    TurboQuant, 3 bits, with the newest 128 and the first 4 tokens exact (without r and s none are)
"""

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ..caches.slots import REPLACED, own_caches, replace_slots
from ..enable import packing

AFFINE_GROUP = 64  # numbers that share a scale in MLX's affine codes, and what a head_dim must be a multiple of


class _Coded:
    """Holds what two functions make of keys and values as floats, for codes that are judged by their numbers alone."""

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(self.code_keys(keys), self.code_values(values))


class FloatCache(_Coded, KVCache):
    """A KVCache of such numbers."""

    def __init__(self, code_keys, code_values=None):
        super().__init__()
        self.code_keys, self.code_values = code_keys, code_values or code_keys


class FloatWindow(_Coded, RotatingKVCache):
    """A RotatingKVCache of such numbers."""

    def __init__(self, max_size, keep, code_keys, code_values):
        super().__init__(max_size, keep)
        self.code_keys, self.code_values = code_keys, code_values


def float_caches(model, coders):
    """A model's caches with such numbers in every slot that `enable` packs.  coders: path -> (of keys, of values)."""

    def make(path, c):
        if type(c) not in REPLACED:
            return None
        return FloatCache(*coders(path)) if type(c) is KVCache else FloatWindow(c.max_size, c.keep, *coders(path))

    return replace_slots(own_caches(model), make)


def to_half(x):
    """Rounded to float16 and back."""
    return x.astype(mx.float16).astype(x.dtype)


def affine(bits, group=AFFINE_GROUP):
    """The numbers of MLX's affine codes with float16 scales.  MLX's CPU products on such codes are too slow to measure
    through, so they are decoded first; tests hold them equal to `QuantizedKVCache`."""

    def code(x):
        if x.shape[-1] % group:
            raise ValueError(f"[affine] head_dim must be a multiple of {group}; got {x.shape[-1]}")
        packed = mx.quantize(x.astype(mx.float16), group_size=group, bits=bits)
        return mx.dequantize(*packed, group_size=group, bits=bits).astype(x.dtype)

    return code


@dataclass(frozen=True)
class Mode:
    """One kind of cache."""

    name: str
    kind: str  # fp16, affine, tq or auto
    key_bits: int
    value_bits: int
    centred: bool = False
    fed: bool = False  # with feedback
    code: str | None = None
    recent: int = 0  # newest and first tokens that queries read exactly
    sink: int = 0

    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes of one head's key and value."""
        if self.kind == "fp16":
            return 4 * head_dim
        extra = 4 * head_dim // AFFINE_GROUP if self.kind == "affine" else 2
        return (self.key_bits + self.value_bits) * head_dim // 8 + 2 * extra

    def make_caches(self, model: Any, calibration: Any = None) -> list[Any]:
        """Fresh caches for `model`, with this mode's in every slot that `enable` packs."""
        if self.kind == "fp16":
            return float_caches(model, lambda path: (to_half, to_half))
        if self.kind == "affine":
            return float_caches(model, lambda path: (affine(self.key_bits), affine(self.value_bits)))
        if self.kind == "auto":
            return packing(model, "auto", calibration=calibration)[0]()
        if not self.centred:
            calibration = None
        elif not calibration:
            raise ValueError(f"[eval] {self.name} needs centres: give --calibration, or --calibrate-text")
        elif not self.fed:
            calibration = {slot: found.without_feedback() for slot, found in calibration.items()}
        elif not any(found.feedback for found in calibration.values()):
            raise ValueError(f"[eval] {self.name} needs feedback, and the calibration has none")
        make, _ = packing(
            model,
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            code=self.code,
            calibration=calibration,
            recent=self.recent,
            sink=self.sink,
        )
        return make()

    def check(self, model: Any, calibration: Any = None) -> None:
        """ValueError when the model cannot run on such caches; computes nothing."""
        caches = self.make_caches(model, calibration)
        try:
            model(mx.zeros((1, 2), mx.int32), cache=caches)
        except Exception as error:  # whatever a model makes of caches that it cannot use
            raise ValueError(f"[eval] the model cannot be measured with {self.name}: {error}") from error


def parse_mode(name: str) -> Mode:
    """The mode of a name; ValueError names what is known."""
    if name == "fp16":
        return Mode(name, "fp16", 16, 16)
    if name == "auto":
        return Mode(name, "auto", 0, 0, centred=True, fed=True)
    if match := re.fullmatch(r"affine([2348])", name):
        return Mode(name, "affine", int(match[1]), int(match[1]))
    if match := re.fullmatch(r"(?:tq([2348])|k([2348])v([2348]))([ts]?)([cf]?)(?:r(\d+))?(?:s(\d+))?", name):
        both, key, value, code, centred, recent, sink = match.groups()
        code = {"t": "trellis", "s": "scalar", "": None}[code]
        widths = int(both or key), int(both or value)
        return Mode(name, "tq", *widths, bool(centred), centred == "f", code, int(recent or 0), int(sink or 0))
    raise ValueError(
        f"[eval] modes are fp16, auto, affine2/3/4/8, tq2/3/4/8 and k3v4 and the like, with a t for trellis codes or an s for "
        f"scalar ones, then a c for centred or an f for centred with feedback, then r128 and s4 for that many newest and "
        f"first tokens exact; got {name!r}"
    )
