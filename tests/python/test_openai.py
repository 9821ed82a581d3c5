"""Both servers through the `openai` client: what it asks for is served, or refused with a reason that it shows."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time

import pytest
import serving
from conftest import MODEL
from needles import ANSWER, QUESTION, page
from turboquant_mlx.commands import hub
from turboquant_mlx.overlay import bodies

openai = pytest.importorskip("openai", reason="the openai client is not installed (pip install openai)")

HELLO = [{"role": "user", "content": "Hello there"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


class Server:
    """A running server and a client of it."""

    def __init__(self, name, port):
        self.name, self.port = name, port
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)

    def chat(self, **settings):
        settings = {"model": str(MODEL), "messages": HELLO, "max_tokens": 4, "temperature": 0} | settings
        return self.client.chat.completions.create(**settings)

    def text(self, **settings):
        return self.chat(**settings).choices[0].message.content

    def streamed(self, **settings):
        """The answer's text and the last piece that has usage."""
        text, usage = "", None
        for piece in self.chat(stream=True, **settings):
            text += "".join(choice.delta.content or "" for choice in piece.choices)
            usage = piece.usage or usage
        return text, usage


@contextlib.contextmanager
def vlm_server(cache, log):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "turboquant_mlx", "vlm-server", "--model", str(MODEL), "--tq-bits", "3"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--top-logprobs-k", "3"]
    with log.open("w") as out:
        program = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"HF_HOME": str(cache)})
    try:
        for _ in range(600):
            if program.poll() is not None:
                raise RuntimeError(log.read_text())
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            time.sleep(0.2)
        yield Server("vlm-server", port)
    finally:
        program.terminate()
        program.wait(timeout=60)


@pytest.fixture(scope="module", params=["server", "vlm-server"])
def served(request, tmp_path_factory):
    """A server that began without a cache folder of Hugging Face."""
    folder = tmp_path_factory.mktemp("served")
    if request.param == "vlm-server":
        pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install mlx-vlm==0.7.10)")
        with vlm_server(folder / "none", folder / "log") as server:
            yield server
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, str(folder / "none" / "hub")
    with serving.serving(MODEL) as running:
        yield Server("server", running.port)
    constants.HF_HUB_CACHE = before


@pytest.fixture(scope="module")
def questions(bundled):
    """Eight conversations, each with a number planted in a page of another length."""
    return [
        [{"role": "user", "content": f"{page(bundled[1], 240 + 30 * i, 0.2 + 0.08 * i)}\n\n{QUESTION}"}]
        for i in range(8)
    ]


def test_eight_clients_at_once_get_the_planted_number(served, questions):
    whole = serving.at_once(lambda messages: served.text(messages=messages, max_tokens=20), questions)
    assert all(ANSWER in text for text in whole)
    options = {"max_tokens": 20, "stream_options": {"include_usage": True}}
    pieces = serving.at_once(lambda messages: served.streamed(messages=messages, **options), questions)
    assert [text for text, _ in pieces] == whole
    assert all(usage.prompt_tokens > 240 and usage.completion_tokens > 4 for _, usage in pieces)


def test_models_are_listed_and_retrieved(served):
    listed = [model.id for model in served.client.models.list().data]
    assert len(listed) == 1 and os.path.realpath(listed[0]) == os.path.realpath(MODEL)
    for name in (listed[0], str(MODEL)):
        assert served.client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError, match="no model 'no/such' here"):
        served.client.models.retrieve("no/such")


def test_content_in_parts_is_the_same_text(served):
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    assert served.text(messages=[{"role": "user", "content": parts}]) == served.text()


