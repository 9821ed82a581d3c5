"""What test_table.py does not ask of a GPU: the codec, long contexts, strides, rules for NaN, the caches.

Against the CPU's operations on the same codes.  `pytest -m gpu` on an NVIDIA host, `-m metal` on a Mac.
"""

import copy
import itertools

import mlx.core as mx
import numpy as np
import pytest
from conftest import relative_error
from turboquant_mlx import TurboQuantKVCache, _core, attention, decode, encode
from turboquant_mlx.calibration.feedback import rotation

pytestmark = [pytest.mark.gpu, pytest.mark.metal]

if not _core.gpu_supported()[0]:
    pytest.skip(f"no GPU here: {_core.gpu_supported()[1]}", allow_module_level=True)

# CUDA keeps q and the softmax weights to 15 bits, Metal q, partial results and some weights to half.
TOLERANCE = 1e-3
ROUNDING = {mx.float32: 0, mx.float16: 2**-11, mx.bfloat16: 2**-8}


def on(device, function, *args, **kwargs):
    out = function(*args, **kwargs, stream=device)
    mx.eval(out)
    return out


def group_errors(x, centre, codes, scales, bits, seed):
    """Of trellis codes: the squared errors of groups of 32, in squared levels; how much of it the rounding of a search's
    costs may explain (each of 32 steps' costs, of two paths, by a half of all costs / 32,751); the scales that the codes
    should have.  Targets are the encoder's: rotated, divided by their RMS, and no larger than its limit (format.h)."""
    dim, (unit, limit, step) = x.shape[-1], {2: (25.374, 94, 0.0625), 3: (44.829, 222, 0.03125)}[bits]
    magnitudes = np.array({2: [5, 15, 27, 47], 3: [5, 13, 23, 33, 45, 59, 79, 111]}[bits])
    subsets = np.concatenate([-magnitudes[::-1], magnitudes]).reshape(-1, 4).T
    turn = rotation(dim, seed)
    vectors = np.array(x.astype(mx.float32)).astype(np.float64) - np.array(centre).astype(np.float64)[:, None]
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    target = np.clip(vectors @ turn.T * (unit * dim**0.5 / norms), -limit, limit)
    costs = np.stack([np.abs(target[..., None] - levels).min(axis=-1) ** 2 for levels in subsets])
    rounding = np.ptp(costs, axis=0) / 32751 * 32
    ones = mx.ones_like(scales)
    levels = np.array(on(mx.cpu, decode, codes, ones, bits, seed=seed)).astype(np.float64) @ turn.T / step
    errors, rounding = (y.reshape(*x.shape[:-1], -1, 32).sum(axis=-1) for y in ((levels - target) ** 2, rounding))
    return errors, rounding, norms[..., 0] / (np.linalg.norm(levels, axis=-1) * step)


@pytest.mark.parametrize("dim, bits", itertools.product(range(32, 257, 32), [2, 3, 4]))
def test_encode(dim, bits):
    """Scalar codes equal the CPU's but where float order moves a coordinate across a threshold: then by one level.  Of
    trellis codes two paths may be equally near: no group errs by more than the CPU's but for the search's rounding."""
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        x = mx.random.normal((2, 3, 37, dim)).astype(dtype)
        centre = 0.3 * mx.random.normal((3, dim))
        (codes, scales), (want, want_scales) = (on(d, encode, x, bits, seed=9, centre=centre) for d in (mx.gpu, mx.cpu))
        if bits < 4:
            errors, rounding, own = group_errors(x, centre, codes, scales, bits, 9)
            least = group_errors(x, centre, want, scales, bits, 9)[0]
            assert ((errors - least) / rounding).max() < 1
            assert errors.mean() / least.mean() < 1.001
            assert np.abs(np.array(scales) / own - 1).max() < 2**-10
        else:
            differing = np.mean(np.array(codes) != np.array(want))
            assert differing < 1e-3, differing
            assert mx.allclose(scales, want_scales, rtol=2e-3)
        got = on(mx.gpu, decode, codes, scales, bits, seed=9, centre=centre)
        assert relative_error(got, on(mx.cpu, decode, codes, scales, bits, seed=9, centre=centre)) < 1e-5


