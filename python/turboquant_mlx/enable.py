"""Replacing the `KVCache` and `RotatingKVCache` slots of a model's caches, after checking that every layer can read
packed codes."""

import os
import sys
from collections.abc import Mapping
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from .caches import CheckpointedArraysCache, TurboQuantKVCache
from .caches.arguments import Code, whole
from .caches.checkpoints import limits_for
from .caches.maker import CacheMaker, packed_like
from .caches.rotating import PackedWindow
from .caches.slots import (
    REPLACED,
    kv_slots,
    layer_name,
    leaves,
    own_caches,
    replace_kv_caches,
    replace_slots,
    slot_name,
)
from .calibration import (
    as_calibration,
    automatic,
    calibrate_by_default,
    check_weights,
    load_beside,
    policies,
)
from .memory import Unnamed
from .overlay import hosts, sharding
from .overlay.gated_delta import enable_chunked_recurrence
from .overlay.patch import apply_patch, reach_own_code
from .overlay.probe import Enabled, latent_slots, reasons, what_stays

__all__ = [
    "Enabled",
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


def _read(calibration):
    """What `enable` takes for a calibration, read when it is a file or a folder."""
    return load_beside(calibration) if isinstance(calibration, str | os.PathLike) else calibration


def _checked_calibration(model, calibration, seed):
    """{slot of the whole model: Calibration} of what `_read` gives."""
    if calibration is not None and not isinstance(calibration, Mapping):
        raise ValueError(
            "[enable] calibration must be {slot: Calibration}, a file of `calibrate` or a folder that holds one; "
            f"got {type(calibration).__name__}"
        )
    check_weights(calibration, model)
    calibration = {slot: as_calibration(found) for slot, found in (calibration or {}).items()}
    seeds = {c.seed for c in calibration.values() if c.feedback}
    if seeds - {seed}:
        raise ValueError(f"[enable] the feedback of `calibration` was made for seed {min(seeds - {seed})}; got {seed}")
    mx.eval([x for c in calibration.values() for x in c if isinstance(x, mx.array)])  # this thread may end
    return calibration


def packing(
    model,
    bits=3,
    *,
    key_bits=None,
    value_bits=None,
    code=None,
    seed=0,
    calibration=None,
    start=None,
    recent=None,
    sink=None,
    checkpoints=False,
    strict=False,
    named=True,
):
    """What `enable` installs, after all its checks, while the model stays as it is.

    Arguments and errors are those of `enable`; the patch is applied.  Without `named` the weights are not read, and the caches
    do not know whose they are.

    Returns:
        (make_cache, slots): a function that makes the model's caches, packed ones in their places, whose `kept` says why
        slots stay, {path: reason}; and the kinds of the slots they replace, {path: class}.
    """
    model = hosts.language_model(model)
    calibration, policy = _read(calibration), None
    if bits == policies.AUTO:
        policy = policies.of(calibration, key_bits=key_bits, value_bits=value_bits, code=code)
        bits, recent = 3, policy.recent if recent is None else recent
        sink = policy.sink if sink is None else sink
    TurboQuantKVCache(  # refuses wrong settings first
        bits, key_bits=key_bits, value_bits=value_bits, code=code, seed=seed, recent=recent, sink=sink
    )
    if start is not None:
        whole("enable", "start", start)
    limits_for(checkpoints, 0)
    shard = sharding.of(model)
    if shard.pipelined and not any(type(c) in REPLACED for _, c in leaves(own_caches(model))):
        slots = {}  # this rank has none; sharding.agree() sees to it that another has
    else:
        slots = kv_slots(own_caches(model), "enable")
    names = [slot_name(path) for path in slots]
    widths = {"bits": bits, "key_bits": key_bits, "value_bits": value_bits, "code": code}
    settings = widths | {"seed": seed, "recent": recent, "sink": sink}
    calibration = shard.own_slots(_checked_calibration(model, calibration, seed))
    unknown = [slot for slot in calibration if slot not in names]
    if unknown:
        raise ValueError(f"[enable] calibration must belong to slots that are packed, {names}; got {unknown}")
    if start and hosts.of_mlx_vlm(model):
        raise ValueError(
            f"[enable] start = {start} is for models of mlx-lm: mlx-vlm batches every cache, and one that packs itself later "
            "cannot be batched"
        )
    windows = [layer_name(path) for path, kind in slots.items() if start and issubclass(REPLACED[kind], PackedWindow)]
    if windows:
        raise ValueError(
            f"[enable] start = {start} needs caches that can be packed later, and a RotatingKVCache cannot: "
            + ", ".join(windows)
        )

    apply_patch()
    reach_own_code(model)
    hosts.apply_patch(model)
    kept, heads = what_stays(model, lambda path, c: packed_like(c, None, settings))
    latent = latent_slots(model, settings, kept, slots, heads)
    slots = {path: kind for path, kind in slots.items() if path not in kept}
    if kept and (strict or not (slots or shard.pipelined)):
        total = len(kept) + len(slots)
        raise ValueError(f"[enable] {len(kept)} of {total} KVCache slots cannot be packed:\n{reasons(kept)}")
    if start and latent:
        raise ValueError(
            f"[enable] start = {start} needs caches that can be packed later, and latent attention's cannot: "
            + ", ".join(map(layer_name, sorted(latent)))
        )
    if shard.tensor and calibration:
        calibration = shard.own_heads(calibration, {slot_name(path): n for path, n in heads.items()})
    extras = {} if policy is None else policies.by_slot(shard.own_slots(policy.widths), slots)
    for slot in map(slot_name, slots):
        if (found := calibration.get(slot)) is not None:
            known = {"centres": found.centres, "feedback": found.feedback, "key_map": found.key_map}
            extras[slot] = extras.get(slot, {}) | known
    maker = CacheMaker(model, settings, extras, start, kept)
    maker.layers, maker.latent = len(model.layers), latent
    if not named:
        maker.names = Unnamed()
    if extras:
        problems, _ = what_stays(model, maker.unfilled)
        if problems:
            raise ValueError(
                f"[enable] the calibration does not fit {len(problems)} of {len(slots)} slots:\n{reasons(problems)}"
            )
    _add_checkpoints(model, maker, checkpoints)
    maker.names.current(fresh=True)
    return maker, slots


def _add_checkpoints(model, maker, checkpoints):
    """Lets `maker` make recurrent states that can go back, as `enable` was told."""
    maker.limits = limits_for(checkpoints, 0)
    if maker.limits is None or not any(type(c) is ArraysCache for _, c in leaves(own_caches(model))):
        return
    caches = maker()
    with hosts.undisturbed(model):
        model(mx.zeros((1, 2), mx.int32), cache=caches)  # the graph's shapes; nothing is computed
    states = {path: c for path, c in leaves(caches) if isinstance(c, CheckpointedArraysCache)}
    maker.uncounted = frozenset(path for path, c in states.items() if c.position != 2)
    if maker.uncounted and checkpoints != "auto":
        raise ValueError(
            "[enable] checkpoints need layers that count the tokens of their states (advance); these do not: "
            + ", ".join(layer_name(path) for path in sorted(maker.uncounted))
        )
    each = sum(c.state_nbytes for path, c in states.items() if path not in maker.uncounted)
    packed = [c.inspect() | {"step": c.step} for _, c in leaves(caches) if isinstance(c, TurboQuantKVCache)]
    token = sum((c["resident_bytes"] - c["exact_bytes"]) / c["step"] for c in packed)  # copies do not grow with tokens
    maker.limits = limits_for(checkpoints, each / token if token else 0)


def _calibrated_now(model, tokenizer, seed):
    """The calibration of a model for which none was given, or None: of a large one, or when there is a tokenizer; of
    others a warning where the weights say that plain codes fail."""
    if tokenizer is not None and hosts.of_mlx_vlm(model):
        raise ValueError(
            "[enable] tokenizer calibrates models of mlx-lm; for this one of mlx-vlm make the file with "
            "python -m turboquant_mlx calibrate --model FOLDER and give calibration=FOLDER"
        )
    if automatic.wanted(model) and not hosts.of_mlx_vlm(model):
        return automatic.calibrated(model, tokenizer, seed=seed)
    if tokenizer is not None and sharding.of(model).group is None:
        print("[enable] no calibration is given: the model reads the package's text now", file=sys.stderr)
        return calibrate_by_default(model, tokenizer, seed=seed)
    if sharding.of(model).group is not None and automatic.parameters(model) >= automatic.LEAST:
        automatic.warn("a model that is spread over ranks is not calibrated by itself", "before it is spread")
    else:
        automatic.warn_of_steady_keys(model)
    return None


def enable(
    model: Any,
    bits: int | Literal["auto"] = 3,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    code: Code = None,
    seed: int = 0,
    calibration: Any = None,
    tokenizer: Any = None,
    start: int | None = None,
    recent: int | None = None,
    sink: int | None = None,
    chunked_recurrence: bool = False,
    checkpoints: bool | int | str = False,
    strict: bool = False,
) -> Enabled:
    """Makes `model.make_cache()` give packed caches in its `KVCache` and `RotatingKVCache` slots; other slots stay, and so
    do those of these kinds that cannot be packed.

    Works for models with and without a `make_cache` of their own, and applies the patch.  Calling it again changes
    the settings; `disable(model)` undoes it.

    Args:
        model: a model of mlx-lm or of mlx-vlm; the latter's caches are made by its language_model.
        bits, key_bits, value_bits, code, seed: as for TurboQuantKVCache.  bits="auto": what `calibrate --budget` chose for
            each layer's keys and values, which stands in the calibration file; without `calibration`, what it chose last
            for these weights on this machine.  `recent` and `sink` are those of the choice, unless they are given.
        calibration: centres and feedback: a file of `calibrate` or a model directory that holds one (str or PathLike),
            which is checked against the weights that lie beside it; or {slot index: Calibration}, as
            turboquant_mlx.calibration makes and loads it.  Without one, a model from 64 million parameters on is
            calibrated now, in seconds, which stderr says; what was made is kept for the next time
            (turboquant_mlx.calibration.automatic).  Smaller ones have plain codes, and a warning where the weights show
            that plain codes fail (key biases).  {} makes plain codes in any case.
        tokenizer: of mlx-lm's load().  With it and without `calibration`, any model is calibrated now, on a text that
            ships with the package: better than the random token ids that are read without it.
        start (int): tokens that a cache holds as plain floats before it packs itself (mlx-lm's quantized_kv_start);
            such caches are not batched.
        recent, sink (int): the newest and the first tokens that queries read exactly, as for TurboQuantKVCache.  With
            `recent`, a sliding window of at most 1,024 tokens is held at 8 bits, where copies of its newest would take as
            much; a larger one has its codes alone.
        checkpoints (bool, int or "auto"): let recurrent states (`ArraysCache` slots) go back: True keeps copies of a state
            at the ends of a prompt's chunks, fewer and fewer towards its beginning, which take no more bytes than the
            packed keys and values, but may be 4; a number keeps at most so many; "auto" is True, without the slots
            whose layers do not count tokens.  trim_prompt_cache and rewind_and_read use them.
        chunked_recurrence (bool): off Metal, read prompts through the linear attention of Qwen3.5 and its like 64 tokens
            a step, where mlx-lm loops over tokens: for every model of the process, until
            turboquant_mlx.gated_delta.disable_chunked_recurrence(); without effect on models that have no such layers.
            Same function, other rounding.  False leaves that switch as it is.
        strict (bool): refuses the model when one of its KVCache or RotatingKVCache slots cannot be packed.

    Returns:
        Enabled: the number of slots that are packed, an int; its `kept` has the reason for each that stays.

    Raises:
        ValueError: the model has no such slot, or none that can be packed, or with `strict` one that cannot: the message
            gives each one's reason; a setting is out of range, bits="auto" where no bits were chosen for this model, or
            `calibration` is none, names a slot that the model does not have, or has feedback made for another seed.  The
            model is left as it was, with the caches of an earlier enable() if there was one.
        FileNotFoundError: there is no such calibration file.

    Of a model that is sharded over ranks (mlx-lm's `shard` or `pipeline`), every rank calls this, and takes its own
    heads and slots of a calibration; when one rank refuses, all raise its reason.
    """
    model = hosts.language_model(model)
    settings = {
        "key_bits": key_bits,
        "value_bits": value_bits,
        "code": code,
        "seed": seed,
        "start": start,
        "recent": recent,
        "sink": sink,
        "checkpoints": checkpoints,
        "strict": strict,
    }

    def pack(found):
        return sharding.agreed(model, lambda: packing(model, bits, calibration=found, **settings))

    if calibration is None and bits == policies.AUTO:
        calibration = automatic.chosen(model, seed=seed)
    make_cache, slots = pack(calibration)  # refuses before anything is calibrated
    if calibration is None and (found := _calibrated_now(model, tokenizer, seed)):
        make_cache, slots = pack(found)
    before = vars(model).get("make_cache")
    make_cache.replaced = before.replaced if isinstance(before, CacheMaker) else before
    model.make_cache = make_cache
    if chunked_recurrence:
        enable_chunked_recurrence()
    return Enabled(slots, make_cache.kept)


def disable(model: Any) -> None:
    """Gives the model its own caches back.  The patch stays, which float caches do not notice, and so does the chunked
    recurrence, which belongs to the process."""
    model = hosts.language_model(model)
    ours = vars(model).get("make_cache")
    if not isinstance(ours, CacheMaker):
        return
    del model.make_cache
    if ours.replaced is not None:
        model.make_cache = ours.replaced
