"""A choice of bits within a budget: what it keeps to, the file that carries it, the caches that it makes."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import MODEL
from latent_models import deepseek
from mlx_lm import load
from mlx_lm.models import llama
from small_models import build, save_model, small_gemma3n, small_gpt_oss, small_hybrid, small_llama
from turboquant_mlx import (
    BatchTurboQuantKVCache,
    TurboQuantKVCache,
    calibration,
    disable,
    enable,
    load_prompt_cache,
    save_prompt_cache,
)
from turboquant_mlx.calibration import automatic, choice, policies
from turboquant_mlx.calibration.budget import Budget, parse_budget
from turboquant_mlx.calibration.command import IN_PART
from turboquant_mlx.calibration.command import main as command
from turboquant_mlx.commands import cli
from turboquant_mlx.eval import command as eval_command
from turboquant_mlx.eval import options, parse_mode


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """What is kept for the next time is kept below tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("kld=0.01", Budget(kld=0.01)),
        ("kld=1e-3, context=8192", Budget(kld=1e-3, context=8192)),
        ("bytes=400", Budget(token_bytes=400)),
        ("bytes=1.5KiB", Budget(token_bytes=1536)),
        ("context=128k,memory=8GB", Budget(memory=8e9, context=131072)),
        ("memory=512MiB,context=1M", Budget(memory=2**29, context=2**20)),
    ],
)
def test_budgets_are_read_as_they_are_written(text, budget):
    assert parse_budget(text) == budget == parse_budget(str(budget))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.01",
        "kld",
        "kld=",
        "kld=-1",
        "kld=nan",
        "kld=inf",
        "kld=0",
        "bits=3",
        "kld=1,bytes=2",
        "kld=1,kld=2",
        "memory=8GB",
        "context=8k",
        "context=0,memory=1",
        "context=1.5,memory=1",
        "bytes=0",
        "bytes=8XB",
        "bytes=-4",
    ],
)
def test_other_budgets_are_refused(text):
    with pytest.raises(ValueError, match=r"^\[budget\] .*got|^\[budget\] .*stands twice"):
        parse_budget(text)


SLOTS = {0: policies.Slot(2, 64, 64), 1: policies.Slot(2, 64, 64, window=32), 3: policies.Slot(1, 128, 64)}


def test_bytes_are_those_of_the_caches():
    widths = {0: (3, 2), 1: (8, 4), 3: (4, 8)}
    tokens = 300
    total = 0
    for slot, (keys, values) in widths.items():
        shape = SLOTS[slot]
        if shape.window is None:
            cache = TurboQuantKVCache(key_bits=keys, value_bits=values, recent=16, sink=4)
            k, v = (mx.zeros((1, shape.heads, tokens, d)) for d in (shape.key_dim, shape.value_dim))
            mx.eval(cache.update_and_fetch(k, v)[0].arrays)
            total += sum(x.nbytes for x in cache.state[:4])
            assert shape.copies(16, 4) >= cache.inspect()["exact_bytes"] > 0
            total += shape.copies(16, 4)
        else:
            total += 32 * sum(shape.token_bytes(side, bits) for side, bits in enumerate((keys, values)))
    assert policies.total_bytes(SLOTS, widths, tokens, 16, 4) == total
    assert policies.token_bytes(SLOTS, widths) == 2 * (24 + 16 + 4) + (64 + 64 + 4)


def test_the_way_spends_bytes_where_they_are_worth_most():
    losses = {(slot, side): 1.0 for slot in SLOTS for side in (0, 1)} | {(0, 0): 50.0}
    way = list(policies.way(SLOTS, losses, choice.ERRORS, 1000))
    assert way[0] == policies.everywhere(SLOTS, 2) and way[-1] == policies.everywhere(SLOTS, 8)
    sums = [policies.predicted(losses, choice.ERRORS, widths) for widths in way]
    assert all(a > b for a, b in zip(sums, sums[1:], strict=False)) and len(way) == 1 + 3 * len(losses)
    size = [policies.total_bytes(SLOTS, widths, 1000, 0, 0) for widths in way]
    # No assignment of bits at all loses less in no more bytes.
    rng = np.random.default_rng(0)
    for _ in range(500):
        other = {slot: tuple(int(b) for b in rng.choice(policies.WIDTHS, 2)) for slot in SLOTS}
        bytes_, loss = policies.total_bytes(SLOTS, other, 1000, 0, 0), policies.predicted(losses, choice.ERRORS, other)
        assert not any(bytes_ <= a and loss < b - 1e-12 for a, b in zip(size, sums, strict=True))


