"""Maps of keys: that scores stay, that every way through a cache knows them, and what is refused."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from turboquant_mlx import (
    BatchTurboQuantKVCache,
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    apply_patch,
    attention,
    decode,
    encode,
)

HEADS, DIM, TOKENS = 2, 64, 90
CENTRE = mx.random.normal((HEADS, DIM), key=mx.random.key(5))


def normal(shape, seed, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


@pytest.fixture(scope="module")
def key_map():
    return mx.eye(DIM) + 0.05 * normal((HEADS, DIM, DIM), 1)


def filled(key_map, dtype=mx.float32, bits=4, **settings):
    cache = TurboQuantKVCache(bits, centres=(CENTRE, None), key_map=key_map, **settings)
    shape = (1, HEADS, TOKENS, DIM)
    cache.update_and_fetch(normal(shape, 2, dtype), normal(shape, 3, dtype))
    return cache


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("sinks", [None, mx.array([0.5, -1.0, 2.0, 0.0, 1.0, -2.0])])
def test_attention_is_that_of_the_decoded_keys(key_map, dtype, sinks):
    cache, q = filled(key_map, dtype), normal((1, 6, 5, DIM), 4, dtype)
    out = cache.keys_and_values()[0].attend(q, 0.125, "causal", sinks)
    assert out.dtype == dtype
    plain = cache.to_float(mx.float32)
    expected = mx.fast.scaled_dot_product_attention(
        q.astype(mx.float32), plain.keys, plain.values, scale=0.125, mask="causal", sinks=sinks
    )
    error = mx.abs(out.astype(mx.float32) - expected).max().item()
    assert error < {mx.float32: 1e-3, mx.float16: 3e-3, mx.bfloat16: 2e-2}[dtype]


def test_codes_are_those_of_the_mapped_keys(key_map):
    """Against the same in numpy, by the functions that know no map."""
    cache = filled(key_map, recent=0, sink=0)
    keys = normal((1, HEADS, TOKENS, DIM), 2)
    mapped = np.einsum("bhni,hij->bhnj", np.array(keys - CENTRE[:, None]).astype(np.float64), np.array(key_map))
    codes, scales = encode(mx.array(mapped.astype(np.float32)), 4)
    held = cache._core.arrays
    same = np.array(codes == held[0][:, :, :TOKENS]).mean()
    assert same > 0.999  # a number beside a threshold may be rounded to the other side
    q = normal((1, HEADS, 3, DIM), 4)
    inverse = np.linalg.inv(np.array(key_map).astype(np.float64)).swapaxes(1, 2)
    asked = np.einsum("bhni,hij->bhnj", np.array(q).astype(np.float64), inverse).astype(np.float32)
    values = tuple(x[:, :, :TOKENS] for x in held[2:])
    expected = attention(mx.array(asked), (codes, scales), values, scale=0.1, mask="causal", key_bits=4, value_bits=4)
    assert mx.allclose(cache.keys_and_values()[0].attend(q, 0.1, "causal"), expected, atol=1e-3)
    back = np.einsum("bhni,hji->bhnj", np.array(decode(codes, scales, 4)).astype(np.float64), inverse)
    assert np.allclose(cache.to_float(mx.float32).keys[:, :, :TOKENS], back + np.array(CENTRE)[:, None], atol=2e-2)


def test_codes_do_not_depend_on_how_a_prompt_is_cut(key_map):
    whole, cut = filled(key_map), TurboQuantKVCache(4, centres=(CENTRE, None), key_map=key_map)
    shape = (1, HEADS, TOKENS, DIM)
    keys, values = normal(shape, 2), normal(shape, 3)
    for start, stop in ((0, 1), (1, 6), (6, 70), (70, TOKENS)):
        cut.update_and_fetch(keys[:, :, start:stop], values[:, :, start:stop])
    for a, b in zip(whole._core.arrays, cut._core.arrays, strict=True):
        assert mx.array_equal(a[:, :, :TOKENS], b[:, :, :TOKENS])


def test_copies_batches_windows_and_files_keep_it(tmp_path, key_map):
    cache, q = filled(key_map), normal((1, 6, 1, DIM), 4)
    expected = cache.keys_and_values()[0].attend(q, 0.125, None)
    assert mx.array_equal(cache.key_map, key_map) and cache.key_map.dtype == mx.float32

    def same(other):
        return mx.allclose(other.keys_and_values()[0].attend(q, 0.125, None), expected, atol=1e-5)

    assert same(copy.deepcopy(cache))
    batch = BatchTurboQuantKVCache.merge([cache, cache])
    assert same(batch.extract(1))
    window = TurboQuantRotatingKVCache(TOKENS + 1, bits=4, centres=(CENTRE, None), key_map=key_map)
    shape = (1, HEADS, TOKENS, DIM)
    window.update_and_fetch(normal(shape, 2), normal(shape, 3))
    codes = filled(key_map, recent=0, sink=0).keys_and_values()[0].attend(q, 0.125, None)  # a window has no copies
    assert mx.allclose(window.keys_and_values()[0].attend(q, 0.125, None), codes, atol=1e-5)
    apply_patch()
    save_prompt_cache(str(tmp_path / "x.safetensors"), [cache])
    assert same(load_prompt_cache(str(tmp_path / "x.safetensors"))[0])
    with pytest.raises(ValueError, match="must have the same key map"):
        BatchTurboQuantKVCache.merge([cache, filled(None)])


def test_what_is_refused(key_map):
    with pytest.raises(ValueError, match=r"key_map must be an array \(H_kv, D, D\) of float32; got 3"):
        TurboQuantKVCache(key_map=3)
    with pytest.raises(ValueError, match=r"must be float32 of shape .*; got float16"):
        TurboQuantKVCache(key_map=key_map.astype(mx.float16))
    with pytest.raises(ValueError, match="has no inverse"):
        TurboQuantKVCache(key_map=mx.zeros((HEADS, DIM, DIM)))
    cache = TurboQuantKVCache(key_map=key_map)
    with pytest.raises(
        ValueError, match=r"\[transform\] matrix must have shape \(3,64,64\); got \(2,64,64\)|divide the heads"
    ):
        cache.update_and_fetch(normal((1, 3, 4, DIM), 2), normal((1, 3, 4, DIM), 3))
    assert cache.empty()


def test_exact_copies_are_mapped_too(tmp_path, key_map):
    """The newest and first tokens are read from 8-bit copies of the mapped keys, and files keep both."""
    cache, q = filled(key_map, bits=2, recent=16, sink=4), normal((1, 6, 1, DIM), 4)
    out = cache.keys_and_values()[0].attend(q, 0.125, None)
    plain = cache.to_float(mx.float32)
    expected = mx.fast.scaled_dot_product_attention(q, plain.keys, plain.values, scale=0.125)
    assert mx.allclose(out, expected, atol=2e-3)
    keys = normal((1, HEADS, TOKENS, DIM), 2)
    error = mx.square(plain.keys[:, :, :TOKENS] - keys).mean((0, 1, 3))
    assert error[:4].max() < 1e-3 and error[-16:].max() < 1e-3 and error[4:-16].mean() > 1e-2
    apply_patch()
    save_prompt_cache(str(tmp_path / "x.safetensors"), [cache])
    (back,) = load_prompt_cache(str(tmp_path / "x.safetensors"))
    assert mx.array_equal(back.key_map, key_map) and (back.recent, back.sink) == (16, 4)
    assert mx.allclose(back.keys_and_values()[0].attend(q, 0.125, None), out, atol=1e-5)
