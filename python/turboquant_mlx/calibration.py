"""Calibration: what a short text tells about a model's keys and values, for codes that cost less.

Centres are the means of keys (after RoPE) and values, a constant vector per layer and KV head that is taken from them
before they are coded.  Softmax does not see a constant added to every key, and one taken from every value is added back
once to the output, so what remains to be coded is smaller at no cost in the loop over tokens.  Feedback (feedback.py)
lets the encoder put its errors where attention hardly looks, at no cost after encoding.  docs/quality.md has what both
buy.  They are constants of a model: they do not depend on how a prompt is chunked, batched or restored, and they are
part of a cache's identity.

    found = calibrate(model, tokens)                      # {slot: Calibration}
    save_calibration(found, directory)                    # a file beside the weights
    enable(model, bits=3, calibration=directory)          # or the file, or `found`
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from . import feedback as fed
from .cache import leaves

FILE_NAME = "turboquant_calibration.safetensors"
FORMAT = "turboquant calibration 2"


class Calibration(NamedTuple):
    """What is known of one slot; None stands for what is not."""

    key_centre: mx.array | None = None  # (H_kv, D) float32
    value_centre: mx.array | None = None
    key_feedback: mx.array | None = None  # (H_kv, D, D) float16
    value_feedback: mx.array | None = None
    seed: int = 0  # of the rotation that feedback was made for

    @property
    def centres(self):
        """(keys, values), as caches take them."""
        return self[:2]

    @property
    def feedback(self):
        """(keys, values), as caches take them; None without any."""
        return None if self[2] is None and self[3] is None else self[2:4]

    def without_feedback(self):
        """The centres alone."""
        return Calibration(*self[:2])


NO_CALIBRATION = Calibration()


def as_calibration(found):
    """A Calibration of one, of a tuple in its order, or of None."""
    try:
        return NO_CALIBRATION if found is None else Calibration(*found)
    except TypeError:
        raise ValueError(f"[enable] calibration must hold a Calibration for each slot; got {found!r}") from None


class _Summing(KVCache):
    """A KVCache that adds up, in float64, what it is given and what its keys are asked."""

    def __init__(self):
        super().__init__()
        self.sums = None
        self.queries, self.asked, self.readers, self.updates = 0, 0, 0, 0

    def update_and_fetch(self, keys, values):
        sums = [np.array(x.astype(mx.float32)).sum((0, 2), dtype=np.float64) for x in (keys, values)]
        self.sums = sums if self.sums is None else [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.updates += 1
        return super().update_and_fetch(keys, values)

    def watch(self, queries):
        """Adds up q q' of the queries (B, H_q, L, D) of each KV head."""
        heads, dim = self.sums[0].shape
        if queries.shape[1] % heads or queries.shape[-1] != dim:
            return
        self.readers += 1
        self.queries = self.queries + fed.second_moment(queries, heads)
        self.asked += queries.size // (heads * dim)


def calibrate(model, tokens, *, step=512, seed=0, feedback=True):
    """Means of keys and values over a text, and the feedback for them.

    Args:
        model: a model of mlx-lm; its caches may be packed or not.
        tokens: token ids, (N,) or (B, N): some windows of different texts, each as long as a usual prompt, because the
            rotary part of the keys' mean depends on positions (docs/quality_studies.md).
        step (int): tokens of a row given to the model at a time; without influence on the result beyond rounding.
        seed (int): of the caches that will use the feedback.
        feedback (bool): False makes centres alone.

    Returns:
        {slot index: Calibration}: what `enable(calibration=...)` takes.  The keys' feedback is None where attention
        does not go through mlx-lm's scaled_dot_product_attention; the values' where the way from attention to the
        hidden state is not understood (feedback.Output), or where several layers read one cache.  With D = 32 there is
        nothing to feed back.

    Raises:
        ValueError: no tokens, a model without KVCache slots, or keys that are not (B, H_kv, N, D).
    """
    from .patch import watch_queries
    from .slots import own_caches, replace_kv_caches, slot_name

    tokens = mx.array(tokens)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.size == 0:
        raise ValueError("[calibrate] there are no tokens to calibrate with")
    made = {}

    def make(path):
        made[path] = _Summing()
        return made[path]

    def watch(queries, cache):
        if isinstance(cache, _Summing) and cache.sums is not None:
            cache.watch(queries)

    original = own_caches(model)
    caches = replace_kv_caches(original, make)
    if not made:
        kinds = sorted({type(c).__name__ for _, c in leaves(original)})
        raise ValueError(f"[calibrate] the model has no KVCache slot, so there is nothing to centre; it has {kinds}")
    outputs = _outputs(model, caches, made) if feedback else {}
    with contextlib.ExitStack() as stack:
        if feedback:
            stack.enter_context(watch_queries(watch))
        for output in outputs.values():
            stack.enter_context(output)
        for start in range(0, tokens.shape[1], step):
            mx.eval(model(tokens[:, start : start + step], cache=caches), [c.state for c in caches])
    found = {}
    for path, cache in made.items():
        if cache.sums is None:
            continue  # a slot that this model shares with another layer
        mean = [(x / tokens.size).astype(np.float32) for x in cache.sums]
        if not all(np.isfinite(x).all() for x in mean):
            raise ValueError(f"[calibrate] keys or values of slot {path[0]} are not finite")
        keys = values = None
        if cache.readers:
            keys = fed.of_metrics(cache.queries / cache.asked, seed)
        if path in outputs and cache.readers == cache.updates:
            values = fed.of_metrics(outputs[path].metrics(*mean[1].shape, tokens.size), seed)
        found[slot_name(path)] = Calibration(*map(mx.array, mean), keys, values, seed)
    return found


