"""What all packed caches share, in mlx-lm's cache protocol.  The logic is C++ (turboquant/mlx/kv_cache.h and its like)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from .. import _core
from .arguments import Centres, Feedback, code_names, query_maps
from .identity import CODEBOOK, Identity, read


def inner_slots(cache: Any) -> Any:
    """The slots in a CacheList, of mlx-lm or mlx-vlm, or in a tuple; None of a cache."""
    return cache if isinstance(cache, tuple) else getattr(cache, "caches", None)


def leaves(caches: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """(path, cache) of every slot; a CacheList holds further slots."""
    for i, c in enumerate(caches):
        inner = inner_slots(c)
        if inner is not None:
            yield from leaves(inner, (*path, i))
        else:
            yield (*path, i), c


def layer_name(path: tuple[int, ...]) -> str:
    return "layer " + ".".join(map(str, path))


class PackedCache(_BaseCache):
    """What all packed caches share: a C++ cache in `_core`, and everything that only reads it."""

    step = 256  # tokens that buffers grow by
    group_size = None  # mlx-lm passes it on to the attention hook, which has no use for it
    fingerprint = ""  # of the model that fills the cache: of several models, joined by +
    _names = None  # the Names of the model that enable() was called for; tells a fingerprint that has changed
    _leads = False  # the first packed slot of its model looks whether it has; the others read what that found
    _core: Any  # the C++ cache of this kind

    @classmethod
    def _wrap(cls, core: Any, like: PackedCache | None = None) -> Any:
        """A cache around `core`, of the model that fills `like`."""
        self = cls.__new__(cls)
        self._core = core
        self._last_kernel = _core.LastKernel()
        if like is not None:
            self._named_like(like)
        return self

    def _named_like(self, other: PackedCache) -> None:
        self.fingerprint, self._names, self._leads = other.fingerprint, other._names, other._leads

    def __copy__(self) -> Any:
        """A copy that shares no later write; the buffers are shared until one of the two writes."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._core = copy.deepcopy(self._core)
        other._last_kernel = _core.LastKernel(self._last_kernel)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.copy(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """As mlx-lm saves it: a pickle holds the codes, and its cache is filled by whichever model comes next."""
        *arrays, identity = self.state
        return _unpickled, (type(self), arrays, str(identity))

    def _note_model(self, first: bool, tokens: int) -> None:
        """After an append of `tokens` tokens, the `first` ones or not: notes whose they are.  Single tokens continue an
        answer, for which nobody waits to change the weights."""
        if self._names is None or (tokens == 1 and not first):
            return
        name = self._names.current() if self._leads else self._names.latest
        if first:
            self.fingerprint = name
        elif name not in self.fingerprint:
            self.fingerprint += f"+{name}"

    @property
    def keys(self) -> mx.array | None:
        """The codes of the keys, spare room included; None when nothing was appended.

        Models under pipeline parallelism assign mx.depends(cache.keys, sent) to it, so that whatever reads the cache
        waits for what they send.  Nothing else can be assigned."""
        return None if self._core.empty else self._core.arrays[0]

    @keys.setter
    def keys(self, array: Any) -> None:
        held = self.keys
        if held is None or not isinstance(array, mx.array) or (array.shape, array.dtype) != (held.shape, held.dtype):
            raise ValueError(
                f"[{type(self).__name__}] keys takes mx.depends(cache.keys, ...) alone: packed keys are appended by "
                f"update_and_fetch; got {type(array).__name__}"
            )
        self._core.tie(array)

    @property
    def bits(self) -> int:
        """Width of the keys; its presence makes mlx-lm send attention to the hook that apply_patch() installs."""
        return self._core.coding.keys.bits

    @property
    def key_bits(self) -> int:
        """Bits of a coordinate of the keys: 2, 3, 4 or 8."""
        return self._core.coding.keys.bits

    @property
    def value_bits(self) -> int:
        """Bits of a coordinate of the values: 2, 3, 4 or 8."""
        return self._core.coding.values.bits

    @property
    def code(self) -> str | tuple[str, str]:
        """ "trellis" or "scalar", of the sides of 2 and 3 bits ("scalar" where there is none); a pair (keys, values) where
        they differ."""
        sides = self._core.coding.keys, self._core.coding.values
        found = {side.code for side in sides if side.bits in (2, 3)}
        return (sides[0].code, sides[1].code) if len(found) > 1 else next(iter(found), "scalar")

    @property
    def seed(self) -> int:
        """The seed of the random signs, from 0 to 2^64 - 1."""
        return self._core.coding.keys.seed

    @property
    def recent(self) -> int:
        """Newest tokens that a query reads from exact copies; 0 of a window, which has none."""
        return self._core.coding.recent

    @property
    def sink(self) -> int:
        """First tokens of a row that queries read from exact copies; 0 of a window."""
        return self._core.coding.sink

    @property
    def centres(self) -> Centres | None:
        """(keys, values) as given, each (H_kv, D), or None."""
        coding = self._core.coding
        return _pair_or_none(coding.keys.centre, coding.values.centre)

    @property
    def feedback(self) -> Feedback | None:
        """(keys, values) as given, each (H_kv, D, D) float16, or None."""
        coding = self._core.coding
        return _pair_or_none(coding.keys.feedback, coding.values.feedback)

    @property
    def key_map(self) -> mx.array | None:
        """The map that keys go through before they are coded, (H_kv, D, D) float32, or None."""
        return self._core.coding.key_map

    @property
    def offset(self) -> int | mx.array:
        """Tokens seen: an int, or one number a row (B,) of a batch."""
        return self._core.offset

    @property
    def nbytes(self) -> int:
        """Resident bytes of codes, scales and exact copies, the spare room of the buffers included."""
        return self._core.nbytes

    @property
    def kernel(self) -> str | None:
        """The kernel that attention over this cache used last, as words; None before it ran."""
        return self._last_kernel.name

    route = kernel  # its former name

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[_core.View, _core.View]:
        """Appends keys and values.

        Args:
            keys, values (mx.array): (B, H_kv, N, D) float16, bfloat16 or float32; keys after RoPE; D a multiple of 32
                from 32 to 512, of values another or 0.

        Returns:
            The packed history twice, as keys and as values, for the attention that apply_patch() installs.

        Raises:
            ValueError: a wrong dtype or shape, or B, H_kv or D other than before.  The cache stays as it was.
        """
        first = self.empty()
        views = self._update(keys, values)
        self._note_model(first, keys.shape[2])
        return views

    def _update(self, keys: mx.array, values: mx.array) -> _core.View:
        view = self._core.update(keys, values, self._last_kernel)
        return view, view

    def keys_and_values(self) -> tuple[_core.View, _core.View]:
        """The packed history twice, for layers that read the cache of another."""
        view = self._core.view()
        view.last_kernel = self._last_kernel
        return view, view

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The mask of the next N tokens, to be asked for before they are appended.

        Args:
            N (int): tokens about to be appended.
            return_array (bool): an array even where None or "causal" says the same.
            window_size (int): hides keys `window_size` or more positions before the query.

        Returns:
            None (all is visible), "causal", or a bool array that broadcasts to (B, H, N, tokens held after appending).
        """
        return self._core.mask(N, window_size, return_array)

    def empty(self) -> bool:
        """Whether nothing was appended yet."""
        return self._core.empty

    def is_trimmable(self) -> bool:
        """Whether the latest tokens can be taken back."""
        return True

    def trim(self, n: int) -> int:
        """Drops the latest `n` tokens, or all there are; returns how many that were."""
        return self._core.trim(n)

    def to_quantized(self, *_: Any, **__: Any) -> Any:
        """What mlx-lm calls when `kv_bits` is given; without it, mlx-lm would ignore that argument in silence."""
        raise ValueError(f"[to_quantized] {type(self).__name__} packs its keys and values itself; leave kv_bits out")

    def _arrays(self) -> list[Any]:
        """What is held, as four arrays, without spare room."""
        if hasattr(self._core, "end_chunk"):  # mlx-lm evaluates the state after each chunk of a prompt
            self._core.end_chunk()
        return [None] * 4 if self.empty() else self._core.view().arrays

    def _position(self) -> Any:
        """What `_restore` needs besides the arrays, as JSON values."""
        raise NotImplementedError

    def _restore(self, coding: _core.CacheCoding, position: Any, arrays: Any) -> Any:
        """Sets `_core` once all else went well; `arrays` are four, or None when nothing was appended."""
        raise NotImplementedError

    @property
    def state(self) -> Any:
        """All that from_state needs, as mlx-lm saves it.

        A tuple of key codes (B, H_kv, N, key_bits * D / 32) uint32, key scales (B, H_kv, N) float16, value codes and
        value scales likewise (these four None when nothing was appended), key centre and value centre (H_kv, D) or
        None, key feedback and value feedback (H_kv, D, D) or None, of exact copies the four arrays, if there are any, the
        key map (H_kv, D, D), if there is one, and the Identity: JSON with the settings, the position and a checksum.

        Setting it raises ValueError when it is no such tuple, was saved by another kind of cache or format, or does
        not match its checksum; the cache then stays as it was.
        """
        copies, begin = getattr(self._core, "copies", None) or ((), 0)
        keys, values = self._core.coding.keys, self._core.coding.values
        arrays = (*self._arrays(), keys.centre, values.centre, keys.feedback, values.feedback, *copies)
        if self.key_map is not None:
            arrays = (*arrays, self.key_map)
        fields = {
            "format": _core.FORMAT_VERSION,
            "kind": type(self).__name__,
            "key_bits": self.key_bits,
            "value_bits": self.value_bits,
            "code": self.code,
            "seed": self.seed,
            "codebook": CODEBOOK,
            "model": self.fingerprint,
            "position": self._position(),
        }
        if self.key_map is not None:
            fields["mapped"] = True
        if self.recent or self.sink:
            fields["exact"] = {"recent": self.recent, "sink": self.sink, "from": begin}
        return (*arrays, Identity(fields, arrays))

    @state.setter
    def state(self, state: Any) -> None:
        kind = type(self).__name__
        try:
            *arrays, identity = state
        except (TypeError, ValueError) as error:
            raise ValueError(f"[load] this is not the state of a {kind}") from error
        fields = read(identity, arrays, kind)
        try:
            self._take(fields, arrays)
        except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:  # not as we write it
            raise ValueError(f"[load] this is not the state of a {kind} ({type(error).__name__}: {error})") from error

    def _take(self, fields: dict[str, Any], arrays: list[Any]) -> None:
        """Becomes what `fields` and `arrays` of a state describe."""
        kind = type(self).__name__
        key_map = arrays.pop() if fields.get("mapped") and arrays else None
        exact = fields.get("exact")
        filled = bool(arrays) and arrays[0] is not None
        if len(arrays) not in ((8, 12) if exact and filled else (8,)):  # floats that are not packed yet have no copies
            raise ValueError(f"[load] a {kind} has eight arrays and four of copies; got {len(arrays)}")
        codes = code_names(kind, fields.get("code", "scalar"))  # version 1 had scalar codes alone
        maps = query_maps(kind, key_map)
        coding = _core.CacheCoding(
            _core.Coding(fields["key_bits"], code=codes[0], seed=fields["seed"], centre=arrays[4], feedback=arrays[6]),
            _core.Coding(
                fields["value_bits"], code=codes[1], seed=fields["seed"], centre=arrays[5], feedback=arrays[7]
            ),
            key_map=maps[0],
            query_map=maps[1],
            **({"recent": exact["recent"], "sink": exact["sink"]} if exact else {}),
        )
        model = fields["model"]
        if not isinstance(model, str):
            raise ValueError(f"[load] the name of the model of a {kind} must be text; got {model!r}")
        held = [fields["position"], arrays[:4] if filled else None]
        if exact:
            held.append((arrays[8:], exact["from"]) if len(arrays) == 12 else None)
        self._restore(coding, *held)
        self._last_kernel = _core.LastKernel()
        self.fingerprint = model

    @classmethod
    def from_state(cls, state: Any, meta_state: Any = "") -> PackedCache:
        """The cache that had this `state`.  mlx-lm 0.31.3 also gives the `meta_state`, which is empty."""
        made = cls.__new__(cls)
        made.state = state
        return made

    def keep_exact(self, recent: int, sink: int) -> None:
        """Keeps other tokens exact from now on; those held already are as exact as their codes."""
        if (recent, sink) == (self.recent, self.sink):
            return
        was = self._core.coding
        coding = _core.CacheCoding(
            was.keys, was.values, key_map=was.key_map, query_map=was.query_map, recent=recent, sink=sink
        )
        self._restore(coding, self._position(), None if self.empty() else self._arrays())

    def _shape(self) -> Any:
        """(B, H_kv, tokens held, D of a key and a value together)."""
        view = self._core.view()
        return (*view.shape[:3], view.shape[3] + view.value_dim)

    def inspect(self) -> dict[str, Any]:
        """What the cache holds, as a table's row: bits, tokens, resident bytes, what float16 would take, last kernel."""
        shape = None if self.empty() else self._shape()
        return {
            "kind": type(self).__name__,
            "key_bits": self.key_bits,
            "value_bits": self.value_bits,
            "code": self.code,
            "recent": self.recent,
            "sink": self.sink,
            "tokens": self.size(),
            "resident_bytes": self.nbytes,
            "exact_bytes": getattr(self._core, "copies_nbytes", 0),  # of the former
            "float16_bytes": 0 if shape is None else 2 * shape[0] * shape[1] * shape[2] * shape[3],
            "kernel": self.kernel,
        }


def _pair_or_none(keys: Any, values: Any) -> Any:
    return None if keys is None and values is None else (keys, values)


def _unpickled(cls: Any, arrays: Any, identity: Any) -> Any:
    return cls.from_state((*arrays, identity))
