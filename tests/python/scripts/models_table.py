"""Prints docs/models.md: what `enable` makes of the caches of every family that mlx-lm has a file for.

.venv/bin/python tests/python/scripts/models_table.py > docs/models.md"""

import collections
import gc
import importlib.metadata
import pathlib
import sys
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import families
import mlx.core as mx
from turboquant_mlx import enable
from turboquant_mlx.caches import leaves
from turboquant_mlx.enable import own_caches, slot_name

HEAD = """# Which models are packed

Made by `tests/python/scripts/models_table.py` from the model files of mlx-lm {version}: a small random model of every family,
and what `enable(model)` makes of its caches on a CPU. Numbers are those of the small model, in the family's proportions
where these matter: of slots, and of a key and a value of each.

* Slots of recurrent states do not grow with the context and stay.
* Windows of up to 1,024 tokens have 8 bits by default.
* A checkpoint may have heads of another size than here: each side must be a multiple of 32 from 32 to 512.

| family | slots of the model | keys / values | in their place |
| --- | --- | --- | --- |
"""
SHORT = {
    "its attention does not go through mlx_lm.models.base.scaled_dot_product_attention": "read beside mlx-lm's attention",
}


def _reason(why):
    why = why.removeprefix("[encode] ").splitlines()[0]
    return next((short for long, short in SHORT.items() if why.startswith(long)), why)


def _widths(cache):
    """Of a key and a value that a float cache holds."""
    held = [getattr(cache, name, None) for name in ("keys", "values")]
    return " / ".join(str(x.shape[-1]) for x in held) if all(isinstance(x, mx.array) for x in held) else ""


def rows(name):
    """[(slots, widths, what stands in their place)] of a family."""
    model = families.make(name)
    kinds = {path: type(c).__name__ for path, c in leaves(own_caches(model))}
    caches, error, kept, made = own_caches(model), None, {}, {}
    try:
        model(mx.zeros((1, 3), mx.int32), cache=caches)
    except RuntimeError as failure:  # a model that this device cannot run
        error = f"does not run here: {failure}"
    widths = {path: _widths(c) for path, c in leaves(caches)}
    if error is None:
        try:
            kept = enable(model, calibration={}).kept
            made = {path: type(c).__name__ for path, c in leaves(model.make_cache())}
        except ValueError as refused:
            lines = str(refused).splitlines()[1:]  # one a slot
            kept = {path: line.split(": ", 1)[1] for path, line in zip(_packable(kinds), lines, strict=False)}
    found = collections.Counter()
    for path, kind in kinds.items():
        place = error or made.get(path, kind)
        if slot_name(path) in kept or path in kept:
            place = "stays: " + _reason(kept.get(slot_name(path), kept.get(path)))
        elif place == kind:
            place = "stays" if kind == "ArraysCache" else "stays: a kind of its own"
        found[kind, widths[path], place] += 1
    return [(f"{n} x {kind}", size, place) for (kind, size, place), n in found.items()]


def _packable(kinds):
    return [path for path, kind in kinds.items() if kind in ("KVCache", "RotatingKVCache")]


def text():
    """The document."""
    lines = []
    for name in families.names():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = rows(name)
        gc.collect()
        for first, row in enumerate(found):
            lines.append(f"| {'' if first else f'`{name}`'} | " + " | ".join(row) + " |\n")
    for name, why in families.LEFT_OUT.items():
        lines.append(f"| `{name}` | | | not tried: {why} |\n")
    return HEAD.format(version=importlib.metadata.version("mlx-lm")) + "".join(lines)


if __name__ == "__main__":
    print(text(), end="")
