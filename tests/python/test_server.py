"""mlx-lm's server with packed caches, through our command line: concurrent clients, its prompt cache, its memory."""

import json
import socket

import pytest
from conftest import MODEL
from mlx_lm.models.cache import KVCache
from needles import ANSWER, QUESTION, page
from serving import at_once, serving
from small_models import sure
from turboquant_mlx import TurboQuantKVCache, disable, enable


@pytest.fixture(scope="module")
def served():
    with serving(MODEL, "--tq-calibration", "none", "--prefill-step-size", "512") as running:
        yield running


@pytest.fixture(scope="module")
def alone(bundled):
    """The plain one-request path: prompt tokens to the text of `count` greedy tokens, or to the first near tie."""
    model, tokenizer = bundled

    def answer(tokens, count):
        enable(model, bits=3)
        try:
            out = sure(model, tokens, count, prefill_step_size=512)
        finally:
            disable(model)
        end = next((i for i, t in enumerate(out) if t in tokenizer.eos_token_ids), len(out))
        detokenizer = tokenizer.detokenizer  # as the server spells tokens: without a leading space
        for token in out[:end]:
            detokenizer.add_token(token)
        detokenizer.finalize()
        return detokenizer.text

    return answer


def test_eight_clients_at_once_get_what_each_would_get_alone(served, bundled, alone, tokens):
    tokenizer = bundled[1]
    prompts = [
        tokenizer.decode(tokens[at : at + n])
        for at, n in zip(range(0, 4400, 550), (9, 30, 80, 200, 5, 330, 12, 64), strict=True)
    ]
    want = [alone(tokenizer.encode(p), 16) for p in prompts]
    got = at_once(lambda prompt: served.complete(prompt, 16), prompts)
    assert served.generator.model_provider.is_batchable
    assert sum(map(len, want)) > 0.7 * sum(map(len, got))
    assert [text[: len(w)] for text, w in zip(got, want, strict=True)] == want


def test_the_prompt_cache_counts_packed_bytes(served):
    """What the server adds up is what the arrays take: 98 bytes per vector of 256 and the exact copies, and the recurrent state as it is."""
    served.complete("Count these bytes, please.", 8)
    cache = served.generator.prompt_cache
    assert len(cache) > 0
    entries = [entry.prompt_cache for entry in entries_of(cache)]
    assert cache.nbytes == sum(c.nbytes for slots in entries for c in slots)
    for slots in entries:
        packed = [c for c in slots if type(c) is TurboQuantKVCache]
        assert len(packed) == 2 and not any(type(c) is KVCache for c in slots)
        for c in packed:
            assert (
                c.nbytes - c.inspect()["exact_bytes"] == c.offset * 2 * 2 * 98 == sum(x.nbytes for x in c._core.arrays)
            )
            ring = next(n for n in (32, 64, 128, 256, 384) if n in (384, max(n, c.offset)))  # all, or 128 and room
            assert c.inspect()["exact_bytes"] == (ring + 4) * 2 * 2 * 258


def entries_of(cache):
    """The entries of an LRUPromptCache."""
    stack, found = list(cache._trie._trie.values()), []
    while stack:
        node = stack.pop()
        found += [node["__value__"]] if "__value__" in node else []
        stack += [child for key, child in node.items() if key != "__value__"]
    return found


def test_a_needle_is_found_in_a_reused_prefix_of_4k_tokens(served, bundled, alone):
    """Two questions after one long system message: the second request reads its tokens from the prompt cache."""
    tokenizer = bundled[1]
    system = {"role": "system", "content": page(tokenizer, 4200, 0.4)}
    first = served.post(
        "/v1/chat/completions",
        messages=[system, {"role": "user", "content": "What is this text about?"}],
        max_tokens=4,
    )
    messages = [system, {"role": "user", "content": QUESTION}]
    second = served.post("/v1/chat/completions", messages=messages, max_tokens=16)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 4096
    text = second["choices"][0]["message"]["content"]
    assert ANSWER in text
    want = alone(tokenizer.apply_chat_template(messages, add_generation_prompt=True), 16)
    assert ANSWER in want and text.startswith(want)


def test_a_client_that_hangs_up_harms_nobody(served, bundled, alone):
    prompt, want = "The kernel maps a page", alone(bundled[1].encode("The kernel maps a page"), 24)
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 3000, "stream": True})
    with socket.create_connection(("127.0.0.1", served.port)) as quitter:
        quitter.sendall(f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        assert b" 200 " in quitter.recv(1000)
    for _ in range(2):
        assert want and served.complete(prompt, 24).startswith(want)
    connection = served.connection()
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200


def test_a_request_with_a_seed_is_served_alone_and_gets_the_same(served, bundled, alone):
    """mlx-lm does not batch such requests: its other path, stream_generate, with the same prompt cache."""
    prompt = "The function returns"
    want = alone(bundled[1].encode(prompt), 16)
    answer = served.post("/v1/completions", prompt=prompt, max_tokens=16, seed=7)["choices"][0]["text"]
    assert want and answer.startswith(want)


def test_bad_requests_are_answered_and_harm_nobody(served):
    for body in (
        b"{",
        json.dumps({"prompt": "x", "max_tokens": -3}).encode(),
        json.dumps({"prompt": 5}).encode(),
    ):
        connection = served.connection()
        connection.request("POST", "/v1/completions", body)
        assert connection.getresponse().status >= 400
    assert served.complete("Still here", 4)
