"""Packed caches inside mlx-vlm: small random models of several families, and the bundled model."""

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install mlx-vlm==0.7.10)")

import copy

import small_models
import vlm_models
from conftest import MODEL, relative_error
from mlx_vlm import generate
from mlx_vlm.apc import make_warm_batch_exact_cache_multi, snapshot_prompt_cache_row
from mlx_vlm.apc_adapters import CheckpointAdapter, build_prefix_cache_plan
from mlx_vlm.models import cache, qwen3_vl
from mlx_vlm.prompt_utils import apply_chat_template
from needles import ANSWER, QUESTION, page
from turboquant_mlx import decode, disable, enable, encode, remove_patch
from turboquant_mlx.caches import PackedCache
from turboquant_mlx.overlay.vlm_caches import VlmTurboQuantKVCache, VlmTurboQuantRotatingKVCache
from vlm_models import FAMILIES, greedy, prompt, steps


@pytest.fixture(autouse=True)
def unpatched():
    yield
    remove_patch()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    mx.set_default_device(mx.cpu)
    return FAMILIES[request.param]()


def rounded(x):
    """What a 3-bit cache makes of keys or values."""
    return decode(*encode(x, 3, code="scalar"), 3, code="scalar", dtype=x.dtype)


class Rounded(cache.KVCache):
    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(rounded(keys), rounded(values))


class RoundedWindow(cache.RotatingKVCache):
    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(rounded(keys), rounded(values))


def rounded_caches(model):
    """The model's float caches, which hold what codes decode to."""
    kinds = {cache.KVCache: lambda c: Rounded(), cache.RotatingKVCache: lambda c: RoundedWindow(c.max_size, c.keep)}
    return [kinds.get(type(c), lambda c: c)(c) for c in cache.make_prompt_cache(model.language_model)]


def test_logits_are_those_of_floats_that_went_through_the_codes(model):
    """Three chunks of a prompt and a token, in windows beyond their size.  Where a coordinate lies on a threshold, a
    rounding makes another code of it, which all later layers see: a quarter of the results may differ for that."""
    near, far = [], []
    for seed in range(4):
        tokens = prompt(model, 60, seed)
        plain = steps(model, tokens, 2)
        want = steps(model, tokens, 2, caches=rounded_caches(model), prefill_step_size=24)
        enable(model, bits=3, code="scalar", recent=0, sink=0)
        got = steps(model, tokens, 2, prefill_step_size=24)
        disable(model)
        near += [relative_error(g, w) for (_, g), (_, w) in zip(got, want, strict=True)]
        far += [relative_error(p, w) for (_, p), (_, w) in zip(plain, want, strict=True)]
    assert sorted(near)[5] < 1e-3 and min(far) > 1e-2, (near, far)


def test_the_models_caches_are_packed_and_given_back(model):
    kinds = (
        [type(c).__name__ for c in model.language_model.make_cache()]
        if hasattr(model.language_model, "make_cache")
        else ["KVCache"] * len(model.layers)
    )
    count = enable(model, key_bits=4, value_bits=2, recent=0)  # with it small windows have 8 bits
    packed = cache.make_prompt_cache(model.language_model)
    found = [type(c).__name__ for c in packed]
    names = {"KVCache": "VlmTurboQuantKVCache", "RotatingKVCache": "VlmTurboQuantRotatingKVCache"}
    assert found == [names.get(kind, kind) for kind in kinds]
    assert count == sum(isinstance(c, PackedCache) for c in packed) > 0
    assert all((c.key_bits, c.value_bits) == (4, 2) for c in packed if isinstance(c, PackedCache))
    disable(model)
    assert not any(isinstance(c, PackedCache) for c in cache.make_prompt_cache(model.language_model))


def test_enable_leaves_the_positions_of_the_last_prompt(model):
    lm = model.language_model
    greedy(model, prompt(model, 20), 2)
    before = {name: getattr(lm, name, None) for name in ("_position_ids", "_rope_deltas")}
    enable(model, bits=3)
    assert all(getattr(lm, name, None) is value for name, value in before.items())
    disable(model)


@pytest.fixture(scope="module")
def bundled_vlm():
    mx.set_default_device(mx.cpu)
    return vlm_models.bundled_vlm()


def test_tokens_are_those_of_mlx_lm(bundled_vlm, bundled, tokens):
    """The same weights and codes through mlx-lm."""
    model, prompt_tokens = bundled_vlm[0], tokens[:300]
    enable(bundled[0], bits=3)
    want = small_models.sure(bundled[0], prompt_tokens, 24)
    disable(bundled[0])
    enable(model, bits=3)
    got = vlm_models.greedy(model, prompt_tokens, 24)
    disable(model)
    assert len(want) > 4 and got[: len(want)] == want


def test_the_calibration_beside_the_weights_is_used(bundled_vlm):
    model = bundled_vlm[0]
    enable(model, bits=3, calibration=MODEL)
    packed = [c for c in model.language_model.make_cache() if isinstance(c, PackedCache)]
    assert len(packed) == 2 and all(c.centres is not None and c.feedback is not None for c in packed)
    disable(model)


def test_rows_of_a_batch_answer_as_they_do_alone(model):
    """Scalar codes: a rounding chooses between trellis paths that are equally near."""
    prompts = [prompt(model, n, seed=n) for n in (17, 40, 29)]
    enable(model, bits=3, code="scalar")
    try:
        want = [greedy(model, tokens, 8) for tokens in prompts]
        got = vlm_models.batch(model, prompts, 8)
    finally:
        disable(model)
    assert got == want and len({tuple(w) for w in want}) == 3


