"""Needles in filler text, over depth and length, and look-ups in a list of keys.

Sentence forms are those the bundled model was trained on (its card); values, depths and filler are new to it.  A needle
or look-up passes when every token of the answer is the most likely one, which is what greedy decoding would write
after the answer's opening words.  The log-probability of the answer is kept as well: it shows loss before failures do.
"""

import copy
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .model import recurrent_states

LIST_FILLER = 1000  # tokens of text after a list
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


def _inside(tokenizer, text):
    """Token ids of a piece that follows other text."""
    return tokenizer.encode(text, add_special_tokens=False)


def needle_context(tokenizer, filler, length, depths, rng):
    """A context of `length` tokens with a sentence planted at each depth.

    Returns (token ids, [(depth, question and opening, answer)]); ValueError when the filler is too short, or the context
    for its sentences."""
    names = rng.choice(NAMES, len(depths), replace=False)
    planted = []
    for depth, name in sorted(zip(depths, names, strict=True)):
        answer = f" {rng.integers(10000, 100000)}."
        sentence = _inside(tokenizer, f"\n\nThe secret number for {name} is{answer}\n\n")
        question = _question(f"\n\nWhat is the secret number for {name}?", f"The secret number for {name} is")
        planted.append((depth, sentence, question, answer))
    opening = tokenizer.encode("<|im_start|>user\n")
    taken = len(opening) + sum(len(sentence) for _, sentence, _, _ in planted)
    room = length - taken
    if room < 1:
        raise ValueError(f"[eval] {len(depths)} needles take {taken} tokens, so --lengths must be more; got {length}")
    if len(filler) < room:
        raise ValueError(f"[eval] --lengths {length} needs {room} tokens of filler; the text has {len(filler)}")
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
        raise ValueError(f"[eval] a list needs {filler_tokens} tokens of filler; the text has {len(filler)}")
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


def ask(model, tokenizer, caches, context, questions, *, step=512, progress=lambda tokens: None):
    """Reads a context into fresh caches and asks each question in a branch of its own: a list of Answers.

    The context is read through the caches under test, as a real prompt is."""
    for start in range(0, len(context), step):
        part = context[start : start + step]
        mx.eval(model(mx.array([part]), cache=caches)[:, -1], recurrent_states(caches))
        progress(len(part))
    answers = []
    for depth, question, answer in questions:
        asked, expected = _inside(tokenizer, question), _inside(tokenizer, answer)
        branch = copy.deepcopy(caches)  # not every cache can take tokens back: a window that has moved on cannot
        logits = model(mx.array([asked + expected]), cache=branch)[0, len(asked) - 1 : -1].astype(mx.float32)
        log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        target = mx.array(expected)
        hit = (mx.argmax(logits, axis=-1) == target).all()
        log_prob = mx.take_along_axis(log_p, target[:, None], axis=-1).sum()
        answers.append(Answer(len(context), depth, bool(hit.item()), float(log_prob.item())))
        progress(0)
    return answers


def summarise(rows, reference):
    """{mode: figures} of rows with mode, tokens, trial, passed and log_prob.

    found of asked, and in each context; the mean log-probability of the answers, and its change against the reference's
    with its standard error over contexts (nan for one): modes answer the same questions."""
    contexts = list(dict.fromkeys((r["tokens"], r["trial"]) for r in rows))
    by_mode = {}
    for r in rows:
        own = by_mode.setdefault(r["mode"], {context: [] for context in contexts})
        own[r["tokens"], r["trial"]].append((r["passed"], r["log_prob"]))
    # (contexts,) each: number found, and mean log-probability
    means = {mode: [np.mean(own[context], 0)[1] for context in contexts] for mode, own in by_mode.items()}
    found = {mode: [sum(passed for passed, _ in own[context]) for context in contexts] for mode, own in by_mode.items()}
    out = {}
    for mode, own in by_mode.items():
        change = np.subtract(means[mode], means[reference])
        error = change.std(ddof=1) / np.sqrt(len(change)) if len(change) > 1 else float("nan")
        out[mode] = {
            "found": sum(found[mode]),
            "asked": sum(map(len, own.values())),
            "found_in_each": found[mode],
            "mean_log_prob": float(np.mean(means[mode])),
            "change": float(change.mean()),
            "change_stderr": float(error),
        }
    return out


def seeded(seed, *numbers):
    """A generator that depends on these numbers alone, so that every kind of cache meets the same contexts."""
    return np.random.default_rng([seed, *numbers])
