"""The measuring itself: numbers against plain computations, contexts of the right length, errors said plainly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gemma3_text, llama
from mlx_lm.models.cache import QuantizedKVCache
from small_models import FAMILIES, VOCAB, prompt, save_model
from turboquant_mlx import calibration
from turboquant_mlx.eval import command, divergence, modes, options, reconstruction, retrieval
from turboquant_mlx.eval.model import cut_windows, load_model, read_tokens
from turboquant_mlx.overlay.gated_delta import disable_chunked_recurrence

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "qwen35-tiny-4bit"
TEXT = ROOT / "tests" / "data" / "valid.txt"


@pytest.fixture(scope="module")
def loaded():
    yield load_model(MODEL)
    disable_chunked_recurrence()


@pytest.fixture(scope="module")
def tokens(loaded):
    return read_tokens(loaded[1], TEXT)


def test_divergence_is_what_it_says(loaded, tokens):
    model = loaded[0]
    windows = cut_windows(tokens, 96, 2)
    made = {name: modes.parse_mode(name).make_caches(model) for name in ("fp16", "tq2")}
    seen = []
    records = divergence.compare(model, windows, made, step=96, progress=seen.append)
    assert sum(seen) == 2 * windows.size
    logits = {}
    for name in made:
        x = np.array(model(mx.array(windows), cache=modes.parse_mode(name).make_caches(model)), np.float64)
        logits[name] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    p, q = logits["fp16"], logits["tq2"]
    assert np.allclose(records["tq2"].kld, (np.exp(p) * (p - q)).sum(-1), atol=1e-4)
    nll = -np.take_along_axis(q[:, :-1], windows[:, 1:, None].astype(int), -1)[..., 0]
    assert np.allclose(records["tq2"].nll, nll, atol=1e-3)
    figures = divergence.summarise(records["tq2"], records["fp16"], 10, 50)
    assert figures["positions"] == 80
    assert figures["mean_kld"] == pytest.approx(records["tq2"].kld[:, 10:50].mean(), rel=1e-5)
    reference = np.exp(records["fp16"].nll[:, 10:50].mean())
    assert figures["perplexity"] / reference - 1 == pytest.approx(figures["perplexity_change"], abs=1e-5)
    assert divergence.summarise(records["fp16"], records["fp16"])["mean_kld"] == 0
    # The standard error of a ratio of perplexities is that of the windows' own differences.
    low, high = (records["tq2"].nll - records["fp16"].nll)[:, 10:50].mean(1)
    expected = np.exp((low + high) / 2) * abs(high - low) / 2  # two values: s / sqrt(2) is half their distance
    assert figures["perplexity_change_stderr"] == pytest.approx(expected, rel=1e-4)
    halves = [{k: divergence.Record(r.nll[i], r.kld[i], r.agree[i]) for k, r in records.items()} for i in ([0], [1])]
    joined = divergence.joined([h["tq2"] for h in halves])
    assert all(np.array_equal(getattr(joined, k), getattr(records["tq2"], k)) for k in ("nll", "kld", "agree"))
    assert figures["mean_kld"] > 1e-3 and figures["top1_agreement"] < 1


def test_windows_left_out():
    tokens = np.arange(100)
    assert cut_windows(tokens, 10, 3, 1, {2, 9})[:, 0].tolist() == [10, 30, 40]
    assert cut_windows(tokens, 10, 2, 8)[:, 0].tolist() == [80, 90]
    with pytest.raises(ValueError, match="need 110 tokens; the text has 100"):
        cut_windows(tokens, 10, 2, 8, {9})


def test_bands_cover_every_position():
    for length in (1, 2, 256, 257, 258, 513, 2048, 3000):
        edges = divergence.bands(length)
        assert length == 1 or all(b - a > 1 for a, b in edges)  # the text's last position has no next token
        assert [p for a, b in edges for p in range(a, b)] == list(range(length))


def test_affine_mode_holds_the_numbers_of_mlx_quantized_cache():
    x = mx.random.normal((1, 2, 50, 256), key=mx.random.key(0))
    for bits in (2, 4, 8):
        keys, _ = QuantizedKVCache(64, bits).update_and_fetch(x.astype(mx.float16), x.astype(mx.float16))
        expected = mx.dequantize(*keys, group_size=64, bits=bits).astype(mx.float32)
        assert mx.array_equal(modes.affine(bits)(x), expected)


def test_bytes():
    bytes_per_token = {
        name: modes.parse_mode(name).bytes_per_token(256) for name in ("fp16", "affine4", "tq3", "k4v2c")
    }
    assert bytes_per_token == {"fp16": 1024, "affine4": 288, "tq3": 196, "k4v2c": 196}
    with pytest.raises(ValueError, match="got 'tq5'"):
        modes.parse_mode("tq5")


def test_contexts(loaded, tokens):
    tokenizer = loaded[1]
    depths = [0, 0.3, 1]
    context, questions = retrieval.needle_context(tokenizer, tokens, 700, depths, retrieval.seeded(0, 1))
    assert len(context) == 700 and [d for d, _, _ in questions] == depths
    text = tokenizer.decode(context)
    for _, question, answer in questions:
        assert text.count(question.rsplit("\n", 1)[1] + answer) == 1
    again, _ = retrieval.needle_context(tokenizer, tokens, 700, depths, retrieval.seeded(0, 1))
    assert again == context
    with pytest.raises(ValueError, match="--lengths 700 needs 650 tokens of filler; the text has 100"):
        retrieval.needle_context(tokenizer, tokens[:100], 700, depths, retrieval.seeded(0))


CONTEXTS = """
import hashlib, numpy as np
from turboquant_mlx.eval import retrieval
class Letters:
    encode = staticmethod(lambda text, **_: [ord(c) for c in text])
