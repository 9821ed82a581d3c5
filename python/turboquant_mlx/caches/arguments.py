"""Checks of what callers pass to the caches, so that an error names the class, the rule and the value found."""

from __future__ import annotations

import operator
import weakref
from typing import Any, TypeAlias

import mlx.core as mx

from .. import _core

CODES = ("scalar", "trellis")
DEFAULT_CODE = "trellis"  # of widths of 2 and 3 bits
RECENT, SINK = 0, 0  # tokens that queries read exactly unless asked for otherwise
Centres: TypeAlias = "tuple[mx.array | None, mx.array | None]"
Feedback: TypeAlias = "tuple[mx.array | None, mx.array | None]"


def whole(owner: str, name: str, number: int, least: int = 0, below: int = 2**31) -> int:
    """`number` as an int; ValueError unless it is a whole number with least <= number < below."""
    try:
        found = operator.index(number)
    except TypeError:
        raise ValueError(f"[{owner}] {name} must be a whole number; got {number!r}") from None
    if found < least:
        raise ValueError(f"[{owner}] {name} must be at least {least}; got {found}")
    if found >= below:
        raise ValueError(f"[{owner}] {name} must be less than {below}; got {found}")
    return found


def _width(owner, name, bits):
    try:
        found = operator.index(bits)
    except TypeError:
        found = None
    if found not in (2, 3, 4, 8):
        raise ValueError(f"[{owner}] {name} must be 2, 3, 4 or 8; got {bits!r}")
    return found


def code_name(owner: str, code: str | None) -> str:
    """The name of the codes asked for, None being the default; ValueError for one that does not exist."""
    if code is None:
        return DEFAULT_CODE
    if not isinstance(code, str) or code not in CODES:
        raise ValueError(f"[{owner}] code must be None, {' or '.join(map(repr, CODES))}; got {code!r}")
    return code


def _pair(owner, name, shape, pair):
    """A pair (keys, values) of arrays or None; None is a pair of them."""
    found = (None, None) if pair is None else pair
    if not (
        isinstance(found, (tuple, list))
        and len(found) == 2
        and all(x is None or isinstance(x, mx.array) for x in found)
    ):
        raise ValueError(f"[{owner}] {name} must be a pair (keys, values) of arrays {shape}; got {pair!r}")
    return tuple(found)


_query_maps: dict = {}  # id of a key map: its query map, while the key map lives


def query_maps(owner, key_map):
    """(key map, query map), or (None, None).  Caches that share a key map share the inverse, too."""
    if key_map is None:
        return None, None
    if not isinstance(key_map, mx.array):
        raise ValueError(f"[{owner}] key_map must be an array (H_kv, D, D) of float32; got {key_map!r}")
    found = _query_maps.get(id(key_map))
    if found is None:
        found = _query_maps[id(key_map)] = _core.inverse_transpose(key_map)
        weakref.finalize(key_map, _query_maps.pop, id(key_map), None)
    return key_map, found


def coding(
    owner, bits, key_bits, value_bits, code, seed, centres, feedback, key_map=None
) -> tuple[Any, Any, Any, Any, Any, Any, Any]:
    """(key bits, value bits, seed, centres, feedback, code, maps): the arguments that every cache takes, checked, as the
    extension's; see TurboQuantKVCache."""
    bits = _width(owner, "bits", bits)
    key_bits = bits if key_bits is None else _width(owner, "key_bits", key_bits)
    value_bits = bits if value_bits is None else _width(owner, "value_bits", value_bits)
    centres = _pair(owner, "centres", "(H_kv, D)", centres)
    feedback = _pair(owner, "feedback", "(H_kv, D, D)", feedback)
    code, maps = code_name(owner, code), query_maps(owner, key_map)
    return key_bits, value_bits, whole(owner, "seed", seed, below=2**64), centres, feedback, code, maps


def exact_tokens(owner: str, recent: int | None, sink: int | None) -> tuple[int, int]:
    """(recent, sink) as whole numbers, None being the defaults; ValueError where no kernel reads exact copies."""
    recent = RECENT if recent is None else whole(owner, "recent", recent, below=2**20)
    sink = SINK if sink is None else whole(owner, "sink", sink, below=2**20)
    if (recent or sink) and not _core.reads_exact_copies():
        raise ValueError(
            f"[{owner}] the kernels of this GPU cannot read exact copies: recent and sink must be 0; got {recent} and "
            f"{sink}"
        )
    return recent, sink


def as_list(numbers) -> list[int]:
    """Padding, lengths and rows come as lists, tuples or arrays of whole numbers, or None for none."""
    if numbers is None:
        return []
    return numbers.tolist() if hasattr(numbers, "tolist") else list(numbers)


def padding(owner: str, numbers) -> list[int]:
    """Pads of each row; ValueError unless they are a list of whole numbers of at least 0."""
    try:
        listed = list(as_list(numbers))
    except TypeError:
        raise ValueError(f"[{owner}] left_padding must be a list of numbers, one a row; got {numbers!r}") from None
    return [whole(owner, "left_padding", n) for n in listed]
