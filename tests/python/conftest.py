"""Shared: the bundled model in float32, a text it never saw, and shorthands."""

import os
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "qwen35-tiny-4bit"
TEXT = ROOT / "tests" / "data" / "valid.txt"

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def on_cpu():
    """Tests name another device when they mean one; TURBOQUANT_TEST_DEVICE=gpu runs those of the caches on a GPU."""
    mx.set_default_device(getattr(mx, os.environ.get("TURBOQUANT_TEST_DEVICE", "cpu")))


@pytest.fixture(scope="session")
def bundled():
    """(model, tokenizer): the bundled model with float32 weights, which a CPU multiplies fast and exactly."""
    from mlx_lm import load
    from mlx_lm.utils import dequantize_model
    from turboquant_mlx.overlay.gated_delta import enable_chunked_recurrence

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(str(MODEL))
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    enable_chunked_recurrence(model)  # five times faster than mlx-lm's loop over tokens
    return model, tokenizer


@pytest.fixture(scope="session")
def tokens(bundled):
    """4096 tokens of text the model never saw: windows 9 and 10 of 2,048, on which nothing was chosen."""
    return bundled[1].encode(TEXT.read_text()[:120000])[9 * 2048 : 11 * 2048]


@pytest.fixture
def patched():
    """The patch, for one test."""
    from turboquant_mlx import apply_patch, remove_patch

    apply_patch()
    yield
    remove_patch()


def relative_error(got, want):
    """|got - want| / |want| over all numbers."""
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()
