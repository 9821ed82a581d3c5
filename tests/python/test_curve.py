"""The publication curve: what it writes, how it goes on after an interruption, and that failures stay in the table."""

import csv
import importlib
import sys
from pathlib import Path

import pytest
from turboquant_mlx.gated_delta import disable_chunked_recurrence

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--tokens", "40", "--scales", "1,2", "--modes", "fp16,tq3", "--decode-tokens", "4", "--step", "32"]
SMALL += ["--block", "2"]
DECODED = 1 + 2 * (2 + 2)  # a warm-up, and two turns of two tokens with two in flight


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
    assert int(by_mode["fp16"]["fp16_equivalent_bytes"]) == (80 + DECODED) * 2 * 2 * 2 * 512
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
        if len(calls) == 3:  # a warm-up and one context
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(curve, "measure", interrupted)
    status, rows = run("--repetitions", "1")
    assert status == 130 and len(rows) == 2
    monkeypatch.setattr(curve, "measure", real)
    # A mode that was not asked for before joins the rows that are there.
    status, after = run("--repetitions", "1", "--modes", "fp16,tq3,tq4")
    assert status == 0 and after[:2] == rows and len(after) == 6
    assert len({(r["scale"], r["mode"]) for r in after}) == 6
    assert {r["decode_ratio"] == "" for r in after if r["mode"] == "tq4" and r["scale"] == "1.00x"} == {True}
    # Another run's rows are not mixed in.
    assert run("--repetitions", "1", "--decode-tokens", "3")[0] == 1


def test_stops_when_told(run, capsys):
    status, rows = run("--repetitions", "1", "--stop-after", "0")
    assert status == 1 and rows == [] and "stopped by --stop-after" in capsys.readouterr().err
    assert len(run("--repetitions", "1")[1]) == 4


class Clock:
    """Time that passes with the tokens of the caches that are read: `cost` seconds each, whatever the machine does."""

    def __init__(self, cost):
        self.now, self.cost, self.drift = 0.0, cost, 1.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now

    def spend(self, mode):
        self.drift *= 1.02  # a clock that slows down all the time: by half in 35 tokens
        self.now += self.cost[mode] * self.drift


def test_ratio_is_that_of_turns_side_by_side(curve, tmp_path, monkeypatch):
    """On a machine that becomes three times slower meanwhile; modes that decode one after the other show another ratio."""
    import curve_run

    clock = Clock({"fp16": 1.0, "tq3": 0.5})
    monkeypatch.setattr(curve_run, "time", clock)
    step = curve_run.Run._next
    monkeypatch.setattr(curve_run.Run, "_next", lambda self, y: (clock.spend(self.mode), step(self, y))[1])
    args = curve.parse([*SMALL, "--decode-tokens", "16", "--limit", "1e9", "--out", str(tmp_path)])
    curve.apply_patch()
    model, _ = curve.load_model(args.model)
    measured = curve_run.measure(model, args, ["fp16", "tq3"], list(range(8)), 8, False)
    assert {m: r.get("error") for m, r in measured.items()} == {"fp16": None, "tq3": None}
    assert float(measured["tq3"]["decode_ratio"]) == pytest.approx(2, rel=0.1)
    assert float(measured["fp16"]["decode_ratio"]) == 1
    alone = {m: float(curve_run.measure(model, args, [m], [1, 2], 2, False)[m]["decode_tps"]) for m in ("fp16", "tq3")}
    assert alone["tq3"] / alone["fp16"] < 1.5


@pytest.fixture
def without_room(curve, monkeypatch):
    """tq3 fails: while it reads, or in its second turn of decoding."""
    import curve_run

    def fail(where):
        real = getattr(curve_run.Run, where)

        def failing(self, *args):
            if self.mode == "tq3" and (where == "read" or self.blocks):
                raise MemoryError("no room")
            return real(self, *args)

        monkeypatch.setattr(curve_run.Run, where, failing)

    return fail


@pytest.mark.parametrize("where", ["read", "decode"])
def test_a_failing_run_is_a_row(run, without_room, tmp_path, where):
    without_room(where)
    status, rows = run("--repetitions", "1")
    assert status == 0 and len(rows) == 4
    failed = [r for r in rows if r["mode"] == "tq3"]
    assert {(r["status"], r["error"]) for r in failed} == {("failed", "MemoryError: no room")}
    assert {r["status"] for r in rows if r["mode"] == "fp16"} == {"ok"}
    assert "failed: MemoryError: no room" in (tmp_path / "README.md").read_text()


def test_a_run_over_the_limit_fails(run):
    _, rows = run("--repetitions", "1", "--scales", "1", "--limit", "1e-9")
    assert {r["error"] for r in rows} == {"TimeoutError: over the limit of 1e-09 s"}


def test_long_contexts_are_filled_and_say_so(run, curve, monkeypatch, tmp_path):
    monkeypatch.setattr(curve, "LONG", (1024,))
    _, rows = run("--repetitions", "1", "--scales", "1", "--long")
    filled = [r for r in rows if r["synthetic"] == "1"]
    assert [(r["scale"], r["status"], r["prompt_tps"]) for r in filled] == [("1K", "ok", "")] * 2
    assert "| 1024 (filled) | TQ3 |" in (tmp_path / "README.md").read_text()
    assert int(filled[0]["fp16_equivalent_bytes"]) == (1024 + DECODED) * 2 * 2 * 2 * 512


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--modes", "fp16,tq9"], "got tq9"),
        (["--tokens", "1000000"], "the longest prompt needs 2000000 tokens"),
        (["--block", "0"], "--block"),
    ],
)
def test_bad_input(run, capsys, extra, message):
    assert run(*extra)[0] == 1
    assert message in capsys.readouterr().err


def test_unwritable_folder(run, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert run()[0] == 1
    assert "out" in capsys.readouterr().err


def test_model_without_key_value_slots(run, curve, monkeypatch, capsys):
    from mlx_lm.models.cache import ArraysCache

    real = curve.load_model

    def load(path):
        model, tokenizer = real(path)
        model.make_cache = lambda: [ArraysCache(2)]
        return model, tokenizer

    monkeypatch.setattr(curve, "load_model", load)
    assert run()[0] == 1
    assert "nothing to compress; it has ['ArraysCache']" in capsys.readouterr().err


def test_the_nine_billion_shape_without_its_size(run, curve, monkeypatch, tmp_path):
    """`--shape`: random weights of an architecture, marked as such, short prompts read and long caches filled."""
    import curve_models

    small = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 256}
    small |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    small |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    monkeypatch.setitem(curve_models.SHAPES, "9b", curve_models.SHAPES["9b"] | small)
    monkeypatch.setattr(curve, "LONG", (512,))
    status, rows = run("--shape", "9b", "--long", "--repetitions", "1", "--scales", "1")
    assert status == 0 and [(r["status"], r["error"]) for r in rows] == [("ok", "")] * 4
    text = (tmp_path / "README.md").read_text()
    assert "shape 9b, random weights" in text and "512 (filled)" in text and "random numbers" in text