REFUSED = [
    ({"n": 2}, "n must be 1 here: this server gives one answer a request; got 2"),
    ({"n": True}, "n must be 1 here"),
    ({"extra_body": {"echo": True}}, "echo must be false here"),
    ({"response_format": {"type": "xml"}}, "response_format must be an object of type"),
    ({"response_format": "json"}, "response_format must be an object of type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "never"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls must be true here"),
    ({"tools": "look"}, "tools must be a list"),
    ({"functions": [{"name": "look"}]}, "functions must be left out"),
    ({"modalities": ["text", "audio"]}, "modalities must be"),
    ({"messages": []}, "messages must be a list of at least one message"),
    ({"messages": [{"content": "x"}]}, "messages must be objects that each have a role"),
    ({"messages": [{"role": "user", "content": 5}]}, "content is a string or a list of parts"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]}, "text"),
    ({"temperature": -1}, "temperature must be a number of at least 0; got -1"),
    ({"temperature": "hot"}, "temperature must be a number of at least 0; got 'hot'"),
    ({"top_p": 1.5}, "top_p must be a number from 0 to 1; got 1.5"),
    ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1; got 0"),
    ({"max_completion_tokens": -2}, "max_completion_tokens must be a whole number"),
    ({"stop": 5}, "stop must be"),
    ({"seed": -1}, "seed must be from 0 to 2^64 - 1; got -1"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias must be of tokens from 0 to 8191; got 99999999"),
    ({"logit_bias": {"a": 1}}, "logit_bias must be an object of token ids to numbers"),
    ({"extra_body": {"top_k": 8192}}, "top_k must be less than the vocabulary's 8192 tokens; got 8192"),
    ({"stream": True, "stream_options": 5}, "stream_options must be an object"),
    ({"logprobs": True, "top_logprobs": 20}, "top_logprobs must be at most"),
    ({"model": 5}, "model must be a string"),
]


@pytest.mark.parametrize("settings, message", REFUSED, ids=[f"{i}-{next(iter(s))}" for i, (s, _) in enumerate(REFUSED)])
def test_what_cannot_be_served_is_refused(served, settings, message):
    with pytest.raises(openai.BadRequestError) as caught:
        served.chat(**settings)
    assert caught.value.status_code == 400 and message in str(caught.value)


def test_after_all_refusals_it_still_answers(served):
    for settings, _ in REFUSED:
        with pytest.raises(openai.BadRequestError):
            served.chat(**settings)
    assert served.text()


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 1},
        {"n": None, "stop": None, "tools": None, "top_p": None, "seed": None, "logit_bias": None},
        {"response_format": {"type": "text"}},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tool_choice": "auto"},
        {"max_tokens": None, "max_completion_tokens": 4},
        {"modalities": ["text"], "user": "me", "metadata": {}, "store": False},
        {"extra_body": {"echo": False, "best_of": 1}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_changes_nothing_is_served(served, settings):
    assert served.text(**settings) == served.text()


def test_structured_answers_are_refused_where_they_would_be_free(served):
    import mlx.core as mx

    if served.name == "vlm-server" and mx.metal.is_available():
        pytest.skip("mlx-vlm serves them with Metal")
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}):
        with pytest.raises(openai.BadRequestError, match='response_format must be {"type": "text"} here'):
            served.chat(response_format=form)


def test_completions(served):
    ask = served.client.completions.create
    settings = {"model": str(MODEL), "max_tokens": 4, "temperature": 0}
    if served.name == "vlm-server":
        with pytest.raises(openai.NotFoundError, match="use /v1/chat/completions"):
            ask(prompt="Hello there", **settings)
        return
    text = ask(prompt="Hello there", **settings).choices[0].text
    assert text == ask(prompt=["Hello there"], echo=False, **settings).choices[0].text
    assert text == "".join(piece.choices[0].text for piece in ask(prompt="Hello there", stream=True, **settings))
    for bad, message in (
        ({"prompt": ["a", "b"]}, "prompt must be one string; got list"),
        ({"prompt": ""}, "the prompt must have at least one token"),
        ({"echo": True}, "echo must be false here"),
        ({"best_of": 2}, "best_of must be 1 here"),
        ({"suffix": "end"}, "suffix must be left out"),
        ({"n": 3}, "n must be 1 here"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(**({"prompt": "Hello there"} | bad | settings))


def test_a_cache_folder_that_cannot_be_made_leaves_the_servers_own_model(served, tmp_path, monkeypatch):
    if served.name == "vlm-server":
        pytest.skip("the server is another process")
    from huggingface_hub import constants

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    hub.make_cache_folder()
    assert [model.id for model in served.client.models.list().data] == [str(MODEL.resolve())]


def test_a_body_that_is_no_json_object_is_refused(served):
    for body in (b"{", b"[]", b"\xff\xfe", b""):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 400 and b"the body must be" in answer.read()


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="temperature must be a number"):
        bodies.checked(b'{"temperature": NaN}', bodies.MLX_LM)
    with pytest.raises(ValueError, match="top_k must be a whole number"):
        bodies.checked(b'{"top_k": 1e3}', bodies.MLX_LM)
    assert bodies.checked(b'{"top_k": 5, "unknown": {"a": 1}}', bodies.MLX_LM) == b'{"top_k": 5, "unknown": {"a": 1}}'
