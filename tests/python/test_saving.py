"""Saved caches: they come back the same through mlx-lm's own functions, and nothing but the same comes back."""

import copy
import json
import random
import re
import sys

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
    trim_prompt_cache,
)
from needles import ANSWER, read_page
from small_models import FAMILIES, greedy, prompt, small_gpt_oss, small_llama, sure
from turboquant_mlx import (
    BatchTurboQuantKVCache,
    BatchTurboQuantRotatingKVCache,
    DelayedTurboQuantKVCache,
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    disable,
    enable,
    load_prompt_cache,
    other_slots,
    to_turboquant,
)
from turboquant_mlx.identity import Identity
from turboquant_mlx.report import table
from turboquant_mlx.saving import check_fits


@pytest.fixture(autouse=True)
def everywhere(patched):
    """The patch registers our classes with mlx-lm's load_prompt_cache."""


def kv(tokens, batch=1, dtype=mx.float16):
    return [mx.random.normal((batch, 2, tokens, 64)).astype(dtype) for _ in range(2)]


def fill(cache, *chunks, batch=1):
    for n in chunks:
        cache.update_and_fetch(*kv(n, batch))
    return cache


CENTRES = (mx.full((2, 64), 0.25), mx.full((2, 64), -0.5))
FEEDBACK = tuple((0.06 * mx.random.normal((2, 64, 64), key=mx.random.key(i))).astype(mx.float16) for i in range(2))
CASES = {
    "full": lambda: fill(TurboQuantKVCache(), 300, 1),
    "empty": lambda: TurboQuantKVCache(bits=4, seed=2**63 + 5),
    "trimmed": lambda: trimmed(fill(TurboQuantKVCache(bits=2), 40), 13),
    "mixed widths, centred": lambda: fill(TurboQuantKVCache(key_bits=4, value_bits=2, seed=9, centres=CENTRES), 17),
    "centred, with feedback": lambda: fill(TurboQuantKVCache(centres=CENTRES, feedback=FEEDBACK), 17, 1),
    "feedback of the keys alone": lambda: fill(TurboQuantKVCache(feedback=(FEEDBACK[0], None)), 9),
    "window": lambda: fill(TurboQuantRotatingKVCache(16, keep=4), 10, 1, 30, 1, 1),
    "window with feedback": lambda: fill(TurboQuantRotatingKVCache(16, feedback=FEEDBACK), 10, 1, 30, 1, 1),
    "batch": lambda: fill(BatchTurboQuantKVCache([1, 0, 4]), 9, 1, batch=3),
    "batch with feedback": lambda: fill(BatchTurboQuantKVCache([1, 0, 4], feedback=FEEDBACK), 9, 1, batch=3),
    "batch of windows": lambda: fill(BatchTurboQuantRotatingKVCache(8, [1, 0]), 7, 1, 1, 1, batch=2),
    "not packed yet": lambda: fill(DelayedTurboQuantKVCache(100, bits=4), 20),
    "not packed yet, with feedback": lambda: fill(DelayedTurboQuantKVCache(20, feedback=FEEDBACK), 20),
    "packed by now": lambda: fill(DelayedTurboQuantKVCache(10, bits=4), 9, 20),
    "list": lambda: CacheList(fill(TurboQuantKVCache(), 5), fill(KVCache(), 5)),
}


def trimmed(cache, n):
    assert cache.trim(n) == n
    return cache


