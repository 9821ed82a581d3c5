"""Saved caches: they come back the same through mlx-lm's own functions, and nothing but the same comes back."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    CacheList,
    KVCache,
    make_prompt_cache,
    trim_prompt_cache,
)
from needles import ANSWER, read_page
from packed_caches import CENTRES, FEEDBACK, fill, kv, same, trimmed
from small_models import greedy, prompt, small_gpt_oss, small_llama, sure
from turboquant_mlx import (
    BatchTurboQuantKVCache,
    BatchTurboQuantRotatingKVCache,
    DelayedTurboQuantKVCache,
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    disable,
    enable,
    load_prompt_cache,
)
from turboquant_mlx.caches import older
from turboquant_mlx.caches.identity import Identity
from turboquant_mlx.overlay.saving import check_fits

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def everywhere(patched):
    """The patch registers our classes with mlx-lm's load_prompt_cache."""


CASES = {
    "full": lambda: fill(TurboQuantKVCache(), 300, 1),
    "empty": lambda: TurboQuantKVCache(bits=4, seed=2**63 + 5),
    "trimmed": lambda: trimmed(fill(TurboQuantKVCache(bits=2), 40), 13),
    "mixed widths, centred": lambda: fill(TurboQuantKVCache(key_bits=4, value_bits=2, seed=9, centres=CENTRES), 17),
    "centred, with feedback": lambda: fill(TurboQuantKVCache(centres=CENTRES, feedback=FEEDBACK), 17, 1),
    "feedback of the keys alone": lambda: fill(TurboQuantKVCache(feedback=(FEEDBACK[0], None)), 9),
    "window": lambda: fill(TurboQuantRotatingKVCache(16, keep=4), 10, 1, 30, 1, 1),
    "window with feedback": lambda: fill(TurboQuantRotatingKVCache(16, feedback=FEEDBACK), 10, 1, 30, 1, 1),
    "batch": lambda: fill(BatchTurboQuantKVCache([1, 0, 4]), 9, 1, batch=3),
    "batch with feedback": lambda: fill(BatchTurboQuantKVCache([1, 0, 4], feedback=FEEDBACK), 9, 1, batch=3),
    "batch of windows": lambda: fill(BatchTurboQuantRotatingKVCache(8, [1, 0]), 7, 1, 1, 1, batch=2),
    "not packed yet": lambda: fill(DelayedTurboQuantKVCache(100, bits=4), 20),
    "not packed yet, with feedback": lambda: fill(DelayedTurboQuantKVCache(20, feedback=FEEDBACK), 20),
    "packed by now": lambda: fill(DelayedTurboQuantKVCache(10, bits=4), 9, 20),
    "list": lambda: CacheList(fill(TurboQuantKVCache(), 5), fill(KVCache(), 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_cache_comes_back(case, tmp_path):
    cache = CASES[case]()
    file = str(tmp_path / "cache.safetensors")
    mlx_lm_cache.save_prompt_cache(file, [cache], {"note": "kept"})
    (back,), metadata = mlx_lm_cache.load_prompt_cache(file, return_metadata=True)
    assert metadata == {"note": "kept"} and same(cache, back)
    if isinstance(cache, CacheList):
        return
    batch = len(cache.left_padding) if hasattr(cache, "left_padding") else 1
    for n in (1, 5, 1):
        x = kv(n, batch)
        for c in (cache, back):
            c.update_and_fetch(*x)
    assert same(cache, back)


def test_a_state_can_be_set_and_evaluated():
    for make in CASES.values():
        cache = make()
        mx.eval(cache.state)
        other = older.from_state(type(cache), older.whole_state(cache))
        assert same(cache, other)
        cache.state = other.state
        assert same(cache, other)


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("empty", "list")])
@pytest.mark.parametrize("damage", ["position", "key_bits", "arrays"])
def test_a_bad_state_changes_nothing(case, damage):
    cache = CASES[case]()
    if damage == "key_bits" and case.startswith("not packed yet"):
        damage = "position"  # floats have no width
    *arrays, identity = cache.state
    fields = dict(identity.fields, model="another model")
    if damage == "position":  # a right checksum over numbers that do not fit the arrays
        fields["position"] = {
            key: [0] * 9 if isinstance(value, list) else None for key, value in fields["position"].items()
        }
    elif damage == "key_bits":
        fields["key_bits"] = 4 if fields["key_bits"] == 3 else 3  # the codes have another length
    else:
        arrays = arrays[:-1]
    before, codes = str(cache.state[-1]), cache._core
    with pytest.raises((ValueError, TypeError, KeyError)):
        cache.state = (*arrays, Identity(fields, arrays))
    assert cache._core is codes and str(cache.state[-1]) == before and cache.fingerprint == ""
    if not case.startswith("batch"):
        fill(cache, 1)


def rewritten(cache, **changes):
    """The state of a cache with other fields and a checksum that fits them."""
    from turboquant_mlx.caches.identity import Identity

    *arrays, identity = cache.state
    return (*arrays, str(Identity(identity.fields | changes, arrays)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 3}, "saved in format 3; this build reads 1 and 2"),
        ({"kind": "KVCache"}, "kind of the saved cache is KVCache; expected TurboQuantKVCache"),
        ({"codebook": "uniform"}, "codebook of the saved cache is uniform"),
        ({"key_bits": 4}, "keys of 4 bits must have"),
        ({"position": {"offset": 7}}, "length must be from 0 to the 5 tokens held; got 7"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(changes, message):
    cache = fill(TurboQuantKVCache(), 5)
    with pytest.raises(ValueError, match=message):
        TurboQuantKVCache.from_state(rewritten(cache, **changes))


@pytest.mark.parametrize("state", [None, (), (1, 2, 3), (None,) * 6 + ("{}",), (None, None, 0)])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="this is not the state of a TurboQuantKVCache"):
        TurboQuantKVCache.from_state(state)


def test_a_file_must_fit_the_model_and_the_settings(tmp_path):
    file = tmp_path / "cache.safetensors"
    model, other = small_llama(), small_llama(seed=1)
    text = prompt(30)
    plain = make_prompt_cache(model)
    model(mx.array(text)[None], cache=plain)
    mlx_lm_cache.save_prompt_cache(str(tmp_path / "plain.safetensors"), plain)

    enable(model, bits=3)
    cache = make_prompt_cache(model)
    model(mx.array(text)[None], cache=cache)
    mlx_lm_cache.save_prompt_cache(str(file), cache)
    back = load_prompt_cache(file, model)
    assert greedy(model, [5], 10, back) == greedy(model, [5], 10, copy.deepcopy(cache))

    with pytest.raises(
        ValueError, match="layer 0 holds a KVCache .not packed.; asked for was a TurboQuantKVCache of 3-bit"
    ):
        load_prompt_cache(tmp_path / "plain.safetensors", model)
    for settings, message in (
        (
            {"bits": 4},
            "layer 1 holds a TurboQuantKVCache of 3-bit keys .* asked for was a TurboQuantKVCache of 4-bit",
        ),
        ({"seed": 3}, "layer 0 was saved with seed 0; asked for was 3"),
        ({"calibration": {0: CENTRES}}, "layer 0 was saved with other centres of the keys"),
        ({"calibration": {1: (None, None, *FEEDBACK)}}, "layer 1 was saved with other feedback of the keys"),
    ):
        enable(model, **settings)
        with pytest.raises(ValueError, match=message):
            load_prompt_cache(file, model)
    disable(model)
    with pytest.raises(ValueError, match="asked for was a KVCache .not packed."):
        load_prompt_cache(file, model)
    enable(other, bits=3)
    with pytest.raises(ValueError, match="layer 0 was made by another model"):
        load_prompt_cache(file, other)
    deeper = small_llama(num_hidden_layers=3)
    enable(deeper)
    with pytest.raises(ValueError, match="has 2 slots; the model has 3"):
        load_prompt_cache(file, deeper)


def test_weights_cast_to_float32_are_the_same_model():
    model = small_llama()
    model.set_dtype(mx.bfloat16)
    enable(model)
    cache = make_prompt_cache(model)
    model.set_dtype(mx.float32)
    enable(model)
    check_fits(cache, model)


@pytest.mark.parametrize("make", [small_llama, small_gpt_oss])
def test_generation_goes_on_from_a_file_and_after_a_trim(make, tmp_path):
    """Saving and loading, trimming and going on: the tokens of the path that did neither."""
    model = make()
    enable(model)
    text = prompt(30)
    want = greedy(model, text, 20)
    cache = make_prompt_cache(model)
    model(mx.array(text[:-1])[None], cache=cache)
    file = str(tmp_path / "cache.safetensors")
    mlx_lm_cache.save_prompt_cache(file, cache)
    assert greedy(model, text[-1:], 20, mlx_lm_cache.load_prompt_cache(file)) == want
    if make is small_llama:  # a window that has wrapped cannot go back
        model(mx.array(prompt(25, seed=8))[None], cache=cache)
        assert trim_prompt_cache(cache, 25) == 25
        assert greedy(model, text[-1:], 20, cache) == want


def test_a_needle_of_4k_tokens_survives_saving_and_trimming(bundled, tmp_path):
    """The hybrid model's caches from a file; its recurrent layers cannot go back, so the packed slots are trimmed and
    the recurrent state is that of a copy."""
    model, tokenizer = bundled
    tokens, cache = read_page(model, tokenizer)
    enable(model, bits=3)
    try:
        want = sure(model, tokens[-1:], 16, copy.deepcopy(cache))
        assert ANSWER in tokenizer.decode(want)
        file = tmp_path / "cache.safetensors"
        mlx_lm_cache.save_prompt_cache(str(file), cache)
        assert sure(model, tokens[-1:], 16, load_prompt_cache(file, model)) == want
        assert not mlx_lm_cache.can_trim_prompt_cache(cache)

        branch = copy.deepcopy(cache)
        model(mx.array(tokens[:700])[None], cache=branch)
        for i, c in enumerate(branch):
            if isinstance(c, TurboQuantKVCache):
                assert c.trim(700) == 700
            else:
                branch[i] = copy.deepcopy(cache[i])
        assert sure(model, tokens[-1:], 16, branch) == want
    finally:
        disable(model)