filler = np.arange(5000)
made = [retrieval.list_context(Letters, filler, 50, 100, retrieval.seeded(3, 50, 0)),
        retrieval.needle_context(Letters, filler, 3000, [0, 0.5, 1], retrieval.seeded(3, 3000, 0))]
print(hashlib.sha256(repr(made).encode()).hexdigest())
"""


def test_contexts_depend_on_the_seed_alone():
    """Not on the order in which this process happens to walk a set of strings."""

    def digest(hash_seed):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        return subprocess.run(
            [sys.executable, "-c", CONTEXTS], env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert digest("1") == digest("2") != ""


def test_a_list_has_as_many_keys_as_asked_for(loaded, tokens):
    """All different, shuffled, and asked for in their order; values are those of the list."""
    context, questions = retrieval.list_context(loaded[1], tokens, 40, 100, retrieval.seeded(0, 40, 0))
    text = loaded[1].decode(context)
    keys = [question.split("key ")[1].split("?")[0] for _, question, _ in questions]
    assert len(set(keys)) == 40 and keys != sorted(keys)
    assert all(
        f"The value of key {key} is{answer}" in text for key, (_, _, answer) in zip(keys, questions, strict=True)
    )


@pytest.mark.parametrize("mode", ["fp16", "tq3"])
def test_needles_are_found_and_lost_with_the_cache(loaded, tokens, mode):
    """The model answers from its cache: it finds the needles, and misses them when keys hold nothing."""
    model, tokenizer = loaded
    context, questions = retrieval.needle_context(tokenizer, tokens, 600, [0.1, 0.8], retrieval.seeded(0, 2))
    caches = modes.parse_mode(mode).make_caches(model)
    answers = retrieval.ask(model, tokenizer, caches, context, questions)
    assert all(a.passed for a in answers)
    twice = retrieval.ask(model, tokenizer, modes.parse_mode(mode).make_caches(model), context, questions[::-1])
    assert [a.log_prob for a in twice[::-1]] == pytest.approx([a.log_prob for a in answers], abs=1e-3)
    blank = modes.float_caches(model, lambda path: (lambda x: 0 * x,) * 2)
    assert not any(a.passed for a in retrieval.ask(model, tokenizer, blank, context, questions))


def test_answers_leave_no_trace_in_windows():
    """A window that has moved on cannot take tokens back; each question is still asked right after the context."""
    model = FAMILIES["gemma3, head_dim 256"]()  # windows of 32 tokens in every second layer

    class Letters:
        encode = staticmethod(lambda text, **_: [ord(c) % VOCAB for c in text])

    context = prompt(150)
    questions = [(0.0, "ask", " 123."), (1.0, "a longer question than a window is, so it replaces all", " 45.")]
    for name in ("fp16", "affine4", "tq3"):
        mode = modes.parse_mode(name)
        kinds = [type(c).__name__ for c in mode.make_caches(model)]
        packed = ["TurboQuantRotatingKVCache", "TurboQuantKVCache"]
        assert kinds == (packed if name == "tq3" else ["FloatWindow", "FloatCache"])
        answers = retrieval.ask(model, Letters, mode.make_caches(model), context, questions)
        for answer, (_, question, expected) in zip(answers, questions, strict=True):
            caches = mode.make_caches(model)
            model(mx.array([context]), cache=caches)
            asked, target = Letters.encode(question), Letters.encode(expected)
            logits = model(mx.array([asked + target]), cache=caches)[0, len(asked) - 1 : -1].astype(mx.float32)
            log_p = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            assert answer.log_prob == pytest.approx(log_p[range(len(target)), target].sum(), abs=1e-3)


def test_windows_are_measured_with_what_the_mode_codes():
    """Every token's key and value passes the coder, in windows as elsewhere, and capture sees each once."""
    model = FAMILIES["gemma3, head_dim 256"]()
    tokens = np.array([prompt(100), prompt(100, seed=2)])
    captured = reconstruction.capture(model, tokens, step=40)
    assert {slot: [x.shape for x in sides] for slot, sides in captured.items()} == {
        0: [(2, 2, 100, 256)] * 2,
        1: [(2, 2, 100, 256)] * 2,
    }
    records = divergence.compare(
        model, tokens, {name: modes.parse_mode(name).make_caches(model) for name in ("fp16", "tq4", "tq2")}, step=40
    )
    assert 0 < records["tq4"].kld.mean() < records["tq2"].kld.mean() / 3


