"""Centres and feedback: that they are what they are said to be, the file that keeps them, what they must not change."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.models.cache import KVCache
from turboquant_mlx import attention, calibration, decode, disable, enable, encode
from turboquant_mlx.calibration import command as calibration_command
from turboquant_mlx.calibration.moments import SINKS
from turboquant_mlx.overlay.gated_delta import disable_chunked_recurrence, enable_chunked_recurrence

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
def calibrated(model, tokens):
    return calibration.calibrate(model, tokens, balance=False, positions=0)


def test_centres_are_the_means(model, tokens, calibrated):
    caches = model.make_cache()
    mx.eval(model(tokens, cache=caches))
    assert sorted(calibrated) == [i for i, c in enumerate(caches) if isinstance(c, KVCache)] == [3, 7]
    for slot, found in calibrated.items():
        for side, history in zip(found.centres, caches[slot].state[:2], strict=True):
            assert side.shape == (2, 256) and side.dtype == mx.float32
            own = np.array(history[:, :, SINKS : tokens.shape[1]])  # the sinks are not counted
            assert np.allclose(side, own.mean((0, 2), dtype=np.float64), atol=1e-5)


def test_do_not_depend_on_chunks_or_on_enable(model, tokens, calibrated):
    enable(model, bits=2)
    try:
        again = calibration.calibrate(model, tokens, step=17, balance=False, positions=0)
        assert "TurboQuantKVCache" in {type(c).__name__ for c in model.make_cache()}
    finally:
        disable(model)
    for slot in calibrated:
        for a, b in zip(calibrated[slot].centres, again[slot].centres, strict=True):
            assert np.allclose(a, b, atol=1e-4)
        for a, b in zip(calibrated[slot].feedback, again[slot].feedback, strict=True):
            assert np.allclose(a, b, atol=2e-3)
    alone = calibration.calibrate(model, tokens, feedback=False)
    assert all(c.feedback is None and c.key_centre is not None for c in alone.values())


def test_file(tmp_path, calibrated):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(MODEL / name)
    with pytest.raises(FileNotFoundError, match="calibrate"):
        calibration.load_calibration(tmp_path)
    path = calibration.save_calibration(calibrated, tmp_path, source="random tokens")
    assert path == tmp_path / calibration.FILE_NAME
    back = calibration.load_calibration(tmp_path)
    assert sorted(back) == sorted(calibrated)
    for slot, found in calibrated.items():
        assert all(mx.array_equal(a, b) for a, b in zip(found[:4], back[slot][:4], strict=True))
        assert back[slot].key_map is None
        assert back[slot].key_feedback.dtype == mx.float16 and back[slot].seed == 0
    alone = {3: calibrated[3].without_feedback(), 7: calibrated[7]._replace(value_feedback=None)}
    calibration.save_calibration(alone, tmp_path)
    back = calibration.load_calibration(tmp_path)
    assert back[3].feedback is None and back[7].value_feedback is None and back[7].key_feedback is not None
    with pytest.raises(ValueError, match=r"calibrated for one seed; got \[0, 4\]"):
        calibration.save_calibration({3: calibrated[3], 7: calibrated[7]._replace(seed=4)}, tmp_path)
    # It belongs to one model, wherever the file lies.
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    with pytest.raises(ValueError, match="was made for the model"):
        calibration.load_calibration(path, directory=other)
    calibration.load_calibration(path, directory=MODEL)
    for held in (None, "turboquant centres 1"):
        mx.save_safetensors(str(other / "x.safetensors"), {"a": mx.zeros(1)}, {"format": held} if held else {})
        with pytest.raises(ValueError, match=f"must hold 'turboquant calibration 3'; it holds {held!r}: make it with"):
            calibration.load_calibration(other / "x.safetensors", directory=MODEL)


@pytest.mark.parametrize("kind", [str, Path])
def test_enable_takes_the_file(tmp_path, model, kind):
    """A file or the folder that holds it, checked against weights that lie beside it."""
    expected = calibration.load_calibration(MODEL)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(MODEL / calibration.FILE_NAME, alone)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(alone, other / calibration.FILE_NAME)
    (other / "config.json").write_text("{}")
    (other / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    try:
        for where in (MODEL, MODEL / calibration.FILE_NAME, alone):
            enable(model, bits=3, calibration=kind(where))
            for slot, c in enumerate(model.make_cache()):
                if slot in expected:
                    found = expected[slot]
                    assert all(mx.array_equal(a, b) for a, b in zip(c.centres, found.centres, strict=True))
                    assert all(mx.array_equal(a, b) for a, b in zip(c.feedback, found.feedback, strict=True))
        with pytest.raises(ValueError, match="was made for the model"):
            enable(model, bits=3, calibration=kind(other))
        with pytest.raises(FileNotFoundError, match="there is no .*nowhere"):
            enable(model, bits=3, calibration=kind(tmp_path / "nowhere"))
    finally:
        disable(model)


def test_bundled_file_belongs_to_the_bundled_model():
    bundled = calibration.load_calibration(MODEL)
    assert sorted(bundled) == [3, 7]
    for found in bundled.values():
        assert all(c.shape == (2, 256) for c in found.centres)
        assert all(g.shape == (2, 256, 256) and g.dtype == mx.float16 for g in found.feedback)


def test_bad_input(model, tmp_path):
    with pytest.raises(ValueError, match="no tokens"):
        calibration.calibrate(model, [])
    with pytest.raises(ValueError, match="holds no model"):
        calibration.fingerprint(tmp_path)


def test_command(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The functions of this section deal with connections. " * 40)
    arguments = ["--model", str(MODEL), "--text", str(text), "--length", "64", "--windows", "2"]
    out = tmp_path / "calibration.safetensors"
    assert calibration_command.main([*arguments, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 windows of 64 tokens" in said and "feedback of 2 layers' keys and 2 layers' values" in said
    assert sorted(calibration.load_calibration(out, directory=MODEL)) == [3, 7]
    for extra, message in (
        (["--out", str(tmp_path / "nowhere" / "x.safetensors")], "nowhere"),
        (["--out", str(text / "x.safetensors")], "text.txt"),
        (["--length", "100000"], "a window takes 100000 tokens; the text has"),
        (["--windows", "0"], "must be at least 1"),
        (["--text", str(tmp_path / "none.txt")], "none.txt"),
        (["--text", str(out)], "[calibrate] "),
        (["--model", str(tmp_path / "none")], "[calibrate] the model must be a local directory"),
    ):
        assert calibration_command.main([*arguments, "--out", str(tmp_path / "other.safetensors"), *extra]) == 1
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


def test_prompt_in_chunks_gives_the_same_cache(model, tokens, calibrated):
    """Both are constants, so how a prompt was cut leaves no trace beyond codes at a threshold, and with feedback those
    after them."""
    enable(model, bits=3, calibration=calibrated)
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
