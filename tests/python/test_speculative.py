"""Speculative decoding on packed caches: drafts are checked several tokens at a time, and what was wrong is trimmed."""

import mlx.core as mx
import pytest
from conftest import relative_error
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models import qwen3
from mlx_lm.models.cache import ArraysCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from small_models import FAMILIES, build, greedy, prompt, small_hybrid, small_jamba, small_llama
from turboquant_mlx import PromptLookup, _core, enable
from turboquant_mlx.overlay import drafts
from turboquant_mlx.overlay.lookup import LookupDrafter


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


@pytest.mark.parametrize("most", [1, 4, 8])
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("draft", ["itself", "another", "lookup"])
def test_hybrids_take_drafts(most, checkpoints, draft):
    """Recurrent states go back to the last token that was right: the answer is plain decoding's, and so is what follows."""
    model = small_hybrid()
    helper = PromptLookup(most) if draft == "lookup" else small_hybrid(seed=0 if draft == "itself" else 1)
    enable(model, checkpoints=checkpoints)
    text = prompt(30) * 2
    want = greedy(model, text, 40)
    caches = make_prompt_cache(model) + make_prompt_cache(helper)
    kept = make_prompt_cache(model)
    steps = speculative_generate_step(
        mx.array(text), model, helper, num_draft_tokens=most, max_tokens=40, prompt_cache=caches
    )
    assert [token for token, _, _ in steps] == want
    own = caches[: len(model.layers)]
    assert greedy(model, want[-1:], 10, own) == greedy(model, text + want, 10, kept)
    if draft != "lookup":  # the helper's caches stand where the model's do
        helped = caches[len(model.layers) :]
        assert greedy(helper, want[-1:], 10, helped) == greedy(helper, text + want, 10)


def test_states_after_a_round_are_those_of_single_tokens():
    """Whatever was refused: recurrence and convolution are where one token at a time takes them."""
    model = small_hybrid()
    enable(model)
    text = prompt(20)
    for right in range(9):
        plain, checked = ([*make_prompt_cache(model)] for _ in range(2))
        for cache in (plain, checked):
            model(mx.array([text]), cache=cache)
        checked, pairs = drafts._stood_in(checked)
        drafts._call(model, checked, mx.array(prompt(9, seed=2)), keep=True)
        drafts._take_back(checked, 9 - right)
        for token in prompt(9, seed=2)[:right]:
            model(mx.array([[token]]), cache=plain)
        for a, b in zip(checked, plain, strict=True):
            if isinstance(a, ArraysCache):
                # Behind a packed layer the rounding of queries to 8 bits takes part.
                assert all(relative_error(x, y) < 1e-4 for x, y in zip(a.cache, b.cache, strict=True))
            else:
                assert a.offset == b.offset == 20 + right


def test_a_closed_answer_leaves_what_it_gave():
    """A client that hangs up in the middle of a round: the caches hold the tokens before the last one that it got."""
    model = small_hybrid()
    enable(model)
    text = prompt(30)
    want = greedy(model, text, 20)
    for stop in range(1, 12):
        cache = make_prompt_cache(model)
        both = cache + make_prompt_cache(model)
        steps = speculative_generate_step(mx.array(text), model, model, num_draft_tokens=4, prompt_cache=both)
        assert [next(steps)[0] for _ in range(stop)] == want[:stop]
        steps.close()
        assert greedy(model, want[stop - 1 : stop], 20 - stop, cache) == want[stop:]


def test_layers_without_states_of_each_token_take_no_drafts():
    """mlx-lm's Jamba."""
    model = small_jamba()
    enable(model)
    with pytest.raises(ValueError, match="the model takes no drafts: recurrent layer 0 of 1 gives no state after each"):
        drafted(model, PromptLookup(4), prompt(20), 10)


def test_lookup_drafts_what_followed():
    drafter = LookupDrafter([1, 2, 3, 4, 5, 9, 3, 4], 8)
    assert drafter.propose(3).tolist() == [5, 9, 3] and drafter.propose(0).tolist() == []
    assert drafter.propose(8).tolist() == [5, 9, 3, 4, 5, 9, 3, 4]
    drafter.settle([4, 5, 9, 3], 2, 7)
    assert drafter.room() == 2 and drafter.propose(2).size == 0, "5, 7 never occurred"
    drafter.settle([7], 1, 8)
    drafter.settle([8, 1], 2, 2)
    assert drafter.room() == 4
    for wrong in (0, 65):
        with pytest.raises(ValueError, match=f"from 1 to 64; got {wrong}"):
            PromptLookup(wrong)


@pytest.mark.parametrize("sampler", [None, make_sampler(0.8)])
def test_logits_processors_see_the_whole_text(sampler):
    """As in plain decoding; mlx-lm's own loop shows them the latest tokens alone."""
    model = small_hybrid()
    enable(model)
    text = prompt(30)
    processors = make_logits_processors(repetition_penalty=1.5, repetition_context_size=25)
    want = greedy(model, text, 30, logits_processors=processors)
    steps = speculative_generate_step(
        mx.array(text), model, PromptLookup(4), max_tokens=30, logits_processors=processors, sampler=sampler
    )
    got = [token for token, _, _ in steps]
    assert len(got) == 30 and (sampler or got == want)


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
    for most in (1, 4):
        cache = make_prompt_cache(model) + make_prompt_cache(helper)
        assert drafted(model, helper, text, 40, most, cache) == want
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


@pytest.mark.parametrize("helper", [lambda: small_llama(), lambda: PromptLookup(4)])
def test_drafts_pause_where_caches_pack_themselves(helper):
    """The round ends before the token at which plain decoding packs, and drafts go on after it."""
    model = small_llama()
    enable(model, start=30)
    for length, count in ((20, 5), (31, 10), (40, 10), (20, 20), (29, 10), (30, 2), (10, 50)):
        text = (prompt(5) * 9)[:length]
        assert drafted(model, helper(), text, count) == greedy(model, text, count)


@pytest.mark.parametrize("helper", [lambda: small_llama(), lambda: PromptLookup(4)])
def test_drafts_stop_where_float_windows_fill_up(helper):
    """Beside packed caches, and without any: the tokens are plain decoding's, where mlx-lm's own loop is wrong."""
    model = WINDOWS["llama"]()
    floats = make_prompt_cache(model)
    want = greedy(model, prompt(20), 30)
    assert drafted(model, helper(), prompt(20), 30) == want
    enable(model)
    packed = make_prompt_cache(model)[1:]
    kept = [*make_prompt_cache(WINDOWS["llama"]())[:1], *make_prompt_cache(model)[1:]]
    want = greedy(model, prompt(20), 30, kept)
    other = helper()
    assert drafted(model, other, prompt(20), 30, 3, [floats[0], *packed, *make_prompt_cache(other)]) == want
