"""The chunked gated delta recurrence against mlx-lm's loop and against float64, within bounds that are derived, not
chosen: a running error analysis of both algorithms in float32 (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.3) on the very numbers of the case."""

from pathlib import Path

import mlx.core as mx
import mlx_lm.models.gated_delta as mlx_lm_gated_delta
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import load
from mlx_lm.models import qwen3_5
from turboquant_mlx import disable, enable
from turboquant_mlx.overlay import gated_delta

MODEL = Path(__file__).resolve().parents[2] / "models" / "qwen35-tiny-4bit"
UNIT = 2.0**-24  # half the spacing of float32 at 1


class Bounded:
    """An exact value (float64) and a bound on the error of its float32 computation."""

    def __init__(self, value, error=0.0):
        self.value = np.asarray(value, np.float64)
        self.error = np.broadcast_to(np.asarray(error, np.float64), self.value.shape)

    @property
    def size(self):
        return np.abs(self.value) + self.error

    @property
    def t(self):
        return Bounded(np.swapaxes(self.value, -1, -2), np.swapaxes(self.error, -1, -2))

    def __getitem__(self, at):
        return Bounded(self.value[at], self.error[at])

    def rounded(self, roundings=1):
        return Bounded(self.value, self.error + roundings * UNIT / (1 - roundings * UNIT) * self.size)

    def __add__(self, other):
        return Bounded(self.value + other.value, self.error + other.error).rounded()

    def __sub__(self, other):
        return Bounded(self.value - other.value, self.error + other.error).rounded()

    def __mul__(self, other):
        error = self.size * other.error + self.error * np.abs(other.value)
        return Bounded(self.value * other.value, error).rounded()

    def __matmul__(self, other):
        n = self.value.shape[-1]
        rounding = n * UNIT / (1 - n * UNIT)
        error = self.size @ other.error + self.error @ np.abs(other.value) + rounding * (self.size @ other.size)
        return Bounded(self.value @ other.value, error)


def norm(x):
    return np.sqrt(np.square(x).sum(-1))


def token_step(state, q, k, v, g, beta):
    """One token of mlx-lm's loop: the state, the output and what of an earlier state error they pass on."""
    state = state * g
    delta = (v - (state @ k[:, None])[:, 0]) * beta
    state = state + delta[:, None] * k[None]
    y = (state @ q[:, None])[:, 0]
    shift = k.value[:, None] * k.value * beta.value
    keep = g.value * (np.eye(len(k.value)) - shift)
    return state, y[None], np.linalg.norm(keep, 2), norm(keep @ q.value)[None]


