"""Centres: the means they are said to be, the file that keeps them, and what they must not change."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.models.cache import KVCache
from turboquant_mlx import attention, calibration, decode, disable, enable, encode
from turboquant_mlx.gated_delta import disable_chunked_recurrence, enable_chunked_recurrence

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "qwen35-tiny-4bit"


@pytest.fixture(scope="module")
def model():
    enable_chunked_recurrence()
    model, _ = load(str(MODEL))
    model.set_dtype(mx.float32)
    yield model
    disable_chunked_recurrence()


@pytest.fixture(scope="module")
def tokens():
    return mx.random.randint(0, 8192, (2, 120), key=mx.random.key(0))


@pytest.fixture(scope="module")
def centres(model, tokens):
    return calibration.calibrate(model, tokens)


def test_centres_are_the_means(model, tokens, centres):
    caches = model.make_cache()
    mx.eval(model(tokens, cache=caches))
    assert sorted(centres) == [i for i, c in enumerate(caches) if isinstance(c, KVCache)] == [3, 7]
    for slot, sides in centres.items():
        for side, history in zip(sides, caches[slot].state[:2], strict=True):
            assert side.shape == (2, 256) and side.dtype == mx.float32
            own = np.array(history[:, :, : tokens.shape[1]])
            assert np.allclose(side, own.mean((0, 2), dtype=np.float64), atol=1e-5)


def test_do_not_depend_on_chunks_or_on_enable(model, tokens, centres):
    enable(model, bits=2)
    try:
        again = calibration.calibrate(model, tokens, step=17)
        assert "TurboQuantKVCache" in {type(c).__name__ for c in model.make_cache()}
    finally:
        disable(model)
    for slot in centres:
        for a, b in zip(centres[slot], again[slot], strict=True):
            assert np.allclose(a, b, atol=1e-4)


def test_file(tmp_path, centres):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(MODEL / name)
    with pytest.raises(FileNotFoundError, match="calibrate"):
        calibration.load_centres(tmp_path)
    path = calibration.save_centres(centres, tmp_path, source="random tokens")
    assert path == tmp_path / calibration.FILE_NAME
    back = calibration.load_centres(tmp_path)
    assert sorted(back) == sorted(centres)
    assert all(mx.array_equal(a, b) for slot in centres for a, b in zip(centres[slot], back[slot], strict=True))
    # It belongs to one model, wherever the file lies.
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    with pytest.raises(ValueError, match="was made for the model"):
        calibration.load_centres(path, directory=other)
    calibration.load_centres(path, directory=MODEL)
    mx.save_safetensors(str(other / "x.safetensors"), {"a": mx.zeros(1)})
    with pytest.raises(ValueError, match="must hold 'turboquant centres 1'; it holds None"):
        calibration.load_centres(other / "x.safetensors", directory=MODEL)


def test_bundled_file_belongs_to_the_bundled_model():
    bundled = calibration.load_centres(MODEL)
    assert sorted(bundled) == [3, 7] and all(c.shape == (2, 256) for sides in bundled.values() for c in sides)


def test_bad_input(model, tmp_path):
    with pytest.raises(ValueError, match="no tokens"):
        calibration.calibrate(model, [])
    with pytest.raises(ValueError, match="holds no model"):
        calibration.fingerprint(tmp_path)


def test_command(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The functions of this section deal with connections. " * 40)
    arguments = ["--model", str(MODEL), "--text", str(text), "--length", "64", "--windows", "2"]
    out = tmp_path / "centres.safetensors"
    assert calibration.main([*arguments, "--out", str(out)]) == 0
    assert "2 windows of 64 tokens" in capsys.readouterr().out
    assert sorted(calibration.load_centres(out, directory=MODEL)) == [3, 7]
    for extra, message in (
        (["--out", str(tmp_path / "nowhere" / "x.safetensors")], "nowhere"),
        (["--out", str(text / "x.safetensors")], "text.txt"),
        (["--length", "100000"], "a window takes 100000 tokens; the text has"),
        (["--windows", "0"], "must be at least 1"),
        (["--text", str(tmp_path / "none.txt")], "none.txt"),
    ):
        assert calibration.main([*arguments, "--out", str(tmp_path / "other.safetensors"), *extra]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other.safetensors").exists()


def test_a_constant_costs_nothing():
    """Attention over codes with centres is attention over the decoded vectors, and a large constant leaves no error."""
    key = mx.random.key(4)
    noise = mx.random.normal((1, 2, 40, 64), key=key)
    centre = 30 * mx.random.normal((2, 64), key=mx.random.key(5))
    x = noise + centre[None, :, None]
    q = mx.random.normal((1, 4, 3, 64), key=mx.random.key(6))
    packed = encode(x, 4, centre=centre)
    x_hat = decode(*packed, 4, centre=centre)
    error = float(mx.square(x_hat - x).mean())
    assert error < 0.0098 * float(mx.square(noise).mean())
    assert error < 0.01 * float(mx.square(decode(*encode(x, 4), 4) - x).mean())
    ours = attention(q, packed, packed, scale=0.125, key_bits=4, value_bits=4, key_centre=centre, value_centre=centre)
    plain = mx.fast.scaled_dot_product_attention(q, x_hat, x_hat, scale=0.125)
    assert float(mx.abs(ours - plain).max()) < 5e-4 * float(mx.abs(plain).max())


def test_prompt_in_chunks_gives_the_same_cache(model, tokens, centres):
    """Centres are constants, so how a prompt was cut leaves no trace beyond codes at a threshold."""
    enable(model, bits=3, centres=centres)
    try:
        whole, parts = model.make_cache(), model.make_cache()
        one = model(tokens, cache=whole)[:, -1]
        for a, b in ((0, 50), (50, 51), (51, 120)):
            two = model(tokens[:, a:b], cache=parts)[:, -1]
    finally:
        disable(model)
    decoded = [c[3].to_float(mx.float32).keys for c in (whole, parts)]
    assert float(mx.square(decoded[0] - decoded[1]).mean()) < 1e-3 * float(mx.square(decoded[0]).mean())
    assert mx.array_equal(mx.argmax(one, -1), mx.argmax(two, -1))
