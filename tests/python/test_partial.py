"""Models of which some slots can be packed: those are, the others stay as the model made them, and it is said which."""

import copy
import json
import pickle
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from conftest import MODEL
from decoded import check_logits
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import deepseek_v2, gemma4_text
from mlx_lm.models.cache import KVCache, make_prompt_cache, trim_prompt_cache
from small_models import VOCAB, batched, build, greedy, prompt, small_llama
from turboquant_mlx import (
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    enable,
    load_prompt_cache,
    save_prompt_cache,
)


def small_gemma4(global_head_dim, vocab=VOCAB):
    """Three windows of 64 coordinates and a full layer of another head_dim; the last two layers read others' caches."""
    return build(
        gemma4_text,
        num_hidden_layers=6,
        head_dim=64,
        global_head_dim=global_head_dim,
        num_kv_shared_layers=2,
        vocab_size=vocab,
        vocab_size_per_layer_input=vocab,
        hidden_size_per_layer_input=32,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 3,
        tie_word_embeddings=True,
    )


def mixed(vocab=VOCAB):
    return small_gemma4(80, vocab)


def chunks(read=40, single=12):
    """A prompt and single tokens after it."""
    tokens = prompt(read + single)
    return [tokens[:read], *([token] for token in tokens[read:])]


REASON = "head_dim must be a multiple of 32 from 32 to 512; got 80"
KINDS = [TurboQuantRotatingKVCache, KVCache] * 2


def test_what_can_be_packed_is_and_the_rest_stays():
    model = mixed()
    done = enable(model, bits=8, recent=0, sink=0)
    assert done == 2 and list(done.packed) == [0, 2] and list(done.kept) == [1, 3]
    assert all(REASON in why for why in done.kept.values())
    assert [type(c) for c in make_prompt_cache(model)] == KINDS
    twin = copy.deepcopy(model)
    assert [type(c) for c in twin.make_cache()] == KINDS
    assert pickle.loads(pickle.dumps(done)) == 2
    check_logits(model, chunks())


def test_strict_refuses_a_model_with_a_slot_that_stays():
    model = mixed()
    with pytest.raises(ValueError, match=rf"2 of 4 KVCache slots cannot be packed:\n  layer 1: .*{REASON}"):
        enable(model, strict=True)
    assert "make_cache" not in vars(model)
    with pytest.raises(ValueError, match="2 of 2"):
        enable(small_llama(head_dim=80))  # nothing can be packed
    assert enable(small_llama(), strict=True) == 2


def test_mixed_slots_are_trimmed_saved_and_reloaded(tmp_path):
    model = mixed()
    enable(model)
    tokens, cache = prompt(20), make_prompt_cache(model)
    for _ in generate_step(mx.array(tokens), model, max_tokens=1, prompt_cache=cache):
        pass
    trim_prompt_cache(cache, cache[1].offset - 15)
    assert {c.offset for c in cache} == {15}
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    again = load_prompt_cache(str(tmp_path / "cache.safetensors"), model)
    assert [type(c) for c in again] == KINDS
    assert greedy(model, tokens[15:], 8, again) == greedy(model, tokens[15:], 8, cache)


def test_mixed_slots_are_batched():
    model = mixed()
    enable(model, bits=8, recent=0, sink=0)
    texts = [prompt(n, seed=n) for n in (9, 20)]
    assert batched(model, texts, 6) == [greedy(model, text, 6) for text in texts]


def test_heads_of_512_are_packed():
    """Gemma 4's sizes: windows of 256 beside full attention of 512, and layers that read other layers' caches."""
    model = small_gemma4(512)
    assert enable(model, bits=8, strict=True, recent=0, sink=0) == 4
    assert [type(c) for c in make_prompt_cache(model)] == [TurboQuantRotatingKVCache, TurboQuantKVCache] * 2
    check_logits(model, chunks())


def small_deepseek_v2():
    """Keys of 96 coordinates, 32 of them rotary, and values of 64."""
    return build(
        deepseek_v2,
        num_key_value_heads=4,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        moe_intermediate_size=64,
        n_routed_experts=None,
        n_shared_experts=None,
        rope_scaling={"type": "yarn", "factor": 1.0, "mscale_all_dim": 0},
    )


def test_keys_and_values_of_different_widths(tmp_path):
    model = small_deepseek_v2()
    assert enable(model, bits=8, strict=True) == 2
    tokens, cache = prompt(40), make_prompt_cache(model)
    greedy(model, tokens, 12, cache)
    held = cache[0].inspect()
    assert held["float16_bytes"] == 2 * 4 * (96 + 64) * held["tokens"]
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    again = load_prompt_cache(str(tmp_path / "cache.safetensors"), model)
    assert greedy(model, [1, 2], 4, again) == greedy(model, [1, 2], 4, cache)
    enable(model, bits=3, recent=0, sink=0)
    check_logits(model, chunks())


def test_values_of_width_0_are_an_empty_array():
    cache = TurboQuantKVCache()
    keys = mx.random.normal((1, 2, 300, 128))
    for part in (keys[:, :, :290], keys[:, :, 290:]):
        view, _ = cache.update_and_fetch(part, mx.zeros((*part.shape[:3], 0)))
    decoded, values = view.decode(mx.float32)
    assert decoded.shape == keys.shape and values.shape == (1, 2, 300, 0)
    assert view.attend(keys[:, :, :1], 1.0).shape == (1, 2, 1, 0)
    other = TurboQuantKVCache()
    other.update_and_fetch(keys, keys)
    with pytest.raises(ValueError, match="head_dim of values must stay 0; got 128"):
        cache.update_and_fetch(keys, keys)
    with pytest.raises(ValueError, match="same heads and head_dim"):
        TurboQuantKVCache.merge([cache, other])


def test_the_programs_say_what_stays(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    model = mixed(vocab=8192)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, directory)
    config = {k: v for k, v in vars(model.args).items() if v is not None}
    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})

    def run(*options):
        command = [sys.executable, "-m", "turboquant_mlx", "inspect", "--model", str(directory), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    told = run()
    assert told.returncode == 0, told.stderr
    assert f"[tq] 2 x TurboQuantRotatingKVCache K8 V8, 2 x KVCache kept: {REASON}" in told.stderr
    told = run("--tq-strict")
    assert told.returncode != 0 and f"layer 1: [encode] {REASON}" in told.stderr
