"""Prompts whose answers can be checked: exact copies, needles, tool calls in JSON, code, arithmetic.

All are made here from words and numbers drawn by seed, so that they need no data and are the same on every machine.  Each
task says whether an answer passes, and what of it is compared with the answer over float16 caches."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .retrieval import NAMES, seeded

WORDS = (
    "amber basket candle dragon ember falcon garden harbor island jacket kettle lantern marble needle orchard pepper "
    "quiver ribbon saddle timber umbrella velvet walnut yellow zipper anchor bridge copper desert engine forest glacier"
).split()


class Prompt(NamedTuple):
    """One question and how its answer is judged."""

    text: str
    chat: bool  # whether it is a user's turn, where the model has a chat template; else the text is continued
    tokens: int  # of the answer at most
    judge: Callable[[str, bool], tuple[bool, Any]]  # (answer, whether it was cut off) -> (passes, what is compared)


def copies(rng, number) -> Prompt:
    """Lines of words and numbers, to be written again."""
    lines = [" ".join([*rng.choice(WORDS, 4), str(rng.integers(100, 10000))]) for _ in range(5)]
    text = "\n".join(lines)

    def judge(answer, cut):
        return text in answer, " ".join(answer.split())[: 2 * len(text)]

    return Prompt(
        f"Here is a text:\n\n{text}\n\nWrite exactly the same text again, and nothing else:\n\n", True, 128, judge
    )


def needles(rng, number, filler: Callable[[int, Any], str], lengths, depths) -> Prompt:
    """A number in a text of so many tokens."""
    length, depth = lengths[number % len(lengths)], depths[number // len(lengths) % len(depths)]
    name, value = rng.choice(NAMES), str(rng.integers(10000, 100000))
    text = filler(length, rng)
    at = text.find("\n", round(depth * len(text)))
    at = len(text) if at < 0 else at
    text = f"{text[:at]}\n\nThe secret number for {name} is {value}.\n\n{text[at:]}"
    question = f"{text}\n\nWhat is the secret number for {name}? Answer with the sentence that says it.\n"

    def judge(answer, cut):
        found = re.findall(r"\d{5}", answer)
        return value in found, found[:1]

    return Prompt(question, True, 32, judge)


# (name, arguments with their types, a request)
TOOLS = (
    (
        "get_weather",
        {"city": "string", "days": "integer"},
        "What will the weather be in {city} for the next {days} days?",
    ),
    ("send_email", {"to": "string", "subject": "string"}, 'Send {to} an email with the subject "{subject}".'),
    ("set_alarm", {"hour": "integer", "minute": "integer"}, "Set an alarm for hour {hour}, minute {minute}."),
    (
        "convert_currency",
        {"amount": "integer", "source": "string", "target": "string"},
        "Convert {amount} {source} into {target}.",
    ),
    ("find_files", {"pattern": "string", "folder": "string"}, "Find the files like {pattern} in the folder {folder}."),
    (
        "book_table",
        {"restaurant": "string", "people": "integer", "hour": "integer"},
        "Book a table for {people} people at the restaurant {restaurant} at hour {hour}.",
    ),
    ("create_user", {"name": "string", "age": "integer"}, "Create a user with the name {name} and the age {age}."),
    ("copy_file", {"source": "string", "target": "string"}, "Copy the file {source} to {target}."),
    ("play_music", {"artist": "string", "volume": "integer"}, "Play music of {artist} at volume {volume}."),
    ("count_rows", {"table": "string", "limit": "integer"}, "Count the rows of the table {table}, up to {limit}."),
)


def _value(rng, name):
    """A value for an argument of this name."""
    word = str(rng.choice(WORDS))
    drawn = {
        "city": lambda: str(rng.choice(NAMES)),
        "to": lambda: f"{word}@example.com",
        "subject": lambda: f"{word} {rng.choice(WORDS)}",
        "pattern": lambda: f"*.{rng.choice(['txt', 'py', 'csv', 'md'])}",
        "folder": lambda: f"/home/{word}",
        "restaurant": lambda: word.capitalize(),
        "artist": lambda: word.capitalize(),
        "name": lambda: word.capitalize(),
        "table": lambda: f"{word}s",
        "hour": lambda: int(rng.integers(0, 24)),
        "minute": lambda: int(rng.integers(0, 60)),
        "days": lambda: int(rng.integers(2, 9)),
        "people": lambda: int(rng.integers(2, 9)),
    }
    if name in ("source", "target"):
        return f"{word}.txt"
    return drawn[name]() if name in drawn else int(rng.integers(1, 100))


def tool_calls(rng, number) -> Prompt:
    """A request for one of three tools, to be answered by a JSON object."""
    own = number % len(TOOLS)
    others = rng.choice([n for n in range(len(TOOLS)) if n != own], 2, replace=False).tolist()
    name, kinds, request = TOOLS[own]
    values = {key: _value(rng, key) for key in kinds}
    if name == "convert_currency":
        values["source"], values["target"] = rng.choice(["EUR", "USD", "GBP", "JPY", "CHF"], 2, replace=False).tolist()
    tools = "\n".join(
        json.dumps({"name": TOOLS[n][0], "arguments": TOOLS[n][1]}) for n in rng.permutation([own, *others]).tolist()
    )
    text = (
        f"You can call these tools:\n{tools}\n\nRequest: {request.format(**values)}\n\nAnswer with one JSON object of the form "
        '{"name": ..., "arguments": {...}} that calls the right tool, and nothing else.\n'
    )

    def judge(answer, cut):
        found = first_json(answer)
        good = (
            isinstance(found, dict) and isinstance(found.get("name"), str) and isinstance(found.get("arguments"), dict)
        )
        return good, found

    return Prompt(text, True, 96, judge)


def first_json(text: str):
    """The first JSON object in a text; None when there is none."""
    start = text.find("{")
    try:
        return json.JSONDecoder().raw_decode(text[start:])[0] if start >= 0 else None
    except ValueError:
        return None


FUNCTIONS = (
    ("count_vowels(text)", "Return how many vowels the text has."),
    ("fibonacci(n)", "Return a list of the first n Fibonacci numbers."),
    ("is_palindrome(text)", "Return whether the text reads the same backwards, letters alone counted."),
    ("flatten(items)", "Return a flat list of all that nested lists hold."),
    ("prime_factors(n)", "Return the prime factors of n in ascending order."),
    ("merge_sorted(a, b)", "Return one sorted list of two sorted lists."),
    ("word_counts(text)", "Return a dictionary from each word in lower case to how often it occurs."),
    ("transpose(matrix)", "Return the transpose of a matrix, a list of rows."),
    ("binary_search(items, x)", "Return the index of x in a sorted list, or -1."),
    ("parse_pairs(line)", "Return a dictionary of a line such as 'a=1;b=2'."),
    ("moving_average(values, width)", "Return the averages of each `width` values in a row."),
    ("roman(n)", "Return n from 1 to 3999 as a Roman numeral."),
    ("chunks(items, size)", "Yield lists of at most `size` items in order."),
    ("gcd(a, b)", "Return the greatest common divisor of a and b."),
    ("caesar(text, shift)", "Return the text with its letters shifted along the alphabet."),
    ("balanced(text)", "Return whether all brackets in the text are closed in the right order."),
    ("second_largest(values)", "Return the second largest of the different values; raise ValueError if there is none."),
    ("read_lines(path)", "Return the lines of a text file that are not empty, without their line ends."),
    ("invert(mapping)", "Return a dictionary from each value to the sorted list of its keys."),
    ("matrix_power(matrix, n)", "Return the n-th power of a square matrix, a list of rows, for n >= 0."),
)


def code(rng, number) -> Prompt:
    """The head of a function in Python, to be completed."""
    head, says = FUNCTIONS[number % len(FUNCTIONS)]
    text = f'def {head}:\n    """{says}"""\n'

    def judge(answer, cut):
        body = function_body(answer, cut)
        try:
            tree = ast.parse(text + body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False, body
        return bool(body.strip()), ast.dump(tree)

    return Prompt(text, False, 160, judge)


def function_body(answer: str, cut: bool) -> str:
    """What of a continuation belongs to the function: up to the first line that is not indented, without a last line that
    was cut off."""
    lines = answer.split("\n")
    if cut and len(lines) > 1:
        lines = lines[:-1]
    for n, line in enumerate(lines):
        if line and not line[0].isspace():
            return "\n".join(lines[:n])
    return "\n".join(lines)


def arithmetic(rng, number) -> Prompt:
    """A question of several steps, whose last number is the answer."""
    a, b, c, d = (int(rng.integers(low, high)) for low, high in ((10, 60), (2, 9), (5, 30), (2, 6)))
    name, thing = str(rng.choice(NAMES)), str(rng.choice(["apples", "books", "coins", "stamps", "tickets"]))
    forms = (
        (f"A shop in {name} has {a} boxes of {b} {thing} each. It sells {c} {thing} and then buys {d} more boxes. How many "
         f"{thing} does it have?", a * b - c + d * b),
        (f"A train from {name} carries {a} people. At the first stop {b} get off and {c} get on; at the second stop {d} times "
         f"as many get on as got off at the first. How many people are on the train?", a - b + c + d * b),
        (f"I had {a} {thing} and gave {b} to each of {d} friends, then found {c} more. How many "
         f"{thing} do I have?", a - b * d + c),
    )  # fmt: skip
    question, right = forms[number % len(forms)]
    text = f"{question} Work it out step by step, and end with a line 'Answer: ' and the number.\n"

    def judge(answer, cut):
        found = re.findall(r"-?\d+(?:,\d{3})*", answer)
        last = int(found[-1].replace(",", "")) if found else None
        return last == right, last

    return Prompt(text, True, 200, judge)


COUNTS = {"copy": 10, "needle": 10, "json": 50, "code": 20, "arithmetic": 20}  # prompts of each task


def prompts(task: str, count: int, seed: int, *, filler, lengths, depths) -> list[Prompt]:
    """`count` prompts of a task, the same for the same seed.

    Args:
        filler: (tokens, rng) -> text of about so many tokens.
        lengths, depths: of needles, as for retrieval.needle_context."""
    make = {"copy": copies, "json": tool_calls, "code": code, "arithmetic": arithmetic}
    found = []
    for number in range(count):
        rng = seeded(seed, list(COUNTS).index(task), number)
        if task == "needle":
            found.append(needles(rng, number, filler, lengths, depths))
        else:
            found.append(make[task](rng, number))
    return found


def fillers(tokenizer, tokens: np.ndarray) -> Callable[[int, Any], str]:
    """(length, rng) -> a piece of a text given as token ids; ValueError when that is too short."""

    def piece(length, rng):
        if len(tokens) < length:
            raise ValueError(f"[eval] --lengths {length} needs {length} tokens of filler; the text has {len(tokens)}")
        start = int(rng.integers(0, len(tokens) - length + 1))
        return tokenizer.decode(tokens[start : start + length].tolist())

    return piece
