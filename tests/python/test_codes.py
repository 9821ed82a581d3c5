"""Caches of every kind of codes: trellis and scalar, 2 to 8 bits, mixed widths."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache
from turboquant_mlx import (
    BatchTurboQuantKVCache,
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    attention,
    decode,
    encode,
    load_prompt_cache,
    save_prompt_cache,
    to_turboquant,
)
from turboquant_mlx.caches.identity import Identity


def relative_error(got, want):
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()


def same_codes(a, b):
    return all(mx.array_equal(x, y) for x, y in zip(a._core.view().arrays, b._core.view().arrays, strict=True))


KINDS = [(2, 2, "trellis"), (3, 3, "trellis"), (8, 8, None), (8, 3, "trellis"), (3, 4, "trellis"), (8, 4, "scalar")]


@pytest.fixture(params=KINDS, ids=lambda kind: f"K{kind[0]}V{kind[1]}{kind[2]}")
def settings(request):
    key_bits, value_bits, code = request.param
    return {"key_bits": key_bits, "value_bits": value_bits, "code": code}


def vectors(tokens=40, heads=2, dim=64, key=0):
    return mx.random.normal((1, heads, tokens, dim), key=mx.random.key(key))


def filled(settings, tokens=40, key=0, **more):
    cache = TurboQuantKVCache(**settings, **more)
    cache.update_and_fetch(vectors(tokens, key=key), vectors(tokens, key=key + 1))
    return cache


def test_attention_reads_what_decoding_gives(settings):
    cache = filled(settings)
    view = cache._core.view()
    q = vectors(3, heads=4, key=7)
    got = view.attend(q, 0.2, "causal")
    floats = cache.to_float(mx.float32)
    want = mx.fast.scaled_dot_product_attention(q, *floats.keys_and_values(), scale=0.2, mask="causal")
    assert relative_error(got, want) < 5e-4
    stored = {"trellis": {2: 0.0875, 3: 0.0240}, "scalar": {4: 0.0097}}.get(cache.code, {})
    for x, y, bits in ((vectors(), floats.keys, cache.key_bits), (vectors(key=1), floats.values, cache.value_bits)):
        bound = 1e-4 if bits == 8 else stored.get(bits, 0.0097)
        assert relative_error(y, x) ** 2 < 1.05 * bound


def test_copies_trims_batches_and_windows_keep_the_codes(settings):
    cache = filled(settings)
    other = copy.deepcopy(cache)
    other.trim(15)
    again, values = vectors(), vectors(key=1)
    other.update_and_fetch(again[:, :, 25:], values[:, :, 25:])  # a prompt's codes do not depend on how it was cut
    row = BatchTurboQuantKVCache.merge([filled(settings, 30, key=3), other]).extract(1)
    for copied in (other, row):
        assert copied.code == cache.code
        assert same_codes(copied, cache)
    window = TurboQuantRotatingKVCache(64, **settings)
    window.update_and_fetch(again, values)
    assert same_codes(window, cache)


def test_saved_files_name_the_code(settings, tmp_path):
    cache = filled(settings)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [cache])
    (loaded,) = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert (loaded.key_bits, loaded.value_bits, loaded.code) == (cache.key_bits, cache.value_bits, cache.code)
    assert same_codes(loaded, cache)
    assert loaded.inspect()["code"] == cache.code


def test_a_float_cache_becomes_any_kind(settings):
    floats = KVCache()
    floats.update_and_fetch(vectors(), vectors(key=1))
    packed = to_turboquant(floats, **settings)
    assert same_codes(packed, filled(settings))


def test_a_file_of_format_1_holds_scalar_codes():
    cache = filled({"bits": 3, "code": "scalar"})
    *arrays, identity = cache.state
    old = {name: value for name, value in identity.fields.items() if name != "code"} | {"format": 1}
    loaded = TurboQuantKVCache.from_state((*arrays, str(Identity(old, arrays))))
    assert loaded.code == "scalar"
    assert same_codes(loaded, cache)


def test_caches_of_other_codes_do_not_mix():
    caches = [filled({"bits": 3, "code": code}) for code in ("scalar", "trellis")]
    with pytest.raises(ValueError, match="must have the same codes; got scalar and trellis"):
        BatchTurboQuantKVCache.merge(caches)
    same = [filled({"bits": 4, "code": code}) for code in ("scalar", "trellis")]  # which have no trellis
    assert [c.code for c in same] == ["scalar", "scalar"]
    BatchTurboQuantKVCache.merge(same)


@pytest.mark.parametrize("code", ["lattice", 3, b"trellis"])
def test_an_unknown_code_is_refused(code):
    x = vectors()
    for call in (
        lambda: encode(x, code=code),
        lambda: decode(*encode(x), code=code),
        lambda: attention(x, encode(x), encode(x), scale=1, code=code),
        lambda: TurboQuantKVCache(code=code),
    ):
        with pytest.raises(ValueError, match="code must be None, 'scalar' or 'trellis'; got"):
            call()


def test_feedback_in_trellis_codes():
    x = vectors(200, heads=1)
    g = mx.tril(mx.full((64, 64), 0.02), -1).astype(mx.float16)[None]
    plain, fed = (encode(x, 3, feedback=f, code="trellis") for f in (None, g))
    assert not mx.array_equal(plain[0], fed[0])
    assert relative_error(decode(*fed, 3, code="trellis"), x) ** 2 < 0.03


@pytest.mark.parametrize("code", [("trellis", "scalar"), ("scalar", "trellis")])
def test_each_side_may_have_codes_of_its_own(code, tmp_path):
    cache = TurboQuantKVCache(3, code=code, recent=0, sink=0)
    keys, values = vectors(key=1), vectors(key=2)
    view, _ = cache.update_and_fetch(keys, values)
    assert cache.code == code and cache.inspect()["code"] == code
    decoded = [decode(*encode(x, 3, code=name), 3, code=name) for x, name in zip((keys, values), code, strict=True)]
    for held, want in zip(view.decode(mx.float32), decoded, strict=True):
        assert mx.array_equal(held, want)
    q = vectors(1, heads=4, key=3)
    want = mx.fast.scaled_dot_product_attention(q.astype(mx.float32), *decoded, scale=0.1)
    assert relative_error(view.attend(q, 0.1), want) < 1e-3
    packed = [encode(x, 3, code=name) for x, name in zip((keys, values), code, strict=True)]
    assert mx.array_equal(attention(q, *packed, scale=0.1, code=code), view.attend(q, 0.1))
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [cache])
    (again,) = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert again.code == code and same_codes(again, cache)
    assert TurboQuantKVCache(3, code=("trellis", "trellis")).code == "trellis"
    assert TurboQuantKVCache(key_bits=4, value_bits=3, code=("trellis", "scalar")).code == "scalar"
    with pytest.raises(ValueError, match="code must be None, 'scalar' or 'trellis'"):
        TurboQuantKVCache(3, code=(*code, "scalar"))
