"""Memory that is known before it is needed: what caches take, counted from shapes, against caches that were filled."""

import json
import shutil

import mlx.core as mx
import pytest
from conftest import MODEL
from latent_models import deepseek, indexed
from mlx_lm.models.cache import make_prompt_cache
from small_models import FAMILIES, prompt, small_hybrid
from turboquant_mlx import calibration, enable
from turboquant_mlx.calibration.files import write_calibration
from turboquant_mlx.calibration.policies import Policy
from turboquant_mlx.commands import cli
from turboquant_mlx.memory import CacheSizes

MODELS = {
    "hybrid": small_hybrid,
    "llama": FAMILIES["llama, head_dim 64"],
    "windows": FAMILIES["gemma3, head_dim 256"],
    "gemma3n": FAMILIES["gemma3n, shared keys and values"],
    "latent": deepseek,
    "latent, some kept": indexed,
}


def resident(model, count):
    """Bytes of caches that have read `count` tokens, in chunks of 64, and one more."""
    cache = make_prompt_cache(model)
    text = prompt(count)
    for at in range(0, count - 1, 64):
        model(mx.array([text[at : min(at + 64, count - 1)]]), cache=cache)
        mx.eval([c.state for c in cache])
    model(mx.array([text[-1:]]), cache=cache)
    mx.eval([c.state for c in cache])
    return sum(c.nbytes for c in cache)


@pytest.mark.parametrize("settings", [{}, {"bits": 2, "recent": 0, "sink": 0}, {"key_bits": 8, "checkpoints": True}])
@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_filled_caches(name, settings):
    model = MODELS[name]()
    if name != "hybrid":
        settings = {key: value for key, value in settings.items() if key != "checkpoints"}
    enable(model, **settings)
    sizes = CacheSizes(model, lambda: make_prompt_cache(model))
    for count in (1030, 2000) if "checkpoints" in settings else (100, 1030, 2000):  # 100 tokens make two of four
        assert resident(model, count) == sizes.at(count)
    assert sizes.longest(sizes.at(1536), 10**6) == 1536 or name in ("windows", "gemma3n")
    assert sizes.longest(0, 100) == 0


def test_plan_prints_what_caches_take(tmp_path, capsys):
    """Of a directory that has no weights at all."""
    shutil.copy(MODEL / "config.json", tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "--model", str(tmp_path), "--context", "16k", "--batch", "1", "4", "--width", "3", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert end.value.code == 0 and [(r["caches"], r["batch"]) for r in rows] == [
        ("float", 1),
        ("float", 4),
        ("3 bits", 1),
        ("3 bits", 4),
    ]
    assert rows[3]["cache_bytes"] == 4 * rows[2]["sequence_bytes"] and rows[0]["context"] == 16384
    assert rows[2]["sequence_bytes"] < 0.5 * rows[0]["sequence_bytes"]
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "--model", str(tmp_path / "nothing")])
    assert end.value.code == 1 and "there is no" in capsys.readouterr().err


def test_plan_heeds_the_options_of_the_caches(tmp_path, capsys):
    """--tq-bits is the width, auto the chosen ones; what cannot be counted is refused."""
    shutil.copy(MODEL / "config.json", tmp_path)

    def rows(*options):
        with pytest.raises(SystemExit) as end:
            cli.main(["plan", "--model", str(tmp_path), "--context", "1k", "--batch", "1", "--json", *options])
        told = capsys.readouterr()
        if end.value.code:
            return told.err
        return {row["caches"]: row["sequence_bytes"] for row in map(json.loads, told.out.splitlines())}

    all_widths = rows()
    assert rows("--tq-bits", "2") == {name: all_widths[name] for name in ("float", "2 bits")}
    chosen = calibration.Calibrations({3: calibration.Calibration(key_centre=mx.zeros((2, 256)))})
    chosen.policy = Policy({3: (4, 4), 7: (4, 4)}, 128, 4, "kld=1", {})
    write_calibration(chosen, tmp_path / calibration.FILE_NAME)
    assert rows("--tq-bits", "auto")["auto bits"] == all_widths["4 bits"]
    assert rows("--context", "1M", "--width", "3") == rows("--context", str(2**20), "--width", "3")
    assert "--tq-start 5 is not counted" in rows("--tq-start", "5")
    assert "exclude each other; got [3] and 2" in rows("--width", "3", "--tq-bits", "2")


def test_the_workspace_is_an_upper_estimate(bundled, tokens):
    """Of the bundled model's prompts; a fifth too much at most."""
    model, _ = bundled
    enable(model)
    sizes = CacheSizes(model, lambda: make_prompt_cache(model))
    for step in (512, 2048):
        cache = make_prompt_cache(model)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model(mx.array([tokens[:step]]), cache=cache)
        mx.eval([c.state for c in cache])
        taken = mx.get_peak_memory() - before
        assert taken <= sizes.workspace(step) + sizes.at(step) <= 1.3 * taken
