"""Replacing the `KVCache` and `RotatingKVCache` slots of a model's caches, after checking that every layer can read
packed codes."""

import os
from collections.abc import Mapping

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache

from .caches import DelayedTurboQuantKVCache, TurboQuantKVCache, TurboQuantRotatingKVCache
from .caches.arguments import whole
from .caches.identity import fingerprint
from .caches.slots import (
    REPLACED,
    kv_slots,
    layer_name,
    own_caches,
    own_make_cache,
    replace_kv_caches,
    replace_slots,
    slot_name,
)
from .calibration import NO_CALIBRATION, as_calibration, load_beside
from .overlay.gated_delta import enable_chunked_recurrence
from .overlay.patch import apply_patch, record_reads

__all__ = [
    "REPLACED",
    "disable",
    "enable",
    "kv_slots",
    "own_caches",
    "packing",
    "replace_kv_caches",
    "replace_slots",
    "slot_name",
]


def _packed(original, start, coding):
    """The packed cache that stands in for `original`; None for kinds that stay."""
    if type(original) not in REPLACED:
        return None
    if type(original) is RotatingKVCache:
        return TurboQuantRotatingKVCache(original.max_size, original.keep, **coding)
    return DelayedTurboQuantKVCache(start, **coding) if start else TurboQuantKVCache(**coding)


class _Probe:
    """Notes what a layer puts into a packed cache and what it is handed."""

    def __init__(self, cache):
        self.handed_out = None
        self.failure = None
        update = cache.update_and_fetch

        def noted(keys, values):
            try:
                views = update(keys, values)
            except ValueError as error:
                self.failure = str(error)
                raise
            self.handed_out = views[0]
            return views

        cache.update_and_fetch = noted


def _probe_once(model, original, coding, left):
    """Builds, without evaluating it, the graph of two tokens with packed caches in all slots but those of `left`.
    Returns what keeps a slot from being packed, and the exception that ended the attempt, if one did."""
    probes = {}

    def make(path, c):
        cache = None if path in left else _packed(c, None, coding(path))
        if cache is not None:
            probes[path] = _Probe(cache)
        return cache

    error = None
    with record_reads() as seen:
        try:
            model(mx.zeros((1, 2), mx.int32), cache=replace_slots(original(), make))
        except Exception as raised:  # whatever a model does with keys that are not arrays
            error = raised
    problems = {}
    for path, probe in probes.items():
        if probe.failure:
            problems[path] = probe.failure
        elif probe.handed_out is not None and id(probe.handed_out) not in seen:
            problems[path] = "its attention does not go through mlx_lm.models.base.scaled_dot_product_attention" + (
                f" ({type(error).__name__}: {str(error).splitlines()[0]})" if str(error or "") else ""
            )
    return problems, error


def _probe(model, original, coding):
    """What keeps each slot from being packed.  One slot may end an attempt, so attempts go on without it."""
    problems = {}
    while True:
        more, error = _probe_once(model, original, coding, problems)
        if not more:
            if error and not problems:
                raise ValueError(
                    f"[enable] the model cannot run on packed caches: {type(error).__name__}: {error}"
                ) from error
            return problems
        problems |= more


