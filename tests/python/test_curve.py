"""The publication curve: what it measures and writes, how it goes on, and that failures stay in the table."""

import contextlib
import csv
import functools
import importlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import MODEL
from mlx_lm.models import qwen3
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache
from small_models import FAMILIES, save_model, small_llama
from turboquant_mlx import disable, enable
from turboquant_mlx.calibration import load_calibration
from turboquant_mlx.eval.model import load_model
from turboquant_mlx.overlay.gated_delta import disable_chunked_recurrence

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--tokens", "40", "--scales", "1,2", "--modes", "fp16,tq3", "--decode-tokens", "4", "--step", "32"]
SMALL += ["--block", "2", "--repetitions", "1"]
DECODED = 1 + 2 * (2 + 2)  # a warm-up, and two turns of two tokens with two in flight
TEXT = "The curve reads the beginning of a text. " * 50


load_once = functools.cache(load_model)


@pytest.fixture
def curve(monkeypatch):
    """The script, which loads a model once and draws no pictures (`test_writes_rows_pictures_and_table` does)."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("qwen35_9b_publication_curve")
    monkeypatch.setattr(script, "load_model", load_once)
    script.draw = getattr(script, "draw", script.curve_report.draw)
    monkeypatch.setattr(script.curve_report, "draw", lambda *_: None)
    yield script
    disable_chunked_recurrence()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A model directory for tests of everything but the figures: two layers of two KV heads of 64, and no make_cache."""
    return save_model(qwen3, tmp_path_factory.mktemp("curve") / "tiny")


@pytest.fixture
def run(curve, tiny, tmp_path):
    (tmp_path / "text").write_text(TEXT)

    def run(*extra):
        own = [*SMALL, "--text", str(tmp_path / "text"), "--out", str(tmp_path / "out")]
        own += ["--readme", str(tmp_path / "README.md"), *extra]
        status = curve.main(own if {"--shape", "--model"} & {*extra} else [*own, "--model", str(tiny)])
        path = tmp_path / "out" / "raw_rows.tsv"
        if not path.exists():
            return status, []
        with path.open(newline="") as file:
            return status, list(csv.DictReader(file, delimiter="\t"))

    return run


def test_writes_rows_pictures_and_table(run, curve, monkeypatch, tmp_path):
    from curve import rows as curve_rows

    monkeypatch.setattr(curve.curve_report, "draw", curve.draw)
    status, rows = run("--repetitions", "2")
    assert status == 0 and len(rows) == 8 and {r["status"] for r in rows} == {"ok"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "raw_rows.tsv", "summary_rows.tsv", "run_metadata.json", "curve.png", "curve.svg",
    }  # fmt: skip
    # Rotated: each mode goes first once.
    assert [r["mode"] for r in rows if r["scale"] == "1.00x"] == ["fp16", "tq3", "tq3", "fp16"]
    by_mode = {r["mode"]: r for r in rows if r["scale"] == "2.00x"}
    assert all(float(r[c]) > 0 for r in rows for c in ("prompt_tps", "decode_tps", "first_token_s", "peak_bytes"))
    # Two layers, two heads, keys and values: 256 rows of 26 bytes and 132 exact copies of 66.
    assert int(by_mode["tq3"]["attention_bytes"]) == 2 * 2 * 2 * (26 * 256 + 66 * 132)
    assert int(by_mode["fp16"]["fp16_equivalent_bytes"]) == (80 + DECODED) * 2 * 2 * 2 * 128
    assert by_mode["tq3"]["kernel"].startswith("cpu") and {r["linear_bytes"] for r in rows} == {"0"}
    # On a CPU the model's caches are float32, and twice as large as float16.
    assert {r["key_bits"] for r in rows if r["mode"] == "fp16"} == {"32"}
    text = (tmp_path / "README.md").read_text()
    assert text.count("| TQ3 |") == 2 and text.count("| float32 cache |") == 2 and "Medians of up to 2 runs" in text
    assert f"### tiny on {curve_rows.processor()}" in text
    # The table takes its own place again, and pictures are the same.
    picture = (tmp_path / "out" / "curve.svg").read_bytes()
    assert run("--report")[0] == 0
    assert (tmp_path / "README.md").read_text() == text
    assert (tmp_path / "out" / "curve.svg").read_bytes() == picture


