"""The lazy operations: against plain MLX on the decoded vectors, and as citizens of MLX's graphs."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from turboquant_mlx import attention, decode, encode

pytestmark = pytest.mark.quick

# q and the softmax weights are kept to 15 bits on the CPU; see tests/cpp/table_test.cpp.
TOLERANCE = 5e-4
ROUNDING = {mx.float32: 0, mx.float16: 2**-11, mx.bfloat16: 2**-8}


def packed_kv(batch, heads, tokens, dim, key_bits=3, value_bits=3, seed=0):
    k = mx.random.normal((batch, heads, tokens, dim))
    v = 0.5 * mx.random.normal((batch, heads, tokens, dim)) + 0.3
    return encode(k, key_bits, seed=seed), encode(v, value_bits, seed=seed)


def naive(q, keys, values, mask=None, key_bits=3, value_bits=3, seed=0, scale=0.1):
    k, v = decode(*keys, key_bits, seed=seed), decode(*values, value_bits, seed=seed)
    return mx.fast.scaled_dot_product_attention(q.astype(mx.float32), k, v, scale=scale, mask=mask)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    dim=st.sampled_from([32, 64, 96, 128, 160, 192, 224, 256]),
    bits=st.sampled_from([2, 3, 4]),
    seed=st.integers(0, 2**64 - 1),
)
def test_decoding_errs_by_the_codebooks_distortion(shape, dim, bits, seed):
    x = mx.random.normal((*shape, dim))
    codes, scales = encode(x, bits, seed=seed)
    assert codes.shape == (*shape, bits * dim // 32) and codes.dtype == mx.uint32
    assert scales.shape == tuple(shape) and scales.dtype == mx.float16
    back = decode(codes, scales, bits, seed=seed)
    assert back.shape == x.shape
    lengths = [mx.linalg.norm(a, axis=-1) for a in (x, back)]
    assert mx.allclose(*lengths, rtol=1e-3), "the scale makes |x^| = |x|"
    # Few vectors scatter about the mean distortion; 3 times it is out of reach for a working codec.
    assert relative_error(back, x) ** 2 < 3 * {2: 0.1175, 3: 0.0346, 4: 0.0096}[bits]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    "dtype, size", [(mx.float16, 65504), (mx.bfloat16, 2e5), (mx.float32, 2e5), (mx.float32, 3e38)]
)
def test_vectors_beyond_float16_stay_finite(dtype, size, bits):
    x = mx.full((1, 1, 3, 128), size, dtype=dtype)
    codes, scales = encode(x, bits)
    assert mx.isfinite(scales).all() and (size <= 65504 or mx.all(scales == 65504))
    for out_dtype in (dtype, mx.float16):
        q = mx.ones((1, 2, 3, 128), out_dtype)
        out = attention(q, (codes, scales), (codes, scales), scale=0.1, key_bits=bits, value_bits=bits)
        assert mx.isfinite(out).all() and mx.isfinite(decode(codes, scales, bits, dtype=out_dtype)).all()
        assert mx.all(out.mean(-1) > 4e4), "the direction is kept"


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    query_len=st.integers(1, 20),
    tokens=st.integers(1, 200),
    dim=st.sampled_from([32, 64, 96, 128, 256]),
    key_bits=st.sampled_from([2, 3, 4]),
    value_bits=st.sampled_from([2, 3, 4]),
    dtype=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    kind=st.sampled_from(["none", "causal", "boolean", "additive"]),
)
def test_attention_equals_attention_on_the_decoded_history(
    batch, kv_heads, group, query_len, tokens, dim, key_bits, value_bits, dtype, kind
):
    tokens = max(tokens, query_len)
    keys, values = packed_kv(batch, kv_heads, tokens, dim, key_bits, value_bits, seed=7)
    q = mx.random.normal((batch, kv_heads * group, query_len, dim)).astype(dtype)
    mask = {"none": None, "causal": "causal"}.get(kind)
    if kind == "boolean":
        mask = mx.random.uniform(shape=(batch, 1, query_len, tokens)) < 0.7
        mask = mask | (mx.arange(tokens) == 0)  # MLX's own attention has no answer for a row that sees nothing
    if kind == "additive":
        mask = mx.random.normal((query_len, tokens))
    bits = {"key_bits": key_bits, "value_bits": value_bits}
    got = attention(q, keys, values, scale=0.1, mask=mask, seed=7, **bits)
    assert got.shape == q.shape and got.dtype == dtype
    want = naive(q, keys, values, mask, seed=7, **bits)
    assert relative_error(got, want) < TOLERANCE + ROUNDING[dtype]


def test_strided_inputs_need_no_copy_by_the_caller():
    x = mx.random.normal((2, 50, 3, 128))
    turned = x.transpose(0, 2, 1, 3)
    for got, want in zip(encode(turned), encode(mx.contiguous(turned)), strict=True):
        assert mx.array_equal(got, want)
    reversed_last = x[..., ::-1]
    for got, want in zip(encode(reversed_last), encode(mx.contiguous(reversed_last)), strict=True):
        assert mx.array_equal(got, want)
    (kc, ks), values = packed_kv(2, 3, 64, 128)
    q = mx.random.normal((2, 5, 6, 128)).transpose(0, 2, 1, 3)
    wide = mx.concatenate([kc, kc], axis=-1)[..., :12]  # rows no longer dense
    got = attention(q, (wide, ks), values, scale=0.1)
    assert mx.array_equal(got, attention(mx.contiguous(q), (kc, ks), values, scale=0.1))
    part = (kc[:, :, :40], ks[:, :, :40]), tuple(a[:, :, :40] for a in values)
    copies = tuple(tuple(mx.contiguous(a) for a in side) for side in part)
    assert mx.array_equal(attention(q, *part, scale=0.1), attention(q, *copies, scale=0.1))


def test_compile_async_and_streams_give_the_same_numbers():
    keys, values = packed_kv(1, 2, 100, 256)
    q = mx.random.normal((1, 8, 1, 256))

    def step(q, kc, ks, vc, vs):
        return attention(q, (kc, ks), (vc, vs), scale=0.1) * 2 + encode(q)[1][..., None]

    want = step(q, *keys, *values)
    compiled = mx.compile(step)
    assert mx.array_equal(compiled(q, *keys, *values), want)
    assert mx.array_equal(compiled(q + 0, *keys, *values), want)
    later = step(q, *keys, *values)
    mx.async_eval(later)
    assert mx.array_equal(later, want)
    other = mx.new_stream(mx.cpu)
    got = attention(q, keys, values, scale=0.1, stream=other) * 2 + encode(q, stream=other)[1][..., None]
    assert mx.array_equal(got, want)


def test_compiled_without_shapes_reads_as_many_tokens_as_there_are():
    long, short = packed_kv(1, 2, 3000, 64), packed_kv(1, 2, 7, 64)
    q = mx.random.normal((1, 4, 1, 64))
    compiled = mx.compile(lambda q, kc, ks, vc, vs: attention(q, (kc, ks), (vc, vs), scale=0.1), shapeless=True)
    for keys, values in (long, short, long):
        assert mx.array_equal(compiled(q, *keys, *values), attention(q, keys, values, scale=0.1))
    with pytest.raises(ValueError, match="must fit together"):
        compiled(q, *long[0], *short[1])


def test_two_compiled_settings_do_not_share_a_result():
    keys, values = packed_kv(1, 1, 20, 64)
    q = mx.random.normal((1, 1, 1, 64))

    def both(q):
        return attention(q, keys, values, scale=0.1), attention(q, keys, values, scale=0.9)

    one, two = mx.compile(both)(q)
    assert not mx.allclose(one, two)


def test_transformations_are_refused():
    x = mx.random.normal((4, 64))
    with pytest.raises(ValueError, match=r"\[turboquant.encode\] vmap is not supported"):
        mx.vmap(lambda row: encode(row)[1])(x)
    with pytest.raises(ValueError, match=r"vjp is not supported"):
        mx.grad(lambda row: decode(*encode(row)).sum())(x)


def test_special_values():
    x = mx.random.normal((5, 64))
    x[1, 3] = float("nan")
    x[2, 5] = float("-inf")
    x[3] = 0
    x[4] *= 1e-4
    codes, scales = encode(x)
    scale = np.array(scales.astype(mx.float32))
    assert np.isnan(scale[[1, 2]]).all() and scale[3] == 0 and np.isfinite(scale[[0, 4]]).all()
    assert not np.array(codes[1:3]).any()
    back = decode(codes, scales)
    assert mx.isnan(back[1:3]).all() and mx.array_equal(back[3], mx.zeros(64))
    assert relative_error(back[4], x[4]) ** 2 < 0.11, "small vectors keep their precision"


def test_nan_reaches_only_who_sees_it():
    k, v = mx.random.normal((1, 2, 10, 64)), mx.random.normal((1, 2, 10, 64))
    k[0, 1, 7] = float("nan")
    keys, values = encode(k), encode(v)
    out = attention(mx.random.normal((1, 4, 10, 64)), keys, values, scale=0.1, mask="causal")
    bad = mx.isnan(out).any(axis=-1)[0]
    assert not bad[:2].any() and not bad[2:, :7].any() and bad[2:, 7:].all()


def test_a_query_that_sees_nothing_gets_zero():
    keys, values = packed_kv(1, 1, 10, 64)
    q = mx.random.normal((1, 1, 2, 64))
    mask = mx.array([[True] * 10, [False] * 10])
    out = attention(q, keys, values, scale=0.1, mask=mask)
    assert mx.array_equal(out[0, 0, 1], mx.zeros(64)) and out[0, 0, 0].any()


BAD = [
    (lambda: encode(mx.zeros((3, 80))), "head_dim must be a multiple of 32 from 32 to 512; got 80"),
    (lambda: encode(mx.zeros((3, 544))), "got 544"),
    (lambda: encode(mx.zeros((3, 64)), 5), "bits must be 2, 3, 4 or 8; got 5"),
    (lambda: encode(mx.zeros((3, 64), mx.int32)), "x must be float16, bfloat16 or float32; got int32"),
    (lambda: encode(mx.array(1.0)), "at least one axis"),
    (lambda: encode(mx.zeros((1, 2, 3, 64)), centre=mx.zeros((3, 64))), r"centre must have shape \(2,64\)"),
    (
        lambda: encode(mx.zeros((1, 2, 3, 64)), feedback=mx.zeros((2, 64, 32), mx.float16)),
        r"feedback must have shape \(2,64,64\); got \(2,64,32\)",
    ),
    (lambda: encode(mx.zeros((1, 2, 3, 64)), feedback=mx.zeros((2, 64, 64))), "feedback must be float16; got float32"),
    (lambda: decode(mx.zeros((3, 5), mx.uint32), mx.zeros((3,), mx.float16)), "got 5 words"),
    (lambda: decode(mx.zeros((3, 6), mx.uint32), mx.zeros((2,), mx.float16)), "codes' shape without its last axis"),
    (lambda: decode(mx.zeros((3, 6), mx.int32), mx.zeros((3,), mx.float16)), "codes must be uint32; got int32"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_vectors_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": mx.zeros((2, 64))}, r"q must have shape \(batch, query_heads, query_len, head_dim\)"),
        ({"q": mx.zeros((2, 4, 1, 64))}, "same batch; got 2 and 1"),
        ({"q": mx.zeros((1, 5, 1, 64))}, "multiple of KV heads; got 5 and 2"),
        ({"q": mx.zeros((1, 4, 1, 128))}, "must have 12 words a vector; got 6"),
        ({"scale": float("nan")}, "scale must be finite; got nan"),
        ({"mask": "diagonal"}, 'mask must be None, "causal" or an array; got "diagonal"'),
        ({"mask": mx.zeros((1, 9), mx.bool_)}, r"mask must broadcast to .* = \(1,4,1,10\); got \(1,9\)"),
        ({"mask": mx.zeros((1, 10), mx.int32)}, "mask must be bool, float16, bfloat16 or float32; got int32"),
        ({"key_bits": 4}, "keys of 4 bits"),
        ({"window": -1}, "window must be at least 0; got -1"),
        ({"sinks": mx.zeros((3,))}, r"sinks must have shape \(4\); got \(3\)"),
        ({"starts": mx.zeros((1,))}, "starts must be integers"),
    ],
)
def test_bad_attention_is_refused(change, message):
    keys, values = packed_kv(1, 2, 10, 64)
    arguments = {"q": mx.zeros((1, 4, 1, 64)), "keys": keys, "values": values, "scale": 0.1} | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_keys_and_values_must_agree():
    keys, _ = packed_kv(1, 2, 10, 64)
    _, values = packed_kv(1, 2, 11, 64)
    with pytest.raises(ValueError, match="agree in batch, heads and tokens"):
        attention(mx.zeros((1, 2, 1, 64)), keys, values, scale=1)
