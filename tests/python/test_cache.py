"""The cache of one layer: growth, trimming, memory, and that failure changes nothing."""

import copy
import inspect

import mlx.core as mx
import pytest
from conftest import relative_error
from mlx_lm.models import base
from turboquant_mlx import (
    BatchTurboQuantKVCache,
    BatchTurboQuantRotatingKVCache,
    DelayedTurboQuantKVCache,
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    _core,
)

pytestmark = pytest.mark.quick
COPIES = (384 + 4) * 4 * 2 * 258  # bytes of the newest and the first tokens at 8 bits, of the vectors below


def kv(tokens, batch=1, heads=4, dim=256, dtype=mx.float16):
    return [mx.random.normal((batch, heads, tokens, dim)).astype(dtype) for _ in range(2)]


def held(cache):
    return cache._core.view().arrays


def same(a, b):
    return all(mx.array_equal(x, y) for x, y in zip(held(a), held(b), strict=True))


def test_three_bits_take_98_bytes_a_vector():
    cache = TurboQuantKVCache(bits=3, recent=0, sink=0)
    cache.update_and_fetch(*kv(512))
    assert cache.nbytes == 512 * 4 * 2 * 98
    assert TurboQuantKVCache(bits=4).nbytes == 0
    mixed = TurboQuantKVCache(key_bits=4, value_bits=2)
    mixed.update_and_fetch(*kv(256))
    assert mixed.nbytes == 256 * 4 * (130 + 66) + (256 + 4) * 4 * 2 * 258  # as yet the ring holds all


def test_any_chunking_gives_the_same_bytes():
    k, v = kv(700)
    whole, parts = TurboQuantKVCache(), TurboQuantKVCache()
    whole.update_and_fetch(k, v)
    at = 0
    for n in (1, 255, 1, 300, 2, 100, 41):
        parts.update_and_fetch(k[:, :, at : at + n], v[:, :, at : at + n])
        at += n
    assert at == 700 == parts.offset and same(whole, parts)


def test_trim_then_append_equals_never_having_seen_it():
    k, v = kv(300)
    a, b = TurboQuantKVCache(), TurboQuantKVCache()
    a.update_and_fetch(k, v)
    assert a.trim(100) == 100 and a.offset == 200
    a.update_and_fetch(k[:, :, 200:250], v[:, :, 200:250])
    b.update_and_fetch(k[:, :, :250], v[:, :, :250])
    assert same(a, b)
    assert a.trim(1000) == 250 and a.offset == 0


def test_a_copy_shares_no_later_write():
    k, v = kv(100)
    a = TurboQuantKVCache()
    a.update_and_fetch(k, v)
    before = held(a)
    b = copy.deepcopy(a)
    b.trim(50)
    b.update_and_fetch(*kv(50))
    a_now = held(a)
    assert all(mx.array_equal(x, y) for x, y in zip(before, a_now, strict=True))
    assert not same(a, b)


def test_the_history_handed_out_does_not_move():
    cache = TurboQuantKVCache()
    first, _ = cache.update_and_fetch(*kv(10))
    arrays = [mx.array(a) for a in first.arrays]
    cache.trim(5)
    cache.update_and_fetch(*kv(5))
    mx.eval(cache._core.arrays)
    assert first.length == 10
    assert all(mx.array_equal(x, y) for x, y in zip(first.arrays, arrays, strict=True))


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: kv(3, batch=2), "batch must stay 1; got 2"),
        (lambda: kv(3, heads=2), "KV heads must stay 4; got 2"),
        (lambda: kv(3, dim=128), "head_dim must stay 256; got 128"),
        (lambda: kv(3, dtype=mx.int32), "must be float16, bfloat16 or float32; got int32"),
        (lambda: [kv(3)[0], kv(4)[1]], "agree in batch, heads and tokens"),
        (lambda: [kv(3)[0][0], kv(3)[1][0]], r"shape \(batch, kv_heads, tokens, head_dim\)"),
    ],
)
def test_a_failed_append_changes_nothing(bad, message):
    cache = TurboQuantKVCache()
    cache.update_and_fetch(*kv(20))
    before = [mx.array(a) for a in held(cache)]
    with pytest.raises(ValueError, match=message):
        cache.update_and_fetch(*bad())
    assert cache.offset == 20
    assert all(mx.array_equal(x, y) for x, y in zip(held(cache), before, strict=True))


