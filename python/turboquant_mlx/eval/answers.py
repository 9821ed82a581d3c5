"""Greedy answers through each kind of cache, and how many of them are right and the same as over float16 caches."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..overlay.products import fast_attention
from .model import recurrent_states
from .tasks import Prompt

STEP = 512  # tokens of a prompt read at a time


def token_ids(tokenizer, prompt: Prompt) -> list[int]:
    """The tokens of a prompt: in the model's chat template where it is a user's turn and there is one."""
    if prompt.chat and getattr(tokenizer, "has_chat_template", False):
        messages = [{"role": "user", "content": prompt.text}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    return list(tokenizer.encode(prompt.text))


def answer(model, tokenizer, caches, prompt: Prompt) -> tuple[str, list[int], bool]:
    """(text, tokens, whether it was cut off) of a greedy answer through fresh caches."""
    ids = token_ids(tokenizer, prompt)
    ends = set(tokenizer.eos_token_ids)
    found: list = []
    with fast_attention(model):
        for start in range(0, len(ids), STEP):
            logits = model(mx.array([ids[start : start + STEP]]), cache=caches)[0, -1]
            mx.eval(logits, recurrent_states(caches))
        while True:
            token = mx.argmax(logits).tolist()
            if token in ends:
                return tokenizer.decode(found), found, False
            found.append(token)
            if len(found) == prompt.tokens:
                return tokenizer.decode(found), found, True
            logits = model(mx.array([[token]]), cache=caches)[0, -1]
            mx.eval(logits, recurrent_states(caches))


def ask_all(
    model,
    tokenizer,
    modes: dict[str, Callable[[], list]],
    prompts: list[Prompt],
    progress: Callable[[int], None] = lambda tokens: None,
    done: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """Rows of each mode and prompt; the first mode is what the others are compared with.

    Args:
        modes: {name: function that makes fresh caches}.
        prompts: of one task.
        progress: called with 1 after each answer.
        done: called with all rows so far after each prompt.

    Returns:
        Rows with mode, prompt (its number), passed, same (what is compared is the same as the first mode's), same_tokens
        (so is every token), tokens of the answer and the answer itself."""
    rows: list[dict] = []
    for number, prompt in enumerate(prompts):
        first = None
        for mode, make in modes.items():
            text, tokens, cut = answer(model, tokenizer, make(), prompt)
            passed, value = prompt.judge(text, cut)
            first = (value, tokens) if first is None else first
            rows.append(
                {
                    "mode": mode,
                    "prompt": number,
                    "passed": int(passed),
                    "same": int(value == first[0]),
                    "same_tokens": int(tokens == first[1]),
                    "tokens": len(tokens),
                    "answer": text,
                }
            )
            progress(1)
        done(rows)
    return rows


def summarise(rows: list[dict]) -> dict[str, dict[str, int]]:
    """{mode: asked, passed, same, both (passed and the same), same_tokens}."""
    out: dict[str, dict[str, int]] = {}
    for row in rows:
        own = out.setdefault(row["mode"], dict.fromkeys(("asked", "passed", "same", "both", "same_tokens"), 0))
        own["asked"] += 1
        for name in ("passed", "same", "same_tokens"):
            own[name] += row[name]
        own["both"] += row["passed"] * row["same"]
    return out