def test_nothing_is_coded_to_nothing():
    """A cache whose tokens are all read from exact copies decodes no codes; MLX cannot launch an empty grid."""
    packed = on(mx.gpu, encode, mx.zeros((1, 2, 0, 64)), 3)
    assert (packed[0].shape, packed[1].shape) == ((1, 2, 0, 6), (1, 2, 0))
    assert on(mx.gpu, decode, *packed, 3).shape == (1, 2, 0, 64)


@pytest.mark.parametrize("dim", [96, 128, 256])
def test_feedback(dim):
    """One coordinate beside a threshold changes the codes after it, so vectors are the CPU's or err as theirs do; and
    they are the same one by one, in the place of a cache, as together."""
    x = mx.random.normal((1, 2, 65, dim)).astype(mx.float16)
    g = (0.06 * mx.random.normal((2, dim, dim))).astype(mx.float16)
    for bits in (2, 3, 4):
        got, want = (on(d, encode, x, bits, feedback=g) for d in (mx.gpu, mx.cpu))
        same = np.mean((np.array(got[0]) == np.array(want[0])).all(axis=-1))
        assert same > 0.9, same
        errors = [relative_error(on(mx.cpu, decode, *packed, bits), x) for packed in (got, want)]
        assert abs(errors[0] / errors[1] - 1) < 1e-2, errors
    mx.set_default_device(mx.gpu)
    cache = TurboQuantKVCache(bits=3, feedback=(g, g))
    for t in range(65):
        view, _ = cache.update_and_fetch(x[:, :, t : t + 1], x[:, :, t : t + 1])
    whole, _ = TurboQuantKVCache(bits=3, feedback=(g, g)).update_and_fetch(x, x)
    for one, other in zip(view.decode(mx.float32), whole.decode(mx.float32), strict=True):
        assert mx.array_equal(one, other)
    mx.set_default_device(mx.cpu)


def inputs(batch, heads, kv_heads, length, tokens, dim, key_bits, value_bits, dtype=mx.float32):
    k = mx.random.normal((batch, kv_heads, tokens, dim))
    v = 0.5 * mx.random.normal((batch, kv_heads, tokens, dim)) + 0.3
    q = mx.random.normal((batch, heads, length, dim)).astype(dtype)
    keys, values = on(mx.cpu, encode, k, key_bits), on(mx.cpu, encode, v, value_bits)
    return q, keys, values


def check(q, keys, values, **options):
    got, want = (on(d, attention, q, keys, values, scale=0.1, **options) for d in (mx.gpu, mx.cpu))
    assert got.dtype == q.dtype
    error = relative_error(got, want)
    assert error < TOLERANCE + 2 * ROUNDING[q.dtype], error


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [(3, 3), (4, 4), (2, 2), (4, 3)])
def test_prompts(dim, bits):
    for tokens, length, (heads, kv_heads) in [(300, 8, (8, 1)), (190, 40, (8, 2)), (513, 130, (4, 4))]:
        q, keys, values = inputs(1, heads, kv_heads, length, tokens, dim, *bits)
        check(q, keys, values, key_bits=bits[0], value_bits=bits[1], mask="causal")


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("length", [1, 4, 50])
def test_rules(dtype, length):
    q, keys, values = inputs(3, 8, 2, length, 200, 128, 3, 3, dtype)
    starts = mx.array([0, 50, 149])
    sinks = mx.random.normal((8,))
    centres = {"key_centre": 0.3 * mx.random.normal((2, 128)), "value_centre": 0.3 * mx.random.normal((2, 128))}
    boolean = (mx.random.uniform(shape=(3, 1, length, 200)) < 0.7) | (mx.arange(200) > 196)
    additive = mx.random.normal((length, 200)).astype(dtype)
    for options in (
        {"mask": "causal", "starts": starts},
        {"mask": "causal", "window": 30},
        {"mask": boolean},
        {"mask": additive},
        {"mask": "causal", "sinks": sinks},
        {"mask": "causal", "sinks": sinks, "starts": starts, **centres},
        {"mask": boolean, "starts": starts, **centres},
    ):
        check(q, keys, values, **options)


