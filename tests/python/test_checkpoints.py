"""Recurrent states that go back: checkpoints at the ends of a prompt's chunks, alone, in batches, in files and in the prompt
cache of mlx-lm's server."""

import copy
import math

import mlx.core as mx
import pytest
from conftest import relative_error
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ArraysCache, make_prompt_cache
from small_models import greedy, prompt, small_hybrid, small_jamba, small_llama, sure
from turboquant_mlx import (
    CheckpointedArraysCache,
    disable,
    enable,
    load_prompt_cache,
    rewind_and_read,
    save_prompt_cache,
    trim_prompt_cache,
)
from turboquant_mlx.caches.checkpoints import LEAST, Limits, nearest_checkpoint, thinned


@pytest.fixture
def hybrid(bundled):
    model, _ = bundled
    enable(model, checkpoints=True, calibration=None)
    yield model
    disable(model)


def read(model, tokens, step, cache=None):
    """A prompt cache that has read `tokens`, `step` at a time."""
    cache = make_prompt_cache(model) if cache is None else cache
    for at in range(0, len(tokens), step):
        model(mx.array([tokens[at : at + step]]), cache=cache)
        mx.eval([c.state for c in cache])
    return cache


def states(cache):
    return [x for c in cache if isinstance(c, ArraysCache) for x in c.cache]


def test_checkpoints_thin_out_towards_the_beginning():
    """As a prompt grows chunk by chunk, they stay few, the newest among them, and no gap is much longer than the way back
    to it."""
    limits, kept = Limits(tokens_each=1), []
    for end in range(512, 200_000, 512):
        kept = thinned([*kept, end], end, limits.at(end))
        assert len(kept) <= LEAST + 2 * math.log2(1 + end / 512) and kept[-1] == end
        gaps = zip([0, *kept], kept, strict=False)
        assert all(b - a <= max(1024, 1.5 * (end - a)) for a, b in gaps)
        assert all(b - a <= max(2048, 2 * (end - b) + 4096) for a, b in zip(kept, kept[1:], strict=False))
    assert len(kept) >= 12
    assert thinned([1, 2, 3], 3, 1) == [3] and thinned([], 5, 4) == []


def test_the_number_of_checkpoints_is_bounded_by_bytes():
    assert Limits(tokens_each=1000).at(100_000) == LEAST + 15
    assert Limits(tokens_each=8000).at(100_000) == 12
    assert Limits(tokens_each=8000).at(1000) == LEAST == Limits().at(10**6)
    assert Limits(most=2).at(10**6) == 2


def test_a_prompt_cache_goes_back_to_the_nearest_checkpoint(hybrid, tokens):
    """What it holds then is what reading the prefix afresh gives, and so are the tokens after it."""
    cache = read(hybrid, tokens[:1500], 300)
    assert cache[0].checkpoints == [600, 900, 1200, 1500] and type(cache[0]) is CheckpointedArraysCache
    assert trim_prompt_cache(cache, 0) == 0
    assert trim_prompt_cache(cache, 250) == 300
    assert [c.position if isinstance(c, ArraysCache) else c.offset for c in cache] == [1200] * len(cache)
    assert trim_prompt_cache(cache, 100) == 300
    fresh = read(hybrid, tokens[:900], 300)
    for a, b in zip(states(cache), states(fresh), strict=True):
        assert mx.array_equal(a, b)
    want = sure(hybrid, tokens[900:950], 24, fresh)
    assert len(want) > 4 and greedy(hybrid, tokens[900:950], 24, cache)[: len(want)] == want


def test_a_prompt_cache_goes_back_to_nothing(hybrid, tokens):
    cache = read(hybrid, tokens[:1500], 300)
    assert trim_prompt_cache(cache, 1000) == 1500 and all(c.empty() or c.size() == 0 for c in cache)
    want = sure(hybrid, tokens[:200], 16)
    assert want and greedy(hybrid, tokens[:200], 16, cache)[: len(want)] == want


