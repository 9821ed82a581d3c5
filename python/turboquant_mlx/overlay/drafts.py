"""Speculative decoding over packed caches and recurrent states: mlx-lm's `speculative_generate_step`, whose tokens are those
of plain decoding.

mlx-lm's loop appends a round of drafts and takes the refused ones back with trim_prompt_cache.  It refuses recurrent states,
and a window that has moved on keeps what it refused, without a word.  This loop keeps each state of a round
(caches/stepped.py), and packed windows go back while drafts are checked (rotating.drafting).  A round is never longer than
what every slot can take back: float windows stop drafting when they fill up, and caches that pack themselves later pause it
there, as plain decoding reads the tokens before from floats.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm.generate import speculative_generate_step as original
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models import gated_delta

from ..caches import DelayedTurboQuantKVCache, PackedCache, leaves
from ..caches.rotating import drafting
from ..caches.slots import replace_slots
from ..caches.stepped import SteppedArraysCache, keeping_steps
from .lookup import LookupDrafter, PromptLookup
from .steps import stepwise

_SIGNATURE = inspect.signature(original)
_PLAIN_STEP = 2048  # tokens that plain generation reads of a prompt at a time
_FAR = 1 << 30
_OPERATION = "[speculative_generate_step]"
original_gated_delta: Callable[..., Any] = gated_delta.gated_delta_update
gated_delta_update: Callable[..., Any] = stepwise(original_gated_delta)


@contextmanager
def _checking():
    """Context: packed windows of this thread can take back what they read."""
    token = drafting.set(True)
    try:
        yield
    finally:
        drafting.reset(token)


def _room(caches, unread=0):
    """The most drafts that every slot can take back after a token, `unread` more tokens before it included."""
    room = _FAR
    for _, c in leaves(caches):
        if type(c) is mlx_lm_cache.RotatingKVCache:
            room = min(room, c.max_size - c.offset - unread - 2)
        elif isinstance(c, DelayedTurboQuantKVCache) and not c.packed:
            room = min(room, c.start - c.offset - unread - 1)
    return max(room, 0)


def _take_back(caches, n):
    with _checking():
        for _, c in leaves(caches):
            if isinstance(c, SteppedArraysCache):
                if not c.take_back(n):
                    raise RuntimeError(f"{_OPERATION} the state {n} tokens back was not kept")
                c.forget_steps()
            else:
                c.trim(n)  # of 0 too: a window forgets what it kept for the round


def _states(caches):
    return [c for _, c in leaves(caches) if isinstance(c, SteppedArraysCache)]


def _call(model, caches, tokens, keep):
    """Logits (N, V) of a model that reads `tokens` (N,); with `keep`, the caches can go back to each of these."""
    with _checking():
        if not keep:
            return model(tokens[None], cache=caches)[0]
        with keeping_steps(_states(caches), tokens.size):
            return model(tokens[None], cache=caches)[0]


def _read(model, caches, tokens, step):
    """Reads all of `tokens`, `step` at a time."""
    for at in range(0, tokens.size, step):
        model(tokens[at : at + step][None], cache=caches)
        mx.eval([c.state for c in caches])
        mx.clear_cache()


class _ModelDrafter:
    """A draft model and its caches, which hold what the main model's do but for `_unread`."""

    def __init__(self, model, caches, prompt, step, sampler):
        self._model, self._caches, self._sampler = model, caches, sampler
        self._unread, self._token, self._read = [], prompt[-1:].tolist(), 0
        _read(model, caches, prompt[:-1], step)

    def room(self):
        return _room(self._caches, len(self._unread))

    def propose(self, n):
        self._read = n
        if not n:
            return mx.array([], mx.uint32)
        y, drafts = mx.array(self._unread + self._token, mx.uint32), []
        self._unread = []
        for i in range(n):
            logits = _call(self._model, self._caches, y, keep=i > 0)[-1:]
            y = self._sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(mx.uint32)
            mx.async_eval(y)
            drafts.append(y)
        return mx.concatenate(drafts)

    def settle(self, read, kept, token):
        held = min(kept, self._read)
        _take_back(self._caches, self._read - held)
        self._unread += read[held:kept]
        self._token = [token]

    def finish(self):
        """Reads what is left, so that both models' caches hold the same tokens."""
        if self._unread:
            _call(self._model, self._caches, mx.array(self._unread), keep=False)
            mx.eval([c.state for c in self._caches])
            self._unread = []


def _stood_in(caches):
    """(caches, [(stand-in, original)]): recurrent states of mlx-lm's get stand-ins that can go back."""
    pairs = []

    def make(_, c):
        if type(c) is not mlx_lm_cache.ArraysCache:
            return None
        stand_in = SteppedArraysCache(len(c.cache))
        stand_in.cache = list(c.cache)
        pairs.append((stand_in, c))
        return stand_in

    return replace_slots(caches, make), pairs


