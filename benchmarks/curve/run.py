"""One context of the publication curve: every mode reads the prompt, then all decode in turns.

A machine's clock and its other work change within seconds, by more than the modes differ.  So the modes' caches stand
side by side and decode some tokens each in rotated order: a block of tokens is compared with the float cache's block of
the same turn, and the ratio that is reported is the median over turns.

The peak of a mode is the most bytes MLX held while that mode read its prompt or decoded, weights and its own cache
included; what the other modes' caches hold meanwhile is taken off.
"""

import contextlib
import gc
import os
import statistics
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from turboquant_mlx import disable, enable
from turboquant_mlx.caches import leaves
from turboquant_mlx.caches.slots import REPLACED, own_caches, replace_slots
from turboquant_mlx.calibration import Calibration
from turboquant_mlx.eval.modes import parse_mode

REFERENCE = "fp16"


def chosen(mode, calibration):
    """{slot: Calibration of MLX arrays}: what of the calibration this mode uses; None for plain codes."""
    if not mode.centred:
        return None
    if not calibration:
        raise ValueError(
            f"[curve] {mode.name} needs a calibration and there is none: python -m turboquant_mlx calibrate"
        )
    if mode.fed and not any(found.feedback for found in calibration.values()):
        raise ValueError(f"[curve] {mode.name} needs feedback, and the calibration has none")
    out = {}
    for slot, found in calibration.items():
        kept = found if mode.fed else found.without_feedback()
        out[slot] = Calibration(*(mx.array(x) if isinstance(x, np.ndarray) else x for x in kept))
    return out


def make_caches(subject, name):
    """The caches a user of this mode would get.

    Packed ones are `enable`'s own, and a model that it refuses is refused here with its reasons."""
    model, mode = subject.model, parse_mode(name)
    if mode.kind == "tq":
        found = chosen(mode, subject.calibration)
        seed = next((c.seed for c in (found or {}).values()), 0)
        enable(model, key_bits=mode.key_bits, value_bits=mode.value_bits, seed=seed, calibration=found)
        caches = model.make_cache()
        disable(model)
    else:
        caches = own_caches(model)
    if mode.kind == "affine":
        caches = replace_slots(
            caches, lambda path, c: c.to_quantized(group_size=64, bits=mode.key_bits) if type(c) in REPLACED else None
        )
    return caches


def arrays(cache):
    return [v for _, v in tree_flatten(cache.state) if isinstance(v, mx.array)]


def tokens_held(cache):
    return cache.size() or cache.offset  # mlx-lm's QuantizedKVCache has no size


def resident_bytes(others):
    """Of this process, without the bytes that other modes' caches hold; "" where /proc has none, and on a GPU, whose
    memory is no part of it."""
    if mx.default_device() != mx.Device(mx.cpu):
        return ""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") - others
    except OSError:
        return ""


