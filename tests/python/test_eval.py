"""The measuring itself: numbers against plain computations, contexts of the right length, errors said plainly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache
from turboquant_mlx import calibration
from turboquant_mlx.eval import command, divergence, modes, reconstruction, retrieval
from turboquant_mlx.eval.model import cut_windows, load_model, read_tokens
from turboquant_mlx.gated_delta import disable_chunked_recurrence

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
    for length in (1, 256, 257, 2048, 3000):
        edges = divergence.bands(length)
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
    with pytest.raises(ValueError, match="need .* tokens of filler; there are 100"):
        retrieval.needle_context(tokenizer, tokens[:100], 700, depths, retrieval.seeded(0))


CONTEXTS = """
import hashlib, numpy as np
from turboquant_mlx.eval import retrieval
class Letters:
    encode = staticmethod(lambda text: [ord(c) for c in text])
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
    blank = modes._replace(calibration._float_caches(model), lambda _: modes.FloatCache(mx.zeros_like))
    assert not any(a.passed for a in retrieval.ask(model, tokenizer, blank, context, questions))


def test_reconstruction_error_is_the_theoretical_one_on_gaussians():
    x = mx.random.normal((1, 2, 2000, 256), key=mx.random.key(1))
    for bits in (2, 3, 4):
        (row, _, _, _) = reconstruction.table({0: (x, x)}, bits, {0: (mx.zeros((2, 256)),) * 2})
        assert row["tq"] == pytest.approx(reconstruction.theoretical(bits)[1], rel=0.03)
        assert row["tq_centred"] == pytest.approx(row["tq"], rel=1e-3)


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
        (["--parts", "needles"], "got needles"),
        (["--windows", "0"], "must be at least 1"),
        (["--context", "200000", "--windows", "1"], "need 200000 tokens; the text has"),
        (["--lengths", "1000000", "--parts", "needle"], "tokens of filler"),
    ],
)
def test_bad_input(tmp_path, capsys, extra, message):
    assert run(tmp_path, *extra) == 1
    assert message in capsys.readouterr().err


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
    for part in command.PARTS:
        assert run(tmp_path, "--parts", part) == 1
        assert "has no KVCache slot, so there is nothing to compress" in capsys.readouterr().err
