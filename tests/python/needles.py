"""A fact hidden in text that the bundled model never saw, and the question that asks for it."""

import copy

import mlx.core as mx
from conftest import TEXT
from mlx_lm.models.cache import make_prompt_cache
from turboquant_mlx import disable, enable

FACT = "The secret number for Lisbon is 70342."
ANSWER = "70342"
QUESTION = "What is the secret number for Lisbon?"


def page(tokenizer, length, depth):
    """About `length` tokens of text with FACT at `depth` (0: start, 1: end)."""
    paragraphs = [p for p in TEXT.read_text().split("\n") if len(p) > 80]
    picked, count = [], 0
    for p in paragraphs:
        count += len(tokenizer.encode(p))
        picked.append(p)
        if count >= length:
            break
    at = round(depth * len(picked))
    return "\n\n".join([*picked[:at], FACT, *picked[at:]])


def question(tokenizer, length, depth):
    """The tokens of a chat turn: a page and the question."""
    content = QUESTION if length == 0 else page(tokenizer, length, depth) + "\n\n" + QUESTION
    return tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


_read = []


def read_page(model, tokenizer):
    """The tokens of a question about a page of more than 4096 tokens, and 3-bit caches that have read all but the last.

    Read once for all tests, as it takes the longest; each gets a copy."""
    if not _read:
        tokens = question(tokenizer, 4200, 0.3)
        assert len(tokens) > 4096
        enable(model, bits=3)
        cache = make_prompt_cache(model)
        disable(model)
        for at in range(0, len(tokens) - 1, 512):
            model(mx.array(tokens[at : min(at + 512, len(tokens) - 1)])[None], cache=cache)
            mx.eval([c.state for c in cache])
        _read.extend((tokens, cache))
    tokens, cache = _read
    return tokens, copy.deepcopy(cache)