def _check(model, caches, what):
    """ValueError before anything is read when some slot can take no drafts back."""
    stuck = {
        type(c).__name__
        for _, c in leaves(caches)
        if not isinstance(c, (SteppedArraysCache, PackedCache, mlx_lm_cache.RotatingKVCache)) and not c.is_trimmable()
    }
    if stuck:
        raise ValueError(f"{_OPERATION} drafts need a trimmable prompt cache of the {what}; got {sorted(stuck)}")
    if not _states(caches):
        return
    trial, _ = _stood_in(mlx_lm_cache.make_prompt_cache(model))
    try:
        _call(model, trial, mx.zeros((2,), mx.int32), keep=True)  # the graph's shapes; nothing is computed
    except ValueError as error:
        raise ValueError(f"{_OPERATION} the {what} takes no drafts: {error}") from error


def speculative_generate_step(*positional, **named):
    call = _SIGNATURE.bind(*positional, **named)
    given = set(call.arguments)
    call.apply_defaults()
    of = call.arguments
    model, helper, held = of["model"], of["draft_model"], of["prompt_cache"]
    lookup = isinstance(helper, PromptLookup)
    if held is None:
        caches = mlx_lm_cache.make_prompt_cache(model)
        others = [] if lookup else mlx_lm_cache.make_prompt_cache(helper)
    else:
        caches, others = held[: len(model.layers)], held[len(model.layers) :]
    if of["kv_bits"] is not None:
        for c in (c for _, c in leaves(caches) if isinstance(c, PackedCache)):
            raise ValueError(f"{_OPERATION} {type(c).__name__} packs its keys and values itself; leave kv_bits out")
        if lookup:
            raise ValueError(f"{_OPERATION} kv_bits is mlx-lm's own quantisation; got {of['kv_bits']}: leave it out")
        return original(*call.args, **call.kwargs)  # mlx-lm's own affair
    caches, pairs = _stood_in(caches)
    others, more = _stood_in(others)
    _check(model, caches, "model")
    if not lookup:
        _check(helper, others, "draft model")
    if "prefill_step_size" not in given and any(isinstance(c, DelayedTurboQuantKVCache) for c in caches):
        of["prefill_step_size"] = _PLAIN_STEP  # the chunk that crosses `start` is read from codes
    return _ended(_answer(of, caches, others), pairs + more)


speculative_generate_step.__doc__ = original.__doc__


def _ended(steps, pairs):
    """The steps, after which the states of stand-ins are where the caller looks for them."""
    try:
        yield from steps
    finally:
        steps.close()
        for stand_in, c in pairs:
            c.cache = stand_in.cache


def _sampled(of, history, read, logits):
    """(tokens (N,), log-probabilities (N, V)) after each of the N tokens `read`, the first of which ends `history`."""
    if processors := of["logits_processors"]:
        rows = []
        for i in range(read.size):
            before, row = mx.concatenate([mx.array(history, mx.uint32), read[1 : i + 1]]), logits[i : i + 1]
            for processor in processors:
                row = processor(before, row)
            rows.append(row)
        logits = mx.concatenate(rows)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return (of["sampler"] or _greedy)(logprobs), logprobs


def _greedy(logprobs):
    return mx.argmax(logprobs, axis=-1)


def _answer(of, caches, others):
    """Yields (token, log-probabilities, whether it was drafted)."""
    model, prompt, most = of["model"], of["prompt"].astype(mx.uint32), of["max_tokens"]
    with mx.stream(of["stream"]):
        _read(model, caches, prompt[:-1], of["prefill_step_size"])
        history, produced = prompt.tolist(), 0
        if isinstance(of["draft_model"], PromptLookup):
            longest = of["draft_model"].num_draft_tokens
            drafter = LookupDrafter(history, longest)
        else:
            longest = of["num_draft_tokens"]
            drafter = _ModelDrafter(
                of["draft_model"], others, prompt, of["prefill_step_size"], of["sampler"] or _greedy
            )
        try:
            while produced != most:
                left = most - produced - 1 if most >= 0 else longest
                drafts = drafter.propose(min(longest, left, _room(caches), drafter.room()))
                read = mx.concatenate([mx.array(history[-1:], mx.uint32), drafts])
                logits = _call(model, caches, read, keep=read.size > 1)
                tokens, logprobs = _sampled(of, history, read, logits)
                mx.eval(tokens, read)
                tokens, read = tokens.tolist(), read.tolist()
                right = next((i for i, draft in enumerate(read[1:]) if draft != tokens[i]), len(read) - 1)
                kept = 0
                try:
                    for kept in range(1, right + 2):  # of what was read, the tokens that an answer up to here rests on
                        history.append(tokens[kept - 1])
                        produced += 1
                        yield tokens[kept - 1], logprobs[kept - 1], kept <= right
                finally:
                    _take_back(caches, len(read) - kept)
                    drafter.settle(read, kept, tokens[kept - 1])
        finally:
            drafter.finish()
