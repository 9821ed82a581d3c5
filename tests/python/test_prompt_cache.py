"""The cases of mlx-lm's prompt-cache tests with packed caches in the places of its own, and its server's LRU cache.

Merging, extending, filtering, padding and rotating beside mlx-lm's own caches are in test_protocol.py, saving and
loading in test_saving.py."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models.base import create_attention_mask, create_causal_mask
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    LRUPromptCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from small_models import greedy, prompt, small_llama
from turboquant_mlx import (
    BatchTurboQuantKVCache,
    BatchTurboQuantRotatingKVCache,
    DelayedTurboQuantKVCache,
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    apply_patch,
    disable,
    enable,
    remove_patch,
)


def fill(cache, *chunks, batch=1):
    for n in chunks:
        x = mx.random.uniform(shape=(batch, 2, n, 32))
        view, _ = cache.update_and_fetch(x, x)
    return view if chunks else None


def test_trimming_a_prompt_cache():
    cache = [TurboQuantKVCache() for _ in range(2)]
    assert trim_prompt_cache(cache, 7) == 0  # nothing to trim yet
    for c in cache:
        fill(c, 10)
    assert can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, 7) == 7 and all(c.offset == 3 for c in cache)
    assert trim_prompt_cache(cache, 4) == 3 and all(c.size() == 0 for c in cache)
    assert not can_trim_prompt_cache([*cache, ArraysCache(2)])
    assert trim_prompt_cache([*cache, ArraysCache(2)], 1) == 0

    window = [TurboQuantRotatingKVCache(max_size=6) for _ in range(2)]
    for c in window:
        fill(c, 5)
    assert trim_prompt_cache(window, 4) == 4 and window[0].offset == 1
    for c in window:
        fill(c, 5, 1)
    assert not can_trim_prompt_cache(window) and trim_prompt_cache(window, 4) == 0

    mixed = [TurboQuantKVCache(), KVCache(), RotatingKVCache(max_size=8)]
    for c in mixed:
        fill(c, 5)
    assert trim_prompt_cache(mixed, 2) == 2 and [c.offset for c in mixed] == [3, 3, 3]


def test_a_copy_goes_its_own_way():
    for cache in (TurboQuantKVCache(), TurboQuantRotatingKVCache(8), DelayedTurboQuantKVCache(100)):
        fill(cache, 10)
        for duplicate in (copy.copy, copy.deepcopy):
            now, old = cache.offset, duplicate(cache)
            before = old.state
            fill(cache, 1)
            assert type(old) is type(cache) and (cache.offset, old.offset) == (now + 1, now)
            assert str(old.state[-1]) == str(before[-1]) != str(cache.state[-1])


def test_a_list_of_caches_trims_and_counts_as_one():
    cache = CacheList(TurboQuantKVCache(), KVCache())
    for c in cache.caches:
        fill(c, 5)
    assert cache.is_trimmable() and cache.trim(2) == 2 and cache.size() == 3
    assert cache.nbytes == cache[0].nbytes + cache[1].nbytes
    assert not CacheList(TurboQuantKVCache(), ArraysCache(2)).is_trimmable()
    merged = CacheList.merge([CacheList(TurboQuantKVCache()), CacheList(TurboQuantKVCache())])
    assert type(merged[0]) is BatchTurboQuantKVCache
    fill(merged[0], 4, batch=2)
    assert type(merged.extract(1)[0]) is TurboQuantKVCache and merged.extract(1).size() == 4
    window = CacheList(TurboQuantKVCache(), TurboQuantRotatingKVCache(8))
    for c in window.caches:
        fill(c, 10)
    assert not window.is_trimmable()


def test_masks_with_a_cache():
    cache = TurboQuantKVCache()
    h = mx.zeros((1, 4, 8))
    assert create_attention_mask(h, cache) == "causal" and create_attention_mask(h[:, :1], cache) is None
    assert mx.array_equal(create_attention_mask(h, cache, return_array=True), create_causal_mask(4))
    fill(cache, 16)
    assert create_attention_mask(h, cache, return_array=True).shape == (4, 20)
    assert mx.array_equal(
        create_attention_mask(h[:, :1], cache, window_size=4), create_causal_mask(1, offset=16, window_size=4)
    )


def test_masks_of_a_window():
    cache = TurboQuantRotatingKVCache(max_size=8)
    h = mx.zeros((1, 10, 8))
    assert create_attention_mask(h[:, :4], cache, window_size=5) == "causal"
    assert create_attention_mask(h[:, :4], cache, window_size=5, return_array=True).shape == (4, 4)
    assert create_attention_mask(h[:, :6], cache, window_size=5).sum(axis=-1).max() == 5
    assert create_attention_mask(h[:, :1], cache, window_size=5) is None
    fill(cache, 10)
    mask = cache.make_mask(3, window_size=5)
    assert mask.shape == (3, 10) and mx.all(mask.sum(axis=-1) == 5)
    assert cache.make_mask(1) is None
    # The ring of 8 after 10 tokens: the next one goes to place 0 and sees itself and the four before it.
    assert cache.make_mask(1, window_size=5).tolist() == [True, False, False, False, True, True, True, True]
    fill(cache, 1)
    assert cache.make_mask(1, window_size=5).tolist() == [True, True, False, False, False, True, True, True]


def test_shapes_of_batches():
    cache = BatchTurboQuantKVCache([2, 3, 4])
    assert fill(cache, 4, batch=3).shape == (3, 2, 4, 32)
    cache.filter([0, 1])  # two pads are common to both and go
    assert cache._core.view().shape == (2, 2, 2, 32) and cache.left_padding.tolist() == [0, 1]
    mask = cache.make_mask(1, return_array=True)
    assert mask.squeeze().tolist() == [[True, True, True], [False, True, True]]
    a, b = BatchTurboQuantKVCache([2, 1, 2]), BatchTurboQuantKVCache([3, 0])
    fill(a, 8, batch=3), fill(b, 4, batch=2)
    a.extend(b)
    assert a.offset.tolist() == [6, 7, 6, 1, 4] and a.left_padding.tolist() == [2, 1, 2, 7, 4]

    window = BatchTurboQuantRotatingKVCache(max_size=4, left_padding=[2, 0])
    assert window.make_mask(4)[:, 0, 0].tolist() == [[False] * 4, [True, False, False, False]]
    fill(window, 4, batch=2)
    mask = window.make_mask(4)
    assert mask[0, 0, 0].tolist() == [False, True, True, True, False, False, False]
    assert fill(window, 4, batch=2).shape[2] == mask.shape[-1] == 7
    window = BatchTurboQuantRotatingKVCache(max_size=8, left_padding=[4])
    fill(window, 8)
    assert window.make_mask(1).squeeze().tolist() == [True, False, False, False, True, True, True, True]
    fill(window, 1)
    seen = [[False, False, False, True, True, True, True, True, last] for last in (False, True)]
    assert window.make_mask(2).squeeze().tolist() == seen


@pytest.fixture
def model():
    model = small_llama()
    enable(model, bits=3)
    return model


def filled(model, tokens):
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array(tokens)[None], cache=cache))
    return cache


def test_the_servers_cache_serves_prefixes_and_counts_packed_bytes(model):
    text, question = prompt(60), prompt(10, seed=9)
    want = greedy(model, text + question, 12)
    store = LRUPromptCache(max_size=3)
    store.insert_cache("m", text, filled(model, text))
    # Layers, heads, keys and values; tokens in steps of 256 and exact copies; bytes of a vector.
    assert store.nbytes == 2 * 2 * 2 * (256 * 26 + (64 + 4) * 66)

    cache, rest = store.fetch_nearest_cache("m", text + question)  # a shorter entry is a prefix
    assert rest == question and greedy(model, rest, 12, cache) == want
    cache, rest = store.fetch_nearest_cache("m", text + question)  # using a copy left the entry alone
    assert rest == question and greedy(model, rest, 12, cache) == want

    longer = text + prompt(30, seed=10)  # a longer entry is trimmed back to what is shared
    store.insert_cache("m", longer, filled(model, longer))
    assert len(store) == 1  # the prefix went: a trimmable entry contains it
    cache, rest = store.fetch_nearest_cache("m", text + question)
    assert rest == question and cache[0].offset == 60 and greedy(model, rest, 12, cache) == want
    cache, rest = store.fetch_nearest_cache("m", longer)
    assert rest == longer[-1:] and cache[0].offset == 89  # a token is left to read

    each = 2 * 2 * 2 * (256 * 26 + (32 + 4) * 66)
    for seed in range(20, 25):
        store.insert_cache("m", prompt(30, seed=seed), filled(model, prompt(30, seed=seed)))
    assert len(store) == 3 and store.nbytes == 3 * each
    store.trim_to(n_bytes=2 * each)
    assert len(store) == 2 and store.nbytes == 2 * each


def test_a_limit_in_bytes_holds_four_times_the_prompts(model):
    """A server's byte limit sees packed sizes: what one prompt fills as float16 holds four packed."""
    enable(model, bits=3, recent=0, sink=0)  # exact copies, 388 x 66 bytes a head and side, come on top
    limit = 2 * 512 * 2 * 2 * 64 * 2  # 512 tokens of two layers as float16
    store = LRUPromptCache(max_size=100, max_bytes=limit)
    for seed in range(8):
        store.insert_cache("m", prompt(500, seed=seed), filled(model, prompt(500, seed=seed)))
    assert len(store) == 4 and store.nbytes <= limit  # head_dim 64: 128 bytes become 26, so 4.9


