"""Latent attention (MLA): the latent is packed once and read as key and as value; the rotary key is packed beside it."""

import copy
import pickle

import mlx.core as mx
import pytest
from decoded import check_logits
from latent_models import FAMILIES, deepseek, indexed
from mlx_lm.generate import generate_step
from mlx_lm.models import deepseek_v2
from mlx_lm.models.cache import KVCache, make_prompt_cache, trim_prompt_cache
from small_models import batched, greedy, prompt, small_llama
from turboquant_mlx import (
    BatchTurboQuantLatentKVCache,
    TurboQuantKVCache,
    TurboQuantLatentKVCache,
    enable,
    load_prompt_cache,
    save_prompt_cache,
)
from turboquant_mlx.caches import leaves
from turboquant_mlx.calibration import calibrate


def chunks(read=40, single=8):
    tokens = prompt(read + single)
    return [tokens[:read], *([token] for token in tokens[read:])]


def latents(tokens, latent=512, rotary=64, batch=1):
    return [mx.random.normal((batch, 1, tokens, width)).astype(mx.float16) for width in (latent, rotary)]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_the_logits_of_their_codes(family):
    model = FAMILIES[family]()
    done = enable(model, strict=True)
    kinds = {type(c) for _, c in leaves(make_prompt_cache(model)) if hasattr(c, "bits")}
    assert kinds == {TurboQuantLatentKVCache} and done == sum(hasattr(c, "bits") for _, c in leaves(model.make_cache()))
    cache = make_prompt_cache(model)
    check_logits(model, chunks(), cache)
    routes = {c.inspect()["kernel"].split()[0] for _, c in leaves(cache) if hasattr(c, "bits")}
    assert routes == {"cpu"}  # the codes were read, nothing was decoded but the rotary keys


def test_chosen_tokens_are_decoded():
    """DeepSeek V3.2's index chooses tokens: what it chooses of is decoded; its own keys stay as they are."""
    model = indexed()
    done = enable(model)
    assert list(done.packed) == [(0, 0), (1, 0)] and list(done.kept) == [(0, 1), (1, 1)]
    assert all("does not go through" in why for why in done.kept.values())
    cache = make_prompt_cache(model)
    check_logits(model, chunks(), cache)
    assert cache[0][0].inspect()["kernel"] == "mlx (decoded)"
    cache = make_prompt_cache(model)
    check_logits(model, chunks(10, 3), cache)  # no more tokens than it chooses
    assert cache[0][0].inspect()["kernel"].startswith("cpu")