@pytest.mark.parametrize("tokens", [20001, 70001])
def test_a_long_context(tokens):
    for bits in (2, 3, 4):
        q, keys, values = inputs(1, 16, 4, 1, tokens, 256, bits, bits)
        check(q, keys, values, key_bits=bits, value_bits=bits)


def test_nan_reaches_only_who_sees_it():
    k, v = mx.random.normal((1, 2, 10, 64)), mx.random.normal((1, 2, 10, 64))
    k[0, 1, 7] = float("nan")
    with mx.stream(mx.gpu):
        keys, values = encode(k), encode(v)
        out = attention(mx.random.normal((1, 4, 10, 64)), keys, values, scale=0.1, mask="causal")
        bad = np.array(mx.isnan(out).any(axis=-1)[0])
    assert not bad[:2].any() and not bad[2:, :7].any() and bad[2:, 7:].all()


def test_strided_inputs():
    q, (kc, ks), values = inputs(2, 6, 3, 5, 64, 128, 3, 3)
    wide = mx.concatenate([kc, kc], axis=-1)[..., :12]  # rows no longer dense
    turned = mx.contiguous(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    got = on(mx.gpu, attention, turned, (wide, ks), values, scale=0.1)
    assert relative_error(got, on(mx.cpu, attention, q, (kc, ks), values, scale=0.1)) < TOLERANCE


PREFILL = ("metal prefill (simdgroup_matrix)", "cuda fp16 split", "cuda fp16 prefill")


def test_the_cache_on_the_gpu():
    mx.set_default_device(mx.gpu)
    cache = TurboQuantKVCache(bits=3)
    k, v = (mx.random.normal((1, 4, 700, 256)).astype(mx.bfloat16) for _ in range(2))
    at = 0
    for n in (300, 1, 1, 255, 143):
        view, _ = cache.update_and_fetch(k[:, :, at : at + n], v[:, :, at : at + n])
        mx.eval(cache._core.arrays)
        at += n
    q = mx.random.normal((1, 16, 1, 256)).astype(mx.bfloat16)
    got = view.attend(q, 1 / 16)
    keys, values = view.decode(mx.float32)
    want = mx.fast.scaled_dot_product_attention(q.astype(mx.float32), keys, values, scale=1 / 16)
    assert relative_error(got, want) < TOLERANCE + 2 * ROUNDING[mx.bfloat16]
    mx.set_default_device(mx.cpu)
    assert cache.kernel in ("metal decode", "cuda int8 rows")
    for queries, kernels in (
        (4, ("metal decode", "cuda int8 rows")),
        (6, ("metal decode", "cuda int8 rows")),
        (200, PREFILL),
    ):
        view.attend(mx.zeros((1, 16, queries, 256)), 1 / 16, "causal", stream=mx.gpu)
        assert cache.kernel in kernels
    view.attend(mx.zeros((1, 16, 1, 256)), 1 / 16, stream=mx.cpu)
    assert cache.kernel.startswith("cpu ")


def test_appends_in_place_are_seen_by_nobody_else():
    """On CUDA a cache writes into its buffers: copies, views and pending results must not notice."""

    def history(device):
        mx.set_default_device(device)
        mx.random.seed(3)

        def rows(n):
            return mx.random.normal((1, 2, n, 64), stream=mx.cpu).astype(mx.float16)

        first, later, other = (rows(n) for n in (20, 3, 3))
        q = rows(1)
        seen = []
        cache = TurboQuantKVCache(bits=4)
        cache.update_and_fetch(first, first)
        twin = copy.deepcopy(cache)
        view, _ = cache.update_and_fetch(later, later)  # takes the room that both could use
        twin_view, _ = twin.update_and_fetch(other, other)
        pending = view.attend(q, 0.125)
        cache.trim(3)
        cache.update_and_fetch(other, other)  # `pending` still needs what stood there
        seen += [pending, view.attend(q, 0.125), twin_view.attend(q, 0.125)]
        mx.eval(seen)
        assert cache.trim(2) == 2  # as after rejected drafts: nothing pending, so the room is written again
        del view, pending
        again, _ = cache.update_and_fetch(later, later)
        seen += [again.attend(q, 0.125), *again.decode(mx.float32), *twin_view.decode(mx.float32)]
        for _ in range(300):  # past the end of the buffers
            last, _ = cache.update_and_fetch(other[:, :, :1], later[:, :, :1])
        seen += [last.attend(q, 0.125), *last.decode(mx.float32), *(x for x in cache.state[:4])]
        mx.eval(seen)
        return [np.array(x.astype(mx.float32)) for x in seen[:-4]], cache.offset

    (got, length), (want, same) = history(mx.gpu), history(mx.cpu)
    assert length == same == 324
    for a, b in zip(got, want, strict=True):
        assert relative_error(mx.array(a), mx.array(b)) < 0.01  # a coordinate at a threshold may take the other level


@pytest.mark.skipif(not mx.cuda.is_available(), reason="Metal would swap instead")
def test_out_of_memory_leaves_copies_valid():
    mx.set_default_device(mx.gpu)
    k = mx.random.normal((1, 4, 20, 256)).astype(mx.float16)

    def filled():
        cache = TurboQuantKVCache(bits=3)
        cache.update_and_fetch(k, k)
        mx.eval(cache.state)
        return cache

    def answer(cache):
        view, _ = cache.update_and_fetch(k[:, :, :1], k[:, :, :1])
        return view.attend(mx.broadcast_to(k[:, :1, :1], (1, 16, 1, 256)), 1 / 16)

    cache = filled()
    twin, want = copy.deepcopy(cache), answer(filled())
    tokens = mx.device_info(mx.gpu)["total_memory"] // (4 * 96)  # whose keys' codes alone fill it
    many = mx.broadcast_to(k[:, :, :1], (1, 4, tokens, 256))
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.update_and_fetch(many, many)
        mx.eval(cache.state)
    assert mx.array_equal(answer(twin), want)


def test_a_trace_appends_by_value():
    mx.set_default_device(mx.gpu)
    cache = TurboQuantKVCache(bits=3)
    k = mx.random.normal((1, 2, 6, 64)).astype(mx.float16)
    cache.update_and_fetch(k, k)

    def step(x):
        twin = copy.deepcopy(cache)
        view, _ = twin.update_and_fetch(x, x)
        return view.attend(x, 0.125)

    x = mx.random.normal((1, 2, 1, 64)).astype(mx.float16)
    assert mx.allclose(mx.compile(step)(x), step(x), atol=1e-3)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="Metal's kernels have one width")
