"""Where the server cuts a chat's prompt, so that the next turn finds a checkpoint.

Recurrent states go back to the ends of the chunks in which a prompt was read.  A next turn differs from this one where its
history was edited: at the last message, when that is asked again in other words, or at the opening of the answer, when the
template drops its reasoning.  mlx-lm cuts the latter, of chats that end with a user's message, and only in its batches."""

import functools
import itertools
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

from ..caches.checkpoints import checkpointed
from .prefixes import shared_length

LEAST = 16  # tokens between two cuts; fewer are read faster than a chunk of a prompt begins
_TAIL = 11  # tokens of an answer's opening at most, as in mlx-lm
_cuts: ContextVar[tuple[int, ...]] = ContextVar("_cuts", default=())  # of the request that this thread serves


def cut(
    tokenizer: Any, messages: list[Any], prompt: list[int], segments: list[list[int]], kinds: list[str], **template
):
    """The segments of a chat's prompt and their kinds, cut once more: before the last message, and before the opening of
    the answer where that begins with reasoning.

    Args:
        tokenizer, messages: the chat.
        prompt: its tokens.
        segments, kinds: as mlx-lm cuts it; the segments make up the prompt.
        template: what the chat template was given besides.

    Returns:
        (segments, kinds), of more segments or the same.
    """
    edges = _ends(segments)
    inner, last = edges[:-1], edges[-1]
    for position in (_last_message(tokenizer, messages, prompt, template), _opening(tokenizer, prompt)):
        if LEAST <= position < last and all(abs(position - end) >= LEAST for end in inner):
            inner.append(position)
    ends = [*sorted(inner), last]
    pieces, at = [], 0
    for end in ends:
        pieces.append(prompt[at:end])
        at = end
    return pieces, [next(kind for kind, edge in zip(kinds, edges, strict=True) if end <= edge) for end in ends]


def _ends(segments):
    return list(itertools.accumulate(map(len, segments)))


def _last_message(tokenizer, messages, prompt, template):
    """Where the last message of a chat begins in its prompt; 0 where the template cannot say."""
    if len(messages) < 2:
        return 0
    try:
        before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=False, tokenize=True, **template)
    except Exception:  # templates raise what they like of a chat that does not end with a user's message
        return 0
    return shared_length(list(before), prompt)


def _opening(tokenizer, prompt):
    """Where the reasoning that opens the answer begins; 0 where there is none."""
    if not getattr(tokenizer, "has_thinking", False):
        return 0
    start = tokenizer.rfind_think_start(prompt, start=max(len(prompt) - _TAIL, 0))
    return max(start, 0)


def note(segments: list[list[int]]) -> None:
    """Remembers, for `read_to_cuts` of this thread, where the request that it serves now is cut."""
    _cuts.set(tuple(_ends(segments)))


def read_to_cuts(models: list[Any], caches: list[Any], prompt: list[int], step: int) -> list[int]:
    """Reads a request's prompt up to its last cut, so that there are checkpoints, and returns the tokens left.

    Args:
        models: the model, and the draft model if there is one.
        caches: the prompt cache, of all models in turn.
        prompt: the tokens that it has not read.
        step: tokens read at a time.
    """
    if not _cuts.get() or not checkpointed(caches):
        return prompt
    done = _cuts.get()[-1] - len(prompt)
    for end in _cuts.get()[:-1]:
        while done < end:
            chunk, prompt = prompt[: min(step, end - done)], prompt[min(step, end - done) :]
            first = 0
            for model in models:
                of_model = caches[first : first + len(model.layers)]
                model(mx.array([chunk]), cache=of_model)
                mx.eval([c.state for c in of_model])
                first += len(model.layers)
            mx.clear_cache()
            done += len(chunk)
    return prompt


def continued(stream_generate: Any) -> Any:
    """mlx-lm's `stream_generate`, which reads a request's prompt up to its last cut first."""

    @functools.wraps(stream_generate)
    def generate(model, tokenizer, prompt, max_tokens=256, draft_model=None, **settings):
        if settings.get("input_embeddings") is None and settings.get("prompt_cache") is not None:
            models = [m for m in (model, draft_model) if m is not None and m.layers]  # the text itself may draft
            step = settings.get("prefill_step_size", 2048)
            prompt = read_to_cuts(models, settings["prompt_cache"], list(prompt), step)
        return stream_generate(model, tokenizer, prompt, max_tokens, draft_model, **settings)

    return generate