def same(a, b):
    """Whether two caches hold the same and go on the same way."""
    if isinstance(a, CacheList):
        return all(same(x, y) for x, y in zip(a.caches, b.caches, strict=True))
    if isinstance(a, KVCache):
        return a.offset == b.offset and mx.array_equal(a.keys_and_values()[0], b.keys_and_values()[0])
    return type(a) is type(b) and str(a.state[-1]) == str(b.state[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_saved_cache_comes_back(case, tmp_path):
    cache = CASES[case]()
    file = str(tmp_path / "cache.safetensors")
    mlx_lm_cache.save_prompt_cache(file, [cache], {"note": "kept"})
    (back,), metadata = mlx_lm_cache.load_prompt_cache(file, return_metadata=True)
    assert metadata == {"note": "kept"} and same(cache, back)
    if isinstance(cache, CacheList):
        return
    batch = len(cache.left_padding) if hasattr(cache, "left_padding") else 1
    for n in (1, 5, 1):
        x = kv(n, batch)
        for c in (cache, back):
            c.update_and_fetch(*x)
    assert same(cache, back)


def test_a_state_can_be_set_and_evaluated():
    for make in CASES.values():
        cache = make()
        mx.eval(cache.state)
        other = type(cache).from_state(cache.state)
        assert same(cache, other)
        cache.state = other.state
        assert same(cache, other)


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("empty", "list")])
@pytest.mark.parametrize("damage", ["position", "key_bits", "arrays"])
def test_a_bad_state_changes_nothing(case, damage):
    cache = CASES[case]()
    if damage == "key_bits" and case.startswith("not packed yet"):
        damage = "position"  # floats have no width
    *arrays, identity = cache.state
    fields = dict(identity.fields, model="another model")
    if damage == "position":  # a right checksum over numbers that do not fit the arrays
        fields["position"] = {
            key: [0] * 9 if isinstance(value, list) else None for key, value in fields["position"].items()
        }
    elif damage == "key_bits":
        fields["key_bits"] = 4 if fields["key_bits"] == 3 else 3  # the codes have another length
    else:
        arrays = arrays[:-1]
    before, codes = str(cache.state[-1]), cache._core
    with pytest.raises((ValueError, TypeError, KeyError)):
        cache.state = (*arrays, Identity(fields, arrays))
    assert cache._core is codes and str(cache.state[-1]) == before and cache.fingerprint == ""
    if not case.startswith("batch"):
        fill(cache, 1)


@pytest.fixture
def saved(tmp_path):
    file = tmp_path / "cache.safetensors"
    mlx_lm_cache.save_prompt_cache(str(file), [fill(TurboQuantKVCache(), 100), fill(TurboQuantKVCache(), 100)])
    return file


def parts(file):
    """(all bytes, where the tensors' bytes begin, the header)."""
    whole = file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    return whole, begin, json.loads(whole[8:begin])


def some_bytes(entry, seed=0, more=4):
    """Where to hurt a tensor: its first and last byte and a few between; none of an empty one."""
    first, end = entry["data_offsets"]
    return (
        sorted({first, end - 1, *random.Random(seed).sample(range(first, end), min(more, end - first))})
        if end > first
        else []
    )


def altered(file, whole, at, to=None):
    damaged = bytearray(whole)
    damaged[at] = damaged[at] ^ 0x10 if to is None else to
    file.write_bytes(damaged)


def test_altered_bytes_of_every_packed_tensor_are_noticed(saved):
    whole, begin, header = parts(saved)
    arrays = {k: v for k, v in header.items() if v.get("dtype") in ("U32", "F16")}
    assert len(arrays) == 8
    for entry in arrays.values():
        for at in some_bytes(entry):
            altered(saved, whole, begin + at)
            with pytest.raises(ValueError, match="does not match its checksum .*altered or truncated"):
                mlx_lm_cache.load_prompt_cache(str(saved))
    # Tokens in another order.
    entry = arrays["0.0"]["data_offsets"]
    damaged = bytearray(whole)
    first, second = begin + entry[0], begin + entry[0] + 24
    damaged[first : first + 24], damaged[second : second + 24] = (
        whole[second : second + 24],
        whole[first : first + 24],
    )
    saved.write_bytes(damaged)
    with pytest.raises(ValueError, match="does not match its checksum"):
        mlx_lm_cache.load_prompt_cache(str(saved))
    saved.write_bytes(whole)
    assert len(load_prompt_cache(saved)) == 2


def test_codes_of_another_shape_are_noticed(saved):
    """The same bytes read as one row of two heads or as two rows of one."""
    whole, _, _ = parts(saved)
    assert whole.count(b"[1,2,100") == 8
    saved.write_bytes(whole.replace(b"[1,2,100", b"[2,1,100"))
    with pytest.raises(ValueError, match="does not match its checksum"):
        load_prompt_cache(saved)


def recurrent(dtype=mx.float16):
    state = ArraysCache(2)
    state[0], state[1] = mx.random.normal((1, 3, 8)).astype(dtype), mx.random.normal((1, 2, 4, 4))
    return state


