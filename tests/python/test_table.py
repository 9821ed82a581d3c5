"""The table that every backend is held against, on the devices that are here: `pytest -m metal` on a Mac, `-m gpu` on NVIDIA.

tests/data/cases.txt names its rows, and those in which every pair of the Metal kernels' template parameters meets.
The emulator of the C++ tests runs the same ones.
"""

import re
import zlib

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from turboquant_mlx import _core, attention, decode, encode

NAME = re.compile(
    r"K(?P<key_bits>\d)(?P<key_code>t?)V(?P<value_bits>\d)(?P<value_code>t?)_D(?P<dim>\d+)_B(?P<batch>\d+)_H(?P<heads>\d+)x(?P<kv_heads>\d+)"
    r"_L(?P<queries>\d+)_N(?P<tokens>\d+)(?P<causal>_causal)?(?:_window(?P<window>\d+))?(?P<ragged>_ragged)?"
    r"(?P<sinks>_sinks)?(?P<centred>_centred)?(?:_(?P<mask>boolean|additive))?(?P<saturated>_saturated)?"
    r"(?:_(?P<dtype>f16|bf16))?"
)
DTYPES = {None: mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
ROUNDING = {mx.float32: 0, mx.float16: 2**-11, mx.bfloat16: 2**-8}

DEVICES = [pytest.param(mx.cpu, id="cpu")]
if _core.gpu_supported()[0]:
    DEVICES.append(pytest.param(mx.gpu, id="gpu", marks=[pytest.mark.gpu, pytest.mark.metal]))


def parse(name):
    found = NAME.fullmatch(name).groupdict()
    return {k: int(v) if v and v.isdigit() else v for k, v in found.items()}


def tolerance(device, dtype):
    """On a GPU q and some weights are half; 1e-3 is twice what the emulator allows, since these are other numbers."""
    return (1e-3 if device == mx.gpu else 5e-4) + ROUNDING[dtype]


def oracle(q, k, v, scale, c, bias, starts, sinks):
    """Plain attention in double precision on the decoded history; a query that sees no key gets zeros."""
    q, k, v = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (q, k, v))
    position = c["tokens"] - c["queries"] + np.arange(c["queries"])[:, None]
    key = np.arange(c["tokens"])
    sees = np.broadcast_to(key >= starts[:, None, None, None], (c["batch"], 1, c["queries"], c["tokens"]))
    if c["causal"]:
        sees = sees & (key <= position)
    if c["window"]:
        sees = sees & (key > position - c["window"])
    k, v = (np.repeat(x, c["heads"] // c["kv_heads"], axis=1) for x in (k, v))
    scores = np.where(sees, scale * (q @ k.swapaxes(-1, -2)) + bias, -np.inf)
    logits = np.full((1, c["heads"], 1, 1), -np.inf) if sinks is None else sinks[None, :, None, None]
    top = np.maximum(scores.max(axis=-1, keepdims=True), logits)
    top[np.isinf(top)] = 0
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(logits - top)
    return weights @ v / np.where(total == 0, 1, total)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", (ROOT / "tests" / "data" / "cases.txt").read_text().split())
def test_attention_matches_the_oracle(name, device):
    c = parse(name)
    dtype, scale, seed = DTYPES[c["dtype"]], 1.5 * c["dim"] ** -0.5, zlib.crc32(name.encode())
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return mx.array(rng.standard_normal(shape, dtype=np.float32))

    q = normal(c["batch"], c["heads"], c["queries"], c["dim"]).astype(dtype)
    k, v = (normal(c["batch"], c["kv_heads"], c["tokens"], c["dim"]) for _ in range(2))
    v = 0.5 * v + mx.where(mx.arange(c["dim"]) % 7 == 0, 0.7, -0.1)  # or long contexts would average to nothing
    if c["saturated"]:  # scales are float16's largest, as in cases.h
        q, k = (q.astype(mx.float32) / 65504).astype(dtype), 1e6 * k
        v = v * mx.where(mx.arange(c["tokens"]) % 2 == 1, 1e6, 1.0)[:, None]
    centres = {}
    if c["centred"]:
        centres = {side: 0.3 * normal(c["kv_heads"], c["dim"]) for side in ("key_centre", "value_centre")}
    sides = [(k, c["key_bits"], centres.get("key_centre")), (v, c["value_bits"], centres.get("value_centre"))]
    code = "trellis" if c["key_code"] or c["value_code"] else "scalar"
    packed = [encode(x, bits, seed=seed, centre=centre, code=code) for x, bits, centre in sides]
    history = [
        decode(*codes, bits, seed=seed, centre=centre, code=code)
        for codes, (_, bits, centre) in zip(packed, sides, strict=True)
    ]
    sinks = normal(c["heads"]) if c["sinks"] else None
    starts = np.arange(c["batch"], dtype=np.int32) * c["tokens"] // (c["batch"] + 1) * bool(c["ragged"])
    mask, bias = "causal" if c["causal"] else None, 0.0
    if c["mask"]:
        hidden = rng.random((c["batch"], 1, c["queries"], c["tokens"])) < 1 / 3
        if c["causal"]:  # an array takes the place of "causal"
            hidden |= np.arange(c["tokens"]) > c["tokens"] - c["queries"] + np.arange(c["queries"])[:, None]
        bias = np.where(hidden, -np.inf, 0)
        mask = mx.array(~hidden)
        if c["mask"] == "additive":
            mask = mx.array((bias + 0.5 * rng.standard_normal(bias.shape)).astype(np.float32)).astype(dtype)
            bias = np.array(mask.astype(mx.float32)).astype(np.float64)
    got = attention(
        q,
        *packed,
        scale=scale,
        mask=mask,
        key_bits=c["key_bits"],
        value_bits=c["value_bits"],
        code=code,
        seed=seed,
        sinks=sinks,
        starts=mx.array(starts) if c["ragged"] else None,
        window=c["window"] or 0,
        **centres,
        stream=device,
    )
    assert got.shape == q.shape and got.dtype == dtype
    want = oracle(q, *history, scale, c, bias, starts, None if sinks is None else np.array(sinks).astype(np.float64))
    if dtype == mx.float16:
        want = np.clip(want, -65504, 65504)  # outputs saturate
    error = np.linalg.norm(np.array(got.astype(mx.float32)) - want, axis=-1)
    worst = np.max(error / np.maximum(np.linalg.norm(want, axis=-1), 1e-30))
    assert worst <= tolerance(device, dtype)
