"""Checks of what callers pass to the caches, so that an error names the class, the rule and the value found."""

from __future__ import annotations

import inspect
import operator
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar

import mlx.core as mx

from .. import _core

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Function = TypeVar("_Function", bound=Callable[..., Any])
CODES = ("scalar", "trellis")
DEFAULT_CODE = "trellis"  # of widths of 2 and 3 bits
RECENT, SINK = 128, 4  # tokens that queries read exactly unless asked for otherwise
EXACT_WINDOW = 1024  # tokens of the largest window that is held at 8 bits where queries read their newest exactly
Centres: TypeAlias = "tuple[mx.array | None, mx.array | None]"
Code: TypeAlias = "str | tuple[str | None, str | None] | None"
Feedback: TypeAlias = "tuple[mx.array | None, mx.array | None]"


class Settings(TypedDict, total=False):
    """The keywords that every packed cache takes beside `bits`: how it codes, and what it keeps exact.

    TurboQuantKVCache says what each means."""

    key_bits: int | None
    value_bits: int | None
    code: Code
    seed: int
    centres: Centres | None
    feedback: Feedback | None
    key_map: mx.array | None
    recent: int | None
    sink: int | None


def spelled_out(function: _Function) -> _Function:
    """`function` with the keywords of Settings in its signature in place of **settings, as help() shows it."""
    signature = inspect.signature(function)
    given = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = []
    for name, kind in Settings.__annotations__.items():
        words = getattr(kind, "__forward_arg__", kind)  # TypedDict keeps annotations as such references
        default = 0 if name == "seed" else None
        named.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=words))
    vars(function)["__signature__"] = signature.replace(parameters=[*given, *named])
    return function


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


def _width(owner: str, name: str, bits: int) -> int:
    try:
        found = operator.index(bits)
    except TypeError:
        found = None
    if found not in (2, 3, 4, 8):
        raise ValueError(f"[{owner}] {name} must be 2, 3, 4 or 8; got {bits!r}")
    return found


def code_names(owner: str, code: Code) -> tuple[str, str]:
    """The names of the codes asked for, of keys and of values: one name is of both."""
    keys, values = code if isinstance(code, (tuple, list)) and len(code) == 2 else (code, code)
    return code_name(owner, keys), code_name(owner, values)


def code_name(owner: str, code: str | None) -> str:
    """The name of the codes asked for, None being the default; ValueError for one that does not exist."""
    if code is None:
        return DEFAULT_CODE
    if not isinstance(code, str) or code not in CODES:
        raise ValueError(f"[{owner}] code must be None, {' or '.join(map(repr, CODES))}; got {code!r}")
    return code


def _pair(owner: str, name: str, shape: str, pair: Any) -> Any:
    """A pair (keys, values) of arrays or None; None is a pair of them."""
    found = (None, None) if pair is None else pair
    if not (
        isinstance(found, (tuple, list))
        and len(found) == 2
        and all(x is None or isinstance(x, mx.array) for x in found)
    ):
        raise ValueError(f"[{owner}] {name} must be a pair (keys, values) of arrays {shape}; got {pair!r}")
    return tuple(found)


_query_maps: dict[int, Any] = {}  # id of a key map: its query map, while the key map lives


def query_maps(owner: str, key_map: Any) -> Any:
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


def exact_tokens(owner: str, recent: int | None, sink: int | None) -> tuple[int, int]:
    """(recent, sink) as whole numbers, None being the defaults: 128 and 4, or 0 where no kernel reads exact copies.
    ValueError where numbers are given that the kernels cannot serve."""
    readable = _core.reads_exact_copies()
    recent = RECENT * readable if recent is None else whole(owner, "recent", recent, below=2**20)
    sink = SINK * readable if sink is None else whole(owner, "sink", sink, below=2**20)
    if (recent or sink) and not readable:
        raise ValueError(
            f"[{owner}] the kernels of this GPU cannot read exact copies: recent and sink must be 0; got {recent} and "
            f"{sink}"
        )
    return recent, sink


def coding(owner: str, bits: int = 3, **settings: Unpack[Settings]) -> _core.CacheCoding:
    """How a cache of the class `owner` codes, from the arguments of its constructor.

    Raises:
        ValueError: a setting is out of range.
        TypeError: there is no such setting.
    """
    unknown = sorted(settings.keys() - Settings.__annotations__.keys())
    if unknown:
        raise TypeError(f"{owner}.__init__() got an unexpected keyword argument '{unknown[0]}'")
    bits = _width(owner, "bits", bits)
    codes, seed = code_names(owner, settings.get("code")), whole(owner, "seed", settings.get("seed", 0), below=2**64)
    centres = _pair(owner, "centres", "(H_kv, D)", settings.get("centres"))
    feedback = _pair(owner, "feedback", "(H_kv, D, D)", settings.get("feedback"))

    def side(index: int, name: str, own_bits: int | None) -> _core.Coding:
        width = bits if own_bits is None else _width(owner, name, own_bits)
        return _core.Coding(width, code=codes[index], seed=seed, centre=centres[index], feedback=feedback[index])

    keys, values = side(0, "key_bits", settings.get("key_bits")), side(1, "value_bits", settings.get("value_bits"))
    key_map, query_map = query_maps(owner, settings.get("key_map"))
    recent, sink = exact_tokens(owner, settings.get("recent"), settings.get("sink"))
    return _core.CacheCoding(keys, values, key_map=key_map, query_map=query_map, recent=recent, sink=sink)


def window_coding(owner: str, max_size: int, settings: Settings) -> Settings:
    """The settings of a window of `max_size` tokens where `settings` were asked for.  Windows have no copies; where queries
    read their newest tokens exactly, one of at most EXACT_WINDOW tokens is held at 8 bits, which need no feedback."""
    recent, _ = exact_tokens(owner, settings.get("recent"), settings.get("sink"))
    window: Settings = {**settings, "recent": 0, "sink": 0}
    if recent and max_size <= EXACT_WINDOW:
        window.update({"key_bits": 8, "value_bits": 8, "feedback": None})
    return window


def as_list(numbers: Any) -> list[int]:
    """Padding, lengths and rows come as lists, tuples or arrays of whole numbers, or None for none."""
    if numbers is None:
        return []
    return numbers.tolist() if hasattr(numbers, "tolist") else list(numbers)


def padding(owner: str, numbers: Any) -> list[int]:
    """Pads of each row; ValueError unless they are a list of whole numbers of at least 0."""
    try:
        listed = list(as_list(numbers))
    except TypeError:
        raise ValueError(f"[{owner}] left_padding must be a list of numbers, one a row; got {numbers!r}") from None
    return [whole(owner, "left_padding", n) for n in listed]