class Run:
    """One mode's caches over one context; raises what the model raises, and TimeoutError beyond args.limit seconds."""

    def __init__(self, subject, args, mode, nobody=0):
        """nobody: bytes that MLX holds when no mode has a cache."""
        self.subject, self.model, self.args, self.mode = subject, subject.model, args, mode
        self.held, self.peak = nobody, 0
        with self._own_memory():
            self.caches = make_caches(subject, mode)
        found = dict(leaves(self.caches))
        self.attention = [found.pop(slot.path) for slot in subject.slots]
        self.linear = list(found.values())
        self.spent, self.blocks, self.figures = 0.0, [], {}

    def _within_limit(self, seconds):
        if self.spent + seconds > self.args.limit:
            raise TimeoutError(f"over the limit of {self.args.limit:g} s")

    @contextlib.contextmanager
    def _own_memory(self):
        """What happens inside counts as this mode's: its peak, and what it leaves behind."""
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        yield
        mx.synchronize()
        self.peak = max(self.peak, mx.get_peak_memory() - (before - self.held))
        self.held += mx.get_active_memory() - before

    def _next(self, y):
        return mx.argmax(self.model(y[None], cache=self.caches)[:, -1], axis=-1)

    def read(self, prompt, tokens, synthetic):
        """Reads the prompt, or 64 tokens of it and `tokens` in all of random keys and values.

        Of those the peak is that of decoding alone: filling is no part of any real prompt."""
        mx.clear_cache()
        others = mx.get_active_memory() - self.held
        read = prompt[:64] if synthetic else prompt
        started = time.perf_counter()
        with self._own_memory():
            first_token = self._read(read, started)
        if synthetic:
            with self._own_memory():
                self._fill(tokens)
            mx.clear_cache()
            self.peak = 0
        with self._own_memory():
            self.y = self._next(self.y)  # the first step over these caches warms up
            mx.eval(self.y, [arrays(c) for c in self.linear])
        self.spent = time.perf_counter() - started
        self._within_limit(0)
        self.figures = {
            "prompt_tps": "" if synthetic else f"{len(read) / first_token:.2f}",
            "first_token_s": "" if synthetic else f"{first_token:.4f}",
            "resident_bytes": resident_bytes(others),
        }

    def _read(self, read, started):
        """Seconds to the first token, which `y` becomes, as mlx-lm's generate_step: all but the last token in steps
        whose logits nobody computes, then the last one."""
        for start in range(0, len(read) - 1, self.args.step):
            self.model(mx.array([read[start : min(start + self.args.step, len(read) - 1)]]), cache=self.caches)
            mx.eval([arrays(c) for _, c in leaves(self.caches)])
            mx.clear_cache()
            self._within_limit(time.perf_counter() - started)
        logits = self.model(mx.array([read[-1:]]), cache=self.caches)[:, -1]
        self.y = mx.argmax(logits, axis=-1)
        mx.eval(self.y)
        first_token = time.perf_counter() - started
        self._within_limit(first_token)
        if not mx.isfinite(logits).all().item():
            raise ValueError("the model's logits are not finite")
        return first_token

    def _fill(self, tokens):
        """Extends the attention caches to `tokens`, some thousands at a time."""
        key = mx.random.key(self.args.seed)
        for cache, slot in zip(self.attention, self.subject.slots, strict=True):
            while cache.offset < tokens:
                shape = (1, slot.heads, min(4096, tokens - cache.offset))
                key, *keys = mx.random.split(key, 3)
                dims = (slot.key_dim, slot.value_dim)
                new = [mx.random.normal((*shape, d), key=k) for d, k in zip(dims, keys, strict=True)]
                cache.update_and_fetch(*(x.astype(slot.dtype) for x in new))
                mx.eval(arrays(cache))

    def decode(self, count):
        """Times `count` tokens of a running pipeline: the clock starts when a token arrives while the next one is on
        its way, and stops likewise, so a block costs what as many tokens of a long answer cost."""
        with self._own_memory():
            seconds = self._decode(count)
        self.blocks.append(count / seconds)
        self.spent += seconds
        self._within_limit(0)

    def _decode(self, count):
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
        return seconds

    def row(self, reference=None):
        """The measured columns; `reference` is the float cache's run of the same turns."""
        ratio = ""
        if reference is not None and len(reference.blocks) == len(self.blocks):
            ratio = statistics.median(a / b for a, b in zip(self.blocks, reference.blocks, strict=True))
            ratio = f"{ratio:.4f}"
        kernel = getattr(self.attention[0], "kernel", None)
        numbers = [
            tokens_held(c) * s.heads * (s.key_dim + s.value_dim)
            for c, s in zip(self.attention, self.subject.slots, strict=True)
        ]
        return self.figures | {
            "decode_tps": f"{statistics.median(self.blocks):.2f}",
            "decode_ratio": ratio,
            "attention_bytes": sum(c.nbytes for c in self.attention),
            "fp16_equivalent_bytes": 2 * sum(numbers),
            "linear_bytes": sum(v.nbytes for c in self.linear for v in arrays(c)),
            "peak_bytes": self.peak,
            "load": f"{os.getloadavg()[0]:.1f}",  # of the last minute: a busy machine shows in the table
            "kernel": kernel or ("mlx quantized_matmul" if self.mode.startswith("affine") else "mlx fast attention"),
        }


def describe(error):
    return {"status": "failed", "error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def measure(subject, args, modes, prompt, tokens, synthetic, begin=lambda mode, doing: None):
    """All modes over one context: {mode: measured columns, or status and error of a mode that failed}.

    begin(mode, "reading" or "decoding") is called before a mode does either, which some processes do not survive."""
    gc.collect()
    mx.clear_cache()
    mx.synchronize()
    nobody = mx.get_active_memory()
    runs, out = {}, {}
    for mode in modes:
        begin(mode, "reading")
        try:
            run = Run(subject, args, mode, nobody)
            run.read(prompt, tokens, synthetic)
            runs[mode] = run
        except Exception as error:  # a run that fails is a result
            out[mode] = describe(error)
        run = None
    for turn in range(-(-args.decode_tokens // args.block)):
        order = list(runs)
        for mode in order[turn % max(1, len(order)) :] + order[: turn % max(1, len(order))]:
            begin(mode, "decoding")
            try:
                runs[mode].decode(min(args.block, args.decode_tokens))
            except Exception as error:
                out[mode] = describe(error)
                del runs[mode]
    for mode, run in runs.items():
        out[mode] = {"status": "ok", **run.row(runs.get(REFERENCE))}
    return out
