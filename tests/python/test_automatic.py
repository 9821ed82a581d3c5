"""Calibration that nobody asked for: when it is made, kept, taken again and left alone."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama
from small_models import build, save_model, small_llama
from test_balance import Letters, model_with_key_bias
from turboquant_mlx import disable, enable
from turboquant_mlx.calibration import automatic
from turboquant_mlx.commands import cli
from turboquant_mlx.overlay import products


@pytest.fixture
def large(monkeypatch, tmp_path):
    """Every model counts as large; what is made is kept below tmp_path."""
    monkeypatch.setattr(automatic, "LEAST", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "turboquant-mlx" / "calibrations"


def error_of(model):
    """Mean error of the logits through the model's packed caches."""
    tokens = mx.random.randint(0, 400, (1, 60), key=mx.random.key(1))
    return mx.abs(model(tokens, cache=model.make_cache()) - model(tokens)).mean().item()


def test_a_large_model_is_calibrated_by_itself_and_its_calibration_kept(large, capsys, recwarn):
    model = model_with_key_bias(60)
    found = {}
    try:
        for name, settings in (("made", {}), ("kept", {}), ("plain", {"calibration": {}})):
            disable(model)
            enable(model, **settings)
            found[name] = error_of(model)
            told = capsys.readouterr().err
            assert {"made": "reads 1024 tokens", "kept": str(large), "plain": ""}[name] in told
            assert name != "plain" or not told
    finally:
        disable(model)
    assert found["made"] == found["kept"] < 0.5 * found["plain"]
    assert len(list(large.iterdir())) == 1 and not recwarn


def test_another_model_is_calibrated_anew(large):
    for seed in (0, 1):
        model = small_llama(seed=seed)
        enable(model)
        disable(model)
    assert len(list(large.iterdir())) == 2


def test_a_text_is_better_than_ids_and_is_taken_once_there_is_one(large, capsys):
    model = model_with_key_bias(60)
    try:
        enable(model, tokenizer=Letters())
        assert "the package's text" in capsys.readouterr().err
        enable(model)
        assert "-text-" in capsys.readouterr().err
    finally:
        disable(model)


def test_small_models_stay_plain(capsys, recwarn):
    model = small_llama()
    try:
        enable(model)
        assert not capsys.readouterr().err and not recwarn
        assert all(c.key_map is None and c.centres is None for c in model.make_cache())
    finally:
        disable(model)


def test_a_damaged_file_is_made_again(large, capsys):
    model = small_llama()
    try:
        enable(model)
        (path,) = large.iterdir()
        path.write_bytes(path.read_bytes()[:100])
        enable(model)
        assert "reads 1024 tokens" in capsys.readouterr().err.splitlines()[-1]
        enable(model)
        assert str(path) in capsys.readouterr().err
    finally:
        disable(model)


def test_a_folder_that_cannot_be_written_to_is_named(large, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model = small_llama()
    try:
        enable(model)
        assert "the calibration is not kept for the next time" in capsys.readouterr().err
        assert all(c.key_map is not None for c in model.make_cache())
    finally:
        disable(model)


def test_what_cannot_be_calibrated_is_named(large, monkeypatch):
    model = small_llama()
    monkeypatch.setattr(automatic, "MOST_ON_CPU", 10)
    monkeypatch.setattr(products, "slow_here", lambda: True)
    try:
        with pytest.warns(UserWarning, match="codes are plain.*this CPU would take minutes"):
            enable(model)
        monkeypatch.undo()
        monkeypatch.setattr(automatic, "LEAST", 1000)
        monkeypatch.setattr(automatic, "random_ids", lambda model: None)
        monkeypatch.setattr(automatic, "_load", lambda path: None)
        with pytest.warns(UserWarning, match="it has no token embedding.*run python -m turboquant_mlx calibrate"):
            enable(model)
    finally:
        disable(model)


def test_parameters_of_a_quantised_model_are_counted_as_floats():
    model = small_llama()
    floats = automatic.parameters(model)
    nn.quantize(model, group_size=64, bits=4)
    assert floats <= automatic.parameters(model) < 1.1 * floats


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "quantized"])
def test_products_by_numpy_are_the_models_own(kind):
    model = build(llama, tie_word_embeddings=True)
    if kind == "quantized":
        nn.quantize(model, group_size=64, bits=4)
    else:
        model.set_dtype(getattr(mx, kind))
    kinds = [type(m) for m in model.modules()]
    tokens = mx.arange(40)[None]
    own = np.array(model(tokens).astype(mx.float32))
    with products.fast_products(model):
        if products.slow_here():
            assert [type(m) for m in model.modules()] != kinds
        fast = model(tokens)
    assert fast.dtype == model(tokens).dtype and [type(m) for m in model.modules()] == kinds
    bound = {"float16": 1e-2, "bfloat16": 8e-2}.get(kind, 1e-4)
    np.testing.assert_allclose(np.array(fast.astype(mx.float32)), own, atol=bound * np.abs(own).max())


def test_the_command_line_calibrates_large_models(large, tmp_path, capsys):
    folder = save_model(llama, tmp_path / "model")
    settings = ["generate", "--model", str(folder), "--prompt", "hello", "--max-tokens", "2"]
    cli.main(settings)
    told = capsys.readouterr().err
    assert "reads 1024 tokens of the package's text" in told and "centred, feedback of keys and values" in told
    for extra in (["--tq-no-calibrate"], ["--tq-calibration", "none"]):
        cli.main([*settings, *extra])
        assert "centred" not in capsys.readouterr().err
