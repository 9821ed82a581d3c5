"""Saved files: whatever is altered in one, in a packed slot or beside it, is noticed."""

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
)
from packed_caches import fill
from turboquant_mlx import (
    BatchTurboQuantKVCache,
    BatchTurboQuantRotatingKVCache,
    TurboQuantKVCache,
    load_prompt_cache,
    other_slots,
)
from turboquant_mlx.caches import older


@pytest.fixture(autouse=True)
def everywhere(patched):
    """The patch registers our classes with mlx-lm's load_prompt_cache."""


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
    assert len(arrays) == 16  # of two layers: keys and values, their exact copies, codes and scales of each
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
    other_slots._save(file, caches, {"note": "kept"})
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


@pytest.mark.skipif(older.OLD, reason="mlx-lm 0.31.3 reads another layout")
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
