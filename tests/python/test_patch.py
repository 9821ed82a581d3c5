"""The overlay: patching, enabling, refusing."""

import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import MODEL
from mlx_lm import load
from mlx_lm.models import base, llama, qwen3
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache
from small_models import greedy, save_model
from turboquant_mlx import TurboQuantKVCache, apply_patch, disable, enable, remove_patch

SMOKE = (
    "import mlx.core as mx; from pathlib import Path; from mlx_lm import load; from mlx_lm.models.cache import KVCache; "
    "from turboquant_mlx import TurboQuantKVCache, apply_patch; root=Path('.').resolve(); "
    "model, tokenizer = load(str(root)); apply_patch(); cache=[TurboQuantKVCache(bits=3) if isinstance(c, KVCache) else "
    "c for c in model.make_cache()]; logits=model(mx.array(tokenizer.encode('TurboQuant smoke test.'))[None], "
    "cache=cache); mx.eval(logits); token=mx.argmax(logits[:, -1, :], axis=-1); logits=model(token.reshape(1, 1), "
    "cache=cache); mx.eval(logits); print('TQ3 local bundle OK')"
)


def small_llama(head_dim=64, layers=2):
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=128,
        num_hidden_layers=layers,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        vocab_size=100,
    )
    return llama.Model(args)


def small_qwen3():
    args = qwen3.ModelArgs(
        model_type="qwen3",
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        vocab_size=100,
        max_position_embeddings=1000,
        rope_theta=10000,
        tie_word_embeddings=False,
    )
    return qwen3.Model(args)


def test_smoke_test_of_the_seed_card():
    done = subprocess.run([sys.executable, "-c", SMOKE], cwd=MODEL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "TQ3 local bundle OK"


def test_patch_is_idempotent_and_can_be_undone():
    remove_patch()
    functions = (
        base.quantized_scaled_dot_product_attention,
        base.scaled_dot_product_attention,
        llama.__dict__["scaled_dot_product_attention"],
    )
    apply_patch()
    apply_patch()
    assert base.quantized_scaled_dot_product_attention is not functions[0]
    assert llama.scaled_dot_product_attention is not functions[2]
    remove_patch()
    remove_patch()
    now = (
        base.quantized_scaled_dot_product_attention,
        base.scaled_dot_product_attention,
        llama.__dict__["scaled_dot_product_attention"],
    )
    assert now == functions


def test_without_the_patch_the_message_says_so():
    remove_patch()
    model = small_llama()
    with pytest.raises(RuntimeError, match=r"call turboquant_mlx.apply_patch\(\)"):
        model(mx.array([[1, 2, 3]]), cache=[TurboQuantKVCache() for _ in range(2)])


def test_mlx_lms_own_quantised_cache_still_works(patched):
    from mlx_lm.models.cache import QuantizedKVCache

    model = small_llama()
    want = model(mx.array([[1, 2, 3]]), cache=[KVCache() for _ in range(2)])
    got = model(mx.array([[1, 2, 3]]), cache=[QuantizedKVCache(bits=8) for _ in range(2)])
    assert mx.allclose(got, want, atol=0.05)


def test_enable_replaces_only_kvcache_slots(bundled):
    model, _ = bundled
    try:
        assert enable(model, bits=4) == 2
        cache = model.make_cache()
        kinds = [type(c) for c in cache]
        assert kinds == [ArraysCache] * 3 + [TurboQuantKVCache] + [ArraysCache] * 3 + [TurboQuantKVCache]
        assert cache[3].bits == 4
        enable(model, key_bits=4, value_bits=2)
        assert (make_prompt_cache(model)[3].key_bits, make_prompt_cache(model)[3].value_bits) == (4, 2)
    finally:
        disable(model)
    assert type(model.make_cache()[3]) is KVCache


def test_enable_works_without_make_cache():
    model = small_qwen3()
    assert not hasattr(type(model), "make_cache")
    want = model(mx.array([[5, 6, 7]]), cache=make_prompt_cache(model))
    assert enable(model, bits=4) == 2
    cache = make_prompt_cache(model)
    assert all(type(c) is TurboQuantKVCache for c in cache)
    got = model(mx.array([[5, 6, 7]]), cache=cache)
    assert mx.linalg.norm(got - want) / mx.linalg.norm(want) < 0.2
    disable(model)
    assert type(make_prompt_cache(model)[0]) is KVCache


class Bypass(nn.Module):
    """A layer that calls MLX's attention by itself."""

    def __call__(self, x, cache):
        q = x[:, None]
        k, v = cache.update_and_fetch(q, q)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0]


class BypassModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Bypass()]

    def __call__(self, tokens, cache):
        return self.layers[0](mx.zeros((*tokens.shape, 64)), cache[0])


class NoAttention(nn.Module):
    layers = ()

    def make_cache(self):
        return [ArraysCache(2)]


def test_enable_refuses_with_the_reason_per_layer():
    with pytest.raises(ValueError, match="layer 0: its attention does not go through"):
        enable(BypassModel())
    model = small_llama(head_dim=80)
    reason = "head_dim must be a multiple of 32 from 32 to 512; got 80"
    with pytest.raises(ValueError, match=rf"2 of 2 .*\n  layer 0: .*{reason}.*\n  layer 1: .*{reason}"):
        enable(model)
    assert type(make_prompt_cache(model)[0]) is KVCache
    with pytest.raises(ValueError, match="no KVCache slot, so there is nothing to compress"):
        enable(NoAttention())
    with pytest.raises(ValueError, match="must be 2, 3, 4 or 8; got 7"):
        enable(small_llama(), bits=7)


@pytest.mark.parametrize("build", [small_llama, small_qwen3])
@pytest.mark.parametrize("owner", ["class", "instance"])
def test_a_refused_enable_leaves_the_model_as_it_was(build, owner):
    model = build()
    if owner == "instance":
        model.make_cache = lambda: [KVCache() for _ in model.layers]
    before = vars(model).get("make_cache")
    enable(model, 3, seed=5)
    for wrong, message in [
        ({"bits": 7}, "must be 2, 3, 4 or 8; got 7"),
        ({"start": -1}, "start must be at least 0; got -1"),
        ({"calibration": {99: (None, None)}}, r"slots that are packed, \[0, 1\]; got \[99\]"),
        ({"calibration": {0: (mx.zeros((3, 64)),) * 2}}, "2 of 2|1 of 2"),
        (
            {"calibration": {0: (None, None, mx.zeros((2, 64, 64)))}, "seed": 0},
            "feedback must be float16; got .*float32",
        ),
        ({"calibration": {0: 7}}, "must hold a Calibration for each slot; got 7"),
        ({"calibration": 7}, "must be {slot: Calibration}, a file of `calibrate` or a folder that holds one; got int"),
        (
            {"calibration": {0: (None, None, mx.zeros((2, 64, 64), mx.float16))}, "seed": 5},
            "made for seed 0; got 5",
        ),
    ]:
        with pytest.raises(ValueError) as error:
            enable(model, **wrong)
        assert re.search(message, str(error.value)) or message in str(error.value)
        assert [(type(c), c.bits, c.seed) for c in make_prompt_cache(model)] == [(TurboQuantKVCache, 3, 5)] * 2
    assert enable(model, 4) == 2 and make_prompt_cache(model)[0].bits == 4
    disable(model)
    assert vars(model).get("make_cache") is before and type(make_prompt_cache(model)[0]) is KVCache


def test_models_can_be_enabled_from_several_threads():
    """One is held up amid its probe while another is probed; a server loads models in a thread of its own."""
    begun, go_on = threading.Event(), threading.Event()

    class Held(llama.Model):
        def __call__(self, *args, **named):
            begun.set()
            assert go_on.wait(timeout=30)
            return super().__call__(*args, **named)

    held, other = small_llama(), small_llama()
    mx.eval(held.parameters())  # another thread cannot compute what this one began
    held.__class__ = Held
    with ThreadPoolExecutor() as pool:
        result = pool.submit(enable, held)
        assert begun.wait(timeout=30)
        assert enable(other) == 2
        go_on.set()
        assert result.result(timeout=30) == 2


def test_mistral_runs_as_llama(tmp_path):
    """mlx-lm maps its model_type to llama; a `sliding_window` without `layer_types` changes nothing, as in mlx-lm."""
    directory = save_model(llama, tmp_path / "mistral", model_type="mistral", sliding_window=4096)
    assert json.loads((directory / "config.json").read_text())["model_type"] == "mistral"
    model, _ = load(str(directory))
    assert type(model) is llama.Model and enable(model, bits=3) == 2
    caches = make_prompt_cache(model)
    text = list(range(50, 90))
    got = greedy(model, text, 16, caches)
    assert [type(c) for c in caches] == [TurboQuantKVCache] * 2 and caches[0].offset == 56
    same, _ = load(str(save_model(llama, tmp_path / "llama")))
    enable(same, bits=3)
    assert got == greedy(same, text, 16) and len(set(got)) > 3