MIXED = {
    "recurrent state": lambda: [fill(TurboQuantKVCache(), 9), recurrent(mx.bfloat16)],
    "half a recurrent state": lambda: [ArraysCache(2), fill(TurboQuantKVCache(), 9)],
    "float cache": lambda: [fill(KVCache(), 9), fill(TurboQuantKVCache(), 9)],
    "float window": lambda: [fill(TurboQuantKVCache(), 9), fill(RotatingKVCache(8, keep=2), 9, 1)],
    "list": lambda: [CacheList(fill(TurboQuantKVCache(), 5), fill(KVCache(), 5)), recurrent()],
    "batches": lambda: [
        ArraysCache(2, left_padding=[1, 2]),
        fill(BatchTurboQuantKVCache([1, 2]), 7, batch=2),
        fill(BatchTurboQuantRotatingKVCache(10, [1, 2]), 7, batch=2),
    ],
}


def plain_leaves(caches):
    return [str(x.tolist()) if isinstance(x, mx.array) else str(x) for _, x in tree_flatten([c.state for c in caches])]


@pytest.mark.parametrize("case", MIXED)
def test_slots_beside_packed_ones_are_checked(case, tmp_path):
    caches, file = MIXED[case](), tmp_path / "cache.safetensors"
    mlx_lm_cache.save_prompt_cache(str(file), caches, {"note": "kept"})
    back, metadata = mlx_lm_cache.load_prompt_cache(str(file), return_metadata=True)
    assert metadata == {"note": "kept"} and plain_leaves(back) == plain_leaves(caches)
    assert plain_leaves(mlx_lm_cache.load_prompt_cache(str(file))) == plain_leaves(caches)

    whole, begin, header = parts(file)
    del header["__metadata__"]
    hurt = 0
    for entry in header.values():
        for at in some_bytes(entry, seed=hurt):
            altered(file, whole, begin + at)
            with pytest.raises(
                ValueError, match="checksum.*altered or truncated|no readable identity|cannot be taken apart"
            ):
                mlx_lm_cache.load_prompt_cache(str(file))
            hurt += 1
    assert hurt > 10


def test_the_message_names_the_slot(tmp_path):
    file = tmp_path / "cache.safetensors"
    mlx_lm_cache.save_prompt_cache(str(file), [fill(TurboQuantKVCache(), 9), recurrent(), recurrent()])
    whole, begin, header = parts(file)
    altered(file, whole, begin + header["2.0.1"]["data_offsets"][0])
    with pytest.raises(
        ValueError, match=r"cache.safetensors: layer 2 does not match its checksum \(saved ArraysCache "
    ):
        load_prompt_cache(file)
    file.write_bytes(whole.replace(b'"ArraysCache"', b'"BrraysCache"', 1))
    with pytest.raises(ValueError, match=r"layer \d does not match its checksum .*found BrraysCache"):
        load_prompt_cache(file)


@pytest.mark.parametrize("case", MIXED)
def test_every_field_of_the_header_is_guarded(case, tmp_path):
    """One character of each name, dtype, shape, offset, class, sum and note at a time."""
    caches, file = MIXED[case](), tmp_path / "cache.safetensors"
    mlx_lm_cache.save_prompt_cache(str(file), caches, {"note": "kept"})
    whole, begin, _ = parts(file)
    fields = [field.span() for field in re.finditer(rb"[A-Za-z0-9_.]+", whole[8:begin])]
    assert len(fields) > 60
    for n, (first, end) in enumerate(fields):
        at = 8 + random.Random(n).randrange(first, end)
        altered(file, whole, at, whole[at] ^ 1)
        with pytest.raises(ValueError):
            load_prompt_cache(file)
    file.write_bytes(whole)
    assert plain_leaves(load_prompt_cache(file)) == plain_leaves(caches)


def test_packed_files_need_sums_of_their_other_slots(tmp_path):
    file = str(tmp_path / "cache.safetensors")
    caches = [fill(TurboQuantKVCache(), 9), recurrent()]
    other_slots.save_original(file, caches, {"note": "kept"})
    with pytest.raises(ValueError, match="layer 1, a ArraysCache, has no checksum"):
        mlx_lm_cache.load_prompt_cache(file)
    other_slots.save_original(file, caches[:1])
    assert len(mlx_lm_cache.load_prompt_cache(file)) == 1


