"""A server that is held to a context and to its memory: what it refuses at start, what it refuses later, what waits."""

import json
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import MODEL
from mlx_lm.models import llama
from serving import at_once, serving
from small_models import save_model
from turboquant_mlx.commands import cli
from turboquant_mlx.overlay import limits

PLAIN = ("--tq-calibration", "none", "--prefill-step-size", "256")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_model(llama, tmp_path_factory.mktemp("limits") / "llama")


class Linear:
    """Costs of a made-up model: 1,000 bytes of weights, 10 a token of a sequence, 1 a token of a prompt."""

    weights = 1000

    def sequence(self, context):
        return 10 * context

    def workspace(self, context):
        return context


def test_a_plan_shares_out_the_memory():
    for memory in (6600, 7000, 10_000, 20_000, 100_000, 10**7):
        for cached in (None, 100):
            found = limits.plan(Linear(), memory, 500, 4096, 32, 8, cached)
            assert found.context == 500 and 1 <= found.prompts <= found.sequences <= 32 and found.prompts <= 8
            taken = 1000 + found.sequences * found.sequence + found.workspace + found.prompt_cache
            assert taken <= memory and (cached or taken == memory) and found.prompt_cache >= 0
    assert (found.sequences, found.prompts) == (32, 8)
    assert limits.plan(Linear(), 6500, 500, 4096, 32, 8, None).sequences == 1
    with pytest.raises(ValueError, match=r"--tq-memory must be at least 6,500 bytes .* 500 tokens .*; got 6,499"):
        limits.plan(Linear(), 6499, 500, 4096, 32, 8, None)


def test_the_context_is_the_longest_that_fits():
    assert limits.plan(Linear(), 1000 + 11 * 700 + 5, None, 4096, 32, 8, None).context == 700
    assert limits.plan(Linear(), 10**9, None, 4096, 32, 8, None).context == 4096
    with pytest.raises(ValueError, match="at least 3,816 bytes for one sequence of 256 tokens"):
        limits.plan(Linear(), 3815, None, 4096, 32, 8, None)
    assert limits.plan(Linear(), None, 100, 4096, 32, 8, None).prompt_cache is None


def test_what_cannot_fit_is_refused_at_start(small, capfd):
    with pytest.raises(SystemExit) as end:
        cli.main(["server", "--model", str(small), "--port", "0", "--tq-memory", "1MB", "--tq-context", "4k", *PLAIN])
    assert "turboquant_mlx server: --tq-memory must be at least" in str(end.value.code)
    assert "one sequence of 4,096 tokens" in str(end.value.code) and "got 1,000,000" in str(end.value.code)
    for option, value in (("--tq-memory", "much"), ("--tq-context", "0")):
        with pytest.raises(SystemExit):
            cli.main(["server", "--model", str(small), option, value])
        assert f"argument {option}: must be a number of" in capfd.readouterr().err


@pytest.mark.parametrize("more", [(), ("--tq-lookup", "4")], ids=["batched", "alone"])
def test_the_context_is_kept(small, more):
    with serving(small, *PLAIN, "--tq-context", "64", *more) as served:
        for stream in (False, True):
            status, answer = served.ask("/v1/completions", prompt="word " * 200, max_tokens=4, stream=stream)
            error = json.loads(answer)["error"]["message"]
            assert status == 400 and "fewer tokens than the context of 64 (--tq-context); got " in error
        answer = served.post("/v1/completions", prompt="word " * 10, max_tokens=1000, logit_bias={"5": 1000.0})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 64


def test_requests_beyond_the_plan_wait(tokens, bundled, capfd):
    """Four of the bundled model's prompts, of which two fit at once; MLX never holds more than it was given."""
    tokenizer = bundled[1]
    prompts = [tokenizer.decode(tokens[at : at + 260]) for at in range(0, 1040, 260)]
    with serving(MODEL, *PLAIN, "--tq-code", "scalar") as served:
        alone = [served.complete(prompt, 6) for prompt in prompts]
        provider = served.generator.model_provider
        costs = limits.Costs(provider.model, None, 0, 256, True)
    memory = costs.weights + int(2.8 * costs.sequence(320)) + costs.workspace(320)
    del provider, served
    at_start = mx.get_active_memory()  # what the other tests of this process hold
    running = []
    with serving(MODEL, *PLAIN, "--tq-code", "scalar", "--tq-memory", str(memory), "--tq-context", "320") as served:
        served.complete("Hello", 1)
        generator = served.generator
        assert generator.cli_args.decode_concurrency == 2
        mx.reset_peak_memory()
        take = generator._next_request

        def watched(timeout=None):
            request = take(timeout)
            running.append(sum(answer.running for answer in generator._running))
            return request

        generator._next_request = watched
        for _ in range(2):  # the second time with a full prompt cache
            assert at_once(lambda prompt: served.complete(prompt, 6), prompts) == alone
        assert mx.get_peak_memory() - at_start <= memory
        assert len(generator.prompt_cache) > 0 and generator.prompt_cache.nbytes <= generator.prompt_cache.max_bytes
    assert max(running) == 2
    assert "context 320 tokens; weights" in capfd.readouterr().err


def test_one_request_too_many_is_503(small, monkeypatch):
    monkeypatch.setattr(limits, "WAITING", 0)
    with serving(small, *PLAIN, "--tq-memory", "1GB") as served:
        status, answer = served.ask("/v1/completions", prompt="Hello", max_tokens=4)
        assert status == 503 and "server is busy" in json.loads(answer)["error"]["message"]


def test_a_clients_queue_knows_when_it_has_ended():
    from queue import Queue

    for last in (None, ValueError("no")):
        answer = limits._Answer(Queue())
        answer.put((1, 2))
        assert answer.running
        answer.put(last)
        assert not answer.running and answer._queue.qsize() == 2
    gone = limits._Answer(Queue())
    gone.put(context := SimpleNamespace(_should_stop=False))
    assert gone.running
    context._should_stop = True
    assert not gone.running