def test_summary_of_answers():
    """Changes are those of the same context, and their error is over contexts."""
    rows = [
        {"mode": mode, "tokens": 9, "trial": trial, "passed": passed, "log_prob": log_prob}
        for mode, trial, passed, log_prob in (
            ("fp16", 0, 1, -1.0),
            ("fp16", 0, 1, -3.0),
            ("fp16", 1, 0, -4.0),
            ("tq3", 0, 1, -2.0),
            ("tq3", 0, 0, -3.0),
            ("tq3", 1, 1, -6.0),
        )
    ]
    figures = retrieval.summarise(rows, "fp16")
    assert figures["fp16"]["found_in_each"] == [2, 0] and figures["fp16"]["mean_log_prob"] == -3
    assert figures["tq3"]["found_in_each"] == [1, 1] and figures["tq3"]["asked"] == 3
    assert figures["tq3"]["change"] == pytest.approx(-1.25)  # -0.5 and -2
    assert figures["tq3"]["change_stderr"] == pytest.approx(0.75)
    assert np.isnan(retrieval.summarise(rows[:2], "fp16")["fp16"]["change_stderr"])


def test_reconstruction_error_is_the_theoretical_one_on_gaussians():
    x = mx.random.normal((1, 2, 2000, 256), key=mx.random.key(1))
    still = np.tril(np.full((256, 256), 0.05, np.float32))  # feedback that is worth nothing to squared error
    for bits, code in ((2, "scalar"), (3, "scalar"), (4, "scalar"), (2, "trellis"), (3, "trellis")):
        calibrated = {0: (*(mx.zeros((2, 256)),) * 2, mx.array(still).astype(mx.float16)[None][[0, 0]])}
        (row, _, values, _) = reconstruction.table({0: (x, x)}, bits, calibrated, code)
        assert row["tq"] == pytest.approx(reconstruction.theoretical(bits, code)[1], rel=0.03)
        assert row["tq_centred"] == pytest.approx(row["tq"], rel=1e-3)
        assert row["tq_feedback"] > 1.01 * row["tq_centred"] and np.isnan(values["tq_feedback"])
    (row, *_) = reconstruction.table({1: (x[..., :96], x[..., :96])}, 3, code="scalar")
    assert np.isnan([row["tq_centred"], row["tq_feedback"], row["affine"]]).all() and row["tq"] > 0.03


