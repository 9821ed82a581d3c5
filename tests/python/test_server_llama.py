"""The server with a small Llama, whose caches can all be trimmed: tokens of concurrent clients, of reused prefixes and
of refused requests' neighbours are those of the one-request path, without exception."""

import json

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from serving import at_once, serving
from small_models import save_model, sure
from turboquant_mlx import TurboQuantKVCache, enable

LENGTHS = (9, 30, 80, 200, 5, 330, 12, 64)
STEP = 128  # tokens of a prefill chunk
TIE = 1e-3  # a lead that who shares the batch may turn; codes are scalar, and the newest tokens exact


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model(llama, tmp_path_factory.mktemp("served") / "llama")


@pytest.fixture(scope="module")
def served(directory):
    # Scalar codes: who shares a batch changes roundings, and where two trellis paths are equally near, a rounding chooses
    # between vectors that differ in many coordinates; a random model's greedy tokens notice.
    with serving(directory, "--prefill-step-size", str(STEP), "--tq-code", "scalar") as running:
        yield running


@pytest.fixture(scope="module")
def alone(directory):
    """The plain one-request path: a text to its next `count` greedy tokens, up to the first that leads by a rounding."""
    mx.set_default_device(mx.cpu)
    model, tokenizer = load(str(directory))
    enable(model, bits=3, code="scalar")
    assert all(type(c) is TurboQuantKVCache for c in make_prompt_cache(model))

    def answer(text, count=24):
        out = sure(model, tokenizer.encode(text), count, tie=TIE, prefill_step_size=STEP)
        end = next((i for i, t in enumerate(out, 1) if t in tokenizer.eos_token_ids), count)  # there the server stops
        return out[:end]

    return answer


@pytest.fixture(scope="module")
def prompts(bundled, tokens):
    return [bundled[1].decode(tokens[500 * i : 500 * i + n]) for i, n in enumerate(LENGTHS)]


def begin_as(answers, wanted):
    """Whether the answers are as wanted, as far as no rounding decides."""
    assert sum(map(len, wanted)) > 12 * len(wanted)
    return len(answers) == len(wanted) and all(a[: len(w)] == w for a, w in zip(answers, wanted, strict=True))


def complete(served, prompt, count=24):
    """The ids of the tokens that the server answers with."""
    answer = served.post("/v1/completions", prompt=prompt, max_tokens=count, logprobs=True)
    return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]


def test_eight_clients_at_once_get_what_each_would_get_alone(served, alone, prompts):
    want = [alone(prompt) for prompt in prompts]
    assert len({tuple(w) for w in want}) == len(want) and sum(len(set(w)) > 3 for w in want) >= len(want) - 2
    assert begin_as(at_once(lambda prompt: complete(served, prompt), prompts), want)
    assert served.generator.model_provider.is_batchable
    # Again, with every prefix in the server's prompt cache; then other ends of the same prefixes, which trims it.
    assert begin_as(at_once(lambda prompt: complete(served, prompt), prompts), want)
    branches = [prompt[: len(prompt) * 2 // 3] + " another end" for prompt in prompts]
    want = [alone(prompt) for prompt in branches]
    assert begin_as(at_once(lambda prompt: complete(served, prompt), branches), want)


def test_a_draft_model_of_a_request_is_refused_and_harms_nobody(served, alone, prompts, directory):
    """The server began without a draft model."""
    want = [alone(prompt) for prompt in prompts]

    def ask(i):
        if i % 2:
            return served.ask("/v1/completions", prompt=prompts[i], max_tokens=24, draft_model=str(directory))
        return complete(served, prompts[i])

    got = at_once(ask, range(len(prompts)))
    assert begin_as(got[0::2], want[0::2])
    for status, answer in got[1::2]:
        assert status >= 400 and b"draft_model must be the server's own --draft-model (it has none)" in answer
    assert served.generator.model_provider.draft_model is None
    assert begin_as([complete(served, prompt) for prompt in prompts], want)
    for allowed in ("default_model", None):
        body = {} if allowed is None else {"draft_model": allowed}
        assert served.ask("/v1/completions", prompt=prompts[0], max_tokens=4, **body)[0] == 200


def test_a_request_for_a_model_that_cannot_be_packed_harms_nobody(served, alone, prompts, tmp_path):
    """The server drops its model before it loads another; the next request gets its own back."""
    other = save_model(llama, tmp_path / "other", hidden_size=160, head_dim=80)
    want = [alone(prompt) for prompt in prompts[:4]]

    def ask(i):
        if i == 2:
            return served.ask("/v1/completions", prompt=prompts[2], max_tokens=4, model=str(other))
        return complete(served, prompts[i])

    got = at_once(ask, range(4))
    status, answer = got.pop(2)
    assert status >= 400 and b"head_dim must be a multiple of 32 from 32 to 512; got 80" in answer
    assert begin_as(got, want[:2] + want[3:])
    assert begin_as([complete(served, prompt) for prompt in prompts[:4]], want)


@pytest.mark.parametrize(
    "body, message",
    [
        ({"prompt": ["one", "two"]}, "prompt must be one string; got list"),
        ({"prompt": ""}, "the prompt must have at least one token; got none"),
        ({"top_k": 8192}, "top_k must be less than the vocabulary's 8192 tokens; got 8192"),
        ({"stop": 5}, "stop must be a string or a list of strings; got 5"),
        ({"stop": ["end", 5]}, "stop must be a string or a list of strings; got ['end', 5]"),
        ({"logit_bias": {"8192": 1}}, "logit_bias must be of tokens from 0 to 8191; got 8192"),
        ({"logit_bias": {"-1": 1}}, "logit_bias must be of tokens from 0 to 8191; got -1"),
        ({"seed": -1}, "seed must be from 0 to 2^64 - 1; got -1"),
    ],
)
def test_a_request_that_mlx_lms_thread_would_die_of_harms_nobody(served, alone, prompts, body, message):
    """Sent while others are answered; they and those who come later get what they asked for."""
    want = [alone(prompt) for prompt in prompts[:4]]

    def ask(i):
        if i == 2:
            request = {"prompt": prompts[2], "max_tokens": 4, "temperature": 1.0} | body
            return served.ask("/v1/completions", **request)
        return complete(served, prompts[i])

    got = at_once(ask, range(4))
    status, answer = got.pop(2)
    assert status == 400 and message in json.loads(answer)["error"]["message"]
    assert begin_as(got, want[:2] + want[3:])
    assert begin_as([complete(served, prompts[2])], [want[2]]) and served.generator.generation_available()


def test_the_largest_top_k_and_biased_tokens_are_served(served, prompts):
    answer = served.post(
        "/v1/completions",
        prompt=prompts[0],
        max_tokens=3,
        top_k=8191,
        temperature=1.0,
        logit_bias={"8191": 1e4, "0": -1e4},
        logprobs=True,
    )
    assert [token["id"] for token in answer["choices"][0]["logprobs"]["content"]] == [8191] * 3
