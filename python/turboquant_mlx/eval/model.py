"""Loading a model and a text so that measuring is bearable on a CPU.

Several commands share this: errors here do not begin with an operation's name, and each command puts its own in front
(`message`)."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.utils import dequantize_model

from ..caches import leaves
from ..overlay import products
from ..overlay.gated_delta import enable_chunked_recurrence


def load_model(path):
    """(model, tokenizer) of a local directory.

    On a CPU the weights become float32 (dequantised when that stays below 2 GB), whose products a fast BLAS can do,
    and the gated delta recurrence goes by chunks wherever mlx-lm would loop over tokens."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"the model must be a local directory; there is none at {path}")
    if not any(path.glob("model*.safetensors")):
        raise ValueError(f"{path} holds no model*.safetensors weights")
    model, tokenizer = load(str(path))
    if mx.default_device() == mx.Device(mx.cpu):
        if sum(v.size for _, v in tree_flatten(model.parameters())) < 500e6:
            model = dequantize_model(model)
        model.set_dtype(mx.float32)
        if products.needed(model):
            products.use_numpy(model)
    model.eval()
    enable_chunked_recurrence()
    return model, tokenizer


def read_text(path):
    """A text file in UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error}") from None


def read_tokens(tokenizer, path):
    """Token ids of a text file in UTF-8."""
    text = read_text(path)
    # A whole text is longer than any context, and is never given to the model at once: no warning about that.
    return np.array(tokenizer.encode(text, verbose=False), np.int32)


def recurrent_states(caches):
    """The states of recurrent slots, to be evaluated beside a step's logits, which do not contain the last of them."""
    return [c.state for _, c in leaves(caches) if hasattr(c, "cache")]


def message(command, error):
    """An error as `command` prints it: with its name in front, unless the error names an operation itself."""
    return str(error) if re.match(r"\[\w+\] ", str(error)) else f"[{command}] {error}"


def window_numbers(count, first=0, without=()):
    """`count` numbers from `first` on, those in `without` left out."""
    return [n for n in range(first, first + count + len(without)) if n not in without][:count]


def cut_windows(tokens, length, count, first=0, without=(), start=()):
    """The windows of `length` tokens of these numbers, each beginning with the ids `start`: (count, length).

    `tokens` is a text that itself begins with `start` or with nothing.  Raises ValueError when it is too short."""
    start = np.array(start, np.int32)
    if len(start) and np.array_equal(tokens[: len(start)], start):
        tokens = tokens[len(start) :]
    whole, length = length, length - len(start)
    if length < 1:
        raise ValueError(f"a window of {whole} tokens has no room behind the {len(start)} that texts begin with")
    numbers = window_numbers(count, first, without)
    need = (numbers[-1] + 1) * length
    if len(tokens) < need:
        raise ValueError(
            f"{count} windows of {length} tokens from window {first} on need {need} tokens; the text has {len(tokens)}"
        )
    return np.stack([np.concatenate([start, tokens[n * length : (n + 1) * length]]) for n in numbers]).astype(np.int32)


def spread_windows(tokens, length, count):
    """Up to `count` windows of `length` tokens spread evenly over a text, the last one at its end.

    Raises ValueError when the text is shorter than one window."""
    total = len(tokens) // length
    if total == 0:
        raise ValueError(f"a window takes {length} tokens; the text has {len(tokens)}")
    count = min(count, total)
    windows = tokens[: total * length].reshape(total, length)
    return windows[[(i + 1) * total // count - 1 for i in range(count)]]