def chosen(widths, recent=8, sink=2):
    """A calibration of nothing but a choice."""
    found = calibration.Calibrations()
    found.policy = policies.Policy(widths, recent, sink, "kld=1", {"mean_kld": 0.5})
    return found


def test_enable_makes_the_caches_that_were_chosen(tmp_path):
    model = small_llama()
    enable(model, bits="auto", calibration=chosen({0: (8, 2), 1: (3, 4)}))
    caches = model.make_cache()
    assert [(c.key_bits, c.value_bits, c.recent, c.sink) for c in caches] == [(8, 2, 8, 2), (3, 4, 8, 2)]
    tokens = mx.random.randint(0, 100, (1, 40), key=mx.random.key(0))
    mx.eval(model(tokens, cache=caches))
    save_prompt_cache(str(tmp_path / "p.safetensors"), caches)
    again = load_prompt_cache(str(tmp_path / "p.safetensors"), model)
    step = mx.array([[5]])
    assert mx.array_equal(model(step, cache=caches), model(step, cache=again))
    rows = [model.make_cache() for _ in range(2)]
    for row, length in zip(rows, (40, 25), strict=True):
        mx.eval(model(tokens[:, :length], cache=row))
    alone = [model(step, cache=row)[0, -1] for row in rows]
    rows = [model.make_cache() for _ in range(2)]
    for row, length in zip(rows, (40, 25), strict=True):
        mx.eval(model(tokens[:, :length], cache=row))
    batch = [BatchTurboQuantKVCache.merge(list(layer)) for layer in zip(*rows, strict=True)]
    assert [(c.key_bits, c.value_bits) for c in batch] == [(8, 2), (3, 4)]
    together = model(mx.broadcast_to(step, (2, 1)), cache=batch)[:, -1]
    assert all(mx.allclose(a, b, atol=1e-3) for a, b in zip(alone, together, strict=True))
    enable(model, bits=3, calibration=chosen({0: (8, 2), 1: (3, 4)}))  # said plainly, 3 bits are 3 bits
    assert all((c.key_bits, c.value_bits) == (3, 3) for c in model.make_cache())
    with pytest.raises(ValueError, match="holds a .*8-bit keys and 2-bit values.*asked for was"):
        load_prompt_cache(str(tmp_path / "p.safetensors"), model)
    disable(model)


@pytest.mark.parametrize(
    ("given", "settings", "why"),
    [
        ({}, {}, "needs bits that were chosen"),
        (None, {}, "needs bits that were chosen"),
        (chosen({0: (3, 3)}), {}, r"must be of the slots that are packed, \[0, 1\]; they are of \[0\]"),
        (chosen({0: (3, 3), 1: (3, 3)}), {"key_bits": 4}, "leave key_bits out"),
        (chosen({0: (3, 3), 1: (3, 3)}), {"code": "scalar"}, "code='scalar'"),
    ],
)
def test_auto_is_refused_where_nothing_fits(given, settings, why):
    model = small_llama()
    enable(model, bits=4, calibration={})
    with pytest.raises(ValueError, match=why):
        enable(model, bits="auto", calibration=given, **settings)
    assert {c.key_bits for c in model.make_cache()} == {4}
    disable(model)
    with pytest.raises(ValueError, match="bits must be 2, 3, 4 or 8"):
        enable(model, bits="automatic")