@pytest.mark.parametrize("start", [{}, {"quantized_kv_start": 0}, {"quantized_kv_start": 100000}])
def test_mlx_lms_own_quantisation_is_refused_not_ignored(model, start):
    """With the first tokens, whatever the length from which mlx-lm would quantise (5,000 unless told)."""
    refusal = "TurboQuantKVCache packs its keys and values itself; leave kv_bits out"
    with pytest.raises(ValueError, match=refusal):
        greedy(model, prompt(5), 3, kv_bits=4, **start)
    with pytest.raises(ValueError, match=refusal):
        caches = make_prompt_cache(model) + make_prompt_cache(model)
        next(speculative_generate_step(mx.array(prompt(5)), model, model, prompt_cache=caches, kv_bits=4, **start))
    enable(model, start=1000)
    with pytest.raises(ValueError, match=f"Delayed{refusal}"):
        greedy(model, prompt(5), 3, kv_bits=4, **start)
    disable(model)
    for patch in (remove_patch, apply_patch):  # mlx-lm's own caches still take it
        patch()
        assert len(greedy(model, prompt(5), 3, kv_bits=4, **start)) == 3


def test_a_packed_prompt_peaks_below_a_float16_one():
    """Chunked prefill of one model with float16 and with packed caches: the packed peak is lower by most of
    what the packed cache is smaller."""
    model = small_llama(head_dim=128, num_hidden_layers=4)
    model.set_dtype(mx.float16)
    text, peaks, resident = prompt(1024), {}, {}
    for name in ("float16", "packed"):
        if name == "packed":
            enable(model, bits=3)
        cache = make_prompt_cache(model)
        mx.clear_cache()
        start = mx.get_active_memory()
        mx.reset_peak_memory()
        for at in range(0, len(text), 128):
            model(mx.array(text[at : at + 128])[None], cache=cache)
            mx.eval([c.state for c in cache])
        peaks[name] = mx.get_peak_memory() - start
        resident[name] = sum(c.nbytes for c in cache)
        del cache
    copies = 4 * 2 * 2 * 388 * 130  # layers, heads, keys and values, exact copies, bytes of each
    assert (resident["packed"] - copies) * 512 == resident["float16"] * 100  # 256 bytes become 50
    assert peaks["packed"] < peaks["float16"] - 0.7 * (resident["float16"] - resident["packed"])
