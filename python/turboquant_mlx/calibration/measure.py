"""From the moments of a text to centres, maps and feedback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..caches.identity import weight_names
from ..caches.slots import slot_name
from ..overlay import sharding
from . import feedback as fed
from .balance import of_moments, offsets, turned, turns
from .files import Calibration, Calibrations
from .moments import attentions, gather


def calibrate(
    model: Any,
    tokens: Any,
    *,
    step: int = 512,
    seed: int = 0,
    feedback: bool = True,
    balance: bool = True,
    positions: int | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Calibrations:
    """Means of keys and values over a text, a map that balances keys, and the feedback for them.

    Args:
        model: a model of mlx-lm; its caches may be packed or not.
        tokens: token ids, (N,) or (B, N): some windows of different texts, each beginning as the model's texts begin
            (`<bos>`).
        step (int): tokens given to the model at a time; without influence on the result beyond rounding.
        seed (int): of the caches that will use the feedback.
        feedback (bool): False makes centres alone.
        balance (bool): False makes no map.
        positions (int): up to where in a context the keys will stand; by default as far as the model's configuration
            allows.  RoPE turns means and moments on with the position; what the windows gave is turned on to positions
            spread that far, and averaged.  0: the windows' own positions.
        progress: called with the number of tokens just read.

    Returns:
        {slot index: Calibration}: what `enable(calibration=...)` takes.  The keys' map and feedback are None where
        attention does not go through mlx-lm's scaled_dot_product_attention; the values' where the way from attention to
        the hidden state is not understood (feedback.Output), or where several layers read one cache.  With D = 32 there is
        nothing to feed back.  What could not be made is in the result's `missing`, {slot: words}.

    Raises:
        ValueError: no tokens, a model without KVCache slots, or keys that are not (B, H_kv, N, D).
    """
    tokens = mx.array(tokens)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.size == 0:
        raise ValueError("[calibrate] there are no tokens to calibrate with")
    positions = context_of(model) if positions is None else positions
    slots, outputs = gather(model, tokens, step=step, feedback=feedback, progress=progress)
    layers = attentions(model, slots)
    found = Calibrations()
    found.weights = frozenset(weight_names(model)) if sharding.of(model).group is None else frozenset()
    for path, moments in slots.items():
        if not moments.tokens:
            continue  # a slot that this model shares with another layer
        values = None
        if path in outputs and moments.readers == moments.updates:
            values = fed.of_metrics(outputs[path].metrics(*moments.value_sum.shape, tokens.size), seed)
        turn = _turns(layers.get(path), moments, tokens.shape[1], positions)
        keys = _of_keys(moments, turn, seed, balance)
        value_centre = (moments.value_sum / moments.tokens).astype(np.float32)
        if not all(x is None or np.isfinite(x).all() for x in (*keys, value_centre)):
            raise ValueError(f"[calibrate] keys or values of slot {path[0]} are not finite")
        centre, key_map, key_feedback = (None if x is None else mx.array(x) for x in keys)
        made = Calibration(centre, mx.array(value_centre), key_feedback, values, seed, key_map)
        found[slot_name(path)] = made
        if missing := _missing(made, moments.readers, feedback, balance and feedback):
            found.missing[slot_name(path)] = missing
    return found


def _missing(made, readers, feedback, balance):
    """What was asked for and could not be made for a slot, and why: words, empty when all is there."""
    why = "its attention does not go through mlx-lm's" if not readers else "its moments are not finite"
    lacks = [
        ("the map of keys", made.key_map is None and balance, why),
        ("the feedback of keys", made.key_feedback is None and feedback and made.key_centre.shape[-1] > fed.BLOCK, why),
        (
            "the feedback of values",
            made.value_feedback is None and feedback and made.value_centre.shape[-1] > fed.BLOCK,
            "the way from attention to the hidden state is not known, or several layers read the slot",
        ),
    ]
    return "; ".join(f"{what}: {reason}" for what, lacking, reason in lacks if lacking)


def context_of(model):
    """The longest context that a model's configuration names, at most 2^20; 32,768 where it names none."""
    found = [32768]
    for part in (getattr(model, "args", None), getattr(getattr(model, "args", None), "text_config", None)):
        part = part if isinstance(part, dict) else vars(part) if hasattr(part, "__dict__") else {}
        number = part.get("max_position_embeddings")
        found += [number] if isinstance(number, int) and number > 0 else []
    return min(found[-1], 1 << 20)


def _turns(attention, moments, length, positions):
    """(turns that move the windows on over the positions, their weights), or None."""
    moved, weights = offsets(length, positions)
    found = None if attention is None or len(moved) == 1 else turns(attention, moments.key_sum.shape[1], moved)
    return None if found is None else (found, weights)


def _of_keys(moments, turn, seed, balance):
    """(centre, map, feedback) of a slot's keys: numpy arrays or None."""
    centre, keys = moments.key_sum / moments.tokens, moments.keys / moments.tokens
    queries = moments.queries / moments.asked if moments.readers else None
    if turn is not None:
        keys, centre = turned(*turn, keys, centre)
        queries = None if queries is None else turned(*turn, queries)[0]
    keys = keys - centre[:, :, None] * centre[:, None]
    key_map = None
    if balance and queries is not None and np.isfinite(queries).all() and np.isfinite(keys).all():
        key_map = np.stack([of_moments(*pair) for pair in zip(queries, keys, strict=True)]).astype(np.float32)
        inverse = np.linalg.inv(key_map.astype(np.float64))
        queries = inverse @ queries @ inverse.swapaxes(1, 2)
    feedback = fed.of_metrics(queries, seed)
    return centre.astype(np.float32), key_map, None if feedback is None else np.array(feedback)
