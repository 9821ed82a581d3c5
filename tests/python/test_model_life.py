"""Enabled models as objects: dropped, copied, pickled, used from another thread, changed, made by code of their own."""

import copy
import gc
import json
import pickle
import threading
import weakref
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import MODEL
from mlx.utils import tree_flatten
from mlx_lm.models import base, gpt_oss, qwen2, qwen3, stablelm
from mlx_lm.models.cache import load_prompt_cache as mlx_lm_load
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from packed_caches import fill, same
from small_models import VOCAB, build, greedy, prompt, small_gpt_oss, small_llama
from test_saving import CASES
from turboquant_mlx import (
    TurboQuantKVCache,
    disable,
    enable,
    load_prompt_cache,
    remove_patch,
    save_prompt_cache,
)
from turboquant_mlx.calibration import calibrate, load_calibration, save_calibration


def calibrated(model):
    return calibrate(model, prompt(80))


# ---- dropped


@pytest.fixture
def by_references_alone():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def ways():
    def fail(model):
        with pytest.raises(ValueError, match="head_dim must be"):
            enable(model)

    def twice(model):
        enable(model, bits=2)
        enable(model, bits=4, calibration=calibrated(model))

    def undone(model):
        enable(model)
        greedy(model, prompt(9), 4)
        disable(model)
        greedy(model, prompt(9), 4)

    def copied(model):
        enable(model)
        greedy(copy.deepcopy(model), prompt(9), 4)
        pickle.loads(pickle.dumps(model))

    return {
        "enabled": (small_llama, enable),
        "answered": (small_llama, lambda model: (enable(model), greedy(model, prompt(9), 4))),
        "windows": (small_gpt_oss, lambda model: (enable(model), greedy(model, prompt(40), 4))),
        "enabled twice": (small_llama, twice),
        "disabled": (small_llama, undone),
        "refused": (lambda: small_llama(head_dim=80), fail),
        "calibrated": (small_llama, calibrated),
        "copied": (small_llama, copied),
    }


@pytest.mark.parametrize("way", ways())
def test_a_dropped_model_is_gone(way, by_references_alone):
    make, use = ways()[way]
    model = make()
    parts = [weakref.ref(model), *(weakref.ref(x) for _, x in tree_flatten(model.parameters()))]
    use(model)
    del model
    assert [part() for part in parts if part() is not None] == []


def test_a_deep_copy_is_independent():
    model = small_llama()
    enable(model, bits=3, calibration=calibrated(model))
    other = copy.deepcopy(model)
    want = greedy(model, prompt(30), 8)
    assert greedy(other, prompt(30), 8) == want
    model.update({"lm_head": {"weight": -model.lm_head.weight}})
    disable(model)
    assert greedy(other, prompt(30), 8) == want and type(other.make_cache()[0]) is TurboQuantKVCache
    del model
    assert greedy(other, prompt(30), 8) == want
    disable(other)
    assert "make_cache" not in vars(other)


def test_a_shallow_copy_outlives_its_model():
    model = small_llama()
    enable(model)
    want = greedy(model, prompt(30), 8)
    other = copy.copy(model)
    del model
    assert greedy(other, prompt(30), 8, make_prompt_cache(other)) == want


# ---- pickled


@pytest.mark.parametrize("case", CASES)
def test_a_pickled_cache_goes_on(case, patched):
    cache = CASES[case]()
    back = pickle.loads(pickle.dumps(cache))
    assert same(back, cache)
    if not hasattr(cache, "caches") and not cache.empty():
        batch = cache._core.arrays[0].shape[0] if cache._core.arrays else 1
        mx.random.seed(3)
        fill(cache, 2, batch=batch)
        mx.random.seed(3)
        assert same(fill(back, 2, batch=batch), cache)


@pytest.mark.parametrize("make", [small_llama, small_gpt_oss])
def test_a_pickled_model_answers(make):
    model = make()
    enable(model, bits=4, calibration=calibrated(model) if make is small_llama else None)
    want = greedy(model, prompt(30), 8)
    kept = pickle.dumps(model)
    del model
    back = pickle.loads(kept)
    assert type(back.make_cache()[-1]).__name__.startswith("TurboQuant") and greedy(back, prompt(30), 8) == want


# ---- threads


def in_a_thread_that_ends(work):
    """work() in a thread that is over when its result is used."""
    out = []
    thread = threading.Thread(target=lambda: out.append(work()))
    thread.start()
    thread.join()
    (result,) = out
    return result


def test_what_one_thread_prepared_another_uses(tmp_path):
    model = small_llama()
    (tmp_path / "config.json").write_text("{}")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    save_calibration(calibrated(model), tmp_path)
    enable(model, calibration=tmp_path)
    want = greedy(model, prompt(30), 8)
    caches = make_prompt_cache(model)
    greedy(model, prompt(30), 2, caches)
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, caches)
    disable(model)
    in_a_thread_that_ends(lambda: enable(model, calibration=tmp_path))
    assert greedy(model, prompt(30), 8) == want
    found = in_a_thread_that_ends(lambda: load_calibration(tmp_path))
    enable(model, calibration=found)
    assert greedy(model, prompt(30), 8) == want
    for load in (lambda: load_prompt_cache(file, model), lambda: mlx_lm_load(file)):
        back = in_a_thread_that_ends(load)
        assert greedy(model, want[1:2], 4, back) == greedy(model, want[1:2], 4, caches_after(model, file))
    # Centres that somebody casts or slices are lazy, and still this thread's own when another one answers.
    made = in_a_thread_that_ends(lambda: TurboQuantKVCache(centres=(mx.ones((4, 64), mx.float16)[::2], None), seed=1))
    assert fill(made, 3).offset == 3 and mx.isfinite(made.to_float().keys).all()