def _outputs(model, caches, made):
    """{path: Output} of the slots whose attention module is that of the layer with the same number."""
    if len(caches) != len(model.layers):
        return {}
    layers = {path: model.layers[path[0]] for path in made if len(path) == 1}
    return {path: fed.Output(layer.self_attn) for path, layer in layers.items() if "self_attn" in layer}


def fingerprint(directory):
    """A hash of a model directory's configuration and of its weights' headers (names, shapes, dtypes, sizes)."""
    directory = Path(directory)
    weights = sorted(directory.glob("model*.safetensors"))
    if not weights:
        raise ValueError(f"[calibration] {directory} holds no model*.safetensors, so it cannot be identified")
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in weights:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name} {path.stat().st_size} {length}".encode())
            digest.update(file.read(min(length, 1 << 24)))
    return digest.hexdigest()[:32]


def _path(where):
    where = Path(where)
    return where / FILE_NAME if where.is_dir() else where


def save_calibration(calibration, where, *, directory=None, source=""):
    """Writes `calibration` to a file, or to turboquant_calibration.safetensors in a model directory.

    Args:
        calibration: as from `calibrate`, for models whose slots are a flat list.
        where: a directory or a file name.
        directory: the model directory it belongs to, `where` by default; the file keeps its fingerprint.
        source (str): what it was made from, for people.

    Returns:
        The path written.
    """
    path = _path(where)
    entries = {slot: as_calibration(found) for slot, found in calibration.items()}
    tensors = {
        f"{slot}.{name}": x
        for slot, found in entries.items()
        for name, x in zip(Calibration._fields, found, strict=True)
        if isinstance(x, mx.array)
    }
    seeds = sorted({found.seed for found in entries.values()})
    if len(seeds) > 1:
        raise ValueError(f"[save_calibration] all slots must be calibrated for one seed; got {seeds}")
    metadata = {"format": FORMAT, "model": fingerprint(directory or path.parent), "source": source}
    mx.save_safetensors(str(path), tensors, metadata | {"seed": str(seeds[0] if seeds else 0)})
    return path


def load_calibration(where, *, directory=None):
    """Reads what `save_calibration` wrote.

    Args:
        where: a model directory or a file.
        directory: the model directory to check against, the file's own by default; False checks nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or belongs to another model.
    """
    path, again = _path(where), "make it with python -m turboquant_mlx calibrate"
    if not path.is_file():
        raise FileNotFoundError(f"[load_calibration] there is no {path}; {again}")
    tensors, metadata = mx.load(str(path), return_metadata=True)
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise ValueError(f"[load_calibration] {path} must hold {FORMAT!r}; it holds {found!r}: {again}")
    if directory is not False:
        expected = fingerprint(directory or path.parent)
        if metadata.get("model") != expected:
            raise ValueError(
                f"[load_calibration] {path} was made for the model {metadata.get('model')}, this one is {expected}"
            )
    found = {}
    for name, x in tensors.items():
        slot, field = name.rsplit(".", 1)
        found.setdefault(int(slot), {"seed": int(metadata["seed"])})[field] = x
    return {slot: Calibration(**found[slot]) for slot in sorted(found)}


def load_beside(where):
    """load_calibration() of a directory or a file, checked against the weights beside it if there are any."""
    weights = _path(where).parent.glob("model*.safetensors")
    return load_calibration(where, directory=None if any(weights) else False)


def main(argv=None):
    """Makes the calibration file of a model, centres and feedback, from windows spread over a text."""
    from .eval.model import load_model, message, read_tokens, spread_windows

    parser = argparse.ArgumentParser(prog="turboquant_mlx calibrate", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a local model directory")
    parser.add_argument("--text", type=Path, required=True, help="any text of the kind the model reads")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--seed", type=int, default=0, help="--tq-seed of the caches that will use it")
    parser.add_argument("--out", type=Path, help="a file; default: beside the weights")
    args = parser.parse_args(argv)
    try:
        if args.windows < 1 or args.length < 1:
            raise ValueError("[calibrate] --windows and --length must be at least 1")
        with tempfile.TemporaryFile(dir=_path(args.out or args.model).parent):
            pass  # an unwritable folder is found before the work
        model, tokenizer = load_model(args.model)
        windows = spread_windows(read_tokens(tokenizer, args.text), args.length, args.windows)
        found = calibrate(model, windows, seed=args.seed)
        source = f"{len(windows)} windows of {args.length} tokens spread over {args.text.name}"
        path = save_calibration(found, args.out or args.model, directory=args.model, source=source)
    except KeyboardInterrupt:
        print("[calibrate] interrupted; nothing was written", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(message("calibrate", error), file=sys.stderr)
        return 1
    keys, values = (sum(c[side] is not None for c in found.values()) for side in (2, 3))
    print(f"{path}: centres of {len(found)} layers, feedback of {keys} layers' keys and {values} layers' values")
    print(f"from {source}")
    return 0