def test_the_choice_is_in_the_file(tmp_path):
    model_dir = save_model(llama, tmp_path / "m")
    found = chosen({0: (8, 2), 1: (3, 4)})
    for slot in (0, 1):
        found[slot] = calibration.Calibration(key_centre=mx.ones((2, 128)), value_centre=mx.zeros((2, 128)))
    path = calibration.save_calibration(found, model_dir)
    again = calibration.load_calibration(model_dir)
    assert again.policy == found.policy and sorted(again) == [0, 1]
    assert calibration.Calibrations(again).policy == found.policy
    tensors, metadata = mx.load(str(path), return_metadata=True)
    for broken in ("", "[]", '{"widths": {"0": [5, 3]}, "recent": 1, "sink": 1, "budget": "", "measured": {}}'):
        mx.save_safetensors(str(path), tensors, metadata | {"policy": broken})
        with pytest.raises(ValueError, match="choice of bits cannot be read"):
            calibration.load_calibration(model_dir)


def test_command_with_the_bundled_model(tmp_path, capsys):
    """From the command to caches, by every way that leads there."""
    out = tmp_path / "c.safetensors"
    arguments = ["--model", str(MODEL), "--windows", "2", "--length", "64", "--positions", "0", "--out", str(out)]
    assert command([*arguments, "--budget", "bytes=1200,context=8k"]) == 0
    told = capsys.readouterr().out
    assert "chosen for bytes=1200,context=8192:" in told and "held out from the choice: KLD" in told
    policy = calibration.load_calibration(out, directory=MODEL).policy
    assert sorted(policy.widths) == [3, 7] and policy.measured["bytes"] <= 1200 * 8192
    assert policy.measured["mean_kld"] > 0
    assert policy.measured["token_bytes"] == sum(
        2 * (32 * bits + 2) for pair in policy.widths.values() for bits in pair
    )
    model, _ = load(str(MODEL))
    for where in (out, None):  # the file, or what was kept for these weights
        enable(model, bits="auto", calibration=where)
        packed = {i: (c.key_bits, c.value_bits) for i, c in enumerate(model.make_cache()) if hasattr(c, "key_bits")}
        assert packed == policy.widths
        disable(model)
    found = calibration.load_calibration(out, directory=MODEL)
    assert len(parse_mode("auto").make_caches(model, found)) == 8
    args = cli.tq_options().parse_args(["--tq-bits", "auto", "--tq-calibration", str(out)])
    cli.prepare(model, args, MODEL)
    assert "KVCache K" in capsys.readouterr().err
    model, _ = load(str(MODEL))  # whose own file has no choice
    cli.prepare(model, cli.tq_options().parse_args(["--tq-bits", "auto"]), MODEL)
    assert "bits and calibration" in capsys.readouterr().err
    args = options.parse(["--model", str(MODEL), "--parts", "tasks", "--modes", "auto"])
    assert eval_command._calibration(args, model, None)[0].policy.widths == policy.widths
    before = out.read_bytes()
    for changes, why in (
        (
            ["--budget", "bytes=100"],
            "cannot be met: with 2 bits everywhere the caches take 8,650,752 bytes at 16,384 tokens",
        ),
        (["--budget", "many"], "a budget is kld=0.01"),
        (["--budget", "kld=1", "--length", "8000"], "takes 6 windows of 8000 tokens at least; the text has"),
    ):
        assert command([*arguments, *changes]) == 1
        assert why in capsys.readouterr().err
    assert out.read_bytes() == before


def test_fewest_bytes_keep_to_a_divergence():
    model = build(llama, num_hidden_layers=3)
    windows = np.random.default_rng(0).integers(0, 100, (2, 64)).astype(np.int32)
    found = calibration.calibrate(model, windows, positions=0)
    loose, tight = (
        choice.choose(model, found, Budget(kld=kld, context=100000), windows, windows[:1]) for kld in (0.5, 0.002)
    )
    assert loose.measured["bytes"] < tight.measured["bytes"]
    assert loose.measured["mean_kld"] < 0.7 and tight.measured["mean_kld"] < 0.004
    with pytest.raises(ValueError, match="with 8 bits everywhere the divergence is"):
        choice.choose(model, found, Budget(kld=1e-12), windows, windows[:1])
    losses = choice.losses(model, found, windows)
    assert losses.keys() == {(slot, side) for slot in range(3) for side in (0, 1)} and min(losses.values()) > 0


