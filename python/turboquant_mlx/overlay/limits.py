"""Limits of mlx-lm's server, known before a request needs them: how long a sequence may be, and how many fit in memory.

When a model has been loaded, what its caches take is counted (memory.py), and the memory that was given is shared out: the
weights, the workspace of the prompts that are read at once, the sequences that run, and the prompt cache with the rest.
Requests beyond the sequences that fit wait, first come first served, and hold nothing but their text."""

import functools
import sys
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_reduce
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from ..caches import leaves
from ..memory import GROWTH, CacheSizes

CONTEXT = 131072  # tokens, of a model that does not say how many it can read
WAITING = 256  # requests that may wait; one more is answered with status 503
LOGITS = 4  # arrays of the vocabulary's size, in float32, that a sequence holds while its next token is chosen


class Busy(RuntimeError):
    """A request that came while too many others waited: status 503."""


@dataclass(frozen=True)
class Plan:
    """How a server shares out its memory.

    Attributes:
        context: tokens of a sequence at most, its answer included.
        sequences: how many run at once.
        prompts: of how many the prompts are read at once.
        weights, sequence, workspace, prompt_cache: bytes of the model, of one sequence, of the prompts that are being
            read, and of the prompt cache at most (None: no limit).
    """

    context: int
    sequences: int
    prompts: int
    weights: int
    sequence: int
    workspace: int
    prompt_cache: int | None = None

    def __str__(self) -> str:
        words = (
            f"context {self.context:,} tokens; weights {self.weights:,} bytes, a sequence {self.sequence:,}, workspace of "
            f"prompts {self.workspace:,}"
        )
        if self.prompt_cache is None:
            return words
        return (
            f"{words}, prompt cache {self.prompt_cache:,}; {self.sequences} sequence{'s' * (self.sequences > 1)} at once, "
            f"{self.prompts} of them reading prompts"
        )


class Costs:
    """Bytes that a server's model takes: `weights` once, `sequence(context)` of each that runs, `workspace(context)` of each
    prompt that is read.

    Args:
        model: a model of mlx-lm, as `enable` left it.
        draft_model: one that drafts for it; what drafts from the text itself has no layers.
        drafts: tokens drafted a step.
        step: tokens of a prompt that are read at a time.
        batched: whether sequences run as a batch, from which each is copied into the prompt cache.
    """

    def __init__(self, model: Any, draft_model: Any, drafts: int, step: int, batched: bool) -> None:
        models = [m for m in (model, draft_model) if m is not None and m.layers]
        self._sizes = [CacheSizes(m, functools.partial(make_prompt_cache, m)) for m in models]
        self._drafts = drafts if draft_model is not None else 0
        self._step, self._copies = step, 2 if batched else 1
        self.weights = sum(tree_reduce(lambda total, x: total + x.nbytes, m.parameters(), 0) for m in models)
        # Logits of the last token, or of each draft; a recurrent state after each draft beside its slot.
        logits = sum(
            LOGITS * 4 * m(mx.zeros((1, 1), mx.int32)).shape[-1] for m in models
        )  # a graph; nobody evaluates it
        self._token = (1 + self._drafts) * logits + (self._drafts * _states(model) if self._drafts else 0)

    def sequence(self, context: int) -> int:
        return self._copies * sum(s.at(context + self._drafts) for s in self._sizes) + self._token

    def workspace(self, context: int) -> int:
        return max(s.workspace(min(self._step, context)) for s in self._sizes)


def _states(model):
    caches = make_prompt_cache(model)
    model(mx.zeros((1, 2), mx.int32), cache=caches)  # shapes alone
    arrays = [a for _, c in leaves(caches) if isinstance(c, ArraysCache) for a in c.cache if a is not None]
    return sum(a.nbytes for a in arrays)


