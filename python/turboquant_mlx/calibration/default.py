"""Calibrating without being told how: the text that ships with the package, some windows of it, every one beginning as the
model's texts begin."""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..caches.slots import REPLACED, leaves, own_caches
from .feedback import matrix
from .measure import calibrate
from .moments import attentions

TEXT = Path(__file__).with_name("text.txt")  # this project's own documentation and code
WINDOWS, LENGTH = 8, 512
STEADY = 2.0  # times the length of what varies: from there on, a key's bias takes most of its codes


def beginning(tokenizer):
    """The ids that the tokenizer puts in front of any text, as `<bos>`: a list."""
    whole, alone = (list(tokenizer.encode("a", add_special_tokens=special)) for special in (True, False))
    front = len(whole) - len(alone)
    return whole[:front] if front > 0 and whole[front:] == alone else []


def windows_of(tokenizer, text, count, length):
    """Windows (count, length) of token ids spread over a text, each beginning as the model's texts begin.

    Raises ValueError when the text is shorter than one window."""
    start = beginning(tokenizer)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    body = length - len(start)
    total = len(ids) // body if body > 0 else 0
    if total == 0:
        raise ValueError(f"a window takes {length} tokens; the text has {len(ids)}")
    count = min(count, total)
    places = [(i + 1) * total // count - 1 for i in range(count)]
    return np.stack([np.concatenate([start, ids[n * body : (n + 1) * body]]) for n in places]).astype(np.int32)


class Bar:
    """A progress bar of tokens on stderr, where that is a terminal."""

    def __init__(self, name, total):
        self.bar = tqdm(total=total, desc=name, unit="tok", disable=None, file=sys.stderr)

    def __call__(self, tokens):
        self.bar.update(tokens)

    def close(self):
        self.bar.close()


def windows_of_text(tokenizer, count=WINDOWS, length=LENGTH):
    """windows_of() the text that ships with the package."""
    return windows_of(tokenizer, TEXT.read_text(encoding="utf-8"), count, length)


def calibrate_by_default(model: Any, tokenizer: Any, *, seed: int = 0) -> Any:
    """`calibrate` on the text that ships with the package: {slot: Calibration}, in seconds."""
    return calibrate_visibly(model, windows_of_text(tokenizer), seed=seed)


def calibrate_visibly(model, windows, *, seed=0):
    """`calibrate` on windows (count, length) of token ids, with a progress bar."""
    bar = Bar("calibrate", windows.size)
    try:
        return calibrate(model, windows, seed=seed, progress=bar)
    finally:
        bar.close()


def steady_keys(model: Any) -> dict[int, float]:
    """{layer: how many times as long as what varies of its keys their bias is}, where that is above STEADY.

    Read from the weights alone: after a norm a layer's input has about unit coordinates times the norm's weights, so what
    varies of a head's keys has about the length |W diag(norm)| of its rows of the projection."""
    slots = {path: c for path, c in leaves(own_caches(model)) if type(c) in REPLACED}
    found: dict[int, float] = {}
    for path, attention in attentions(model, slots).items():
        projection: Any = getattr(attention, "k_proj", None)
        heads = getattr(attention, "n_kv_heads", None) or getattr(attention, "num_key_value_heads", None)
        weight = matrix(projection)
        if weight is None or "bias" not in projection or not heads:
            continue
        norm = getattr(model.layers[path[0]], "input_layernorm", None)
        if norm is not None and "weight" in norm and norm.weight.size == weight.shape[1]:
            weight = weight * np.array(norm.weight.astype(mx.float32))
        bias = np.array(projection.bias.astype(mx.float32)).reshape(heads, -1)
        worst = (np.linalg.norm(bias, axis=1) / np.linalg.norm(weight.reshape(heads, -1), axis=1)).max()
        if worst > STEADY:
            found[path[0]] = float(worst)
    return found