def chunk_step(state, q, k, v, g, beta):
    """The same for one chunk, with the products of `turboquant_mlx.overlay.gated_delta`."""
    chunk = len(g.value)
    log = np.arange(chunk)
    between = np.ones((chunk, chunk))
    for j in range(chunk):
        between[j, j + 1 :] = np.cumprod(g.value[j + 1 :])
    decay = Bounded(between).rounded(chunk)
    from_start = Bounded(np.cumprod(g.value)).rounded(chunk)
    a = (k @ k.t) * decay * beta[None]
    inverse = Bounded(np.eye(chunk))
    half = 1
    while half < chunk:
        j, i = log[:, None], log[None]
        block = (j // (2 * half) == i // (2 * half)) & (j % (2 * half) < half) & (i % (2 * half) >= half)
        inverse = inverse - inverse @ Bounded(a.value * block, a.error * block) @ inverse
        half *= 2
    inverse = inverse * beta[:, None]
    u = inverse.t @ v
    w = (inverse * from_start[:, None]).t @ k
    weighted_keys = decay[:, -1:] * k
    carry = Bounded(from_start[-1].value * np.eye(k.value.shape[1]), 0).rounded(chunk) - w.t @ weighted_keys
    upper = np.triu(np.ones((chunk, chunk)))
    scores = Bounded(decay.value * upper, decay.error * upper) * (k @ q.t)
    delta = u - w @ state.t
    y = from_start[:, None] * (q @ state.t) + scores.t @ delta
    passed_on = from_start[:, None] * q - scores.t @ w
    next_state = (u.t @ weighted_keys + state @ carry).rounded(2)
    factor = np.linalg.norm(carry.value, 2) + np.linalg.norm(carry.error)
    return next_state, y, factor, norm(passed_on.size)


def exact_and_bound(step, size, q, k, v, g, beta, state):
    """y and the state of one head in float64, and bounds on the float32 errors of `step` taken `size` tokens at a time.

    An error E of the state before a step passes through the step's linear map, whose norm is known, and the step adds
    what its own roundings make of the exact state: E' = |map| E + local."""
    tokens = len(g)
    inputs = [Bounded(x) for x in (q, k, v, g, beta)]
    state, error = Bounded(state), 0.0
    ys, bounds = [], []
    for start in range(0, tokens, size):
        part = [x[start : start + size] if size > 1 else x[start] for x in inputs]
        state, y, factor, passed_on = step(state, *part)
        ys.append(y.value)
        bounds.append(y.error + (passed_on * error)[:, None])
        error = factor * error + np.linalg.norm(state.error)
        state = Bounded(state.value)
    return np.concatenate(ys), np.concatenate(bounds), state.value, error


def make_case(rng, batch, tokens, key_heads, heads, key_dim, value_dim, decay, repeat_keys=False, beta=None):
    def unit(x):
        return x / norm(x)[..., None]

    k = unit(rng.normal(size=(batch, 1 if repeat_keys else tokens, key_heads, key_dim)))
    k = np.broadcast_to(k, (batch, tokens, key_heads, key_dim))
    q = unit(rng.normal(size=(batch, tokens, key_heads, key_dim))) / np.sqrt(key_dim)
    v = rng.normal(size=(batch, tokens, heads, value_dim))
    g = {
        "none": np.ones((batch, tokens, heads)),
        "slow": rng.uniform(0.99, 1, (batch, tokens, heads)),
        "any": rng.uniform(0, 1, (batch, tokens, heads)),
        "zeros": rng.uniform(0, 1, (batch, tokens, heads)) * (rng.uniform(size=(batch, tokens, heads)) < 0.9),
        "extreme": np.exp(-np.exp(rng.uniform(-20, 6, (batch, tokens, heads)))),
    }[decay]
    b = rng.uniform(0, 1, (batch, tokens, heads)) if beta is None else np.full((batch, tokens, heads), beta)
    state = rng.normal(size=(batch, heads, value_dim, key_dim))
    return [np.float32(x) for x in (q, k, v, g, b, state)]


def rms(x):
    return np.sqrt(np.mean(np.square(x), dtype=np.float64))


def check(case, mask=None, tight=False):
    """Errors are within the derived bounds, which a wrong term exceeds a thousandfold where decays forget (`tight`).
    Without decay the bounds grow with every chunk, so the errors are also held to the loop's own: over many cases the
    chunked form has 0.6 to 3.5 times its root-mean-square error (0.9 to 1.3 in 64 dimensions)."""
    q, k, v, g, beta, state = case
    arrays = [mx.array(x) for x in case]
    mx_mask = None if mask is None else mx.array(mask)
    chunked = [np.array(x) for x in gated_delta.chunked_gated_delta(*arrays, mx_mask)]
    loop = [np.array(x) for x in gated_delta._loop(*arrays, mx_mask)]
    assert chunked[0].shape == loop[0].shape and chunked[1].shape == loop[1].shape
    batch, tokens, heads = g.shape
    group = heads // k.shape[2]
    size = min(gated_delta.CHUNK, 1 << (tokens - 1).bit_length())
    shown = np.ones((batch, tokens), bool) if mask is None else mask
    assert (chunked[0][~shown] == 0).all()
    errors, loop_errors = [], []
    for b, h in np.ndindex(batch, heads):
        head = [x.copy() for x in (q[b, :, h // group], k[b, :, h // group], v[b, :, h], g[b, :, h], beta[b, :, h])]
        for x, hidden in zip(head, (0, 0, 0, 1, 0), strict=False):  # a hidden token: no decay, nothing written
            x[~shown[b]] = hidden
        exact, loop_bound, exact_state, loop_state_bound = exact_and_bound(token_step, 1, *head, state[b, h])
        _, bound, _, state_bound = exact_and_bound(chunk_step, size, *head, state[b, h])
        exact, loop_bound, bound = exact[shown[b]], loop_bound[shown[b]], bound[shown[b]]
        error = chunked[0][b, shown[b], h] - exact
        assert (np.abs(error) <= bound).all()
        assert (np.abs(chunked[0][b, shown[b], h] - loop[0][b, shown[b], h]) <= bound + loop_bound).all()
        assert np.linalg.norm(chunked[1][b, h] - exact_state) <= state_bound
        assert np.linalg.norm(chunked[1][b, h] - loop[1][b, h]) <= state_bound + loop_state_bound
        if tight:
            assert np.median(bound) < 1e-4 * rms(exact)
        errors += [error, 0.1 * (chunked[1][b, h] - exact_state)]
        loop_errors += [loop[0][b, shown[b], h] - exact, 0.1 * (loop[1][b, h] - exact_state)]
    floor = UNIT * rms(v)
    assert (
        rms(np.concatenate([x.ravel() for x in errors]))
        <= 5 * rms(np.concatenate([x.ravel() for x in loop_errors])) + floor
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    tokens=st.integers(2, 150),
    heads=st.sampled_from([(1, 1), (2, 2), (1, 3), (2, 4)]),
    dims=st.sampled_from([(8, 8), (64, 64), (32, 16), (16, 48)]),
    decay=st.sampled_from(["none", "slow", "any", "zeros", "extreme"]),
    masked=st.booleans(),
)
def test_equals_loop(seed, batch, tokens, heads, dims, decay, masked):
    rng = np.random.default_rng(seed)
    mask = rng.uniform(size=(batch, tokens)) < 0.7 if masked else None
    check(make_case(rng, batch, tokens, *heads, *dims, decay), mask)


@pytest.mark.parametrize("tokens", [63, 64, 65, 128, 192])
@pytest.mark.parametrize("decay", ["none", "zeros", "extreme"])
def test_chunk_edges(tokens, decay):
    check(make_case(np.random.default_rng(tokens), 1, tokens, 1, 2, 32, 32, decay), tight=decay != "none")


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_repeated_keys(beta):
    """The same key in every token makes the triangular system as bad as it gets."""
    check(make_case(np.random.default_rng(5), 1, 128, 1, 1, 64, 64, "none", repeat_keys=True, beta=beta))


def test_long_sequence_in_parts():
    check(make_case(np.random.default_rng(6), 1, 5000, 1, 1, 32, 32, "slow"))


def test_left_padding_with_nan():
    """What a hidden token holds has no influence, NaN included."""
    q, k, v, g, beta, state = make_case(np.random.default_rng(7), 1, 100, 1, 1, 32, 32, "any")
    mask = np.arange(100)[None] >= 37
    shown = [mx.array(x[:, 37:]) for x in (q, k, v, g, beta)]
    expected, expected_state = gated_delta._loop(*shown, mx.array(state))
    for x in (k, v, g, beta):
        x[:, :37] = np.nan
    y, new_state = gated_delta.chunked_gated_delta(*map(mx.array, (q, k, v, g, beta, state)), mx.array(mask))
    assert np.allclose(y[:, 37:], expected, atol=1e-5) and np.allclose(new_state, expected_state, atol=1e-5)
    assert not np.isnan(np.array(y)).any()


@pytest.mark.parametrize("cuts", [(64,), (1, 63, 100), (17, 90, 91), (128,)])
def test_state_carries_over(cuts):
    case = make_case(np.random.default_rng(8), 2, 200, 2, 4, 32, 32, "slow")
    *inputs, state = [mx.array(x) for x in case]
    whole, whole_state = gated_delta.chunked_gated_delta(*inputs, state)
    ys = []
    for start, stop in zip((0, *cuts), (*cuts, 200), strict=False):
        y, state = gated_delta.chunked_gated_delta(*(x[:, start:stop] for x in inputs), state)
        ys.append(y)
    q, k, v, g, beta, first = case
    for b in range(2):
        for h in range(4):
            head = [q[b, :, h // 2], k[b, :, h // 2], v[b, :, h], g[b, :, h], beta[b, :, h]]
            _, bound, _, state_bound = exact_and_bound(chunk_step, 64, *head, first[b, h])
            # Other cuts round elsewhere, so either side has its own error; single tokens round less than chunks.
            difference = np.abs(np.array(mx.concatenate(ys, axis=1)) - np.array(whole))[b, :, h]
            assert (difference <= 4 * bound.max()).all() and rms(difference) < 1e-6
            assert np.linalg.norm(np.array(state - whole_state)[b, h]) <= 4 * state_bound


def test_dtypes():
    case = make_case(np.random.default_rng(9), 1, 70, 1, 1, 32, 32, "any")
    for dtype in (mx.float16, mx.bfloat16):
        q, k, v, g, beta = (mx.array(x).astype(dtype) for x in case[:5])
        y, state = gated_delta.chunked_gated_delta(q, k, v, g, beta)
        assert y.dtype == dtype and state.dtype == mx.float32
        exact = gated_delta.chunked_gated_delta(*(x.astype(mx.float32) for x in (q, k, v, g, beta)))[0]
        assert np.array_equal(np.array(y.astype(mx.float32)), np.array(exact.astype(dtype).astype(mx.float32)))


def test_gradient():
    """Training reaches the loop, so the chunked form must have a gradient: equal to the loop's."""
    case = [mx.array(x) for x in make_case(np.random.default_rng(10), 1, 20, 1, 1, 8, 8, "slow")]

    def loss(function):
        return mx.grad(lambda *x: function(*x)[0].square().sum(), argnums=[0, 1, 2, 3, 4])(*case)

    for ours, theirs in zip(loss(gated_delta.chunked_gated_delta), loss(gated_delta._loop), strict=False):
        assert np.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(mx.abs(theirs).max()))


def test_bad_shapes():
    q, k, v, g, beta, state = (mx.array(x) for x in make_case(np.random.default_rng(0), 1, 8, 2, 4, 8, 8, "any"))
    with pytest.raises(ValueError, match=r"a multiple of Hk.*\(1, 8, 3, 8\)"):
        gated_delta.chunked_gated_delta(q, k, v[:, :, :3], g, beta)
    with pytest.raises(ValueError, match=r"g and beta must be .*\(1, 8, 4\)"):
        gated_delta.chunked_gated_delta(q, k, v, g[:, :4], beta)


@pytest.fixture
def chunked():
    gated_delta.enable_chunked_recurrence()
    yield
    gated_delta.disable_chunked_recurrence()


def test_replaces_the_loop_only_where_it_should(chunked, monkeypatch):
    calls = []
    monkeypatch.setattr(gated_delta, "_loop", lambda *args: calls.append("loop"))
    monkeypatch.setattr(gated_delta, "chunked_gated_delta", lambda *args: calls.append("chunked"))
    inputs = [mx.array(x) for x in make_case(np.random.default_rng(0), 1, 8, 1, 1, 8, 8, "any")[:5]]
    mlx_lm_gated_delta.gated_delta_ops(*inputs)
    mlx_lm_gated_delta.gated_delta_ops(*(x[:, :1] for x in inputs))
    q, k, v, g, beta = inputs
    mlx_lm_gated_delta.gated_delta_ops(q, k, v, mx.ones((1, 8, 1, 8)), beta)
    assert calls == ["chunked", "loop", "loop"]
    gated_delta.disable_chunked_recurrence()
    assert mlx_lm_gated_delta.gated_delta_ops is not gated_delta._gated_delta_ops


def test_option_of_enable(model):
    """The option switches it on, once all else is checked; leaving it out or disabling a model does not switch it off."""
    loop = mlx_lm_gated_delta.gated_delta_ops
    try:
        enable(model)
        assert mlx_lm_gated_delta.gated_delta_ops is loop
        with pytest.raises(ValueError, match="got 7"):
            enable(model, 7, chunked_recurrence=True)
        with pytest.raises(ValueError, match="must belong to slots"):
            enable(model, calibration={0: None}, chunked_recurrence=True)
        assert mlx_lm_gated_delta.gated_delta_ops is loop
        enable(model, chunked_recurrence=True)
        assert mlx_lm_gated_delta.gated_delta_ops is gated_delta._gated_delta_ops
        enable(model)
        disable(model)
        assert mlx_lm_gated_delta.gated_delta_ops is gated_delta._gated_delta_ops
    finally:
        disable(model)
        gated_delta.disable_chunked_recurrence()
    assert mlx_lm_gated_delta.gated_delta_ops is loop


@pytest.fixture(scope="module")
def model():
    model, _ = load(str(MODEL))
    model.set_dtype(mx.float32)
    return model


def test_knows_models_with_the_recurrence(model, chunked):
    assert gated_delta.enable_chunked_recurrence(model)
    from mlx_lm.models import llama

    sizes = dict(hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_attention_heads=1, rms_norm_eps=1e-5)
    other = llama.Model(llama.ModelArgs(model_type="llama", vocab_size=8, **sizes))
    assert not gated_delta.enable_chunked_recurrence(other)


def test_bundled_model_logits(model):
    """The logits of a prompt in two parts and of one more token, two rows at a time, as with mlx-lm's loop."""
    assert qwen3_5.gated_delta_update is mlx_lm_gated_delta.gated_delta_update
    tokens = mx.random.randint(0, 8192, (2, 150), key=mx.random.key(3))

    def logits():
        cache = model.make_cache()
        parts = [(0, 130), (130, 149), (149, 150)]
        return mx.concatenate([model(tokens[:, i:j], cache=cache) for i, j in parts], axis=1)

    loop = logits()
    mx.eval(loop)
    gated_delta.enable_chunked_recurrence()
    try:
        ours = logits()
        mx.eval(ours)
    finally:
        gated_delta.disable_chunked_recurrence()
    # Measured: 3e-5 on logits whose standard deviation is 3.5; float32 rounding through eight layers.
    assert float(mx.abs(ours - loop).max()) < 1e-4
