"""One context of the publication curve: every mode reads the prompt, then all decode in turns.

A machine's clock and its other work change within seconds, by more than the modes differ.  So the modes' caches stand
side by side and decode some tokens each in rotated order: a block of tokens is compared with the float cache's block of
the same turn, and the ratio that is reported is the median over turns.
"""

import gc
import os
import statistics
import time
from pathlib import Path

import mlx.core as mx
from curve_models import attention_shape
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from turboquant_mlx import TurboQuantKVCache

WIDTHS = {"fp16": (16, 16), "affine4": (4, 4), "tq4": (4, 4), "tq3": (3, 3), "tq2": (2, 2)}
REFERENCE = "fp16"


def activation_dtype(model):
    return next(v.dtype for k, v in tree_flatten(model.parameters()) if k.endswith("norm.weight"))


def make_caches(model, mode):
    """The model's caches with this mode's in the KVCache slots: (those of attention, others, all)."""
    key_bits, value_bits = WIDTHS[mode]
    caches, attention = model.make_cache(), []
    for i, cache in enumerate(caches):
        if type(cache) is KVCache:
            if mode.startswith("affine"):
                caches[i] = QuantizedKVCache(group_size=64, bits=key_bits)
            elif mode.startswith("tq"):
                caches[i] = TurboQuantKVCache(key_bits=key_bits, value_bits=value_bits)
            attention.append(caches[i])
    if not attention:
        kinds = sorted({type(c).__name__ for c in caches})
        raise ValueError(f"the model has no KVCache slot, so there is nothing to compress; it has {kinds}")
    return attention, [c for c in caches if not any(c is a for a in attention)], caches


def arrays(cache):
    return [v for _, v in tree_flatten(cache.state) if isinstance(v, mx.array)]


def resident_bytes():
    """Of this process on the host, or "" where /proc has none."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return ""


class Run:
    """One mode's caches over one context; raises what the model raises, and TimeoutError beyond args.limit seconds."""

    def __init__(self, model, args, mode, others=0):
        """others: bytes that other modes' caches hold, which are not this run's."""
        self.model, self.args, self.mode, self.others = model, args, mode, others
        self.attention, self.linear, self.caches = make_caches(model, mode)
        self.spent, self.blocks, self.figures = 0.0, [], {}

    def _within_limit(self, seconds):
        if self.spent + seconds > self.args.limit:
            raise TimeoutError(f"over the limit of {self.args.limit:g} s")

    def _next(self, y):
        return mx.argmax(self.model(y[None], cache=self.caches)[:, -1], axis=-1)

    def read(self, prompt, tokens, synthetic):
        """Reads the prompt, or 64 tokens of it and `tokens` in all of random keys and values.

        As mlx-lm's generate_step: all but the last token in steps whose logits nobody computes, then the last one."""
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        read = prompt[:64] if synthetic else prompt
        started = time.perf_counter()
        for start in range(0, len(read) - 1, self.args.step):
            self.model(mx.array([read[start : min(start + self.args.step, len(read) - 1)]]), cache=self.caches)
            mx.eval([arrays(c) for c in self.caches])
            mx.clear_cache()
            self._within_limit(time.perf_counter() - started)
        logits = self.model(mx.array([read[-1:]]), cache=self.caches)[:, -1]
        y = mx.argmax(logits, axis=-1)
        mx.eval(y)
        first_token = time.perf_counter() - started
        self._within_limit(first_token)
        if not mx.isfinite(logits).all().item():
            raise ValueError("the model's logits are not finite")
        if synthetic:
            self._fill(tokens)
            mx.clear_cache()
            mx.reset_peak_memory()  # the peak of decoding: filling is no part of any real prompt
        self.y = self._next(y)  # the first step over these caches warms up
        mx.eval(self.y, [arrays(c) for c in self.linear])
        self.spent = time.perf_counter() - started
        self._within_limit(0)
        host = resident_bytes()
        on_host = self.others if mx.default_device() == mx.Device(mx.cpu) else 0
        self.figures = {
            "prompt_tps": "" if synthetic else f"{len(read) / first_token:.2f}",
            "first_token_s": "" if synthetic else f"{first_token:.4f}",
            "resident_bytes": host and host - on_host,
            "peak_bytes": mx.get_peak_memory() - self.others,
        }

    def _fill(self, tokens):
        """Extends the attention caches to `tokens`, some thousands at a time."""
        heads, dim = attention_shape(self.model)
        key, dtype = mx.random.key(self.args.seed), activation_dtype(self.model)
        for cache in self.attention:
            while cache.offset < tokens:
                n = min(4096, tokens - cache.offset)
                key, *keys = mx.random.split(key, 3)
                cache.update_and_fetch(*(mx.random.normal((1, heads, n, dim), key=k).astype(dtype) for k in keys))
                mx.eval(arrays(cache))

    def decode(self, count):
        """Times `count` tokens of a running pipeline: the clock starts when a token arrives while the next one is on
        its way, and stops likewise, so a block costs what as many tokens of a long answer cost."""
        a = self._next(self.y)
        mx.async_eval(a)
        b = self._next(a)
        mx.async_eval(b)
        a.item()
        started = time.perf_counter()
        for _ in range(count):
            c = self._next(b)
            mx.async_eval(c)
            b.item()
            b = c
        seconds = time.perf_counter() - started
        b.item()
        self.y = b
        self.blocks.append(count / seconds)
        self.spent += seconds
        self._within_limit(0)

    def row(self, reference=None):
        """The measured columns; `reference` is the float cache's run of the same turns."""
        heads, dim = attention_shape(self.model)
        ratio = ""
        if reference is not None and len(reference.blocks) == len(self.blocks):
            ratio = statistics.median(a / b for a, b in zip(self.blocks, reference.blocks, strict=True))
            ratio = f"{ratio:.4f}"
        route = getattr(self.attention[0], "route", None)
        return self.figures | {
            "decode_tps": f"{statistics.median(self.blocks):.2f}",
            "decode_ratio": ratio,
            "attention_bytes": sum(c.nbytes for c in self.attention),
            "fp16_equivalent_bytes": len(self.attention) * self.attention[0].offset * heads * dim * 2 * 2,
            "linear_bytes": sum(v.nbytes for c in self.linear for v in arrays(c)),
            "load": f"{os.getloadavg()[0]:.1f}",  # of the last minute: a busy machine shows in the table
            "kernel": route or ("mlx quantized_matmul" if self.mode.startswith("affine") else "mlx fast attention"),
        }


def describe(error):
    return {"status": "failed", "error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def measure(model, args, modes, prompt, tokens, synthetic):
    """All modes over one context: {mode: measured columns, or status and error of a mode that failed}."""
    gc.collect()
    mx.clear_cache()
    nobody = mx.get_active_memory()
    runs, out = {}, {}
    for mode in modes:
        try:
            run = Run(model, args, mode, mx.get_active_memory() - nobody)
            run.read(prompt, tokens, synthetic)
            runs[mode] = run
        except Exception as error:  # a run that fails is a result
            out[mode] = describe(error)
        run = None
    for turn in range(-(-args.decode_tokens // args.block)):
        order = list(runs)
        for mode in order[turn % max(1, len(order)) :] + order[: turn % max(1, len(order))]:
            try:
                runs[mode].decode(min(args.block, args.decode_tokens))
            except Exception as error:
                out[mode] = describe(error)
                del runs[mode]
    for mode, run in runs.items():
        out[mode] = {"status": "ok", **run.row(runs.get(REFERENCE))}
    return out