@pytest.fixture
def qwen():
    model = FAMILIES["qwen3_vl, image"]()
    enable(model, bits=3, code="scalar")
    return model


def ask(model, **settings):
    return vlm_models.greedy(model, prompt(model, 30), 2, **settings)


def test_what_packed_caches_cannot_do_is_refused_before_the_first_token(qwen):
    with pytest.raises(ValueError, match="packs its keys and values itself; leave kv_bits out"):
        ask(qwen, kv_bits=4)
    with pytest.raises(ValueError, match="packs its keys and values itself; leave kv_bits out"):
        ask(qwen, kv_bits=3.5, kv_quant_scheme="turboquant")
    with pytest.raises(ValueError, match="a draft model of mlx-vlm cuts the history"):
        ask(qwen, draft_model=object())
    with pytest.raises(ValueError, match=r"start = 8 is for models of mlx-lm"):
        enable(qwen, start=8)
    with pytest.raises(ValueError, match=r"tokenizer calibrates models of mlx-lm"):
        enable(qwen, tokenizer=object())
    disable(qwen)
    assert len(ask(qwen, kv_bits=4, kv_group_size=32)) == 2  # mlx-vlm's own, with its own caches


def test_max_kv_size_gives_windows_where_the_model_sizes_no_caches(qwen):
    """Qwen3-VL makes no caches of its own; Gemma 3 does, and mlx-vlm ignores the size there."""
    packed = cache.make_prompt_cache(qwen.language_model, max_kv_size=64)
    assert [(type(c).__name__, c.max_size, c.keep) for c in packed] == [("VlmTurboQuantRotatingKVCache", 64, 4)] * 2
    assert len(ask(qwen, max_kv_size=16)) == 2
    gemma = FAMILIES["gemma3, windows"]()
    enable(gemma)
    assert [c.max_size for c in cache.make_prompt_cache(gemma.language_model, 64) if hasattr(c, "max_size")] == [32]


def test_errors_name_the_module_of_the_caches_and_of_the_attention(monkeypatch):
    model = FAMILIES["qwen3_5, text"]()
    monkeypatch.setattr(type(model.language_model), "make_cache", lambda self: [cache.ArraysCache(2)] * 4)
    with pytest.raises(ValueError, match=r"no KVCache slot.*it has \['mlx_vlm.models.cache.ArraysCache'\]"):
        enable(model)
    monkeypatch.undo()
    model = FAMILIES["qwen3_vl, image"]()
    monkeypatch.setattr(
        qwen3_vl.language,
        "scaled_dot_product_attention",
        lambda q, k, v, **_: mx.softmax(q @ k[:].swapaxes(-1, -2)) @ v,
    )
    with pytest.raises(ValueError, match=r"does not go through mlx_vlm\.models\.base\.scaled_dot_product_attention"):
        enable(model)


def test_the_prefix_cache_keeps_codes(model):
    """What mlx-vlm's automatic prefix cache does with the caches of a prompt: keep, restore, merge into a batch."""
    enable(model, bits=3)
    tokens = prompt(model, 50)
    caches = cache.make_prompt_cache(model.language_model)
    steps(model, tokens, 1, caches=caches)
    plan = build_prefix_cache_plan(model.language_model)
    assert plan.restorable and plan.strategy == "checkpoint"
    kept = snapshot_prompt_cache_row(caches)
    packed = [(old, new) for old, new in zip(caches, kept, strict=True) if isinstance(old, PackedCache)]
    read = packed[0][0].offset
    for old, new in packed:
        assert type(new) is type(old) and new.fingerprint == old.fingerprint
        assert old.offset == new.offset == read
        again = CheckpointAdapter().capture(new, read).payload
        assert all(mx.array_equal(a, b) for a, b in zip(again["arrays"][:4], old.state[:4], strict=True))
    # Rows are merged into a batch; mlx-vlm takes a row without tokens for a float cache.
    kinds = {VlmTurboQuantKVCache: cache.KVCache, VlmTurboQuantRotatingKVCache: lambda: cache.RotatingKVCache(32)}
    empty = [kinds[type(c)]() if type(c) in kinds else copy.deepcopy(c) for c in kept]
    batch, length = make_warm_batch_exact_cache_multi([kept, empty], [read, 0])
    assert length == read >= 50
    for c in batch:
        if isinstance(c, PackedCache):
            assert c.batch_size == 2 and [c.extract(i).offset for i in (0, 1)] == [read, 0]
    disable(model)


def test_batches_have_no_merge(model):
    """With a `merge` on the class, Qwen3.5 takes batches apart into float rows."""
    enable(model, bits=3)
    for c in cache.make_prompt_cache(model.language_model):
        if isinstance(c, PackedCache):
            batch = c.to_batch([3, 0])
            assert not hasattr(type(batch), "merge") and callable(type(c).merge)
            assert batch.left_padding.tolist() == [3, 0] and batch.batch_size == 2 and batch.empty()
            assert batch.fingerprint == c.fingerprint and (batch.key_bits, batch.code) == (c.key_bits, c.code)
    disable(model)


def test_mlx_vlms_generate_finds_the_planted_number(bundled_vlm):
    model, processor = bundled_vlm
    text = f"{page(processor.tokenizer, 900, 0.4)}\n\n{QUESTION}"
    formatted = apply_chat_template(processor, model.config, text)
    enable(model, bits=3)
    result = generate(model, processor, formatted, max_tokens=20, temperature=0.0)
    disable(model)
    assert ANSWER in result.text
