"""Files that somebody altered, or wrote to do harm: refused as ValueError, or read as what was saved, and never more."""

import contextlib
import json
import random
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from packed_caches import same
from turboquant_mlx import (
    BatchTurboQuantKVCache,
    BatchTurboQuantLatentKVCache,
    BatchTurboQuantRotatingKVCache,
    TurboQuantKVCache,
    TurboQuantLatentKVCache,
    TurboQuantRotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from turboquant_mlx.caches.identity import Identity
from turboquant_mlx.calibration import Calibration
from turboquant_mlx.calibration.files import load_calibration, save_calibration


@pytest.fixture(autouse=True)
def everywhere(patched):
    """The patch registers our classes with mlx-lm's load_prompt_cache."""


def kv(tokens, batch=1):
    return [mx.random.normal((batch, 1, tokens, 32), key=mx.random.key(i)).astype(mx.float16) for i in range(2)]


def small(kind):
    """A cache of a few tokens."""
    centre = mx.full((1, 32), 0.25)
    made = {
        "copies": lambda: TurboQuantKVCache(3, recent=8, sink=1, centres=(centre, None)),
        "mapped": lambda: TurboQuantKVCache(2, recent=0, sink=0, key_map=2 * mx.eye(32)[None]),
        "empty": lambda: TurboQuantKVCache(3),
        "batch": lambda: BatchTurboQuantKVCache([1, 0], 4, recent=0, sink=2),
        "latent": lambda: TurboQuantLatentKVCache(3),
        "latents": lambda: BatchTurboQuantLatentKVCache([1, 0], 2),
        "young": lambda: TurboQuantRotatingKVCache(16, 1, 3),
        "window": lambda: TurboQuantRotatingKVCache(4, 1, 3, code="scalar"),
        "windows": lambda: BatchTurboQuantRotatingKVCache(4, [1, 0], 8),
    }
    cache = made[kind]()
    for n in () if kind == "empty" else (3, 1, 1):
        cache.update_and_fetch(*kv(n, 2 if kind in ("batch", "windows", "latents") else 1))
    return cache


KINDS = ["copies", "mapped", "empty", "batch", "latent", "latents", "young", "window", "windows"]


def use(cache):
    """Whatever can be done with a cache that was read, whose heads may be others than before."""
    if cache.empty():
        return
    mx.eval(cache.keys_and_values() if "Latent" in type(cache).__name__ else [])
    view = cache._core.view()
    keys, values = view.decode(mx.float16)
    rows, heads, _, dim = keys.shape
    query = mx.ones((rows, 2 * heads, 2, dim), mx.float16)
    mx.eval(view.attend(query[:, :, :1], 0.2, None), keys, values)
    more = mx.ones((rows, heads, 2, dim), mx.float16), mx.ones((rows, heads, 2, values.shape[3]), mx.float16)
    cache.update_and_fetch(*more)
    view = cache._core.view()
    mx.eval(view.attend(query, 0.2, "causal"))
    cache.make_mask(1, return_array=True)
    mx.eval([x for x in cache.state if isinstance(x, mx.array)])
    cache.inspect()
    cache.trim(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_altered_anywhere_in_a_cache_is_noticed(kind, tmp_path):
    file = tmp_path / "cache.safetensors"
    saved = small(kind)
    save_prompt_cache(str(file), [saved])
    whole, drawn = file.read_bytes(), random.Random(kind)
    read = 0
    every = 1 if kind == "batch" else 9  # a load takes 2 ms
    for at in range(drawn.randrange(every), len(whole), every):
        damaged = bytearray(whole)
        damaged[at] ^= drawn.randrange(1, 256)
        file.write_bytes(damaged)
        try:
            (found,) = mlx_lm_cache.load_prompt_cache(str(file))
        except ValueError:
            continue
        assert same(found, saved), f"byte {at} was altered, and the cache differs"
        read += 1
    assert read < 60  # spaces of the header, and parts of names that mean nothing
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_byte_altered_anywhere_in_a_calibration_is_noticed(tmp_path):
    file = tmp_path / "calibration.safetensors"
    made = {
        3: Calibration(
            key_centre=mx.ones((1, 32)), value_feedback=mx.ones((1, 32, 32), mx.float16), key_map=mx.eye(32)[None]
        )
    }
    save_calibration(made, file, directory=MODEL)
    whole, drawn = file.read_bytes(), random.Random(1)
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in [*range(header), *range(header, len(whole), 5)]:
        damaged = bytearray(whole)
        damaged[at] ^= drawn.randrange(1, 256)
        file.write_bytes(damaged)
        try:
            found = load_calibration(file, directory=False)
        except ValueError:
            continue
        assert list(found) == [3], at
        for a, b in zip(found[3], made[3], strict=True):
            assert a is b is None or (mx.array_equal(a, b) if isinstance(b, mx.array) else a == b), at


MODEL = Path(__file__).parents[2] / "models" / "qwen35-tiny-4bit"


def written(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return str(file)


def tensor(dtype="U32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, data, length, message",
    [
        ({}, b"", 2**63, "header of 9223372036854775808"),
        ({}, b"", 90_000_000, "header of 90000000"),
        ({"a": tensor(shape=(2**31 - 1,) * 3)}, bytes(8), None, "takes 8 bytes"),
        ({"a": tensor(shape=(2**32,))}, bytes(8), None, "shape"),
        ({"a": tensor(shape=(-2,), offsets=(0, -8))}, bytes(8), None, "shape"),
        ({"a": tensor(shape=(True, 2))}, bytes(8), None, "shape"),
        ({"a": tensor(shape=(1,) * 40, offsets=(0, 4))}, bytes(4), None, "shape"),
        ({"a": tensor(offsets=(8, 0))}, bytes(8), None, "takes -8 bytes"),
        ({"a": tensor(offsets=(4, 12))}, bytes(12), None, "begins at byte 4"),
        ({"a": tensor(), "b": tensor()}, bytes(8), None, "begins at byte 0"),
        ({"a": tensor(dtype="F8")}, bytes(8), None, "dtype F8"),
        ({"a": tensor(dtype=["U32"])}, bytes(8), None, "dtype"),
        ({"a": [1, 2]}, bytes(8), None, "is described by"),
        ({"a": tensor()}, bytes(7), None, "truncated"),
        ({"a": tensor()}, bytes(9), None, "has .* bytes and describes"),
        ({"__metadata__": {"0.0": 1}}, b"", None, "metadata are no strings"),
        ([], b"", None, "no JSON object"),
        (b'{"a":' * 100_000, b"", None, "no complete safetensors file"),
        (b'{"__metadata__":{"0.a":"1","0.a":"2"}}', b"", None, "stands twice"),
        (b"\xff\xfe{}", b"", None, "no complete safetensors file"),
    ],
)
def test_headers_that_lie_are_refused_before_memory_is_taken(header, data, length, message, tmp_path):
    file = written(tmp_path / "a.safetensors", header, data, length)
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    for read in (load_prompt_cache, lambda name: load_calibration(name, directory=False)):
        with pytest.raises(ValueError, match=message):
            read(file)
    assert mx.get_peak_memory() - held < 1 << 20


WRONG = [
    -1,
    0,
    1,
    2**31 - 1,
    2**31,
    2**63,
    -(2**70),
    1.5,
    "x",
    "9" * 5000,
    None,
    [],
    [1],
    [-1, 5],
    [2**31] * 2,
    {},
    True,
]


def places(fields, path=()):
    """The path of every value in nested fields."""
    for key, value in fields.items() if isinstance(fields, dict) else enumerate(fields):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_field_is_refused_or_harmless(kind):
    """Whoever writes a file can give it a fitting checksum."""
    cache = small(kind)
    *arrays, identity = cache.state
    text = str(identity)
    for path in places(json.loads(text)):
        for wrong in WRONG:
            fields = json.loads(text)
            fields.pop("checksum")
            at = fields
            for key in path[:-1]:
                at = at[key]
            if path[-1] == "checksum":
                continue
            at[path[-1]] = wrong
            forged = str(Identity(fields, arrays))
            other = small(kind)
            before = str(other.state[-1])
            try:
                other.state = (*arrays, forged)
            except ValueError:
                assert str(other.state[-1]) == before, (path, wrong)
                continue
            use(other)


@pytest.mark.parametrize("kind", KINDS)
def test_forged_arrays_are_refused_or_harmless(kind):
    """Other sizes along an axis, other dtypes, none at all, arrays exchanged: with a fitting checksum each."""
    cache = small(kind)
    *arrays, identity = cache.state
    fields = identity.fields

    def changed(x):
        yield None
        yield x.astype(mx.int32 if x.dtype != mx.int32 else mx.float32)
        yield x[None]
        yield x.reshape(-1)
        for axis in range(x.ndim):
            yield mx.concatenate([x, x], axis)
            yield mx.take(x, mx.array([0]), axis)
            yield mx.take(x, mx.zeros((0,), mx.int32), axis)

    variants = []
    for i, x in enumerate(arrays):
        if x is None:
            variants += [[*arrays[:i], mx.zeros((1, 1, 5, 3)), *arrays[i + 1 :]]]
        else:
            variants += [[*arrays[:i], other, *arrays[i + 1 :]] for other in changed(x)]
    variants += [arrays[:i] for i in range(len(arrays))] + [[*arrays, mx.zeros(3)], arrays[::-1]]
    for forged in variants:
        other = small(kind)
        before = str(other.state[-1])
        try:
            other.state = (*forged, str(Identity(fields, forged)))
        except ValueError:
            assert str(other.state[-1]) == before
            continue
        with contextlib.suppress(ValueError):  # centres of other sizes are refused where they are used
            use(other)


@pytest.mark.parametrize(
    "settings, heads, message",
    [
        ({"recent": 8, "sink": 1}, 1, "no exact copies"),
        ({"recent": 0, "sink": 0, "key_map": 2 * mx.eye(32)[None]}, 1, "no exact copies, feedback or maps"),
        ({"recent": 0, "sink": 0, "feedback": (mx.zeros((1, 32, 32), mx.float16), None)}, 1, "feedback or maps"),
        ({"recent": 0, "sink": 0}, 2, "one head"),
    ],
)
def test_a_latent_cache_takes_no_state_of_another_kind(settings, heads, message):
    cache = TurboQuantKVCache(3, **settings)
    cache.update_and_fetch(*(mx.repeat(x, heads, 1) for x in kv(5)))
    *arrays, identity = cache.state
    latent = small("latent")
    before = str(latent.state[-1])
    with pytest.raises(ValueError, match=message):
        latent.state = (*arrays, str(Identity(identity.fields | {"kind": type(latent).__name__}, arrays)))
    assert str(latent.state[-1]) == before


def test_saving_a_calibration_writes_nowhere_else(tmp_path):
    other = tmp_path / "other"
    other.write_text("untouched")
    file = tmp_path / "calibration.safetensors"
    file.symlink_to(other)
    save_calibration({0: Calibration(key_centre=mx.ones((1, 32)))}, file, directory=MODEL)
    assert other.read_text() == "untouched" and not file.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.safetensors", "other"]