def test_bytes():
    """DeepSeek's shape takes a fifth; one set of codes has the larger width of the two sides."""
    cache = TurboQuantLatentKVCache()
    cache.update_and_fetch(*latents(1024))
    note = cache.inspect()
    assert note["resident_bytes"] == 1024 * (512 * 3 // 8 + 2 + 64 * 4 // 8 + 2)
    assert note["float16_bytes"] == 1024 * 1152 > 5 * note["resident_bytes"]
    model = deepseek()
    enable(model, key_bits=4, value_bits=3)
    made = make_prompt_cache(model)[0]
    assert (made.key_bits, made.value_bits) == (4, 4)
    enable(model, bits=8)
    made = make_prompt_cache(model)[0]
    assert (made.key_bits, made.value_bits) == (8, 8)


def test_rows_of_a_batch_are_as_alone():
    model = deepseek()
    enable(model, bits=8)
    texts = [prompt(n, seed=n) for n in (9, 20, 14)]
    assert batched(model, texts, 6) == [greedy(model, text, 6) for text in texts]


def test_merged_rows_hold_what_was_merged():
    one, two = TurboQuantLatentKVCache(), TurboQuantLatentKVCache()
    one.update_and_fetch(*latents(5))
    two.update_and_fetch(*latents(9))
    batch = TurboQuantLatentKVCache.merge([one, two])
    assert type(batch) is BatchTurboQuantLatentKVCache and batch.left_padding.tolist() == [4, 0]
    handed = batch.update_and_fetch(*latents(1, batch=2))
    assert [x.shape for x in handed] == [(2, 1, 10, 512), (2, 1, 10, 64)]
    row = batch.extract(0)
    assert type(row) is TurboQuantLatentKVCache
    for held, merged in zip(one.keys_and_values(), row.keys_and_values(), strict=True):
        assert mx.array_equal(held, merged[:, :, :5])
    other = TurboQuantKVCache()
    other.update_and_fetch(*latents(5, 512, 512))
    with pytest.raises(ValueError, match="merge"):
        TurboQuantLatentKVCache.merge([one, other])


def test_trimmed_saved_and_reloaded(tmp_path):
    model = deepseek()
    enable(model)
    tokens, cache = prompt(20), make_prompt_cache(model)
    for _ in generate_step(mx.array(tokens), model, max_tokens=1, prompt_cache=cache):
        pass
    trim_prompt_cache(cache, cache[0].offset - 15)
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, cache)
    twins = load_prompt_cache(file, model), pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)
    want = greedy(model, tokens[15:], 8, cache)
    for twin in twins:
        assert [type(c) for c in twin] == [TurboQuantLatentKVCache] * 2
        assert greedy(model, tokens[15:], 8, twin) == want
    floats = twins[0][0].to_float()
    assert type(floats) is KVCache and floats.offset == twins[0][0].offset


def test_nothing_of_a_step_is_left():
    """What was handed out is forgotten with it: appending goes on in place."""
    cache = TurboQuantLatentKVCache()
    handed = cache.update_and_fetch(*latents(4))
    mx.eval(handed)
    before = cache.keys
    del handed
    from turboquant_mlx.caches import latent

    assert not latent._known and before is not None


def test_centres_of_latents_are_their_means():
    """RoPE does not turn a latent, wherever in the context it stands; of an expanded key it turns the last coordinates."""
    model, text = deepseek(), prompt(40)
    near, far = (calibrate(model, text, positions=positions) for positions in (0, 1000))
    assert mx.allclose(near[0].key_centre, far[0].key_centre, atol=1e-6)
    assert enable(model, calibration=far) == 2
    held = make_prompt_cache(model)[0].centres[0]
    assert mx.array_equal(held, far[0].key_centre)
    expanded = deepseek(deepseek_v2, rope_scaling={"type": "yarn", "factor": 1.0, "mscale_all_dim": 0})
    near, far = (calibrate(expanded, text, positions=positions) for positions in (0, 1000))
    assert mx.allclose(near[0].key_centre[:, :64], far[0].key_centre[:, :64], atol=1e-6)
    assert not mx.allclose(near[0].key_centre[:, 64:], far[0].key_centre[:, 64:], atol=1e-6)


def test_a_bound_on_tokens_is_refused():
    """Windows would drop tokens, which latent caches cannot: max_kv_size must not be forgotten."""
    model = deepseek()
    enable(model, calibration={})
    with pytest.raises(ValueError, match=r"\[make_cache\] max_kv_size = 64 needs caches that drop tokens"):
        make_prompt_cache(model, 64)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[TurboQuantLatentKVCache\] latent caches take no recent; got 16"):
        TurboQuantLatentKVCache(recent=16)
    cache = TurboQuantLatentKVCache()
    with pytest.raises(ValueError, match="head_dim must be a multiple of 32 from 32 to 512; got 80"):
        cache.update_and_fetch(*latents(4, 80))
    assert cache.empty()
    with pytest.raises(ValueError, match=r"start = 64 needs caches that can be packed later"):
        enable(deepseek(), start=64)
    llama = small_llama(num_key_value_heads=1)
    assert enable(llama, strict=True) == 2  # one head that is shared is no latent
    assert type(make_prompt_cache(llama)[0]) is TurboQuantKVCache