@pytest.mark.parametrize(("make", "slots"), [(small_gpt_oss, [0, 1]), (small_gemma3n, [0, 1]), (small_hybrid, [1, 3])])
def test_models_with_windows_shared_caches_and_recurrent_states(make, slots):
    """A window is held at its chosen bits, whatever the default for windows is; layers without a packed slot stay."""
    model = make()
    windows = np.random.default_rng(0).integers(0, 100, (2, 64)).astype(np.int32)
    found = calibration.calibrate(model, windows, positions=0)
    found.policy = choice.choose(model, found, Budget(memory=700_000, context=2000), windows, windows[:1])
    assert sorted(found.policy.widths) == slots and found.policy.measured["bytes"] <= 700_000
    for slot in slots:
        found.policy.widths[slot] = (3, 2)
    enable(model, bits="auto", calibration=found)
    caches = model.make_cache()
    assert [(caches[slot].key_bits, caches[slot].value_bits) for slot in slots] == [(3, 2)] * 2
    disable(model)


def test_memory_counts_the_caches_that_stay():
    """What is chosen for packed slots leaves room for recurrent states."""
    model = small_hybrid()
    windows = np.random.default_rng(0).integers(0, 100, (2, 64)).astype(np.int32)
    found = calibration.calibrate(model, windows, positions=0)
    loose = choice.choose(model, found, Budget(memory=10**9, context=2000), windows, windows[:1])
    caches = model.make_cache()
    model(mx.zeros((1, 2), mx.int32), cache=caches)
    others = sum(c.nbytes for i, c in enumerate(caches) if i not in loose.widths)
    assert loose.measured["other_bytes"] == others > 0
    assert f"caches that are not packed take {others:,} bytes beside" in choice.described(loose)
    least = policies.total_bytes(choice.slots_of(model), policies.everywhere(loose.widths, 2), 2000, 0, 0)
    with pytest.raises(ValueError, match=f"the caches take {least + others:,} bytes at 2,000 tokens"):
        choice.choose(model, found, Budget(memory=least + others - 1, context=2000), windows, windows[:1])
    smallest = choice.choose(model, found, Budget(memory=least + others, context=2000), windows, windows[:1])
    assert set(smallest.widths.values()) == {(2, 2)}


def test_latent_attention_is_refused():
    """One set of codes is key and value, so that bits of each cannot be chosen."""
    with pytest.raises(
        ValueError, match=r"\[choose\] .* latent attention has one set of codes for both, in layers 0, 1"
    ):
        choice.slots_of(deepseek())


def test_layers_before_the_changed_one_are_not_computed_again(monkeypatch):
    """Handing out what layers gave changes nothing but the time."""
    model = build(llama, num_hidden_layers=3)
    windows = np.random.default_rng(0).integers(0, 100, (1, 48)).astype(np.int32)
    quick = choice.losses(model, {}, windows)
    assert {type(layer) for layer in model.layers} == {llama.TransformerBlock}
    layers = choice._Layers.__init__

    def without(self, model):
        layers(self, model)
        self.layers = []

    monkeypatch.setattr(choice._Layers, "__init__", without)
    slow = choice.losses(model, {}, windows)
    assert all(np.isclose(quick[at], slow[at], rtol=1e-3) for at in slow)


def test_what_a_layer_lacks_is_said(tmp_path, capsys, monkeypatch):
    from turboquant_mlx.calibration import feedback

    folder = save_model(llama, tmp_path / "m")
    monkeypatch.setattr(feedback.Output, "metrics", lambda *_: None)
    assert command(["--model", str(folder), "--windows", "1", "--length", "32", "--positions", "0"]) == IN_PART
    assert "layer 1 has not the feedback of values: the way from attention" in capsys.readouterr().err
    assert calibration.load_calibration(folder)[1].value_feedback is None


def test_an_interrupted_choice_writes_nothing(tmp_path, capsys, monkeypatch):
    folder = save_model(llama, tmp_path / "m")
    before = sorted(folder.iterdir())

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    arguments = ["--model", str(folder), "--windows", "2", "--length", "48", "--positions", "0", "--budget", "kld=0.01"]
    for owner, name in ((choice, "measure"), (mx, "save_safetensors")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            assert command(arguments) == 130
        assert "nothing was written" in capsys.readouterr().err
        assert sorted(folder.iterdir()) == before and not automatic.folder().exists()