def plan(
    costs: Costs,
    memory: int | None,
    context: int | None,
    longest: int,
    sequences: int,
    prompts: int,
    cached: int | None,
) -> Plan:
    """Shares out `memory` bytes.

    Args:
        costs: of the model.
        memory: bytes of all that MLX holds; None: no limit.
        context: tokens of a sequence at most; None: as many as fit, up to `longest`.
        longest: tokens that the model can read.
        sequences, prompts: how many may run, and have their prompts read, at once; fewer where no more fit.
        cached: bytes that the prompt cache may take at most; None: what is left.

    Raises:
        ValueError: not even one sequence fits.
    """
    prompts = min(prompts, sequences)
    if memory is None:
        context = context or longest
        return Plan(
            context, sequences, prompts, costs.weights, costs.sequence(context), prompts * costs.workspace(context)
        )

    def least(tokens):
        return costs.weights + costs.sequence(tokens) + costs.workspace(tokens)

    if context is None:
        low, high = min(GROWTH, longest), longest
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if least(middle) <= memory else (low, middle - 1)
        context = low
    if least(context) > memory:
        raise ValueError(
            f"--tq-memory must be at least {least(context):,} bytes for one sequence of {context:,} tokens (weights "
            f"{costs.weights:,}, caches {costs.sequence(context):,}, workspace of a prompt {costs.workspace(context):,}); got "
            f"{memory:,}"
        )
    one, each = costs.sequence(context), costs.workspace(context)
    room = memory - costs.weights
    prompts = max(1, min(prompts, room // 4 // each if each else prompts))
    room -= prompts * each
    if room < one:  # one sequence fits beside one prompt's workspace
        room, prompts = room + (prompts - 1) * each, 1
    # A quarter of what is left goes to the prompt cache, if a sequence fits into the rest.
    sequences = max(1, min(sequences, room * 3 // 4 // one))
    prompts = min(prompts, sequences)
    left = memory - costs.weights - prompts * each - sequences * one
    return Plan(
        context, sequences, prompts, costs.weights, one, prompts * each, left if cached is None else min(left, cached)
    )


class Limits:
    """What a server was given, and the plan of the model that it has loaded (None before)."""

    def __init__(self, memory: int | None, context: int | None) -> None:
        self.memory, self.context = memory, context
        self.plan: Plan | None = None
        self._before = mx.set_memory_limit(memory) if memory is not None else None

    def close(self) -> None:
        """Gives MLX the limit back that it had."""
        if self._before is not None:
            mx.set_memory_limit(self._before)

    def full(self, running: int) -> bool:
        """Whether a request has to wait.  The first one may load the model."""
        return self.memory is not None and running >= (self.plan.sequences if self.plan else 1)


def provider(base: Any, limits: Limits) -> type:
    """mlx-lm's ModelProvider, which makes a plan of each model that it loads, and refuses one that does not fit."""

    class Planned(base):
        _asked: tuple[int, int] | None = None

        def _load(self, *positional: Any, **named: Any) -> None:
            super()._load(*positional, **named)
            args = self.cli_args
            self._asked = self._asked or (args.decode_concurrency, args.prompt_concurrency)
            lookup = getattr(self.draft_model, "num_draft_tokens", 0)
            drafts = max(lookup, args.num_draft_tokens)
            try:
                costs = Costs(self.model, self.draft_model, drafts, args.prefill_step_size, self.is_batchable)
                read = getattr(getattr(self.model, "args", None), "max_position_embeddings", None)
                longest = read if isinstance(read, int) and read > 0 else CONTEXT
                limits.plan = found = plan(
                    costs, limits.memory, limits.context, longest, *self._asked, args.prompt_cache_bytes
                )
            except ValueError:
                self.reset()
                raise
            if limits.memory is not None:
                args.decode_concurrency, args.prompt_concurrency = found.sequences, found.prompts
            print(f"[tq] {found}", file=sys.stderr)

    return Planned


class _Answer:
    """A request's queue of results, which knows when it has ended or its client has gone."""

    def __init__(self, queue: Any) -> None:
        self._queue, self._ended, self._context = queue, False, None

    def put(self, item: Any) -> None:
        self._ended = self._ended or item is None or isinstance(item, Exception)
        if hasattr(item, "_should_stop"):
            self._context = item
        self._queue.put(item)

    @property
    def running(self) -> bool:
        return not self._ended and not getattr(self._context, "_should_stop", False)


def generator(base: Any, limits: Limits) -> type:
    """mlx-lm's ResponseGenerator, which keeps to the plan."""

    class Limited(base):
        def __init__(self, *positional: Any, **named: Any) -> None:
            self._running: list[_Answer] = []
            super().__init__(*positional, **named)  # starts the generating thread

        def generate(self, *positional: Any, **named: Any) -> Any:
            """Runs in a client's thread."""
            if limits.memory is not None and self.requests.qsize() >= WAITING:
                raise Busy(f"the server is busy: {WAITING} requests wait already; ask again later")
            return super().generate(*positional, **named)

        def _next_request(self, timeout: float | None = None) -> Any:
            """Runs in the generating thread; takes no request while as many run as fit."""
            most = limits.plan.prompt_cache if limits.plan else None
            if most is not None and most != self.prompt_cache.max_bytes:
                self.prompt_cache.max_bytes = most
                self.prompt_cache.trim_to(n_bytes=most)
            self._running = [answer for answer in self._running if answer.running]
            if self._rank == 0 and limits.full(len(self._running)):
                time.sleep(min(timeout or 0, 0.01))
                return self._share_request(None)
            request = super()._next_request(timeout)
            if request is None:
                return None
            self._running.append(_Answer(request[0]))
            return (self._running[-1], *request[1:])

        def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
            """What mlx-lm does; ValueError for a prompt that leaves no room for an answer, and no answer beyond the context."""
            found = super()._tokenize(tokenizer, request, args)
            context, length = limits.plan.context if limits.plan else None, len(found[0])
            if context is not None:
                if length >= context:
                    raise ValueError(
                        f"the prompt must have fewer tokens than the context of {context:,} (--tq-context); got {length:,}"
                    )
                args.max_tokens = min(args.max_tokens, context - length)
            return found

    return Limited