def test_goes_on_after_an_interruption(run, curve, monkeypatch, tmp_path):
    real, calls = curve.measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:  # a warm-up, one context, and then in the midst of one
            args[-1]("fp16", "reading")
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(curve, "measure", interrupted)
    status, rows = run()
    assert status == 130 and len(rows) == 2
    monkeypatch.setattr(curve, "measure", real)
    # A mode that was not asked for before joins the rows that are there.
    status, after = run("--modes", "fp16,tq3,tq4")
    assert status == 0 and after[:2] == rows and len(after) == 6
    assert len({(r["scale"], r["mode"]) for r in after}) == 6
    assert {r["decode_ratio"] == "" for r in after if r["mode"] == "tq4" and r["scale"] == "1.00x"} == {True}
    # Its ratio is to a float cache of another time, and the table says so.
    marked = [line for line in (tmp_path / "README.md").read_text().splitlines() if r"\*" in line]
    assert [line.split(" | ")[1] for line in marked[1:]] == ["TQ4"] and "different times" in marked[0]
    # Another run's rows are not mixed in.
    assert run("--decode-tokens", "3")[0] == 1


def test_stops_when_told(run, capsys):
    status, rows = run("--stop-after", "0")
    assert status == 1 and rows == [] and "stopped by --stop-after" in capsys.readouterr().err
    assert len(run()[1]) == 4


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


def test_ratio_is_that_of_turns_side_by_side(curve, tiny, monkeypatch):
    """On a machine that becomes three times slower meanwhile; modes that decode one after the other show another ratio."""
    from curve import run as curve_run

    clock = Clock({"fp16": 1.0, "tq3": 0.5})
    monkeypatch.setattr(curve_run, "time", clock)
    step = curve_run.Run._next
    monkeypatch.setattr(curve_run.Run, "_next", lambda self, y: (clock.spend(self.mode), step(self, y))[1])
    args = curve.parse([*SMALL, "--model", str(tiny), "--decode-tokens", "16", "--limit", "1e9"])
    curve.apply_patch()
    model = curve.load(args)[0]
    measured = curve_run.measure(model, args, ["fp16", "tq3"], list(range(8)), 8, False)
    assert {m: r.get("error") for m, r in measured.items()} == {"fp16": None, "tq3": None}
    assert float(measured["tq3"]["decode_ratio"]) == pytest.approx(2, rel=0.1)
    assert float(measured["fp16"]["decode_ratio"]) == 1
    alone = {m: float(curve_run.measure(model, args, [m], [1, 2], 2, False)[m]["decode_tps"]) for m in ("fp16", "tq3")}
    assert alone["tq3"] / alone["fp16"] < 1.5


