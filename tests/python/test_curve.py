"""The publication curve: what it writes, how it goes on after an interruption, and that failures stay in the table."""

import csv
import importlib
import sys
from pathlib import Path

import pytest
from turboquant_mlx.gated_delta import disable_chunked_recurrence

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--tokens", "40", "--scales", "1,2", "--modes", "fp16,tq3", "--decode-tokens", "2", "--step", "32"]


@pytest.fixture(scope="module")
def curve():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("qwen35_9b_publication_curve")
    sys.path.remove(str(BENCHMARKS))
    disable_chunked_recurrence()


@pytest.fixture
def run(curve, tmp_path):
    def run(*extra, out="out"):
        folder = tmp_path / out
        status = curve.main([*SMALL, "--out", str(folder), "--readme", str(tmp_path / "README.md"), *extra])
        path = folder / "raw_rows.tsv"
        if not path.exists():
            return status, []
        with path.open(newline="") as file:
            return status, list(csv.DictReader(file, delimiter="\t"))

    return run


def test_writes_rows_pictures_and_table(run, tmp_path):
    status, rows = run("--repetitions", "2")
    assert status == 0 and len(rows) == 8 and {r["status"] for r in rows} == {"ok"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "raw_rows.tsv", "summary_rows.tsv", "run_metadata.json", "curve.png", "curve.svg",
    }  # fmt: skip
    # Rotated: each mode goes first once.
    assert [r["mode"] for r in rows if r["scale"] == "1.00x"] == ["fp16", "tq3", "tq3", "fp16"]
    by_mode = {r["mode"]: r for r in rows if r["scale"] == "2.00x"}
    assert all(float(r[c]) > 0 for r in rows for c in ("prompt_tps", "decode_tps", "first_token_s", "peak_bytes"))
    # 256 rows of two layers, two heads, keys and values: 98 bytes each.
    assert int(by_mode["tq3"]["attention_bytes"]) == 2 * 2 * 2 * 98 * 256
    assert int(by_mode["fp16"]["fp16_equivalent_bytes"]) == (80 + 3) * 2 * 2 * 2 * 512
    assert (
        by_mode["tq3"]["kernel"].startswith("cpu") and by_mode["fp16"]["linear_bytes"] == by_mode["tq3"]["linear_bytes"]
    )
    text = (tmp_path / "README.md").read_text()
    assert text.count("| TQ3 |") == 2
    # The table takes its own place again.
    assert run("--repetitions", "2", "--report")[0] == 0
    assert (tmp_path / "README.md").read_text() == text


def test_goes_on_after_an_interruption(run, curve, monkeypatch):
    real, calls = curve.measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:  # two warm-ups and two runs
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(curve, "measure", interrupted)
    status, rows = run("--repetitions", "1")
    assert status == 130 and len(rows) == 2
    monkeypatch.setattr(curve, "measure", real)
    status, after = run("--repetitions", "1")
    assert status == 0 and after[:2] == rows and len(after) == 4
    assert len({(r["scale"], r["mode"]) for r in after}) == 4
    # Another run's rows are not mixed in.
    assert run("--repetitions", "1", "--decode-tokens", "3")[0] == 1


def test_a_failing_run_is_a_row(run, curve, monkeypatch, tmp_path):
    real = curve.measure

    def failing(model, args, mode, *rest):
        if mode == "tq3":
            raise MemoryError("no room")
        return real(model, args, mode, *rest)

    monkeypatch.setattr(curve, "measure", failing)
    status, rows = run("--repetitions", "1")
    assert status == 0 and len(rows) == 4
    failed = [r for r in rows if r["mode"] == "tq3"]
    assert {(r["status"], r["error"]) for r in failed} == {("failed", "MemoryError: no room")}
    assert "failed: MemoryError: no room" in (tmp_path / "README.md").read_text()


def test_a_run_over_the_limit_fails(run):
    _, rows = run("--repetitions", "1", "--scales", "1", "--limit", "1e-9")
    assert {r["error"] for r in rows} == {"TimeoutError: over the limit of 1e-09 s"}


def test_long_contexts_are_filled_and_say_so(run, curve, monkeypatch):
    monkeypatch.setattr(curve, "LONG", (1024,))
    _, rows = run("--repetitions", "1", "--scales", "1", "--long")
    filled = [r for r in rows if r["synthetic"] == "1"]
    assert [(r["scale"], r["status"], r["prompt_tps"]) for r in filled] == [("1K", "ok", "")] * 2
    assert int(filled[0]["fp16_equivalent_bytes"]) == (1024 + 3) * 2 * 2 * 2 * 512


@pytest.mark.parametrize(
    "extra, message",
    [(["--modes", "fp16,tq9"], "got tq9"), (["--tokens", "1000000"], "the longest prompt needs 2000000 tokens")],
)
def test_bad_input(run, capsys, extra, message):
    assert run(*extra)[0] == 1
    assert message in capsys.readouterr().err
