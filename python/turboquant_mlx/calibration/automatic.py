"""Calibration that nobody asked for: what `enable` and the command line do when they are given none.

Models from LEAST parameters on are calibrated where they are enabled, in seconds: with a tokenizer on the text that ships
with the package, without one on token ids drawn at random, which tell what the weights make of any token (biases, spread
of norms, which directions queries ask for); they lose 1.2 to 1.7 times what text loses (docs/quality.md).  Smaller models
keep plain codes.  What was made is kept in a folder of the user's, by the name of the weights, so that the next process has the same
codes at once."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..caches.identity import fingerprint, weight_names
from ..overlay import products, sharding
from . import default
from .files import Calibrations, read_calibration, write_calibration

LEAST = 64_000_000  # parameters of a model from which on it is calibrated by itself
MOST_ON_CPU = 3_000_000_000  # parameters up to which a CPU calibrates by itself: above, it would take minutes
WINDOWS, LENGTH = 4, 256  # tokens read: so few that nobody waits long; `calibrate` reads four times as many
MADE = 1  # changes when the same weights get other calibrations


def parameters(model) -> int:
    """How many numbers a model's weights stand for, packed ones counted as what they dequantise to."""
    named: Any = tree_flatten(model.parameters())
    total = sum(x.size for _, x in named)
    for module in model.modules():
        if {"weight", "scales"} <= module.keys() and getattr(module, "bits", 0):
            total += module.weight.size * (32 // module.bits - 1)
    return total


def folder() -> Path:
    """Where calibrations that were made without being asked for are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turboquant-mlx" / "calibrations"


def _kept(model, seed, source):
    return folder() / f"{fingerprint(model)}-{seed}-{source}-{MADE}.safetensors"


def _load(path):
    """The calibration kept in a file; None when there is none that can be read."""
    try:
        return read_calibration(path)[0]
    except (OSError, ValueError, RuntimeError, KeyError):
        return None


def _keep(found, path, source):
    """Writes a calibration at once or not at all; a folder that cannot be written to keeps none, and that is said."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_calibration(found, path, source=source)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"[tq] the calibration is not kept for the next time: {error}", file=sys.stderr)


def keep_choice(found: Calibrations, *, seed: int = 0) -> None:
    """Keeps a calibration with a choice of bits where `enable(model, bits="auto")` finds it without being told where."""
    for name in sorted(found.weights):
        _keep(found, folder() / f"{name}-{seed}-choice-{MADE}.safetensors", "choice")


def chosen(model, *, seed: int = 0) -> Calibrations | None:
    """The calibration with a choice of bits that was kept for a model's weights, or None."""
    for name in sorted(weight_names(model)):
        found = _load(path := folder() / f"{name}-{seed}-choice-{MADE}.safetensors")
        if found is not None and found.policy is not None:
            print(f"[tq] bits and calibration: {path}", file=sys.stderr)
            return found
    return None


def random_ids(model) -> np.ndarray | None:
    """Windows (WINDOWS, LENGTH) of token ids drawn evenly from the vocabulary, the same each time; None for a model whose
    vocabulary is not known."""
    sizes = [m.weight.shape[0] for m in model.modules() if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))]
    if not sizes:
        return None
    return np.random.default_rng(0).integers(0, max(sizes), (WINDOWS, LENGTH)).astype(np.int32)


def wanted(model) -> bool:
    """Whether a model is one that is calibrated by itself: by its size, and not spread over ranks."""
    return sharding.of(model).group is None and parameters(model) >= LEAST


def calibrated(model, tokenizer=None, *, seed: int = 0) -> Calibrations | None:
    """The calibration of a model that was given none: what was kept, or made now and kept; says so on stderr.

    None, with a warning, where it cannot be made: too many parameters for this CPU, or a model that cannot read ids."""
    for source in ("text", "ids")[: 1 if tokenizer is not None else 2]:
        found = _load(path := _kept(model, seed, source))
        if found is not None:
            print(f"[tq] calibration: {path}", file=sys.stderr)
            return found
    if products.slow_here() and parameters(model) > MOST_ON_CPU:
        warn(f"this CPU would take minutes to calibrate {parameters(model) / 1e9:.1f}e9 parameters")
        return None
    source = "ids" if tokenizer is None else "text"
    try:
        windows = random_ids(model) if tokenizer is None else default.windows_of_text(tokenizer, WINDOWS, LENGTH)
        if windows is None:
            raise ValueError("it has no token embedding")
        what = "token ids drawn at random; tokenizer=... is better" if tokenizer is None else "the package's text"
        print(f"[tq] no calibration is given: the model reads {windows.size} tokens of {what}", file=sys.stderr)
        found = default.calibrate_visibly(model, windows, seed=seed)
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        warn(f"the model could not be calibrated ({error})")
        return None
    if all(isinstance(slot, int) for slot in found):
        _keep(found, _kept(model, seed, source), source)
    return found


def warn(why, when="once", stacklevel=4) -> None:
    """Says that a large model has plain codes, why, and what to do."""
    warnings.warn(
        f"[enable] codes are plain, which costs quality: {why}; run python -m turboquant_mlx calibrate --model FOLDER "
        f"{when}, and give calibration=FOLDER",
        stacklevel=stacklevel,
    )


def warn_of_steady_keys(model) -> None:
    """A warning where the weights of a model that is not calibrated say that plain codes ruin it."""
    found = default.steady_keys(model)
    if found:
        layers = ", ".join(f"{layer} ({ratio:.0f} times)" for layer, ratio in found.items())
        warnings.warn(
            f"[enable] plain codes ruin this model: the keys of layers {layers} have a bias that much longer than what "
            "varies of them. Calibrate: enable(model, ..., tokenizer=tokenizer) does it now, in seconds to a minute; "
            "python -m turboquant_mlx calibrate --model FOLDER once and better, for calibration=FOLDER.",
            stacklevel=4,
        )
