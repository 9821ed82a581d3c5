"""Feedback: the matrices it is made from, against direct computations, and caches that use it."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models import base, qwen3_next
from mlx_lm.models.cache import KVCache
from small_models import FAMILIES, greedy, prompt, small_llama
from turboquant_mlx import TurboQuantKVCache, calibration, decode, disable, enable, encode
from turboquant_mlx.calibration import feedback
from turboquant_mlx.calibration.moments import SINKS
from turboquant_mlx.overlay.saving import load_prompt_cache, save_prompt_cache

pytestmark = pytest.mark.quick


def random_feedback(heads, dim, seed=0):
    return (0.06 * mx.random.normal((heads, dim, dim), key=mx.random.key(seed))).astype(mx.float16)


def vectors(tokens, heads=2, dim=64, seed=1, dtype=mx.float32):
    return mx.random.normal((1, heads, tokens, dim), key=mx.random.key(seed)).astype(dtype)


def cost(x, packed, metric):
    """e' S e summed over the vectors of each head."""
    e = np.array(decode(*packed, 3) - x, np.float64)[0]
    return np.einsum("hni,hij,hnj->h", e, metric, e)


@pytest.mark.parametrize("dim", [64, 96, 256])
def test_rotation_is_the_one_that_codes_live_in(dim):
    turn = feedback.rotation(dim, 7)
    assert np.allclose(turn @ turn.T, np.eye(dim), atol=1e-12)
    x = np.array(vectors(1, 1, dim))[0, 0, 0]
    codes, scale = encode(mx.array(x), 4, seed=7)
    x_hat = np.array(decode(codes, scale, 4, seed=7), np.float64)
    levels = turn @ x_hat / (float(scale) / 32)  # whole numbers in the right basis alone
    assert np.abs(levels - np.round(levels)).max() < 0.05


@pytest.mark.parametrize("dim", [64, 160])
def test_feedback_of_a_metric_is_a_block_triangle(dim):
    """With L unit lower and C its diagonal, S' = L' D L; within blocks nothing is fed back, so G = blockdiag(L)^-1 L."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(dim, 10))
    metric = half @ half.T
    g = feedback.of_metric(metric, 3)
    blocks = np.arange(dim) // 32
    below = blocks[:, None] > blocks[None]
    assert (g[~below] == 0).all() and (g[below] != 0).all()
    turn = feedback.rotation(dim, 3)
    turned = turn @ metric @ turn.T
    turned += 0.1 * np.trace(turned) / dim * np.eye(dim)
    # (I + G)' B (I + G) = S' with B block-diagonal: what is left after blocks before were made up for.
    whole = np.linalg.inv(np.eye(dim) + g)
    rest = whole.T @ turned @ whole
    assert np.abs(rest[blocks[:, None] != blocks[None]]).max() < 1e-9 * np.abs(rest).max()


def test_errors_cost_less_by_the_metric():
    rng = np.random.default_rng(1)
    half = rng.normal(size=(2, 128, 12))
    metric = half @ half.swapaxes(1, 2)
    g = feedback.of_metrics(metric, 0)
    x = vectors(300, 2, 128)
    assert (cost(x, encode(x, 3, feedback=g), metric) < 0.6 * cost(x, encode(x, 3), metric)).all()
    assert feedback.of_metrics(metric[:, :32, :32], 0) is None  # one block
    assert feedback.of_metrics(metric * np.nan, 0) is None and feedback.of_metrics(None, 0) is None


class Spy:
    """Keeps the arguments of every attention."""

    def __init__(self, monkeypatch):
        self.queries = []
        inner = base.scaled_dot_product_attention

        def spied(queries, keys, values, cache, scale, mask, sinks=None):
            self.queries.append(queries)
            return inner(queries, keys, values, cache, scale, mask, sinks)

        monkeypatch.setattr("mlx_lm.models.llama.scaled_dot_product_attention", spied)


def test_metrics_of_a_small_model(monkeypatch):
    """Against sums over all queries and the weights themselves, without the calibration's own arithmetic."""
    model, tokens = small_llama(), mx.array([prompt(50), prompt(50, seed=2)])
    found = calibration.calibrate(model, tokens, seed=5, balance=False, positions=0)
    spy = Spy(monkeypatch)
    mx.eval(model(tokens, cache=[KVCache() for _ in model.layers]))
    for slot, layer in enumerate(model.layers):
        q = np.array(spy.queries[slot], np.float64)  # (2, 4, 50, 64)
        out = np.array(layer.self_attn.o_proj.weight, np.float64)  # (128, 256)
        for head in range(2):
            own = q[:, 2 * head : 2 * head + 2, SINKS:].reshape(-1, 64)
            metric = sum(np.outer(row, row) for row in own) / len(own)
            assert np.allclose(found[slot].key_feedback[head], feedback.of_metric(metric, 5), atol=2e-3)
            columns = [out[:, 64 * h : 64 * h + 64] for h in (2 * head, 2 * head + 1)]
            metric = sum(part.T @ part for part in columns)
            assert np.allclose(found[slot].value_feedback[head], feedback.of_metric(metric, 5), atol=2e-3)