def test_files_without_packed_caches_are_mlx_lms_own(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    caches = [fill(KVCache(), 9), recurrent()]
    mlx_lm_cache.save_prompt_cache(str(ours), caches, {"note": "kept"})
    other_slots.save_original(str(theirs), caches, {"note": "kept"})
    assert parts(ours)[2] == parts(theirs)[2]
    assert plain_leaves(mlx_lm_cache.load_prompt_cache(str(ours))) == plain_leaves(caches)


def test_sums_do_not_keep_mlx_lms_own_reader_from_a_file(tmp_path):
    """With the classes known and the functions as they were."""
    file = str(tmp_path / "cache.safetensors")
    caches = [fill(TurboQuantKVCache(), 9), recurrent()]
    mlx_lm_cache.save_prompt_cache(file, caches, {"note": "kept"})
    back, metadata = other_slots.load_original(file, return_metadata=True)
    assert plain_leaves(back) == plain_leaves(caches) and metadata["note"] == "kept"
    # What that reader hands on can be saved again, and is summed anew.
    back[1][0] = back[1][0] + 1
    mlx_lm_cache.save_prompt_cache(file, back, metadata)
    again, metadata = mlx_lm_cache.load_prompt_cache(file, return_metadata=True)
    assert metadata == {"note": "kept"} and plain_leaves(again) == plain_leaves(back)


def test_removing_the_patch_gives_the_functions_back():
    from mlx_lm import cache_prompt
    from mlx_lm import generate as _  # noqa: F401  mlx_lm.generate is a function of the package
    from turboquant_mlx import apply_patch, remove_patch

    generate = sys.modules["mlx_lm.generate"]
    for act, save, load in (
        (remove_patch, other_slots.save_original, other_slots.load_original),
        (apply_patch, other_slots.save_prompt_cache, other_slots.load_prompt_cache),
    ):
        act()
        assert mlx_lm_cache.save_prompt_cache is cache_prompt.save_prompt_cache is save
        assert mlx_lm_cache.load_prompt_cache is generate.load_prompt_cache is load


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9999])
def test_a_truncated_file_is_refused(saved, kept):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match="is truncated: it has|is no complete safetensors file"):
        load_prompt_cache(saved)


def test_a_file_with_bytes_behind_its_end_is_refused(saved):
    whole = saved.read_bytes()
    saved.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match=f"was altered: it has {len(whole) + 1} bytes and describes {len(whole)}"):
        load_prompt_cache(saved)


def rewritten(cache, **changes):
    """The state of a cache with other fields and a checksum that fits them."""
    from turboquant_mlx.identity import Identity

    *arrays, identity = cache.state
    return (*arrays, str(Identity(identity.fields | changes, arrays)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 2}, "saved in format 2; this build reads 1"),
        ({"kind": "KVCache"}, "kind of the saved cache is KVCache; expected TurboQuantKVCache"),
        ({"codebook": "uniform"}, "codebook of the saved cache is uniform"),
        ({"key_bits": 4}, "keys of 4 bits must have"),
        ({"position": {"offset": 7}}, "length must be from 0 to the 5 tokens held; got 7"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(changes, message):
    cache = fill(TurboQuantKVCache(), 5)
    with pytest.raises(ValueError, match=message):
        TurboQuantKVCache.from_state(rewritten(cache, **changes))


@pytest.mark.parametrize("state", [None, (), (1, 2, 3), (None,) * 6 + ("{}",), KVCache().state])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="this is not the state of a TurboQuantKVCache"):
        TurboQuantKVCache.from_state(state)