def run(tmp_path, *extra):
    return command.main(["--model", str(MODEL), "--text", str(TEXT), "--out", str(tmp_path / "out"), *extra])


def test_command_writes_everything(tmp_path, capsys):
    arguments = [
        "--context",
        "300",
        "--windows",
        "2",
        "--batch",
        "1",
        "--without",
        "0,2",
        "--lengths",
        "400",
        "--depths",
        "0,1",
        "--pairs",
        "3",
    ]
    assert run(tmp_path, "--modes", "fp16,tq3,k4v2", *arguments) == 0
    out = tmp_path / "out"
    written = {p.name for p in out.iterdir()}
    assert written == {
        "summary.json",
        "divergence.tsv",
        "windows.tsv",
        "divergence.png",
        "needle.tsv",
        "needle.png",
    } | {
        "list.tsv",
        "reconstruction.tsv",
    }
    summary = json.loads((out / "summary.json").read_text())
    assert summary["needle"]["tq3"]["asked"] == 2 and summary["list"]["fp16"]["asked"] == 3
    lines = (out / "windows.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines[1:3]] == [["fp16", "1"], ["fp16", "3"]] and len(lines) == 1 + 3 * 2
    lines = (out / "divergence.tsv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 3 and lines[0].startswith("mode\tband\tstart")
    assert "k4v2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--windows", "500"], "need 1024000 tokens; the text has"),
        (["--modes", "fp17"], "got 'fp17'"),
        (["--parts", "needles"], "got 'needles'"),
        (["--windows", "0"], "--windows must be at least 1; got 0"),
        (["--context", "1"], "--context must be at least 2; got 1"),
        (["--lengths", "a"], "--lengths must be whole numbers with commas between them; got 'a'"),
        (["--depths", "0,a"], "--depths must be numbers with commas between them; got '0,a'"),
        (["--depths", "2"], "--depths must be at most 30 numbers from 0 to 1; got [2.0]"),
        (["--without", "1,,2"], "--without must be whole numbers with commas between them; got '1,,2'"),
        (["--lengths", "60", "--parts", "needle"], "5 needles take 84 tokens, so --lengths must be more; got 60"),
        (["--text", str(MODEL / "model.safetensors")], "model.safetensors must be a text in UTF-8"),
        (["--model", "nowhere"], "[eval] the model must be a local directory; there is none at nowhere"),
        (["--context", "200000", "--windows", "1"], "need 200000 tokens; the text has"),
        (["--lengths", "400,1000000"], "--lengths 1000000 needs 999917 tokens of filler; the text has"),
    ],
)
def test_bad_input(tmp_path, capsys, extra, message):
    """Is refused before anything is measured, and earlier results stay."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("an earlier run's")
    assert run(tmp_path, *extra) == 1
    error = capsys.readouterr().err
    assert message in error and "tok/s" not in error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["summary.json"]
    assert (tmp_path / "out" / "summary.json").read_text() == "an earlier run's"


SHORT = ["--context", "64", "--windows", "1", "--lengths", "200", "--depths", "0,1", "--pairs", "3"]


@pytest.mark.parametrize(
    "family, changes, names, message",
    [
        (llama, {"head_dim": 80}, "tq3", "head_dim must be a multiple of 32 from 32 to 512; got 80"),
        (llama, {"head_dim": 96}, "affine4", "cannot be measured with affine4: [affine] head_dim must be a multiple of 64"),
        (llama, {}, "tq3c", "there is no"),
    ],
)  # fmt: skip
def test_models_that_modes_do_not_fit(tmp_path, capsys, family, changes, names, message):
    directory = save_model(family, tmp_path / "model", **changes)
    assert run(tmp_path, "--model", str(directory), "--modes", f"fp16,{names}", *SHORT) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_windows_from_the_command_line(tmp_path, capsys):
    sizes = dict(head_dim=256, sliding_window=32, sliding_window_pattern=2, query_pre_attn_scalar=256)
    directory = save_model(gemma3_text, tmp_path / "model", **sizes)
    assert run(tmp_path, "--model", str(directory), "--modes", "tq3,affine4", *SHORT) == 0
    said = capsys.readouterr()
    assert "[eval] fp16 is measured first" in said.err
    assert "[eval] each mode replaces 1 x RotatingKVCache, 1 x KVCache; unchanged: nothing" in said.err
    assert "indexing errors" not in said.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["slots"] == {"replaced": {"RotatingKVCache": 1, "KVCache": 1}, "kept": {}}
    assert list(summary["list"]) == ["fp16", "tq3", "affine4"] and summary["list"]["tq3"]["asked"] == 3
    assert "n/a" in said.out and "nan" not in said.out  # one window and one context have no errors


def test_the_reference_is_always_fp16(capsys):
    def names(given):
        return [mode.name for mode in options.parse([*"--model m --text t --out o --modes".split(), given]).modes]

    assert names("fp16,tq3,fp16,tq2,tq3") == ["fp16", "tq3", "tq2"]
    assert capsys.readouterr().err == ""
    for given in ("tq3,fp16", "tq3"):
        assert names(given) == ["fp16", "tq3"]
        assert "fp16 is measured first: it is what the others are compared with" in capsys.readouterr().err


def test_interrupted(tmp_path, capsys, monkeypatch):
    """What was finished stays, and says so."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_list", interrupted)
    assert run(tmp_path, "--modes", "fp16,tq3", *SHORT) == 130
    assert "[eval] interrupted; the tables and summary.json hold what was finished" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["divergence"] and summary["reconstruction"] and "list" not in summary
    assert (tmp_path / "out" / "divergence.tsv").exists() and not list((tmp_path / "out").glob(".*"))


