"""Checksums of the slots that are not packed, in files of prompt caches.

A packed cache holds its own checksum (identity.py).  The recurrent states and float caches beside it are mlx-lm's and
hold none.  These two functions replace mlx-lm's (apply_patch() installs them).  When a file holds packed caches, saving
adds a checksum for every other slot, and loading compares it first.  Files without packed caches are left alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache

from .._safetensors import read_header
from ..caches import PackedCache, leaves, older
from ..caches.identity import checksum
from ..caches.slots import layer_name

KEY = "turboquant_other_slots"  # of the metadata: JSON {"slots": {slot: class and checksum}, "metadata": checksum}
_AGAIN = "the file was altered or truncated; make it again"
# As patch.py notes them, to put them back; and those that are called, of 0.32's layout.
save_original: Callable = mlx_lm_cache.save_prompt_cache
load_original: Callable = mlx_lm_cache.load_prompt_cache
_save: Callable = older.save_prompt_cache if older.OLD else save_original
_load: Callable = older.load_prompt_cache if older.OLD else load_original


def _sum(kind, tensors):
    """The class's name and the checksum of a slot's state, {name: (kind, array)}, as one string."""
    names = sorted(tensors)
    fields = [kind, [[name, tensors[name][0]] for name in names]]
    return f"{kind} {checksum(fields, [tensors[name][1] for name in names])}"


def _is_packed(name):
    cls = getattr(mlx_lm_cache, name, None)
    return isinstance(cls, type) and issubclass(cls, PackedCache)


def check_one_model(caches):
    """ValueError when the weights changed while one of the packed caches was filled."""
    for path, c in leaves(caches):
        if isinstance(c, PackedCache) and "+" in c.fingerprint:
            raise ValueError(
                f"[save_prompt_cache] {layer_name(path)} was filled by models of different weights ({c.fingerprint}): "
                "make the caches again after weights change"
            )


def save_prompt_cache(file_name: Any, cache: list[Any], metadata: dict[str, str] | None = None) -> None:
    """mlx-lm's `save_prompt_cache`; beside packed caches, the other slots are summed.

    Raises:
        ValueError: the model's weights changed while a packed cache was filled.
    """
    check_one_model(cache)
    save = save_original
    if any(isinstance(c, PackedCache) for _, c in leaves(cache)):
        own = {key: value for key, value in (metadata or {}).items() if key != KEY}
        slots = {}
        for i, c in enumerate(cache):
            if not isinstance(c, PackedCache):  # a CacheList is summed whole: it also holds its slots' class names
                flat: Any = tree_flatten([older.whole_state(c)])
                tensors = {name: older.as_saved(leaf) for name, leaf in flat}
                slots[str(i)] = _sum(type(c).__name__, {name[2:]: tensor for name, tensor in tensors.items()})
        sums = {"slots": slots, "metadata": checksum(dict(tree_flatten(own)), [])}
        metadata = own | {KEY: json.dumps(sums, sort_keys=True)}
        save = _save
    save(file_name, cache, metadata or {})


class _Contents:
    """What lies in a file, read without building a cache."""

    def __init__(self, file_name):
        if Path(file_name).is_file():
            read_header("load_prompt_cache", file_name)
        arrays, header = mx.load(file_name, return_metadata=True)
        parts = [{}, {}, {}]  # metadata, class names, kinds of leaves that were no arrays
        for key, value in header.items():
            part, _, rest = key.partition(".")
            if part in ("0", "1", "2"):
                parts[int(part)][rest] = value
        self.metadata, self.classes, listed = parts
        kinds = {listed[f"{n}.0"]: listed.get(f"{n}.1") for n in (k[:-2] for k in listed if k.endswith(".0"))}
        self.slots = {slot: {} for slot in self.classes}
        for name, array in arrays.items():
            slot, _, rest = name.partition(".")
            self.slots.setdefault(slot, {})[rest] = (kinds.get(name, "array"), array)
        self.packed = {slot for slot, name in self.classes.items() if _is_packed(name)}

    def holds_packed(self):
        """Whether the file holds packed caches or says that it does, a CacheList's included."""
        return bool(self.packed) or KEY in self.metadata or any(self._inner_packed(slot) for slot in self.slots)

    def _inner_packed(self, slot):
        strings = (array for kind, array in self.slots[slot].values() if kind == "string" and array.size < 100)
        return any(_is_packed("".join(chr(i) for i in array.tolist())) for array in strings)


def _differences(contents):
    """What does not match the sums, as words."""
    own = dict(contents.metadata)
    try:
        sums = json.loads(own.pop(KEY, "{}"))
        saved, of_metadata = dict(sums.get("slots", {})), sums.get("metadata")
    except (ValueError, TypeError, AttributeError):
        yield f"the sums of the other slots ({KEY}) are unreadable"
        return
    for slot in sorted(contents.slots.keys() | saved.keys(), key=lambda s: (len(s), s)):
        kind, was = contents.classes.get(slot), saved.get(slot)
        if kind is None:
            yield f"layer {slot} has no class name"
        elif slot in contents.packed and was is None:
            continue
        elif was is None:
            yield f"layer {slot}, a {kind}, has no checksum"
        elif was != (found := _sum(kind, contents.slots[slot])):
            yield f"layer {slot} does not match its checksum (saved {was}, found {found})"
    if KEY in contents.metadata and of_metadata != checksum(own, []):
        yield "the metadata does not match its checksum"


def _check(file_name):
    """Whether the file holds packed caches; ValueError when it does and something differs from its sums."""
    contents = _Contents(file_name)
    if not contents.holds_packed():
        return False
    differences = list(_differences(contents))
    if differences:
        raise ValueError(f"[load_prompt_cache] {file_name}: {'; '.join(differences)}: {_AGAIN}")
    return True


def load_prompt_cache(file_name, return_metadata=False):
    """mlx-lm's `load_prompt_cache`; a file of packed caches is compared with its sums first.

    Raises:
        ValueError: a slot beside packed ones was altered or has no sum; the message names it and what differs.
    """
    if not _check(file_name):
        return load_original(file_name, return_metadata)
    try:
        caches, metadata = _load(file_name, return_metadata=True)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, ValueError) and str(error).startswith("["):  # it says what is wrong by itself
            raise
        raise ValueError(
            f"[load_prompt_cache] {file_name} cannot be taken apart ({type(error).__name__}: {error}): {_AGAIN}"
        ) from error
    mx.eval([older.whole_state(c) for c in caches])  # a thread that loads lazily may end before another one reads
    metadata.pop(KEY, None)
    return (caches, metadata) if return_metadata else caches
