"""Centres: a constant vector per layer and KV head that is taken from keys and values before they are coded.

Softmax does not see a constant added to every key, and one taken from every value is added back once to the output, so
what remains to be coded is smaller at no cost in the loop over tokens (docs/quality.md has what that buys).  The
centres are the means of keys (after RoPE) and values over a short text.  They are constants of a model: they do not
depend on how a prompt is chunked, batched or restored, and they are part of a cache's identity.

    centres = calibrate(model, tokens)                    # {slot: (keys, values)}, each (H_kv, D) float32
    save_centres(centres, directory)                      # a small file beside the weights
    enable(model, bits=3, centres=load_centres(directory))
"""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

FILE_NAME = "turboquant_centres.safetensors"
FORMAT = "turboquant centres 1"


class _Summing(KVCache):
    """A KVCache that adds up what it is given, in float64."""

    def __init__(self):
        super().__init__()
        self.sums = None

    def update_and_fetch(self, keys, values):
        sums = [np.array(x.astype(mx.float32)).sum((0, 2), dtype=np.float64) for x in (keys, values)]
        self.sums = sums if self.sums is None else [a + b for a, b in zip(self.sums, sums, strict=True)]
        return super().update_and_fetch(keys, values)


def calibrate(model, tokens, *, step=512):
    """Means of keys and values over a text.

    Args:
        model: a model of mlx-lm; its caches may be packed or not.
        tokens: token ids, (N,) or (B, N): some windows of different texts, each as long as a usual prompt, because the
            rotary part of the keys' mean depends on positions (docs/quality.md).
        step (int): tokens of a row given to the model at a time; without influence on the result beyond rounding.

    Returns:
        {slot index: (key centre, value centre)}, each (H_kv, D) float32: what `enable(centres=...)` takes.

    Raises:
        ValueError: no tokens, a model without KVCache slots, or keys that are not (B, H_kv, N, D).
    """
    from .slots import _replace, _slots

    tokens = mx.array(tokens)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.size == 0:
        raise ValueError("[calibrate] there are no tokens to calibrate with")
    made = {}

    def make(path):
        made[path] = _Summing()
        return made[path]

    original = _float_caches(model)
    caches = _replace(original, make)
    if not made:
        kinds = sorted({type(c).__name__ for _, c in _slots(original)})
        raise ValueError(f"[calibrate] the model has no KVCache slot, so there is nothing to centre; it has {kinds}")
    for start in range(0, tokens.shape[1], step):
        mx.eval(model(tokens[:, start : start + step], cache=caches), [c.state for c in caches])
    centres = {}
    for path, cache in made.items():
        if cache.sums is None:
            continue  # a slot that this model shares with another layer
        mean = [(x / tokens.size).astype(np.float32) for x in cache.sums]
        if not all(np.isfinite(x).all() for x in mean):
            raise ValueError(f"[calibrate] keys or values of slot {path[0]} are not finite")
        centres[path[0] if len(path) == 1 else path] = tuple(mx.array(x) for x in mean)
    return centres


def _float_caches(model):
    """The model's own caches, whether or not `enable` was called."""
    from .slots import _own_make_cache

    make_cache = _own_make_cache(model)
    return make_cache() if make_cache else [KVCache() for _ in model.layers]


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


def save_centres(centres, where, *, directory=None, source=""):
    """Writes `centres` to a file, or to turboquant_centres.safetensors in a model directory.

    Args:
        centres: as from `calibrate`, for models whose slots are a flat list.
        where: a directory or a file name.
        directory: the model directory they belong to, `where` by default; the file keeps its fingerprint.
        source (str): what they were made from, for people.

    Returns:
        The path written.
    """
    path = _path(where)
    tensors = {}
    for slot, (keys, values) in centres.items():
        tensors[f"{slot}.keys"], tensors[f"{slot}.values"] = mx.array(keys), mx.array(values)
    identity = fingerprint(directory or path.parent)
    mx.save_safetensors(str(path), tensors, {"format": FORMAT, "model": identity, "source": source})
    return path


def load_centres(where, *, directory=None):
    """Reads what `save_centres` wrote.

    Args:
        where: a model directory or a file.
        directory: the model directory to check against, the file's own by default; False checks nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or belongs to another model.
    """
    path = _path(where)
    if not path.is_file():
        raise FileNotFoundError(f"[load_centres] there is no {path}; make it with python -m turboquant_mlx calibrate")
    tensors, metadata = mx.load(str(path), return_metadata=True)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"[load_centres] {path} must hold {FORMAT!r}; it holds {metadata.get('format')!r}")
    if directory is not False:
        expected = fingerprint(directory or path.parent)
        if metadata.get("model") != expected:
            raise ValueError(
                f"[load_centres] {path} was made for the model {metadata.get('model')}, this one is {expected}"
            )
    slots = sorted({name.rsplit(".", 1)[0] for name in tensors}, key=int)
    return {int(slot): (tensors[f"{slot}.keys"], tensors[f"{slot}.values"]) for slot in slots}


def main(argv=None):
    """Makes the centres file of a model from windows spread over a text."""
    from .eval.model import load_model, read_tokens, spread_windows

    parser = argparse.ArgumentParser(prog="turboquant_mlx calibrate", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a local model directory")
    parser.add_argument("--text", type=Path, required=True, help="any text of the kind the model reads")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--out", type=Path, help="a file; default: beside the weights")
    args = parser.parse_args(argv)
    try:
        if args.windows < 1 or args.length < 1:
            raise ValueError("[calibrate] --windows and --length must be at least 1")
        with tempfile.TemporaryFile(dir=_path(args.out or args.model).parent):
            pass  # an unwritable folder is found before the work
        model, tokenizer = load_model(args.model)
        windows = spread_windows(read_tokens(tokenizer, args.text), args.length, args.windows)
        centres = calibrate(model, windows)
        source = f"{len(windows)} windows of {args.length} tokens spread over {args.text.name}"
        path = save_centres(centres, args.out or args.model, directory=args.model, source=source)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{path}: centres of {len(centres)} layers from {source}")
    return 0
