"""Loading saved caches with the question asked first: do they fit this model and these settings?

mlx-lm's own `save_prompt_cache` and `load_prompt_cache` work on packed caches once apply_patch() ran, and refuse
altered codes; only the functions here know the model that a cache is meant for."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from .._safetensors import read_header
from ..caches import PackedCache, layer_name, leaves
from ..caches.maker import CacheMaker
from .other_slots import save_prompt_cache
from .patch import apply_patch

__all__ = ["check_fits", "load_prompt_cache", "save_prompt_cache"]


def _kind(cache):
    if isinstance(cache, PackedCache):
        codes = " in scalar codes" if cache.code == "scalar" and min(cache.key_bits, cache.value_bits) < 4 else ""
        codes = codes if isinstance(cache.code, str) else f" in {cache.code[0]} and {cache.code[1]} codes"
        return f"{type(cache).__name__} of {cache.key_bits}-bit keys and {cache.value_bits}-bit values{codes}"
    return type(cache).__name__ + (" (not packed)" if "KVCache" in type(cache).__name__ else "")


def _difference(saved, wanted):
    """What keeps `saved` from standing in `wanted`'s place, as words; None when it may."""
    if not isinstance(wanted, PackedCache) and not isinstance(saved, PackedCache):
        return None  # mlx-lm's own affair
    if type(saved) is not type(wanted) or any(
        getattr(saved, what) != getattr(wanted, what) for what in ("key_bits", "value_bits", "code")
    ):
        return f"holds a {_kind(saved)}; asked for was a {_kind(wanted)}"
    if saved.seed != wanted.seed:
        return f"was saved with seed {saved.seed}; asked for was {wanted.seed}"
    if saved.fingerprint != wanted.fingerprint:
        return f"was made by another model ({saved.fingerprint or 'unnamed'}; this one is {wanted.fingerprint})"
    for side in ("keys", "values"):
        old, new = getattr(saved._core.coding, side), getattr(wanted._core.coding, side)
        for what, a, b in (("centres", old.centre, new.centre), ("feedback", old.feedback, new.feedback)):
            if (a is None) != (b is None) or (a is not None and not mx.array_equal(a, b)):
                return f"was saved with other {what} of the {side}"
    a, b = saved.key_map, wanted.key_map
    if (a is None) != (b is None) or (a is not None and not mx.array_equal(a, b)):
        return "was saved with another key map"
    return None


def check_fits(caches, model, source="the cache"):
    """ValueError unless `caches` are of the kinds, settings and model of `model.make_cache()`; says what differs.  Where
    only the tokens kept exact differ, the caches keep those of the model from then on."""
    maker = vars(model).get("make_cache")
    if isinstance(maker, CacheMaker):
        maker.of(model).names.current(fresh=True)
    saved, wanted = dict(leaves(caches)), dict(leaves(mlx_lm_cache.make_prompt_cache(model)))
    if saved.keys() != wanted.keys():
        raise ValueError(f"[load_prompt_cache] {source} has {len(saved)} slots; the model has {len(wanted)}")
    found = {path: _difference(saved[path], wanted[path]) for path in wanted}
    lines = [f"  {layer_name(path)} {why}" for path, why in found.items() if why]
    if lines:
        raise ValueError(f"[load_prompt_cache] {source} does not fit:\n" + "\n".join(lines))
    for path, cache in saved.items():
        if isinstance(cache, PackedCache):
            cache._named_like(wanted[path])
            if (cache.recent, cache.sink) != (wanted[path].recent, wanted[path].sink):  # an earlier version's has none
                cache.keep_exact(wanted[path].recent, wanted[path].sink)


def load_prompt_cache(file_name: Any, model: Any = None, return_metadata: bool = False) -> Any:
    """mlx-lm's `load_prompt_cache`, with the file checked first.

    Args:
        file_name: a file of `save_prompt_cache`.
        model: the model, after enable(): the caches must be those that it makes, with its bits, seed, centres
            and feedback.
        return_metadata (bool): return (caches, metadata).

    Raises:
        ValueError: the file is truncated or altered, or does not fit the model; the message says what differs.
    """
    apply_patch()
    read_header("load_prompt_cache", file_name)
    caches, metadata = mlx_lm_cache.load_prompt_cache(file_name, return_metadata=True)
    if model is not None:
        check_fits(caches, model, str(file_name))
    return (caches, metadata) if return_metadata else caches
