"""A fact hidden in text that the bundled model never saw, and the question that asks for it."""

from conftest import TEXT

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