def small_gated():
    sizes = dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=64, rms_norm_eps=1e-6)
    rope = dict(partial_rotary_factor=0.5, rope_theta=1e4, rope_scaling=None, max_position_embeddings=100)
    args = type("Args", (), sizes | rope | {"attention_bias": False})
    mx.random.seed(3)
    return qwen3_next.Qwen3NextAttention(args)


def test_metric_of_values_behind_a_gate():
    """M is E[(Wo (g * e))^2] as a quadratic form: judged by random errors instead of its own formula."""
    attention = small_gated()
    x = mx.random.normal((2, 30, 48), key=mx.random.key(2))
    with feedback.Output(attention) as output:
        before = attention(x)
    assert mx.array_equal(before, attention(x)) and isinstance(attention.q_proj, nn.Linear)
    metrics = output.metrics(2, 64, 60)
    y = np.array(attention.q_proj(x), np.float64).reshape(60, 4, 128)
    gates = 1 / (1 + np.exp(-y[:, :, 64:]))
    weight = np.array(attention.o_proj.weight, np.float64).reshape(48, 4, 64)
    for head in range(2):
        for e in np.random.default_rng(0).normal(size=(3, 64)):
            moved = [np.einsum("oi,ni->no", weight[:, h], gates[:, h] * e) for h in (2 * head, 2 * head + 1)]
            want = sum(np.square(m).sum() for m in moved) / 60
            assert e @ metrics[head] @ e == pytest.approx(want, rel=1e-5)


def test_what_is_not_understood_is_left_out():
    """Attention of every family gives keys' feedback; values' only where the way to the hidden state is known."""
    without = {"gemma3n, shared keys and values"}
    for name, build in FAMILIES.items():
        found = calibration.calibrate(build(), mx.array([prompt(40)]))
        for c in found.values():
            one_block = c.key_centre.shape[-1] == 32
            assert (c.key_feedback is None) == one_block, name
            assert (c.value_feedback is None) == (one_block or name in without), name
    attention = small_gated()
    attention.g_proj = nn.Linear(4, 4)
    attention.q_proj = nn.Linear(48, 256)
    assert not feedback.Output(attention).known
    attention.q_proj = nn.Linear(48, 512)
    assert feedback.Output(attention).known and feedback.Output(attention).gated
    assert not feedback.Output(type("Other", (qwen3_next.Qwen3NextAttention,), {})(_args(attention))).known


def _args(attention):
    rope = dict(partial_rotary_factor=0.5, rope_theta=1e4, rope_scaling=None, max_position_embeddings=100)
    sizes = dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=64, rms_norm_eps=1e-6)
    return type("Args", (), sizes | rope | {"attention_bias": False})


