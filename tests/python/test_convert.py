"""Float caches made packed ones and back, at once, later or by length."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    ArraysCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from packed_caches import fill, kv, same
from small_models import FAMILIES, greedy, prompt, small_gpt_oss, small_llama
from turboquant_mlx import (
    DelayedTurboQuantKVCache,
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    enable,
    to_turboquant,
)
from turboquant_mlx.commands.report import table

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def everywhere(patched):
    """The patch registers our classes with mlx-lm's load_prompt_cache."""


def test_to_turboquant_and_back():
    plain = KVCache()
    fill(plain, 30, 1)
    packed = to_turboquant(plain, bits=4)
    direct = TurboQuantKVCache(bits=4)
    direct.update_and_fetch(*plain.keys_and_values())
    assert same(packed, direct) and plain.offset == 31
    assert same(to_turboquant(packed.to_float(mx.float32), bits=4), packed) or packed.to_float().offset == 31
    for n in (10, 40):
        window = RotatingKVCache(16, keep=2)
        fill(window, n, 1, 1)
        other = to_turboquant(window)
        assert (other.offset, other.size(), other.keep) == (window.offset, window.size(), 2)
        x = kv(1)
        view, _ = other.update_and_fetch(*x)
        keys, _ = window.update_and_fetch(*x)
        assert view.shape == keys.shape
        error = mx.linalg.norm(view.decode(mx.float32)[0] - keys.astype(mx.float32)) / mx.linalg.norm(keys)
        assert error**2 < 0.04
        assert other.to_float()._idx == window._idx
    assert to_turboquant(KVCache()).empty()
    with pytest.raises(ValueError, match="must be a KVCache or a RotatingKVCache; got ArraysCache"):
        to_turboquant(ArraysCache(2))


def test_a_delayed_cache_packs_itself_at_its_length():
    cache = DelayedTurboQuantKVCache(20, bits=3)
    x, y = kv(20), kv(3)
    keys, _ = cache.update_and_fetch(*x)
    assert isinstance(keys, mx.array) and not cache.packed and cache.nbytes == 256 * 2 * 2 * 64 * 2
    twin = copy.deepcopy(cache)
    assert cache.trim(2) == 2 and cache.offset == 18 and twin.offset == 20
    cache.update_and_fetch(*[a[:, :, 18:] for a in x])
    view, _ = cache.update_and_fetch(*y)
    assert cache.packed and not twin.packed and not hasattr(cache, "merge")
    want = TurboQuantKVCache(bits=3)
    for part in (x, y):
        want.update_and_fetch(*part)
    assert all(mx.array_equal(a, b) for a, b in zip(view.arrays, want._core.view().arrays, strict=True))
    with pytest.raises(ValueError, match="start must be at least 0; got -1"):
        DelayedTurboQuantKVCache(-1)


@pytest.mark.parametrize("dtype, bits", [(mx.float32, 32), (mx.float16, 16), (mx.bfloat16, 16)])
def test_inspect_tells_the_width_of_what_is_held(dtype, bits):
    cache = DelayedTurboQuantKVCache(20, key_bits=4, value_bits=2)
    note = cache.inspect()
    assert (note["key_bits"], note["value_bits"], note["tokens"]) == (None, None, 0)
    assert table([cache]).splitlines()[1].split()[2] == "-"
    cache.update_and_fetch(*kv(20, dtype=dtype))
    assert (cache.inspect()["key_bits"], cache.inspect()["value_bits"]) == (bits, bits)
    assert table([cache]).splitlines()[1].split()[2:4] == [f"K{bits}", f"V{bits}"]
    cache.update_and_fetch(*kv(1, dtype=dtype))
    assert (cache.inspect()["key_bits"], cache.inspect()["value_bits"]) == (4, 2)


def test_a_model_starts_as_float_and_packs_later():
    model = small_llama()
    text = prompt(40)
    plain = greedy(model, text, 8)
    enable(model, start=1000)
    assert greedy(model, text, 8) == plain
    enable(model, start=24)
    cache = make_prompt_cache(model)
    greedy(model, text, 8, cache, prefill_step_size=16)
    assert all(c.packed for c in cache)
    with pytest.raises(ValueError, match="start = 5 needs caches that can be packed later.*layer 0"):
        enable(small_gpt_oss(), start=5)
    with pytest.raises(ValueError, match="start must be at least 0; got -2"):
        enable(model, start=-2)


def test_max_kv_size_is_not_ignored():
    model = FAMILIES["qwen3, head_dim 128"]()
    enable(model)
    cache = mlx_lm_cache.make_prompt_cache(model, 32)
    assert [type(c) for c in cache] == [TurboQuantRotatingKVCache] * 2 and (
        cache[0].max_size,
        cache[0].keep,
    ) == (32, 4)
    greedy(model, prompt(100), 20, cache, prefill_step_size=16)
    assert cache[0].offset == 120 and cache[0].nbytes <= (32 + 16) * 2 * 2 * 130