@pytest.mark.parametrize("dim, value_dim", [(192, 128), (64, 96), (128, 0), (512, 512), (320, 64)])
def test_caches_of_other_widths(dim, value_dim):
    """Caches of wide heads, and of values of another head_dim than keys: as on the CPU."""
    x, y = (mx.random.normal((2, 2, 40, d)).astype(mx.float16) for d in (dim, value_dim))
    q = mx.random.normal((2, 4, 3, dim)).astype(mx.float16)
    outs = []
    for device in (mx.gpu, mx.cpu):
        mx.set_default_device(device)
        cache = TurboQuantKVCache(key_bits=4, value_bits=8, recent=8, sink=2)
        for end in (30, 31, 32, 40):
            view, _ = cache.update_and_fetch(*(z[:, :, cache.offset : end] for z in (x, y)))
            outs.append(view.attend(q[:, :, : min(3, end)], 0.2, "causal"))
        mx.eval(outs)
    mx.set_default_device(mx.cpu)
    for a, b in zip(outs[:4], outs[4:], strict=True):
        assert a.shape == b.shape == (2, 4, 3, value_dim)
        assert value_dim == 0 or relative_error(a, b) < 0.01  # a coordinate at a threshold may take the other level


@pytest.mark.skipif(not mx.cuda.is_available(), reason="Metal misses the bound")
@pytest.mark.parametrize("tokens", [70, 3000])
def test_latent_attention(tokens):
    """DeepSeek's shape: 128 heads read one vector of 512 as key and as value; the rotary part's scores are a mask."""
    latent = on(mx.cpu, encode, mx.random.normal((1, 1, tokens, 512)), 3)
    mask = mx.random.normal((1, 128, 1, tokens)).astype(mx.float16)
    check(mx.random.normal((1, 128, 1, 512)).astype(mx.float16), latent, latent, key_bits=3, value_bits=3, mask=mask)