def test_calibration_leaves_no_trace():
    model = small_llama()
    before = base.quantized_scaled_dot_product_attention, base.scaled_dot_product_attention
    calibration.calibrate(model, mx.array(prompt(20)))
    assert before == (base.quantized_scaled_dot_product_attention, base.scaled_dot_product_attention)
    assert all(type(layer.self_attn.q_proj) is nn.Linear for layer in model.layers)


def test_codes_do_not_depend_on_chunks_or_on_the_batch():
    g = (random_feedback(2, 64), random_feedback(2, 64, 1))
    keys, values = vectors(70, seed=3), vectors(70, seed=4)
    whole = TurboQuantKVCache(feedback=g)
    whole.update_and_fetch(keys, values)
    parts = TurboQuantKVCache(feedback=g)
    for start, stop in ((0, 1), (1, 38), (38, 39), (39, 70)):
        parts.update_and_fetch(keys[:, :, start:stop], values[:, :, start:stop])
    other = TurboQuantKVCache(feedback=(g[0] + 0, g[1]))  # equal, though another array
    other.update_and_fetch(vectors(9, seed=5), vectors(9, seed=6))
    batch = TurboQuantKVCache.merge([other, whole])
    for cache in (parts, batch.extract(1), copy.deepcopy(whole)):
        for a, b in zip(cache._core.view().arrays, whole._core.view().arrays, strict=True):
            assert mx.array_equal(a, b)
    more = vectors(1, seed=7)
    batch.update_and_fetch(mx.concatenate([vectors(1, seed=8), more]), mx.concatenate([vectors(1, seed=9), more]))
    whole.update_and_fetch(more, more)
    for a, b in zip(batch.extract(1)._core.view().arrays, whole._core.view().arrays, strict=True):
        assert mx.array_equal(a, b)
    plain = TurboQuantKVCache()
    plain.update_and_fetch(keys, values)
    assert plain.nbytes == parts.nbytes
    assert not mx.array_equal(plain._core.view().arrays[0], parts._core.view().arrays[0])
    assert all(mx.array_equal(a, b) for a, b in zip(batch.feedback, g, strict=True))
    centred = TurboQuantKVCache(centres=(mx.ones((2, 64)), None))
    assert centred.centres[1] is None and mx.array_equal(centred.centres[0], mx.ones((2, 64)))


def test_wrong_shapes_are_refused_by_the_first_vectors():
    for wrong in (random_feedback(3, 64), random_feedback(2, 96)):
        cache = TurboQuantKVCache(feedback=(None, wrong))
        with pytest.raises(ValueError, match=r"value_feedback must have shape \(2,64,64\); got"):
            cache.update_and_fetch(vectors(3), vectors(3))
        assert cache.empty()


def test_a_restored_prompt_goes_on_as_if_never_saved(tmp_path):
    model = small_llama()
    found = calibration.calibrate(model, mx.array([prompt(60, seed=4)]))
    enable(model, 3, calibration=found)
    try:
        caches = model.make_cache()
        assert all(mx.array_equal(a, b) for a, b in zip(caches[0].feedback, found[0].feedback, strict=True))
        greedy(model, prompt(40), 1, caches)
        save_prompt_cache(str(tmp_path / "p.safetensors"), caches)
        back = load_prompt_cache(tmp_path / "p.safetensors", model)
        assert all(mx.array_equal(a, b) for a, b in zip(back[1].feedback, found[1].feedback, strict=True))
        assert greedy(model, [7], 12, back) == greedy(model, [7], 12, caches)
        for a, b in zip(back, caches, strict=True):
            for x, y in zip(a.state[:-1], b.state[:-1], strict=True):
                assert x is y is None or mx.array_equal(x, y)
    finally:
        disable(model)
    enable(model, 3, seed=6)  # its feedback would be for other signs
    with pytest.raises(ValueError, match="made for seed 0; got 6"):
        enable(model, 3, seed=6, calibration=found)
    enable(model, 3, seed=6, calibration={slot: c.without_feedback() for slot, c in found.items()})