def test_the_tokens_between_are_read_again(hybrid, tokens):
    """As exactly as if there had been no others: 256 tokens back the copies of the newest are still there."""
    cache = read(hybrid, tokens[:1400], 200)
    assert rewind_and_read(hybrid, cache, tokens[:1400], 1234) == 34
    assert cache[0].position == cache[3].offset == 1234
    fresh = read(hybrid, tokens[:1234], 200)
    assert max(relative_error(a, b) for a, b in zip(states(cache), states(fresh), strict=True)) < 1e-4
    want = sure(hybrid, tokens[1234:1250], 24, fresh)
    assert len(want) > 4 and greedy(hybrid, tokens[1234:1250], 24, cache)[: len(want)] == want
    for length in (-1, 1300):
        with pytest.raises(ValueError, match=r"\[rewind_and_read\] length must be from 0 to the \d+ tokens"):
            rewind_and_read(hybrid, cache, tokens, length)


def test_an_answer_is_taken_back_to_the_end_of_its_prompt(hybrid, tokens):
    """generate_step reads all of a prompt but its last token as chunks."""
    cache = make_prompt_cache(hybrid)
    greedy(hybrid, tokens[:700], 20, cache, prefill_step_size=512)
    assert cache[0].checkpoints == [512, 699] and cache[0].position == 720
    assert trim_prompt_cache(cache, 15) == 21 and cache[3].offset == 699


def test_one_slot_goes_back_to_checkpoints_alone(hybrid, tokens):
    """Recurrent and packed slots that were trimmed by different numbers would answer wrongly."""
    slot = read(hybrid, tokens[:600], 300)[0]
    before = [*slot.cache]
    with pytest.raises(ValueError, match=r"got 10 tokens before 600, and the checkpoints are at \[0, 300, 600\]"):
        slot.trim(10)
    assert slot.position == 600 and all(a is b for a, b in zip(before, slot.cache, strict=True))
    assert slot.trim(300) == 300 and slot.checkpoints == [300] and slot.trim(400) == 300 and slot.empty()


def test_checkpoints_take_no_more_bytes_than_packed_slots(hybrid, tokens):
    cache = read(hybrid, tokens * 2, 512)
    held = [c for c in cache if isinstance(c, CheckpointedArraysCache)]
    checkpoints = sum(c.nbytes - c.state_nbytes for c in held)
    assert len(held[0].checkpoints) > LEAST
    assert checkpoints <= sum(c.nbytes for c in cache if c not in held)


@pytest.mark.parametrize("most", [1, 3])
def test_a_number_of_checkpoints(bundled, tokens, most):
    enable(bundled[0], checkpoints=most, calibration=None)
    try:
        cache = read(bundled[0], tokens[:1000], 100)
    finally:
        disable(bundled[0])
    assert len(cache[0].checkpoints) == most and cache[0].checkpoints[-1] == 1000


@pytest.mark.parametrize("bad", [0, -1, "all", 2.5])
def test_a_wrong_number_of_checkpoints(bad):
    with pytest.raises(ValueError, match=r"\[enable\] checkpoints must be True, False, 'auto' or how many"):
        enable(small_llama(), checkpoints=bad)


def test_models_without_recurrent_states_have_no_checkpoints():
    model = small_llama()
    enable(model, checkpoints=True)
    assert not any(isinstance(c, ArraysCache) for c in make_prompt_cache(model))


def test_layers_that_do_not_count_are_refused_or_left():
    """Jamba's layers never call `advance`: where their states stand is unknown."""
    model = small_jamba()
    with pytest.raises(ValueError, match="checkpoints need layers that count the tokens .* layer 0"):
        enable(model, checkpoints=True)
    assert type(make_prompt_cache(model)[0]) is ArraysCache
    assert enable(model, checkpoints="auto") == 1
    assert type(make_prompt_cache(model)[0]) is ArraysCache


