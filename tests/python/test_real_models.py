"""The judge in small: SmolLM2 over two windows.  Minutes, and the model from PyPI, so only where it is asked for:

TURBOQUANT_LONG_TESTS=1 python -m pytest tests/python/test_real_models.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

JUDGE = Path(__file__).resolve().parents[2] / "benchmarks" / "real_models" / "judge.py"

pytestmark = pytest.mark.skipif(not os.environ.get("TURBOQUANT_LONG_TESTS"), reason="takes minutes")


def test_calibration_pays_on_a_real_model(tmp_path):
    out = tmp_path / "rows"
    settings = ["--models", "smollm2", "--windows", "2", "--length", "1024", "--modes", "tq3s,tq3tfs4,tq3tfr128s4"]
    subprocess.run([sys.executable, str(JUDGE), *settings, "--out", str(out)], check=True)
    head, *lines = [line.split("\t") for line in (out / "windows.tsv").read_text().splitlines()]
    kld = {row["mode"]: float(row["mean_kld"]) for row in (dict(zip(head, line, strict=True)) for line in lines)}
    assert kld["fp16"] == 0
    assert kld["tq3tfs4"] < 0.5 * kld["tq3s"]
    assert kld["tq3tfr128s4"] < 0.5 * kld["tq3tfs4"]