def packing(model, bits=3, *, key_bits=None, value_bits=None, seed=0, calibration=None, start=None):
    """What `enable` installs, after all its checks, while the model stays as it is.

    Arguments and errors are those of `enable`; the patch is applied.

    Returns:
        (make_cache, slots): a function that makes the model's caches, packed ones in their places, and the kinds of the
        slots they replace, {path: class}.
    """
    TurboQuantKVCache(bits, key_bits=key_bits, value_bits=value_bits, seed=seed)  # refuses wrong widths first
    if start is not None:
        whole("enable", "start", start)
    own = own_make_cache(model)
    layers = len(model.layers)
    original = own or (lambda: [KVCache() for _ in range(layers)])

    slots = kv_slots(original(), "enable")
    names = [slot_name(path) for path in slots]
    if isinstance(calibration, str | os.PathLike):
        calibration = load_beside(calibration)
    if calibration is not None and not isinstance(calibration, Mapping):
        raise ValueError(
            "[enable] calibration must be {slot: Calibration}, a file of `calibrate` or a folder that holds one; "
            f"got {type(calibration).__name__}"
        )
    calibration = {slot: as_calibration(found) for slot, found in (calibration or {}).items()}
    unknown = [slot for slot in calibration if slot not in names]
    if unknown:
        raise ValueError(f"[enable] calibration must belong to slots that are packed, {names}; got {unknown}")
    seeds = {c.seed for c in calibration.values() if c.feedback}
    if seeds - {seed}:
        raise ValueError(f"[enable] the feedback of `calibration` was made for seed {min(seeds - {seed})}; got {seed}")
    windows = [layer_name(path) for path, kind in slots.items() if start and kind is RotatingKVCache]
    if windows:
        raise ValueError(
            f"[enable] start = {start} needs caches that can be packed later, and a RotatingKVCache cannot: "
            + ", ".join(windows)
        )

    def coding(path):
        found = calibration.get(slot_name(path), NO_CALIBRATION)
        return {
            "bits": bits,
            "key_bits": key_bits,
            "value_bits": value_bits,
            "seed": seed,
            "centres": found.centres,
            "feedback": found.feedback,
        }

    apply_patch()
    problems = _probe(model, original, coding)
    if problems:
        lines = "\n".join(f"  {layer_name(path)}: {why}" for path, why in problems.items())
        raise ValueError(f"[enable] {len(problems)} of {len(slots)} KVCache slots cannot be packed:\n{lines}")
    name = fingerprint(model)

    def packed(path, c):
        cache = _packed(c, start, coding(path))
        if cache is not None:
            cache.fingerprint = name
        return cache

    def make_cache():
        return replace_slots(original(), packed)

    def sized(max_kv_size):
        if start:
            raise ValueError(f"[enable] start = {start} and max_kv_size = {max_kv_size} exclude each other")
        return replace_slots([RotatingKVCache(max_size=max_kv_size, keep=4) for _ in range(layers)], packed)

    if own is None:  # mlx-lm gives max_kv_size to such models only
        make_cache.sized = sized
    return make_cache, slots


def enable(
    model, bits=3, *, key_bits=None, value_bits=None, seed=0, calibration=None, start=None, chunked_recurrence=False
):
    """Makes `model.make_cache()` give packed caches in its `KVCache` and `RotatingKVCache` slots; other slots stay.

    Works for models with and without a `make_cache` of their own, and applies the patch.  Calling it again changes
    the settings; `disable(model)` undoes it.

    Args:
        model: a model of mlx-lm.
        bits, key_bits, value_bits, seed: as for TurboQuantKVCache.
        calibration: centres and feedback: a file of `calibrate` or a model directory that holds one (str or PathLike),
            which is checked against the weights that lie beside it; or {slot index: Calibration}, as
            turboquant_mlx.calibration makes and loads it.
        start (int): tokens that a cache holds as plain floats before it packs itself (mlx-lm's quantized_kv_start);
            such caches are not batched.
        chunked_recurrence (bool): off Metal, read prompts through the linear attention of Qwen3.5 and its like 64 tokens
            a step, where mlx-lm loops over tokens: for every model of the process, until
            turboquant_mlx.gated_delta.disable_chunked_recurrence(); without effect on models that have no such layers.
            Same function, other rounding.  False leaves that switch as it is.

    Returns:
        The number of slots that were replaced.

    Raises:
        ValueError: the model has no such slot, or layers cannot be packed: the message gives each one's reason;
            a setting is out of range, or `calibration` is none, names a slot that the model does not have, or has
            feedback made for another seed.  The model is left as it was, with the caches of an earlier enable() if
            there was one.
        FileNotFoundError: there is no such calibration file.
    """
    make_cache, slots = packing(
        model, bits, key_bits=key_bits, value_bits=value_bits, seed=seed, calibration=calibration, start=start
    )
    before = vars(model).get("make_cache")
    make_cache.replaced = getattr(before, "replaced", before)
    model.make_cache = make_cache
    if chunked_recurrence:
        enable_chunked_recurrence()
    return len(slots)


def disable(model):
    """Gives the model its own caches back.  The patch stays, which float caches do not notice, and so does the chunked
    recurrence, which belongs to the process."""
    ours = vars(model).get("make_cache")
    if not hasattr(ours, "replaced"):
        return
    del model.make_cache
    if ours.replaced is not None:
        model.make_cache = ours.replaced