def test_a_ragged_batch_carries_the_checkpoints_of_its_rows():
    """Prompts of different lengths, read together: each row leaves with the checkpoints that it gets alone, of the same
    states."""
    model = small_hybrid()
    enable(model, checkpoints=True, code="scalar")
    prompts = [prompt(n, seed=n) for n in (150, 40, 97)]
    batch = BatchGenerator(model, max_tokens=12, prefill_step_size=64)
    uids = batch.insert(prompts)
    done = {}
    while len(done) < len(uids):
        for r in batch.next_generated():
            if r.finish_reason:
                done[r.uid] = r
    for uid, text in zip(uids, prompts, strict=True):
        cache, answer = done[uid].prompt_cache, done[uid].all_tokens[len(text) :]
        assert cache[0].position == cache[1].offset == len(text) + len(answer)
        ends = [at for at in (64, 128) if at < len(text) - 1] + [len(text) - 1]
        assert cache[0].checkpoints == ends
        for end in reversed(ends):
            trim_prompt_cache(cache, cache[0].position - end)
            fresh = read(model, text[:end], 64)
            assert max(relative_error(a, b) for a, b in zip(states(cache), states(fresh), strict=True)) < 1e-4
            assert greedy(model, text[end:], 12, copy.deepcopy(cache)) == greedy(model, text[end:], 12, fresh)


def test_batches_that_grow_and_shrink():
    model = small_hybrid()
    enable(model, checkpoints=True)
    rows = [read(model, prompt(n, seed=n), 32) for n in (33, 64)]
    merged = CheckpointedArraysCache.merge([row[0] for row in rows])
    more = CheckpointedArraysCache.merge([read(model, prompt(40), 40)[0]])
    plain = ArraysCache(2)
    plain.cache = [*rows[0][0].cache]
    merged.extend(more)
    merged.extend(plain)
    assert merged.batch_size == 4 and not merged.is_trimmable() and merged.position is None
    merged.filter([3, 1, 2])
    stranger, second, third = (merged.extract(i) for i in range(3))
    assert (second.position, second.checkpoints) == (64, [32, 64]) and third.checkpoints == [40]
    assert stranger.position is None and not stranger.is_trimmable() and stranger.trim(3) == 0
    assert all(mx.array_equal(a, b) for a, b in zip(second.cache, rows[1][0].cache, strict=True))
    second.trim(32)
    assert all(
        mx.array_equal(a, b) for a, b in zip(second.cache, read(model, prompt(64, 64)[:32], 32)[0].cache, strict=True)
    )


def test_copies_go_their_own_way():
    model = small_hybrid()
    enable(model, checkpoints=True)
    cache = read(model, prompt(64), 32)
    other = copy.deepcopy(cache)
    trim_prompt_cache(other, 32)
    assert cache[0].position == 64 and cache[0].checkpoints == [32, 64] and other[0].checkpoints == [32]
    read(model, prompt(20), 20, other)
    assert other[0].checkpoints == [32, 52] and cache[0].checkpoints == [32, 64]


def test_files_keep_checkpoints(tmp_path):
    model = small_hybrid()
    enable(model, checkpoints=True)
    cache = read(model, prompt(90), 32)
    save_prompt_cache(str(tmp_path / "p.safetensors"), cache)
    for loaded in (
        load_prompt_cache(tmp_path / "p.safetensors", model),
        mlx_lm_cache.load_prompt_cache(str(tmp_path / "p.safetensors")),
    ):
        assert loaded[0].checkpoints == [32, 64, 90] and loaded[0].limits == cache[0].limits
        assert trim_prompt_cache(loaded, 20) == 26
        assert greedy(model, prompt(90)[64:], 8, loaded) == greedy(model, prompt(90), 8)
    empty = make_prompt_cache(model)
    save_prompt_cache(str(tmp_path / "e.safetensors"), empty)
    assert load_prompt_cache(tmp_path / "e.safetensors", model)[0].position == 0
    with pytest.raises(ValueError, match="not the state of a CheckpointedArraysCache"):
        CheckpointedArraysCache.from_state(([None, None], None, None, "{}", []))


