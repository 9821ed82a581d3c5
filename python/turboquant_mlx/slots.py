"""Replacing the `KVCache` slots of a model's caches, after checking that every layer can read packed codes."""

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache

from .cache import TurboQuantKVCache
from .patch import apply_patch, record_reads


def _slots(caches, path=()):
    """(path, cache) of every leaf; CacheList holds further slots."""
    for i, c in enumerate(caches):
        if isinstance(c, CacheList):
            yield from _slots(c.caches, (*path, i))
        else:
            yield (*path, i), c


def _replace(caches, make, path=()):
    """The caches with make(path) in place of each KVCache; `make` may return None to leave one."""
    out = []
    for i, c in enumerate(caches):
        where = (*path, i)
        if isinstance(c, CacheList):
            out.append(CacheList(*_replace(c.caches, make, where)))
        else:
            out.append((make(where) or c) if type(c) is KVCache else c)
    return out


def _name(path):
    return "layer " + ".".join(map(str, path))


class _Probe(TurboQuantKVCache):
    """Notes what a layer puts in and hands out."""

    def __init__(self, **coding):
        super().__init__(**coding)
        self.handed_out = None
        self.failure = None

    def update_and_fetch(self, keys, values):
        try:
            views = super().update_and_fetch(keys, values)
        except ValueError as error:
            self.failure = str(error)
            raise
        self.handed_out = views[0]
        return views


def _probe(model, original, coding):
    """Builds, without evaluating it, the graph of two tokens; returns what keeps each slot from being packed."""
    probes = {}

    def make(path):
        probes[path] = _Probe(**coding(path))
        return probes[path]

    error = None
    with record_reads() as seen:
        try:
            model(mx.zeros((1, 2), mx.int32), cache=_replace(original(), make))
        except Exception as raised:  # whatever a model does with keys that are not arrays
            error = raised
    problems = {}
    for path, probe in probes.items():
        if probe.failure:
            problems[path] = probe.failure
        elif probe.handed_out is not None and id(probe.handed_out) not in seen:
            problems[path] = "its attention does not go through mlx_lm.models.base.scaled_dot_product_attention" + (
                f" ({type(error).__name__}: {error})" if error else ""
            )
    if error and not problems:
        raise error
    return problems


def enable(model, bits=3, *, key_bits=None, value_bits=None, seed=0, centres=None):
    """Makes `model.make_cache()` give packed caches in its `KVCache` slots; other slots stay as they are.

    Works for models with and without a `make_cache` of their own, and applies the patch.  Calling it again changes
    the settings; `disable(model)` undoes it.

    Args:
        model: a model of mlx-lm.
        bits, key_bits, value_bits, seed: as for TurboQuantKVCache.
        centres: {slot index: (keys, values)} of (H_kv, D) arrays; see turboquant_mlx.calibration.

    Returns:
        The number of slots that were replaced.

    Raises:
        ValueError: the model has no KVCache slot, or layers cannot be packed: the message gives each one's reason.
            The model is left as it was.
    """
    disable(model)
    TurboQuantKVCache(bits, key_bits=key_bits, value_bits=value_bits, seed=seed)  # refuses wrong widths first
    if hasattr(model, "make_cache"):
        original = model.make_cache
    else:
        layers = len(model.layers)

        def original():
            return [KVCache() for _ in range(layers)]

    paths = [path for path, c in _slots(original()) if type(c) is KVCache]
    if not paths:
        kinds = sorted({type(c).__name__ for _, c in _slots(original())})
        raise ValueError(f"[enable] the model has no KVCache slot, so there is nothing to compress; it has {kinds}")

    def coding(path):
        return {
            "bits": bits,
            "key_bits": key_bits,
            "value_bits": value_bits,
            "seed": seed,
            "centres": centres.get(path[0] if len(path) == 1 else path) if centres else None,
        }

    apply_patch()
    problems = _probe(model, original, coding)
    if problems:
        lines = "\n".join(f"  {_name(path)}: {why}" for path, why in problems.items())
        raise ValueError(f"[enable] {len(problems)} of {len(paths)} KVCache slots cannot be packed:\n{lines}")

    def make_cache():
        return _replace(original(), lambda path: TurboQuantKVCache(**coding(path)))

    make_cache.replaced = vars(model).get("make_cache")
    model.make_cache = make_cache
    return len(paths)


def disable(model):
    """Gives the model its own caches back.  The patch stays: float caches do not notice it."""
    ours = vars(model).get("make_cache")
    if not hasattr(ours, "replaced"):
        return
    del model.make_cache
    if ours.replaced is not None:
        model.make_cache = ours.replaced
