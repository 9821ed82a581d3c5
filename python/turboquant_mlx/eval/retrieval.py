"""Needles in filler text, over depth and length, and look-ups in a list of keys.

Sentence forms are those the bundled model was trained on (its card); values, depths and filler are new to it.  A needle
or look-up passes when every token of the answer is the most likely one, which is what greedy decoding would write
after the answer's opening words.  The log-probability of the answer is kept as well: it shows loss before failures do.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

NAMES = (
    "Lisbon Oslo Cairo Lima Quito Accra Dakar Hanoi Kyoto Perth Turin Zagreb Porto Bergen Malmo Leeds Cork Basel "
    "Ghent Lyon Sofia Riga Minsk Tunis Rabat Delhi Osaka Busan Davao Cusco"
).split()


@dataclass
class Answer:
    """One question's outcome."""

    tokens: int  # length of the context
    depth: float  # 0: at its beginning, 1: at its end; nan for lists
    passed: bool
    log_prob: float  # of the whole answer, nats


def _question(text, opening):
    return f"{text}<|im_end|>\n<|im_start|>assistant\n{opening}"


def needle_context(tokenizer, filler, length, depths, rng):
    """A context of `length` tokens with a sentence planted at each depth.

    Returns (token ids, [(depth, question and opening, answer)]); ValueError when the filler is too short."""
    names = rng.choice(NAMES, len(depths), replace=False)
    planted = []
    for depth, name in sorted(zip(depths, names, strict=True)):
        answer = f" {rng.integers(10000, 100000)}."
        sentence = tokenizer.encode(f"\n\nThe secret number for {name} is{answer}\n\n")
        question = _question(f"\n\nWhat is the secret number for {name}?", f"The secret number for {name} is")
        planted.append((depth, sentence, question, answer))
    opening = tokenizer.encode("<|im_start|>user\n")
    room = length - len(opening) - sum(len(sentence) for _, sentence, _, _ in planted)
    if room < 1 or len(filler) < room:
        raise ValueError(f"[eval] {length} tokens of context need {room} tokens of filler; there are {len(filler)}")
    start = int(rng.integers(0, len(filler) - room + 1))
    filler = filler[start : start + room].tolist()
    out, at = list(opening), 0
    for depth, sentence, _, _ in planted:
        place = round(depth * room)
        out += filler[at:place] + sentence
        at = place
    return out + filler[at:], [(depth, question, answer) for depth, _, question, answer in planted]


def list_context(tokenizer, filler, pairs, filler_tokens, rng):
    """A list of `pairs` keys with their values, and filler after it: (token ids, [(nan, question, answer)])."""
    keys = [f"{16**5 + n:06x}" for n in rng.choice(15 * 16**5, pairs, replace=False)]  # six digits, no key twice
    values = [f"{rng.integers(10000, 100000)}" for _ in keys]
    lines = "\n".join(f"The value of key {key} is {value}." for key, value in zip(keys, values, strict=True))
    if len(filler) < filler_tokens:
        raise ValueError(f"[eval] the text has {len(filler)} tokens of filler; {filler_tokens} are needed")
    start = int(rng.integers(0, len(filler) - filler_tokens + 1))
    tokens = tokenizer.encode(f"<|im_start|>user\n{lines}\n\n") + filler[start : start + filler_tokens].tolist()
    asked = [
        (
            float("nan"),
            _question(f"\n\nWhat is the value of key {key}?", f"The value of key {key} is"),
            f" {value}.",
        )
        for key, value in zip(keys, values, strict=True)
    ]
    return tokens, asked


def _remember(caches):
    return [None if c.is_trimmable() else (list(c.cache), c.left_padding, c.lengths) for c in caches]


def _go_back(caches, remembered, tokens):
    for cache, state in zip(caches, remembered, strict=True):
        if state is None:
            cache.trim(tokens)
        else:
            cache.state = (list(state[0]), *state[1:])


def ask(model, tokenizer, caches, context, questions, *, step=512, progress=lambda tokens: None):
    """Reads a context into fresh caches and asks each question in a branch of its own: a list of Answers.

    The context is read through the caches under test, as a real prompt is."""
    for start in range(0, len(context), step):
        part = context[start : start + step]
        mx.eval(model(mx.array([part]), cache=caches)[:, -1], [c.state for c in caches if hasattr(c, "cache")])
        progress(len(part))
    answers = []
    remembered = _remember(caches)
    for depth, question, answer in questions:
        asked, expected = tokenizer.encode(question), tokenizer.encode(answer)
        tokens = asked + expected
        logits = model(mx.array([tokens]), cache=caches)[0, len(asked) - 1 : -1].astype(mx.float32)
        log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        target = mx.array(expected)
        hit = (mx.argmax(logits, axis=-1) == target).all()
        log_prob = mx.take_along_axis(log_p, target[:, None], axis=-1).sum()
        answers.append(Answer(len(context), depth, bool(hit.item()), float(log_prob.item())))
        _go_back(caches, remembered, len(tokens))
        progress(0)
    return answers


def seeded(seed, *numbers):
    """A generator that depends on these numbers alone, so that every kind of cache meets the same contexts."""
    return np.random.default_rng([seed, *numbers])