def filed(model, *lengths):
    """An LRUPromptCache with answers to prompts of one text, cut at `lengths`."""
    cache = mlx_lm_cache.LRUPromptCache()
    for n in lengths:
        cache.insert_cache("m", prompt(200)[:n], read(model, prompt(200)[:n], 32))
    return cache


def test_a_request_continues_from_the_cache_that_reaches_furthest():
    model = small_hybrid()
    enable(model, checkpoints=True)
    lru = filed(model, 40, 200)
    text = prompt(200)
    assert len(lru) == 2, "the longer one kept no checkpoint at 40"
    for length, reached in ((50, 40), (199, 192), (201, 200), (170, 160), (35, 32), (20, 0), (200, 192)):
        asked = [*text[:length], *([5] * (length - 200))]
        caches, rest = lru.fetch_nearest_cache("m", asked)
        assert rest == asked[reached:] and (caches is None) == (reached == 0)
        if caches:
            assert caches[0].position == caches[1].offset == reached
    changed = [*text[:100], *(127 - t for t in text[100:150])]
    caches, rest = lru.fetch_nearest_cache("m", changed)
    assert 150 - len(rest) == caches[0].position in (40, 64, 96)
    assert greedy(model, rest, 10, caches) == greedy(model, changed, 10)
    assert lru.fetch_nearest_cache("other", text) == (None, text)


def test_prefixes_that_can_be_reached_are_dropped():
    model = small_hybrid()
    enable(model, checkpoints=True)
    lru = filed(model, 32, 64, 96)
    assert len(lru) == 1 and lru.nbytes == sum(
        c.nbytes for c in lru.fetch_nearest_cache("m", [*prompt(200)[:96], 1])[0]
    )
    lru.trim_to(n_bytes=0)
    assert len(lru) == 0 and lru.nbytes == 0


def test_caches_shorter_than_their_key_are_filed_under_what_they_hold():
    """mlx-lm's server files those of a speculative answer one token short."""
    model = small_llama()
    enable(model)
    lru = mlx_lm_cache.LRUPromptCache()
    text = prompt(60)
    lru.insert_cache("m", text, read(model, text[:-1], 60))
    caches, rest = lru.fetch_nearest_cache("m", [*text, 7])
    assert rest == [text[-1], 7] and caches[0].offset == 59


def test_an_exact_hit_leaves_a_token_to_read():
    """mlx-lm's server dies of a request of which nothing is left."""
    model = small_llama()
    for make in (lambda: enable(model), lambda: disable(model)):
        make()
        lru = filed(model, 60)
        caches, rest = lru.fetch_nearest_cache("m", prompt(200)[:60])
        assert rest == prompt(200)[59:60] and caches[0].offset == 59


def test_the_batch_of_a_server_makes_a_checkpoint_at_each_segment():
    """BatchGenerator stops at segments, so that a turn whose reasoning is dropped is found again."""
    model = small_hybrid()
    enable(model, checkpoints=True)
    batch = BatchGenerator(model, max_tokens=6, prefill_step_size=64)
    text = prompt(120)
    batch.insert_segments([[text[:20], text[20:110], text[110:]]])
    while not (found := [r for r in batch.next_generated() if r.finish_reason]):
        pass
    assert found[0].prompt_cache[0].checkpoints == [20, 84, 110, 119]


def test_steps_of_one_token_make_no_checkpoint(hybrid, tokens):
    cache = read(hybrid, tokens[:10], 10)
    list(generate_step(mx.array(tokens[10:11]), hybrid, max_tokens=5, prompt_cache=cache))
    assert cache[0].checkpoints == [10] and nearest_checkpoint(cache, 12) == 10