def test_a_file_must_fit_the_model_and_the_settings(tmp_path):
    file = tmp_path / "cache.safetensors"
    model, other = small_llama(), small_llama(seed=1)
    text = prompt(30)
    plain = make_prompt_cache(model)
    model(mx.array(text)[None], cache=plain)
    mlx_lm_cache.save_prompt_cache(str(tmp_path / "plain.safetensors"), plain)

    enable(model, bits=3)
    cache = make_prompt_cache(model)
    model(mx.array(text)[None], cache=cache)
    mlx_lm_cache.save_prompt_cache(str(file), cache)
    back = load_prompt_cache(file, model)
    assert greedy(model, [5], 10, back) == greedy(model, [5], 10, copy.deepcopy(cache))

    with pytest.raises(
        ValueError, match="layer 0 holds a KVCache .not packed.; asked for was a TurboQuantKVCache of 3-bit"
    ):
        load_prompt_cache(tmp_path / "plain.safetensors", model)
    for settings, message in (
        (
            {"bits": 4},
            "layer 1 holds a TurboQuantKVCache of 3-bit keys .* asked for was a TurboQuantKVCache of 4-bit",
        ),
        ({"seed": 3}, "layer 0 was saved with seed 0; asked for was 3"),
        ({"calibration": {0: CENTRES}}, "layer 0 was saved with other centres of the keys"),
        ({"calibration": {1: (None, None, *FEEDBACK)}}, "layer 1 was saved with other feedback of the keys"),
    ):
        enable(model, **settings)
        with pytest.raises(ValueError, match=message):
            load_prompt_cache(file, model)
    disable(model)
    with pytest.raises(ValueError, match="asked for was a KVCache .not packed."):
        load_prompt_cache(file, model)
    enable(other, bits=3)
    with pytest.raises(ValueError, match="layer 0 was made by another model"):
        load_prompt_cache(file, other)
    deeper = small_llama(num_hidden_layers=3)
    enable(deeper)
    with pytest.raises(ValueError, match="has 2 slots; the model has 3"):
        load_prompt_cache(file, deeper)


def test_weights_cast_to_float32_are_the_same_model():
    model = small_llama()
    model.set_dtype(mx.bfloat16)
    enable(model)
    cache = make_prompt_cache(model)
    model.set_dtype(mx.float32)
    enable(model)
    check_fits(cache, model)


@pytest.mark.parametrize("make", [small_llama, small_gpt_oss])
def test_generation_goes_on_from_a_file_and_after_a_trim(make, tmp_path):
    """Saving and loading, trimming and going on: the tokens of the path that did neither."""
    model = make()
    enable(model)
    text = prompt(30)
    want = greedy(model, text, 20)
    cache = make_prompt_cache(model)
    model(mx.array(text[:-1])[None], cache=cache)
    file = str(tmp_path / "cache.safetensors")
    mlx_lm_cache.save_prompt_cache(file, cache)
    assert greedy(model, text[-1:], 20, mlx_lm_cache.load_prompt_cache(file)) == want
    if make is small_llama:  # a window that has wrapped cannot go back
        model(mx.array(prompt(25, seed=8))[None], cache=cache)
        assert trim_prompt_cache(cache, 25) == 25
        assert greedy(model, text[-1:], 20, cache) == want


def test_to_turboquant_and_back():
    plain = KVCache()
    fill(plain, 30, 1)
    packed = to_turboquant(plain, bits=4)
    direct = TurboQuantKVCache(bits=4)
    direct.update_and_fetch(*plain.keys_and_values())
    assert same(packed, direct) and plain.offset == 31
    assert same(to_turboquant(packed.to_float(mx.float32), bits=4), packed) or packed.to_float().offset == 31
    for n in (10, 40):
        window = RotatingKVCache(16, keep=2)
        fill(window, n, 1, 1)
        other = to_turboquant(window)
        assert (other.offset, other.size(), other.keep) == (window.offset, window.size(), 2)
        x = kv(1)
        view, _ = other.update_and_fetch(*x)
        keys, _ = window.update_and_fetch(*x)
        assert view.shape == keys.shape
        error = mx.linalg.norm(view.decode(mx.float32)[0] - keys.astype(mx.float32)) / mx.linalg.norm(keys)
        assert error**2 < 0.04
        assert other.to_float()._idx == window._idx
    assert to_turboquant(KVCache()).empty()
    with pytest.raises(ValueError, match="must be a KVCache or a RotatingKVCache; got ArraysCache"):
        to_turboquant(ArraysCache(2))


