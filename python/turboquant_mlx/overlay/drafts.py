"""Speculative decoding over packed caches: mlx-lm's `speculative_generate_step`, whose tokens are those of plain decoding.

mlx-lm appends a round of drafts and takes the refused ones back, which a window that has moved on cannot do: there it
leaves them in, without a word, and every token after them is wrong.  Packed windows can, while drafts are checked
(rotating.drafting).  What cannot be is refused before the first token: a cache that packs itself during the answer, for
a round of drafts would be read from codes where plain decoding still has floats, and float windows beside packed caches.
"""

import inspect

from mlx_lm.generate import speculative_generate_step as original
from mlx_lm.models import cache as mlx_lm_cache

from ..caches import CheckpointedArraysCache, DelayedTurboQuantKVCache, PackedCache, layer_name, leaves
from ..caches.rotating import drafting

_SIGNATURE = inspect.signature(original)
_PLAIN_STEP = 2048  # tokens that plain generation reads of a prompt at a time


def _check(caches, prompt, answer):
    """ValueError when an answer of `answer` tokens (-1: any number) cannot be that of plain decoding."""
    slots = list(leaves(caches))
    if not any(isinstance(c, PackedCache) for _, c in slots):
        return  # mlx-lm's own affair
    for path, c in slots:
        name = f"[speculative_generate_step] {layer_name(path)}"
        if isinstance(c, DelayedTurboQuantKVCache) and not c.packed:
            first = c.offset + prompt
            if first <= c.start and (answer < 0 or c.start < first + answer):
                raise ValueError(
                    f"{name} would pack itself within the answer, at token {c.start}, where drafts would change the "
                    f"tokens: the prompt ends at {first} and the answer at {first + answer if answer >= 0 else 'any'}; "
                    f"choose start (--tq-start) below {first} or leave the draft model out"
                )
        if type(c) is mlx_lm_cache.RotatingKVCache:
            last = c.offset + prompt + answer
            if answer < 0 or last >= c.max_size:
                raise ValueError(
                    f"{name} is a RotatingKVCache of {c.max_size} tokens, which cannot take drafts back once it is full; "
                    f"the answer may end at {last if answer >= 0 else 'any'}: leave the draft model out"
                )


def _check_states(*models):
    """ValueError when a model's recurrent states would go back to a checkpoint instead of by the drafts refused."""
    for caches in models:
        for path, c in leaves(caches):
            if isinstance(c, CheckpointedArraysCache):
                raise ValueError(
                    f"[speculative_generate_step] {layer_name(path)}: drafts need a trimmable prompt cache, and a "
                    "CheckpointedArraysCache goes back to its checkpoints alone, not token by token: leave the draft model "
                    "out"
                )


def speculative_generate_step(*positional, **named):
    call = _SIGNATURE.bind(*positional, **named)
    given = set(call.arguments)
    call.apply_defaults()
    model, caches = call.arguments["model"], call.arguments["prompt_cache"]
    caches = mlx_lm_cache.make_prompt_cache(model) if caches is None else caches[: len(model.layers)]
    held, helper = call.arguments["prompt_cache"], call.arguments["draft_model"]
    _check_states(caches, mlx_lm_cache.make_prompt_cache(helper) if held is None else held[len(model.layers) :])
    _check(caches, call.arguments["prompt"].size, call.arguments["max_tokens"])
    if "prefill_step_size" not in given and any(isinstance(c, DelayedTurboQuantKVCache) for c in caches):
        call.arguments["prefill_step_size"] = _PLAIN_STEP  # the chunk that crosses `start` is read from codes
    return _steps(original(*call.args, **call.kwargs))


def _steps(steps):
    """The steps, while which packed windows know that drafts are checked; the caller in between does not."""
    try:
        while True:
            token = drafting.set(True)
            try:
                step = next(steps)
            except StopIteration:
                return
            finally:
                drafting.reset(token)
            yield step
    finally:
        token = drafting.set(True)
        try:
            steps.close()
        finally:
            drafting.reset(token)


speculative_generate_step.__doc__ = original.__doc__