def test_unwritable_folder(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert run(tmp_path) == 1
    assert "out" in capsys.readouterr().err


def test_model_without_key_value_slots(loaded, tmp_path, monkeypatch, capsys):
    from mlx_lm.models import mamba2

    sizes = dict(num_heads=2, head_dim=8, vocab_size=16, hidden_size=8, intermediate_size=16, state_size=8)
    arguments = mamba2.ModelArgs(
        model_type="mamba2", num_hidden_layers=1, layer_norm_epsilon=1e-5, conv_kernel=4, n_groups=1, use_bias=False,
        use_conv_bias=True, tie_word_embeddings=True, time_step_limit=(0.0, 1.0), time_step_rank=1,
        **sizes,
    )  # fmt: skip
    with pytest.raises(ValueError, match="nothing to centre"):
        calibration.calibrate(mamba2.Model(arguments), [1, 2, 3])
    with pytest.raises(ValueError, match="nothing to compress"):
        reconstruction.capture(mamba2.Model(arguments), np.array([[1, 2, 3]]))
    monkeypatch.setattr(command, "load_model", lambda path: (mamba2.Model(arguments), loaded[1]))
    for part in options.PARTS:
        assert run(tmp_path, "--parts", part) == 1
        assert "has no KVCache slot, so there is nothing to compress" in capsys.readouterr().err
