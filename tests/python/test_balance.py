"""Balance: what makes it best, what RoPE does to moments, and what is said about models that plain codes ruin."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import qwen2
from turboquant_mlx import calibration, disable, enable
from turboquant_mlx.calibration import balance, default

DIM = 64


def spread(seed, powers):
    """A second moment (DIM, DIM) of these powers in random directions."""
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(DIM, DIM)))
    return (turn * powers) @ turn.T


def cost(a, queries, keys):
    inverse = np.linalg.inv(a)
    return np.trace(a.T @ keys @ a) * np.trace(inverse @ queries @ inverse.T)


def test_no_map_beside_it_costs_less():
    queries, keys = spread(0, np.geomspace(1, 300, DIM)), spread(1, np.geomspace(1, 3000, DIM))
    a = balance.of_moments(queries, keys)
    assert np.allclose(a, a.T)
    assert np.isclose(np.trace(a @ keys @ a), np.trace(keys), rtol=1e-2)  # up to the ridge
    least = cost(a, queries, keys)
    assert least < 0.5 * cost(np.eye(DIM), queries, keys)
    rng = np.random.default_rng(2)
    for _ in range(20):
        near = a + 0.05 * np.linalg.norm(a) / DIM * rng.normal(size=(DIM, DIM))
        assert cost(near, queries, keys) > least


@pytest.mark.parametrize("traditional", [False, True])
def test_turned_moments_are_those_of_later_positions(traditional):
    class Attention:
        rope = nn.RoPE(DIM, traditional=traditional, base=1000.0)

    x = mx.random.normal((1, 2, 50, DIM), key=mx.random.key(0)) + 1.0
    here, later = (np.array(Attention.rope(x, offset=n)).astype(np.float64) for n in (0, 700))
    moment, mean = (lambda y: np.einsum("bhni,bhnj->hij", y, y) / 50), (lambda y: y.mean((0, 2)))
    turn = balance.turns(Attention, DIM, [0, 700])
    both, means = balance.turned(turn, [0.25, 0.75], moment(here), mean(here))
    assert np.allclose(both, 0.25 * moment(here) + 0.75 * moment(later), atol=1e-3)
    assert np.allclose(means, 0.25 * mean(here) + 0.75 * mean(later), atol=1e-4)


def test_offsets_reach_the_context():
    found, weights = balance.offsets(512, 8192)
    assert found == [0, 512, 1536, 3584, 7680] and np.isclose(weights.sum(), 1) and weights[0] == 4 * weights[1]
    assert balance.offsets(512, 512)[0] == balance.offsets(512, 0)[0] == [0]
    assert balance.turns(object(), DIM, [0, 1]) is None


def model_with_key_bias(size):
    args = qwen2.ModelArgs("qwen2", 128, 2, 256, 2, 1e-6, 500, 2, max_position_embeddings=512)
    mx.random.seed(0)
    model = qwen2.Model(args)
    slow = mx.arange(2 * DIM) % (DIM // 2) >= 24  # where RoPE hardly turns them, as in Qwen2.5
    for layer in model.layers:
        layer.self_attn.k_proj.bias = size * slow * mx.random.normal((2 * DIM,))
    return model


class Letters:
    """A tokenizer whose texts begin with token 1."""

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [2 + ord(letter) % 400 for letter in text]


def test_a_model_that_plain_codes_ruin_is_calibrated_or_named(recwarn):
    model = model_with_key_bias(60)
    assert sorted(calibration.steady_keys(model)) == [0, 1]
    assert not calibration.steady_keys(model_with_key_bias(0))
    try:
        enable(model)
        (warning,) = recwarn
        assert "plain codes ruin this model: the keys of layers 0 (" in str(warning.message)
        enable(model, tokenizer=Letters())
        assert len(recwarn) == 1
        tokens = mx.random.randint(0, 400, (1, 60), key=mx.random.key(1))
        exact = model(tokens)
        found = {}
        for name, caches in (("calibrated", model.make_cache()), ("plain", None)):
            if caches is None:
                disable(model)
                enable(model)
                caches = model.make_cache()
            found[name] = mx.abs(model(tokens, cache=caches) - exact).mean().item()
    finally:
        disable(model)
    assert found["calibrated"] < 0.5 * found["plain"]


def test_windows_begin_as_texts_begin():
    assert default.beginning(Letters()) == [1]
    windows = default.windows_of(Letters(), "abcdefghij" * 10, 3, 8)
    assert windows.shape == (3, 8) and set(windows[:, 0].tolist()) == {1}
    assert (windows[:, 1:] != 1).all()
    with pytest.raises(ValueError, match="a window takes 200 tokens; the text has 100"):
        default.windows_of(Letters(), "abcdefghij" * 10, 3, 200)