@pytest.fixture
def without_room(curve):
    """Context: tq3 fails, while it reads or in its second turn of decoding."""
    from curve import run as curve_run

    @contextlib.contextmanager
    def fail(where):
        real = getattr(curve_run.Run, where)

        def failing(self, *args):
            if self.mode == "tq3" and (where == "read" or self.blocks):
                raise MemoryError("no room")
            return real(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(curve_run.Run, where, failing)
            yield

    return fail


@pytest.mark.parametrize("where", ["read", "decode"])
def test_a_failing_run_is_a_row(run, without_room, tmp_path, where):
    with without_room(where):
        status, rows = run()
    assert status == 0 and len(rows) == 4
    failed = [r for r in rows if r["mode"] == "tq3"]
    assert {(r["status"], r["error"]) for r in failed} == {("failed", "MemoryError: no room")}
    assert {r["status"] for r in rows if r["mode"] == "fp16"} == {"ok"}
    assert "failed: MemoryError: no room" in (tmp_path / "README.md").read_text()


def test_failed_runs_are_tried_again_when_asked(run, without_room):
    with without_room("read"):
        before = run()[1]
    assert run("--scales", "1")[1] == before
    after = run("--retry-failed")[1]
    assert [r["status"] for r in after] == ["ok"] * 4 and [r["mode"] for r in after[2:]] == ["tq3", "tq3"]


def test_a_run_over_the_limit_fails(run):
    _, rows = run("--scales", "1", "--limit", "1e-9")
    assert {r["error"] for r in rows} == {"TimeoutError: over the limit of 1e-09 s"}


def test_what_would_be_over_the_limit_is_a_row_too(run, curve, monkeypatch, tmp_path):
    from curve import run as curve_run

    read, asked = curve_run.Run.read, []

    def slow(self, prompt, tokens, synthetic):
        asked.append((self.mode, tokens))
        if self.mode == "tq3" and tokens == 80:
            raise TimeoutError("over the limit of 9 s")
        read(self, prompt, tokens, synthetic)

    monkeypatch.setattr(curve_run.Run, "read", slow)
    rows = run("--scales", "1,2,3", "--repetitions", "2")[1]
    assert len(rows) == 12 and asked.count(("tq3", 80)) == 1 and ("tq3", 120) not in asked
    errors = [r["error"] for r in rows if r["mode"] == "tq3" and r["scale"] == "2.00x"]
    assert errors == ["TimeoutError: over the limit of 9 s", "not run: over the limit of 9 s at 80 tokens"]
    text = (tmp_path / "README.md").read_text()
    assert "Medians of up to 2 runs" in text and "| not run: over the limit of 9 s at 80 tokens |" in text


def test_long_contexts_are_filled_and_say_so(run, curve, monkeypatch, tmp_path):
    monkeypatch.setattr(curve, "LONG", (1024,))
    _, rows = run("--scales", "1", "--long")
    filled = [r for r in rows if r["synthetic"] == "1"]
    assert [(r["scale"], r["status"], r["prompt_tps"]) for r in filled] == [("1K", "ok", "")] * 2
    assert "| 1024 (filled) | TQ3 |" in (tmp_path / "README.md").read_text()
    assert int(filled[0]["fp16_equivalent_bytes"]) == (1024 + DECODED) * 2 * 2 * 2 * 128


def test_long_contexts_are_read_when_asked(run, curve, monkeypatch, tmp_path):
    """Beside filled ones, which their rows do not stand in for."""
    monkeypatch.setattr(curve, "LONG", (128,))
    monkeypatch.setattr(curve.curve_report, "draw", curve.draw)
    run("--scales", "1", "--long")
    _, rows = run("--scales", "1", "--long", "--prefill-long")
    long = [(r["synthetic"], r["mode"], r["prompt_tps"] != "") for r in rows if r["prompt_tokens"] == "128"]
    assert long == [("1", "fp16", False), ("1", "tq3", False), ("0", "fp16", True), ("0", "tq3", True)]
    peaks = {(r["synthetic"], r["mode"]): int(r["peak_bytes"]) for r in rows if r["prompt_tokens"] == "128"}
    assert all(peaks["0", mode] > peaks["1", mode] > 0 for mode in ("fp16", "tq3"))
    text = (tmp_path / "README.md").read_text()
    assert "| 128 (filled) | TQ3 |" in text and "| 128 | TQ3 |" in text


@pytest.fixture
def subject(curve):
    """The bundled model with its calibration."""
    return curve.load(curve.parse([*SMALL, "--modes", "fp16,tq3f"]))[0]


def measured(curve, subject, *modes, tokens=8, synthetic=False):
    from curve import run as curve_run

    args = curve.parse(SMALL)
    curve.apply_patch()
    return curve_run.measure(subject, args, modes, list(range(8)), tokens, synthetic)


def test_peak_is_that_of_a_mode_alone_and_of_decoding_too(curve, subject, monkeypatch):
    from curve import run as curve_run

    # Two layers, two heads, keys and values of 256: 32 MiB as float32, 3 MiB as 3-bit codes, and growing copies.
    saved = 2 * 2 * 2 * 4096 * (1024 - 98)
    filled = {"tokens": 4096, "synthetic": True}
    alone = {m: measured(curve, subject, m, **filled)[m]["peak_bytes"] for m in ("fp16", "tq3")}
    beside = {m: r["peak_bytes"] for m, r in measured(curve, subject, "fp16", "tq3", **filled).items()}
    assert min(alone["fp16"], beside["fp16"]) > 0.9 * saved + max(alone["tq3"], beside["tq3"])
    assert beside["tq3"] == pytest.approx(alone["tq3"], abs=saved / 2)

    # What one mode takes while it decodes is its own alone.
    decode = curve_run.Run._decode

    def greedy(self, count):
        if self.mode == "tq3":
            mx.eval(mx.zeros(2**26, mx.uint8) + 1)
        return decode(self, count)

    before = measured(curve, subject, "fp16", "tq3")
    monkeypatch.setattr(curve_run.Run, "_decode", greedy)
    after = measured(curve, subject, "fp16", "tq3")
    more = {m: after[m]["peak_bytes"] - before[m]["peak_bytes"] for m in after}
    assert more["tq3"] > 2**25 and abs(more["fp16"]) < 2**22


def test_modes_are_coded_as_enable_does(curve, subject):
    from curve import run as curve_run

    found = load_calibration(MODEL)
    model = subject.model
    for name, calibration in (
        ("tq3f", found),
        ("tq3c", {slot: c.without_feedback() for slot, c in found.items()}),
        ("tq3", None),
    ):
        caches = curve_run.make_caches(subject, name)
        enable(model, bits=3, calibration=calibration)
        wanted = model.make_cache()
        disable(model)
        assert [type(c) for c in caches] == [type(c) for c in wanted]
        for slot in subject.slots:
            for got, want in zip(caches[slot.path[0]].state[4:8], wanted[slot.path[0]].state[4:8], strict=True):
                assert (got is None) == (want is None) and (got is None or mx.array_equal(got, want))
    assert measured(curve, subject, "tq3f", "k4v3f")["k4v3f"]["status"] == "ok"


class Nested(nn.Module):
    """A model whose slots lie in a CacheList."""

    def __init__(self):
        super().__init__()
        self.inner = small_llama()
        self.layers = [0]

    def __call__(self, x, cache):
        return self.inner(x, cache=cache[0].caches)

    def make_cache(self):
        return [CacheList(KVCache(), KVCache())]


@pytest.mark.parametrize(
    "name, make, slots",
    [
        ("no make_cache", small_llama, 2),
        ("windows", FAMILIES["gemma3, head_dim 256"], 2),
        ("shared slots", FAMILIES["gemma3n, shared keys and values"], 2),
        ("a list", Nested, 2),
    ],
)
def test_what_enable_packs_is_measured(curve, name, make, slots):
    from curve.models import Subject, attention_slots, synthetic_calibration

    model = make()
    found = attention_slots(model)
    assert len(found) == slots and enable(model) >= slots
    disable(model)
    subject = Subject(model, found, synthetic_calibration(found, 0))
    for synthetic in (False, True):
        rows = measured(
            curve, subject, "fp16", "tq3", "tq4f", "affine4", tokens=100 if synthetic else 8, synthetic=synthetic
        )
        wrong = {m: r["error"] for m, r in rows.items() if r["status"] != "ok"}
        windows = {"affine4": "NotImplementedError: RotatingKVCache Quantization NYI"}
        assert wrong == (windows if name in ("windows", "shared slots") else {})
        packed = [rows[m]["attention_bytes"] for m in ("tq3", "tq4f", "affine4") if m not in wrong]
        assert max(packed) < rows["fp16"]["attention_bytes"]


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--modes", "fp16,tq9"], "got 'tq9'"),
        (["--tokens", "1000000"], "the longest prompt needs 2000000 tokens"),
        (["--block", "0"], "--block"),
        (["--model", "absent"], "[curve] the model must be a local directory; there is none at absent"),
    ],
)
def test_bad_input(run, capsys, extra, message):
    assert run(*extra)[0] == 1
    assert message in (error := capsys.readouterr().err) and "[curve] [" not in error


def test_unwritable_folder(run, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert run()[0] == 1
    assert "out" in capsys.readouterr().err


def test_model_without_key_value_slots(run, curve, monkeypatch, capsys):
    def load(path):
        model, tokenizer = small_llama(), None
        model.make_cache = lambda: [ArraysCache(2)]
        return model, tokenizer

    monkeypatch.setattr(curve, "load_model", load)
    assert run()[0] == 1
    assert capsys.readouterr().err.endswith("nothing to compress; it has ['ArraysCache']\n")


def test_the_nine_billion_shape_without_its_size(run, curve, monkeypatch, tmp_path):
    """`--shape`: random weights of an architecture, marked as such, short prompts read and long caches filled."""
    from curve import models as curve_models

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
