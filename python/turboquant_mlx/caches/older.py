"""mlx-lm 0.31.3, which vllm-mlx and Rapid-MLX pin: the one place that knows how its caches differ from those of 0.32.

There `state` has arrays alone and `meta_state` the rest as strings; from 0.32 on `state` has all, and files of prompt
caches have another layout.  The packed caches follow 0.32.  Beside mlx-lm 0.31.3 its float caches get the one method of 0.32
that is used here, and files that hold packed caches have the layout of 0.32."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import cache as host

OLD = hasattr(host._BaseCache, "meta_state")


def whole_state(cache: Any) -> Any:
    """All that a cache's from_state needs: its `state`, and beside mlx-lm 0.31.3, for its own classes, (state, meta_state)."""
    if not _split(type(cache)):
        return cache.state
    return None if getattr(cache, "keys", 0) is None else (cache.state, cache.meta_state)  # nothing was appended


def _split(cls: type) -> bool:
    """Whether a class keeps a part of its state in meta_state; those of this package never do."""
    return OLD and cls.__module__.partition(".")[0] == host.__name__.partition(".")[0]


def from_state(cls: Any, state: Any) -> Any:
    """The cache that had this whole_state()."""
    if not _split(cls):
        made = cls.__new__(cls)
        made.state = state
        return made
    return cls() if state is None else cls.from_state(*state)


def _keys_and_values(self: Any) -> tuple[mx.array, mx.array]:
    """The keys and values held, (B, H_kv, N, D) each."""
    held = min(self.offset, self.keys.shape[2])
    return self.keys[..., :held, :], self.values[..., :held, :]


def as_saved(leaf: Any) -> tuple[str, mx.array]:
    """(kind, array) of a leaf of a state, as mlx-lm 0.32 writes it; MLX 0.31 writes no empty array, so that a zero stands there."""
    nothing = mx.array([0] if OLD else [])
    if isinstance(leaf, mx.array):
        return "array", leaf
    if isinstance(leaf, str):
        return "string", mx.array([ord(c) for c in leaf]) if leaf else nothing
    if leaf is None:
        return "none", nothing
    if isinstance(leaf, (bool, int, float)):
        return "scalar", mx.array(leaf)
    raise ValueError(f"[save_prompt_cache] a state cannot hold a {type(leaf).__name__}")


def save_prompt_cache(file_name: str, cache: list[Any], metadata: dict[str, str] | None = None) -> None:
    """mlx-lm 0.32's save_prompt_cache: arrays under their places; what is no array becomes one, and is listed with its kind."""
    kinds: list[Any] = [""]  # an empty list would be dropped
    arrays = {}
    leaves: Any = tree_flatten([whole_state(c) for c in cache])
    for place, leaf in leaves:
        kind, arrays[place] = as_saved(leaf)
        if kind != "array":
            kinds.append((place, kind))
    header = [metadata or {}, [type(c).__name__ for c in cache], kinds]
    mx.save_safetensors(file_name, arrays, dict(tree_flatten(header)))


def load_prompt_cache(file_name: str, return_metadata: bool = False) -> Any:
    """mlx-lm 0.32's load_prompt_cache."""
    found: Any = mx.load(file_name, return_metadata=True)
    arrays, header = found
    metadata, names, kinds = tree_unflatten(list(header.items()))
    read: dict[str, Any] = {
        "string": lambda array: "".join(chr(int(i)) for i in array.tolist() if i),
        "scalar": lambda array: array.item(),
        "none": lambda array: None,
    }
    for place, kind in kinds[1:]:
        arrays[place] = read[kind](arrays[place])
    states = tree_unflatten(list(arrays.items()))
    caches = [from_state(getattr(host, name), state) for name, state in zip(names, states, strict=True)]
    return (caches, metadata) if return_metadata else caches


if OLD:
    host.KVCache.keys_and_values = _keys_and_values  # type: ignore[method-assign]
    host.RotatingKVCache.keys_and_values = _keys_and_values  # type: ignore[method-assign]