def caches_after(model, file):
    return load_prompt_cache(file, model)


# ---- weights that change


def adapter(model):
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0})


def other_weights(model):
    model.load_weights([(name, x * 1.01) for name, x in tree_flatten(model.parameters())])


CHANGES = {
    "adapter": adapter,
    "load_weights": other_weights,
    "quantize": lambda model: nn.quantize(model, group_size=32),
    "set_dtype": lambda model: model.set_dtype(mx.bfloat16),
    "in place": lambda model: model.lm_head.weight.__setitem__(0, 3.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_after_enable_are_noticed(change, tmp_path):
    model = small_llama()
    enable(model)
    caches = make_prompt_cache(model)
    early = make_prompt_cache(model)
    greedy(model, prompt(20), 2, caches)
    before, after = (str(tmp_path / f"{name}.safetensors") for name in ("before", "after"))
    save_prompt_cache(before, caches)
    CHANGES[change](model)
    with pytest.raises(ValueError, match="was made by another model"):
        load_prompt_cache(before, model)
    if change == "in place":
        return  # loading noticed; a prompt looks only whether parameters are other arrays
    greedy(model, prompt(20), 2, early)  # made before the change, filled after it
    save_prompt_cache(after, early)
    load_prompt_cache(after, model)
    same_as_before = small_llama()
    enable(same_as_before)
    load_prompt_cache(before, same_as_before)
    with pytest.raises(ValueError, match="was made by another model"):
        load_prompt_cache(after, same_as_before)
    greedy(model, prompt(5), 2, caches)  # half of it of either weights
    with pytest.raises(ValueError, match="filled by models of different weights"):
        save_prompt_cache(after, caches)


def test_a_calibration_of_another_fine_tune_is_refused(tmp_path):
    model, tuned = small_llama(), small_llama()
    other_weights(tuned)
    found = calibrated(model)
    for name, m in (("base", model), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        mx.save_safetensors(str(tmp_path / name / "model.safetensors"), dict(tree_flatten(m.parameters())))
    file = save_calibration(found, tmp_path / "base")
    with pytest.raises(ValueError, match="same shape with other weights"):
        load_calibration(file, directory=tmp_path / "tuned")
    for calibration in (found, file, load_calibration(file, directory=False)):
        with pytest.raises(ValueError, match="calibration was made with other weights"):
            enable(tuned, calibration=calibration)
        assert "make_cache" not in vars(tuned)
        assert enable(model, calibration=calibration) == 2
    assert enable(tuned, calibration=dict(found)) == 2  # somebody means it


def test_a_model_split_after_enable_is_not_given_the_calibration_of_other_layers():
    model = build(qwen2, hidden_size=128, num_hidden_layers=3)
    enable(model, calibration=calibrated(model))
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    model.model.pipeline(group)  # the last two layers
    with pytest.raises(RuntimeError, match=r"call enable\(\) after pipeline\(\)"):
        make_prompt_cache(model)


def test_a_calibration_fits_the_model_at_any_width(tmp_path):
    """Quantised, dequantised and in float32, a model is the one it was calibrated as."""
    from mlx_lm.utils import dequantize_model

    model = small_llama()
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32)
    found = calibrated(model)
    wide = dequantize_model(copy.deepcopy(model))
    wide.set_dtype(mx.float32)
    model.set_dtype(mx.float32)
    for m in (model, wide):
        assert enable(m, calibration=found) == 2
    assert enable(model, calibration=calibrated(wide)) == 2


# ---- models with code of their own


def own_code(tmp_path, module, model):
    """A model directory whose architecture lies in a file of its own, loaded before the patch."""
    remove_patch()
    source = open(module.__file__).read().replace("from .", "from mlx_lm.models.")
    (tmp_path / "arch.py").write_text(source)
    config = {k: v for k, v in vars(model.args).items() if v is not None} | {"model_file": "arch.py"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return load_model(tmp_path, trust_remote_code=True)[0]


def test_sinks_in_code_of_its_own(tmp_path):
    plain = small_gpt_oss()
    model = own_code(tmp_path, gpt_oss, plain)
    assert enable(model) == 2 and enable(plain) == 2
    assert greedy(model, prompt(40), 8) == greedy(plain, prompt(40), 8)
    remove_patch()
    assert (
        vars(model.model.layers[0].self_attn.__class__)["__call__"].__globals__["scaled_dot_product_attention"]
        is base.scaled_dot_product_attention
    )


def test_calibrate_reaches_code_of_its_own(tmp_path):
    plain = build(qwen3)
    model = own_code(tmp_path, qwen3, plain)
    found, want = calibrated(model), calibrated(plain)
    for slot in want:
        for a, b in zip(found[slot].feedback, want[slot].feedback, strict=True):
            assert a is not None and mx.array_equal(a, b)


def test_keys_that_a_model_casts(tmp_path):
    """StableLM casts the keys that its cache gave it to float32."""
    model = stablelm.Model(
        stablelm.ModelArgs(
            model_type="stablelm",
            vocab_size=VOCAB,
            hidden_size=128,
            num_attention_heads=4,
            num_hidden_layers=2,
            num_key_value_heads=4,
            intermediate_size=256,
            rope_theta=10000.0,
            use_qkv_bias=False,
            partial_rotary_factor=0.25,
            layer_norm_eps=1e-5,
        )
    )
    mx.eval(model.parameters())
    assert enable(model) == 2
    cache = make_prompt_cache(model)
    assert len(greedy(model, prompt(20), 6, cache)) == 6 and cache[0].kernel


def test_the_bundled_calibration_says_what_it_was_made_with():
    assert load_calibration(MODEL).weights
