"""Speculative decoding on packed caches: drafts are checked several tokens at a time, and what was wrong is trimmed."""

import mlx.core as mx
import pytest
from mlx_lm.generate import speculative_generate_step, stream_generate
from mlx_lm.models import qwen3
from mlx_lm.models.cache import make_prompt_cache
from small_models import FAMILIES, build, greedy, prompt, small_hybrid, small_llama
from turboquant_mlx import _core, disable, enable


@pytest.mark.parametrize("drafts", [1, 3, 7])
@pytest.mark.parametrize("draft", ["itself", "another", "float"])
def test_speculation_gives_the_tokens_of_plain_decoding(drafts, draft):
    """A draft model that is always right, one that is nearly always wrong, and one whose own caches are floats."""
    model, helper = small_llama(), small_llama(seed=0 if draft == "itself" else 1)
    enable(model, bits=3)
    if draft != "float":
        enable(helper, bits=3)
    text = prompt(50)
    want = greedy(model, text, 40)
    caches = make_prompt_cache(model) + make_prompt_cache(helper)
    steps = list(
        speculative_generate_step(
            mx.array(text),
            model,
            helper,
            num_draft_tokens=drafts,
            max_tokens=40,
            prompt_cache=caches,
            prefill_step_size=16,
        )
    )
    assert [token for token, _, _ in steps] == want
    accepted = sum(from_draft for _, _, from_draft in steps)
    assert accepted >= 20 if draft == "itself" else accepted < 10
    # What was drafted in vain is forgotten, and the caches go on as if it had never been there.
    assert caches[0].offset in (len(text) + 39, len(text) + 40)
    for c in caches[:2]:
        c.trim(c.offset - len(text) - 39)
    assert greedy(model, want[-1:], 10, caches[:2]) == greedy(model, text + want, 10)


def test_a_few_queries_read_the_codes():
    """On a CPU one kernel an instruction set serves any number of queries; the GPUs' choice is in test_gpu.py and in
    their plans' own tests."""
    model = small_llama()
    enable(model)
    cache = make_prompt_cache(model)
    for n in (1, 2, 8, 9):
        before = cache[0].kernel
        mx.eval(model(mx.array(prompt(n))[None], cache=cache))
        assert cache[0].kernel == f"cpu {_core.current_isa()}" and before in (None, cache[0].kernel)


def test_what_mlx_lm_cannot_rewind_it_refuses(bundled):
    """Recurrent states cannot go back: mlx-lm says so before it generates anything."""
    model, tokenizer = bundled
    enable(model)
    try:
        with pytest.raises(ValueError, match="requires a trimmable prompt cache .*ArraysCache"):
            next(stream_generate(model, tokenizer, [5, 6, 7], draft_model=model))
    finally:
        disable(model)


def test_checkpoints_take_no_drafts_back():
    """They lie at the ends of a prompt's chunks: trimming by a refused draft would lose the answer without a word."""
    model, hybrid = small_llama(), small_hybrid()
    enable(model)
    enable(hybrid, checkpoints=True)
    for main, helper in ((hybrid, hybrid), (model, hybrid)):
        given = make_prompt_cache(main) + make_prompt_cache(helper)
        for cache in (None, given):
            with pytest.raises(ValueError, match="layer 0: drafts need a trimmable prompt cache"):
                drafted(main, helper, prompt(20), 10, 3, cache)
        assert all(c.empty() for c in given)


def test_speculation_within_a_window():
    """A window that has not wrapped yet can go back."""
    model, helper = FAMILIES["gemma3, head_dim 256"](), FAMILIES["gemma3, head_dim 256"]()
    for m in (model, helper):
        enable(m)
    text = prompt(10)
    steps = speculative_generate_step(mx.array(text), model, helper, num_draft_tokens=2, max_tokens=15)
    assert [token for token, _, _ in steps] == greedy(model, text, 15)


def drafted(model, helper, text, count, drafts=3, cache=None):
    steps = speculative_generate_step(
        mx.array(text), model, helper, num_draft_tokens=drafts, max_tokens=count, prompt_cache=cache
    )
    return [token for token, _, _ in steps]


WINDOWS = {
    "gemma3": lambda: FAMILIES["gemma3, head_dim 256"](),
    "gpt_oss": lambda: FAMILIES["gpt_oss, sinks"](),
    "llama": lambda: FAMILIES["llama, sliding window"](),
}


@pytest.mark.parametrize("length", [5, 25, 31, 32, 60])
@pytest.mark.parametrize("family", WINDOWS)
def test_speculation_while_a_window_fills_up(family, length):
    """Windows of 32 tokens, which fill up in the answer or in the prompt: what is refused is taken back all the same."""
    model, helper = WINDOWS[family](), WINDOWS[family]()
    helper.update({"lm_head": {"weight": helper.lm_head.weight + 0.02 * mx.random.normal(helper.lm_head.weight.shape)}})
    for m in (model, helper):
        enable(m)
    text = prompt(length)
    want = greedy(model, text, 40)
    for drafts in (1, 4):
        cache = make_prompt_cache(model) + make_prompt_cache(helper)
        assert drafted(model, helper, text, 40, drafts, cache) == want
        used = cache[: len(model.layers)]
        offset = used[0].offset
        assert {c.offset for c in used} == {offset} and offset in (length + 39, length + 40)
        if offset == length + 39:
            assert greedy(model, want[-1:], 6, used) == greedy(model, text + want, 6)


def test_a_sized_window_fills_up():
    """--max-kv-size makes windows that keep their first tokens."""
    model, helper = build(qwen3), build(qwen3, seed=1)
    for m in (model, helper):
        enable(m)
    caches = [make_prompt_cache(m, 24) for m in (model, helper, model)]
    want = greedy(model, prompt(15), 30, caches[2])
    assert drafted(model, helper, prompt(15), 30, 3, caches[0] + caches[1]) == want
    assert not caches[0][0].is_trimmable(), "outside of drafts a window that has moved on keeps what it has"


def test_caches_that_pack_themselves_in_the_answer_take_no_drafts():
    model, helper = small_llama(), small_llama(seed=1)
    enable(model, start=30)
    for length, count in ((20, 5), (31, 10), (40, 10)):  # floats throughout, codes throughout
        assert drafted(model, helper, prompt(length), count) == greedy(model, prompt(length), count)
    for length, count in ((20, 20), (29, 10), (30, 2), (20, -1)):
        with pytest.raises(ValueError, match="would pack itself within the answer, at token 30"):
            drafted(model, helper, prompt(length), count)
    cache = make_prompt_cache(model) + make_prompt_cache(helper)
    with pytest.raises(ValueError, match="layer 0 would pack itself"):
        drafted(model, helper, prompt(20), 20, 3, cache)
    assert cache[0].empty() and cache[2].empty()


def test_float_windows_beside_packed_caches_take_no_drafts():
    model, helper = WINDOWS["llama"](), small_llama(seed=1)
    floats = make_prompt_cache(model)
    enable(model)
    cache = [floats[0], *make_prompt_cache(model)[1:]]
    with pytest.raises(ValueError, match="layer 0 is a RotatingKVCache of 32 tokens"):
        drafted(model, helper, prompt(20), 20, 3, cache + make_prompt_cache(helper))
