"""Conversations on the server, whose history changes from turn to turn: each continues from a checkpoint, and every answer is
that of a process that reads the whole prompt."""

import json

import pytest
from conftest import MODEL, TEXT
from serving import at_once, serving
from small_models import sure
from turboquant_mlx import disable, enable
from turboquant_mlx.overlay import turns


@pytest.fixture(scope="module")
def served():
    with serving(MODEL, "--tq-calibration", "none", "--prefill-step-size", "256") as running:
        yield running


@pytest.fixture(scope="module")
def alone(bundled):
    """The greedy answer to messages of a model that reads them afresh, up to the first near tie."""
    model, tokenizer = bundled

    def answer(messages, count):
        enable(model, bits=3)
        try:
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            out = sure(model, prompt, count, prefill_step_size=256)
        finally:
            disable(model)
        end = next((i for i, t in enumerate(out) if t in tokenizer.eos_token_ids), len(out))
        detokenizer = tokenizer.detokenizer
        for token in out[:end]:
            detokenizer.add_token(token)
        detokenizer.finalize()
        return detokenizer.text

    return answer


def chat(served, messages, count=12, **settings):
    """(text, tokens that were read, tokens of the prompt)."""
    found = served.post("/v1/chat/completions", messages=messages, max_tokens=count, **settings)
    usage = found["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return found["choices"][0]["message"]["content"], usage["prompt_tokens"] - cached, usage["prompt_tokens"]


def text(at, characters=500):
    return TEXT.read_text()[at : at + characters]


def talk(served, alone, start, count, settings=None, roles=("user",)):
    """A conversation of `count` turns that drops the first half of each answer.  Returns tokens read and new, without the
    first turn."""
    messages, read, new, before = [{"role": "system", "content": text(start, 1500)}], 0, 0, 0
    for turn in range(count):
        messages.append({"role": roles[turn % len(roles)], "content": text(start + 2000 + 500 * turn)})
        answer, took, length = chat(served, messages, **(settings or {}))
        want = alone(messages, 12)
        assert answer.startswith(want) or want.startswith(answer)
        if turn:
            read, new = read + took, new + length - before
        before = length
        messages.append({"role": "assistant", "content": answer[len(answer) // 2 :]})
    return read, new


@pytest.mark.parametrize("settings", [{}, {"seed": 3}])
@pytest.mark.parametrize("roles", [("user",), ("user", "tool")])
def test_a_conversation_whose_reasoning_is_dropped(served, alone, settings, roles):
    read, new = talk(served, alone, 50_000 + 7000 * len(roles) + 20_000 * len(settings), 4, settings, roles)
    assert read <= 1.3 * new


def test_conversations_at_once(served, alone):
    """Together they have more entries than mlx-lm's prompt cache would keep."""
    for read, new in at_once(lambda i: talk(served, alone_nothing, 120_000 + 9000 * i, 4), list(range(8))):
        assert read <= 1.3 * new


@pytest.mark.parametrize("extra", [("--tq-lookup", "4"), ("--draft-model", str(MODEL))])
def test_a_conversation_with_drafts(alone, extra):
    """One request at a time, whose caches, the draft model's too, go back to checkpoints."""
    with serving(MODEL, "--tq-calibration", "none", "--prefill-step-size", "256", *extra) as served:
        read, new = talk(served, alone, 90_000, 3)
    assert read <= 1.3 * new


def alone_nothing(*_):
    return ""


def test_a_last_message_in_other_words(served, alone):
    messages = [{"role": "system", "content": text(300_000, 1500)}, {"role": "user", "content": text(302_000)}]
    _, first, length = chat(served, messages)
    assert first == length
    messages[-1] = {"role": "user", "content": "In other words: " + text(302_000)}
    answer, read, length = chat(served, messages)
    assert read < 0.4 * length
    want = alone(messages, 12)
    assert want and answer.startswith(want)


def test_the_same_prompt_again(served):
    """Nothing but the last token is left to read; mlx-lm's thread ends of a request of which nothing is left."""
    prompt = text(310_000)
    first = served.post("/v1/completions", prompt=prompt, max_tokens=4)
    again = served.post("/v1/completions", prompt=prompt + first["choices"][0]["text"], max_tokens=4)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert served.post("/v1/completions", prompt=prompt, max_tokens=4)["choices"] == first["choices"]


def test_streams_say_what_was_cached(served):
    messages = [{"role": "user", "content": text(320_000)}]
    chat(served, messages)
    status, body = served.ask(
        "/v1/chat/completions", messages=messages, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    events = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {")]
    usage = next(e["usage"] for e in events if e.get("usage"))
    assert status == 200 and usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


class Thinker:
    """A tokenizer of one token a character, whose answers open with reasoning."""

    has_thinking = True

    def apply_chat_template(self, messages, add_generation_prompt, tokenize, **_):
        out = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return [ord(c) for c in out + ("<assistant><think>" if add_generation_prompt else "")]

    def rfind_think_start(self, prompt, start=0):
        found = bytes(prompt).decode().rfind("<think>")
        return found if found >= start else -1


def cut(messages, tokenizer=None):
    tokenizer = tokenizer or Thinker()
    prompt = tokenizer.apply_chat_template(messages, True, True)
    segments, kinds = turns.cut(tokenizer, messages, prompt, [prompt], ["assistant"])
    assert [t for s in segments for t in s] == prompt and len(kinds) == len(segments)
    return [bytes(s).decode() for s in segments]


def test_where_a_prompt_is_cut():
    system, question = {"role": "system", "content": "s" * 40}, {"role": "tool", "content": "q" * 40}
    first, *_, last = cut([system, question])
    assert first == "<system>" + "s" * 40 + "</>" and last == "<think>"
    assert len(cut([question])) == 2, "there is one message, and the opening of the answer"
    plain = Thinker()
    plain.has_thinking = False
    assert len(cut([question], plain)) == 1

    class Strict(Thinker):
        def apply_chat_template(self, messages, add_generation_prompt, tokenize, **_):
            if messages[-1]["role"] != "tool":
                raise RuntimeError("a chat must end with a tool's message")
            return super().apply_chat_template(messages, add_generation_prompt, tokenize)

    assert len(cut([system, question], Strict())) == 2


def test_cuts_keep_mlx_lms_segments():
    messages = [{"role": "user", "content": "u" * 40}, {"role": "user", "content": "v" * 40}]
    prompt = Thinker().apply_chat_template(messages, True, True)
    segments = [prompt[:30], prompt[30:-7], prompt[-7:]]
    got, kinds = turns.cut(Thinker(), messages, prompt, segments, ["system", "user", "assistant"])
    assert list(map(len, got)) == [30, 49 - 30, len(prompt) - 49 - 7, 7]
    assert kinds == ["system", "user", "user", "assistant"] and sum(got, []) == prompt
