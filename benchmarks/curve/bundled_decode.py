"""Decode tokens a second of the bundled model over filled caches: float32, float16 (widened to be read), TQ4, TQ3.

    LD_PRELOAD=libopenblas.so.0 python benchmarks/curve/bundled_decode.py [TOKENS ...]

Weights are float32, caches are filled with normal keys and values; rounds alternate between the caches, medians.
"""

import sys
import time
from pathlib import Path
from statistics import median

import mlx.core as mx
from mlx_lm import load
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import dequantize_model
from turboquant_mlx import TurboQuantKVCache, apply_patch
from turboquant_mlx.caches.slots import own_caches, replace_kv_caches

MODEL = Path(__file__).resolve().parent.parent / "models" / "qwen35-tiny-4bit"
ROUNDS, STEPS = 7, 4


class HalfKVCache(KVCache):
    """float16 storage under a float32 model."""

    def update_and_fetch(self, keys, values):
        keys, values = super().update_and_fetch(keys.astype(mx.float16), values.astype(mx.float16))
        return keys.astype(mx.float32), values.astype(mx.float32)


def filled(model, make, tokens):
    """The model's caches with make() in the KVCache slots, holding `tokens` tokens."""
    cache = replace_kv_caches(own_caches(model), lambda path: make())
    mx.eval(model(mx.zeros((1, 4), mx.int32), cache=cache))
    mx.random.seed(0)
    for c in cache:
        if hasattr(c, "update_and_fetch"):
            c.update_and_fetch(*(mx.random.normal((1, 2, tokens - 4, 256)) for _ in range(2)))
    mx.eval([c.state for c in cache])
    return cache


def seconds_a_token(model, cache):
    start = time.perf_counter()
    token = mx.array([[5]])
    for _ in range(STEPS):
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.eval(token)
    return (time.perf_counter() - start) / STEPS


def main(lengths):
    mx.set_default_device(mx.cpu)
    model = dequantize_model(load(str(MODEL))[0])
    model.set_dtype(mx.float32)
    apply_patch()
    kinds = {
        "float32": KVCache,
        "float16": HalfKVCache,
        "tq4": lambda: TurboQuantKVCache(4),
        "tq3": lambda: TurboQuantKVCache(3),
    }
    print("tokens  " + "".join(f"{kind:>9}" for kind in kinds) + "  tq3/float32  tq3/float16")
    for tokens in lengths:
        caches = {kind: filled(model, make, tokens) for kind, make in kinds.items()}
        times = {kind: [] for kind in kinds}
        for turn in range(ROUNDS + 1):
            for kind, cache in caches.items():
                took = seconds_a_token(model, cache)
                if turn:  # the first round warms up
                    times[kind].append(took)
        took = {kind: median(t) for kind, t in times.items()}
        row = "".join(f"{1 / took[kind]:9.1f}" for kind in kinds)
        print(
            f"{tokens:6}  {row}{took['float32'] / took['tq3']:13.2f}{took['float16'] / took['tq3']:13.2f}", flush=True
        )


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]] or [2048, 8192, 16384])