def test_a_delayed_cache_packs_itself_at_its_length():
    cache = DelayedTurboQuantKVCache(20, bits=3)
    x, y = kv(20), kv(3)
    keys, _ = cache.update_and_fetch(*x)
    assert isinstance(keys, mx.array) and not cache.packed and cache.nbytes == 256 * 2 * 2 * 64 * 2
    twin = copy.deepcopy(cache)
    assert cache.trim(2) == 2 and cache.offset == 18 and twin.offset == 20
    cache.update_and_fetch(*[a[:, :, 18:] for a in x])
    view, _ = cache.update_and_fetch(*y)
    assert cache.packed and not twin.packed and not hasattr(cache, "merge")
    want = TurboQuantKVCache(bits=3)
    for part in (x, y):
        want.update_and_fetch(*part)
    assert all(mx.array_equal(a, b) for a, b in zip(view.arrays, want._core.view().arrays, strict=True))
    with pytest.raises(ValueError, match="start must be at least 0; got -1"):
        DelayedTurboQuantKVCache(-1)


@pytest.mark.parametrize("dtype, bits", [(mx.float32, 32), (mx.float16, 16), (mx.bfloat16, 16)])
def test_inspect_tells_the_width_of_what_is_held(dtype, bits):
    cache = DelayedTurboQuantKVCache(20, key_bits=4, value_bits=2)
    note = cache.inspect()
    assert (note["key_bits"], note["value_bits"], note["tokens"]) == (None, None, 0)
    assert table([cache]).splitlines()[1].split()[2] == "-"
    cache.update_and_fetch(*kv(20, dtype=dtype))
    assert (cache.inspect()["key_bits"], cache.inspect()["value_bits"]) == (bits, bits)
    assert table([cache]).splitlines()[1].split()[2:4] == [f"K{bits}", f"V{bits}"]
    cache.update_and_fetch(*kv(1, dtype=dtype))
    assert (cache.inspect()["key_bits"], cache.inspect()["value_bits"]) == (4, 2)


def test_a_model_starts_as_float_and_packs_later():
    model = small_llama()
    text = prompt(40)
    plain = greedy(model, text, 8)
    enable(model, start=1000)
    assert greedy(model, text, 8) == plain
    enable(model, start=24)
    cache = make_prompt_cache(model)
    greedy(model, text, 8, cache, prefill_step_size=16)
    assert all(c.packed for c in cache)
    with pytest.raises(ValueError, match="start = 5 needs caches that can be packed later.*layer 0"):
        enable(small_gpt_oss(), start=5)
    with pytest.raises(ValueError, match="start must be at least 0; got -2"):
        enable(model, start=-2)


def test_max_kv_size_is_not_ignored():
    model = FAMILIES["qwen3, head_dim 128"]()
    enable(model)
    cache = mlx_lm_cache.make_prompt_cache(model, 32)
    assert [type(c) for c in cache] == [TurboQuantRotatingKVCache] * 2 and (
        cache[0].max_size,
        cache[0].keep,
    ) == (32, 4)
    greedy(model, prompt(100), 20, cache, prefill_step_size=16)
    assert cache[0].offset == 120 and cache[0].nbytes <= (32 + 16) * 2 * 2 * 50


def test_a_needle_of_4k_tokens_survives_saving_and_trimming(bundled, tmp_path):
    """The hybrid model's caches from a file; its recurrent layers cannot go back, so the packed slots are trimmed and
    the recurrent state is that of a copy."""
    model, tokenizer = bundled
    tokens, cache = read_page(model, tokenizer)
    enable(model, bits=3)
    try:
        want = sure(model, tokens[-1:], 16, copy.deepcopy(cache))
        assert ANSWER in tokenizer.decode(want)
        file = tmp_path / "cache.safetensors"
        mlx_lm_cache.save_prompt_cache(str(file), cache)
        assert sure(model, tokens[-1:], 16, load_prompt_cache(file, model)) == want
        assert not mlx_lm_cache.can_trim_prompt_cache(cache)

        branch = copy.deepcopy(cache)
        model(mx.array(tokens[:700])[None], cache=branch)
        for i, c in enumerate(branch):
            if isinstance(c, TurboQuantKVCache):
                assert c.trim(700) == 700
            else:
                branch[i] = copy.deepcopy(cache[i])
        assert sure(model, tokens[-1:], 16, branch) == want
    finally:
        disable(model)