@pytest.mark.parametrize("arguments", [{"bits": 1}, {"bits": 9}, {"key_bits": 5}, {"value_bits": 0}])
def test_wrong_widths_are_refused(arguments):
    with pytest.raises(ValueError, match="must be 2, 3, 4 or 8; got"):
        TurboQuantKVCache(**arguments)


KINDS = {
    TurboQuantKVCache: (),
    TurboQuantRotatingKVCache: (16,),
    BatchTurboQuantKVCache: ([0],),
    BatchTurboQuantRotatingKVCache: (16, [0]),
    DelayedTurboQuantKVCache: (8,),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_settings_of_a_wrong_kind_are_named(kind):
    for setting, value, message in [
        ("bits", "3", "bits must be 2, 3, 4 or 8; got '3'"),
        ("bits", 3.0, "bits must be 2, 3, 4 or 8; got 3.0"),
        ("bits", None, "bits must be 2, 3, 4 or 8; got None"),
        ("key_bits", "4", "key_bits must be 2, 3, 4 or 8; got '4'"),
        ("value_bits", 9, "value_bits must be 2, 3, 4 or 8; got 9"),
        ("seed", -1, "seed must be at least 0; got -1"),
        ("seed", 2**64, f"seed must be less than {2**64}; got {2**64}"),
        ("seed", "a", "seed must be a whole number; got 'a'"),
        ("seed", None, "seed must be a whole number; got None"),
        ("centres", 7, "centres must be a pair (keys, values) of arrays (H_kv, D); got 7"),
        ("centres", (1, 2), "centres must be a pair (keys, values) of arrays (H_kv, D); got (1, 2)"),
        ("feedback", 7, "feedback must be a pair (keys, values) of arrays (H_kv, D, D); got 7"),
    ]:
        with pytest.raises(ValueError) as raised:
            kind(*KINDS[kind], **{setting: value})
        assert str(raised.value) == f"[{kind.__name__}] {message}"
    with pytest.raises(TypeError, match="unexpected keyword argument 'bit'"):
        kind(*KINDS[kind], bit=3)
    made = kind(*KINDS[kind], key_bits=2, value_bits=4, seed=2**64 - 1)
    assert (made.key_bits, made.value_bits, made.seed, made.centres) == (2, 4, 2**64 - 1, None)
    assert made.feedback is None
    for wrong, rule in ((mx.zeros((2, 64, 64)), "must be float16"), (mx.zeros((2, 64), mx.float16), "must have shape")):
        with pytest.raises(ValueError, match=f"feedback {rule}"):
            kind(*KINDS[kind], feedback=(wrong, None))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TurboQuantRotatingKVCache("8"), "max_size must be a whole number; got '8'"),
        (lambda: TurboQuantRotatingKVCache(0), "max_size must be at least 1; got 0"),
        (lambda: TurboQuantRotatingKVCache(8, keep=8), "keep must be from 0 to max_size - 1 = 7; got 8"),
        (lambda: TurboQuantRotatingKVCache(8, keep=0.5), "keep must be a whole number; got 0.5"),
        (lambda: BatchTurboQuantKVCache(3), "left_padding must be a list of numbers, one a row; got 3"),
        (lambda: BatchTurboQuantKVCache([0, -1]), "left_padding must be at least 0; got -1"),
        (lambda: BatchTurboQuantRotatingKVCache(8, ["1"]), "left_padding must be a whole number; got '1'"),
        (lambda: DelayedTurboQuantKVCache(-1), "start must be at least 0; got -1"),
        (lambda: DelayedTurboQuantKVCache("9"), "start must be a whole number; got '9'"),
    ],
)
def test_wrong_sizes_are_named(make, message):
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value).endswith(f"] {message}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_settings_stand_in_the_signature_and_members_explain_themselves(kind):
    settings = inspect.signature(kind).parameters
    assert {"bits", "key_bits", "value_bits", "seed", "centres", "feedback"} <= settings.keys()
    assert all(p.kind is not p.VAR_KEYWORD and p.annotation is not p.empty for p in settings.values())
    for name in dir(kind):
        if not name.startswith("_") and any(name in vars(c) for c in kind.__mro__ if c.__module__.startswith("turbo")):
            member = inspect.getattr_static(kind, name)
            if callable(member) or isinstance(member, (property, classmethod)):
                assert inspect.getdoc(getattr(member, "__func__", member)), name


def test_no_float_copy_of_the_history_exists():
    """Active and peak memory while a history of 8192 tokens is filled and read stay near the packed size."""
    tokens, chunk = 8192, 512
    k, v = kv(chunk)
    q = mx.random.normal((1, 16, 8, 256)).astype(mx.float16)
    cache = TurboQuantKVCache(bits=3)
    mx.eval(q, k, v)
    mx.clear_cache()
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(tokens // chunk):
        view = cache.update_and_fetch(k, v)[0]
        mx.eval(view.attend(q, 0.06), cache.state)
        del view
    packed = tokens * 4 * 2 * 98 + COPIES
    assert cache.nbytes == packed
    active = mx.get_active_memory() - start
    assert packed <= active < packed * 1.01, (active, packed)
    # Growing holds the old and the new buffers, and the ring of a chunk is put together from its copies; one float16 copy
    # of keys and values would be 4.6 times `packed`.
    peak = mx.get_peak_memory() - start
    assert peak < 2.2 * packed + 5 * chunk * 4 * 2 * 258, (peak, packed)


def test_appending_one_token_writes_in_place():
    """A decode step must not copy the buffers: its peak above the resting size is far below one buffer."""
    cache = TurboQuantKVCache(bits=3)
    cache.update_and_fetch(*kv(8192 - 256))
    cache.update_and_fetch(*kv(1))
    mx.eval(cache.state)
    k, v = kv(1)
    mx.eval(k, v)
    mx.clear_cache()
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    view, _ = cache.update_and_fetch(k, v)
    out = view.attend(mx.random.normal((1, 16, 1, 256)), 0.06)
    del view
    mx.eval(out, cache.state)
    assert mx.get_peak_memory() - start < COPIES / 4  # of the buffers the copies' are the smaller ones


def test_to_float_gives_back_a_kvcache():
    cache = TurboQuantKVCache(bits=4)
    k, v = kv(30, dtype=mx.float32)
    cache.update_and_fetch(k, v)
    back = cache.to_float(mx.float32)
    assert back.offset == 30
    keys, values = back.keys_and_values()
    assert relative_error(keys, k) ** 2 < 0.0105 and relative_error(values, v) ** 2 < 0.0105


def test_inspect_tells_what_is_held():
    cache = TurboQuantKVCache(bits=3)
    assert cache.inspect()["tokens"] == 0 and cache.inspect()["kernel"] is None
    cache.update_and_fetch(*kv(10))
    note = cache.inspect()
    assert note["tokens"] == 10 and note["float16_bytes"] == 10 * 4 * 2 * 512
    assert note["resident_bytes"] == cache.nbytes and note["kernel"] is None  # no attention yet


MADE = {
    "full": TurboQuantKVCache,
    "batch": lambda: BatchTurboQuantKVCache([0]),
    "window": lambda: TurboQuantRotatingKVCache(8),
    "batch of windows": lambda: BatchTurboQuantRotatingKVCache(8, [0]),
    "packed by now": lambda: DelayedTurboQuantKVCache(2),
}


@pytest.mark.parametrize("kind", MADE)
def test_the_kernel_told_is_the_one_that_attention_used(kind, patched):
    """Not what would be used now: neither an append nor another instruction set changes it, only attention does."""
    own = _core.current_isa()
    other = next((isa for isa in _core.available_isas() if isa != own), own)
    cache = MADE[kind]()
    q = mx.random.normal((1, 4, 1, 256))

    def attend(c):
        view, _ = c.update_and_fetch(*kv(1))
        return base.scaled_dot_product_attention(q, view, view, cache=c, scale=0.1, mask=None)

    try:
        cache.update_and_fetch(*kv(5))
        assert cache.kernel is None
        _core.force_isa(other)
        attend(cache)
        _core.force_isa("")
        cache.update_and_fetch(*kv(12))
        assert cache.kernel == cache.inspect()["kernel"] == f"cpu {other}"
        copied = copy.deepcopy(cache)
        assert copied.kernel == f"cpu {other}"
        attend(copied)
        assert (copied.kernel, cache.kernel) == (f"cpu {own}", f"cpu {other}")
        with pytest.raises(ValueError, match=r"\[attention\] query heads must be a multiple"):
            cache.keys_and_values()[0].attend(mx.zeros((1, 3, 1, 256)), 0.1)
        assert cache.kernel == f"cpu {other}"
        assert type(cache).from_state(cache.state).kernel is None
    finally:
        _core.force_isa("")
