"""What each choice about codes buys, by KL divergence from float16 caches: the tables of docs/quality_studies.md.

    python benchmarks/studies/quality_study.py --study scale --out benchmarks/results/quality

Codes are simulated where the package has no such cache: keys and values are coded and decoded as they enter a float
cache, so every position is read through them, prompt included.  Centres come from windows of the same text that no
study measures (every ninth); a study's own windows are given by --first-window, so that a choice made on some windows
can be confirmed on others.
"""

import argparse
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache
from tqdm import tqdm
from turboquant_mlx import decode, encode
from turboquant_mlx.caches.slots import own_caches, replace_kv_caches
from turboquant_mlx.calibration import calibrate
from turboquant_mlx.eval import divergence, modes
from turboquant_mlx.eval.files import write_table
from turboquant_mlx.eval.model import load_model, read_tokens, spread_windows
from turboquant_mlx.overlay.patch import apply_patch

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 2048
UNITS = {2: 6.62, 3: 40.906, 4: 38.143}  # levels a standard deviation, and the value of a level (format.h)
STEPS = {2: 1 / 8, 3: 1 / 32, 4: 1 / 32}
LEVELS = {2: (3, 10), 3: (10, 31, 55, 88), 4: (5, 15, 25, 36, 48, 62, 79, 104)}


def dot(a, b):
    return (a * b).sum(-1, keepdims=True)


def coder(bits, centre=None, scale="same length", search=0):
    """x -> x^ with one of the scales: same length (|x^| = |x|, what the package stores), unbiased (<x, x^> = |x|^2),
    least squares, the paper's plain norm, or a number: the way from same length (0) to least squares (1)."""
    if bits == 16:
        return modes.to_half
    shift = 0 if centre is None else centre.astype(mx.float32)[None, :, None]

    def code(x):
        y = x.astype(mx.float32) - shift
        if search:
            y_hat = searched(y, bits, search)
        else:
            codes, scales = encode(y, bits, code="scalar")
            y_hat = decode(codes, scales, bits, code="scalar")
        square = dot(y, y)
        if scale == "unbiased":
            y_hat = y_hat * (square / dot(y, y_hat))
        elif scale == "least squares":
            y_hat = y_hat * (dot(y, y_hat) / square)
        elif isinstance(scale, float):
            y_hat = y_hat * (1 + scale * (dot(y, y_hat) / square - 1))
        elif scale == "plain":
            plain = mx.sqrt(square) / (np.sqrt(y.shape[-1]) * UNITS[bits] * STEPS[bits])
            y_hat = y_hat * (plain / scales[..., None].astype(mx.float32))
        return (y_hat + shift).astype(x.dtype)

    return code


def searched(y, bits, candidates):
    """Codes of the best of so many scales, from 0.8 to 1.2 times the usual one, by the squared error that least squares
    leaves; then the scale that keeps the length."""
    signs = mx.where(mx.random.bernoulli(0.5, (y.shape[-1],), key=mx.random.key(0)), 1.0, -1.0)
    r = mx.hadamard_transform(y * signs)
    positive = np.array(LEVELS[bits], np.float32) / UNITS[bits]
    levels = mx.array(np.concatenate([-positive[::-1], positive]))
    thresholds = (levels[1:] + levels[:-1]) / 2
    rms = mx.sqrt(mx.square(r).mean(-1, keepdims=True))
    best, error = mx.zeros_like(r), mx.full(rms.shape, float("inf"))
    for factor in np.linspace(0.8, 1.2, candidates) if candidates > 1 else [1.0]:
        u = r / (rms * float(factor))
        index = sum((u > t).astype(mx.int32) for t in thresholds)
        found = levels[index]
        found = found * (dot(found, r) / dot(found, found))
        missed = mx.square(r - found).sum(-1, keepdims=True)
        best, error = mx.where(missed < error, found, best), mx.minimum(missed, error)
    best = best * mx.sqrt(dot(r, r) / dot(best, best))
    return mx.hadamard_transform(best) * signs


class Sinks(modes.FloatCache):
    """The first `count` tokens stay as they are."""

    def __init__(self, count, *coders):
        super().__init__(*coders)
        self.count = count

    def update_and_fetch(self, keys, values):
        first = (mx.arange(keys.shape[2]) + self.offset < self.count)[:, None]
        coded = self.code_keys(keys), self.code_values(values)
        kept = [mx.where(first, modes.to_half(x), c) for x, c in zip((keys, values), coded, strict=True)]
        return KVCache.update_and_fetch(self, *kept)


class Recent(KVCache):
    """Every query reads the last `count` tokens before it as they are, and older ones coded."""

    bits, group_size = 0, 0  # routes attention to `attend_recent`

    def __init__(self, count, code_keys, code_values):
        super().__init__()
        self.count, self.coders = count, (code_keys, code_values)
        self.exact, self.coded = KVCache(), KVCache()

    def update_and_fetch(self, keys, values):
        exact = self.exact.update_and_fetch(modes.to_half(keys), modes.to_half(values))
        coded = self.coded.update_and_fetch(*(f(x) for f, x in zip(self.coders, (keys, values), strict=True)))
        self.offset = self.exact.offset
        return (self.count, exact[0], coded[0]), (exact[1], coded[1])

    @property
    def state(self):
        return self.exact.state, self.coded.state


def attend_recent(queries, q_keys, q_values, scale, mask, group_size, bits):
    count, *keys = q_keys
    group = queries.shape[1] // keys[0].shape[1]
    keys, values = ([mx.repeat(x, group, 1) for x in side] for side in (keys, q_values))
    length, total = queries.shape[2], keys[0].shape[2]
    age = (mx.arange(length) + total - length)[:, None] - mx.arange(total)
    near = age < count
    scores = mx.where(near, *((queries * scale) @ k.swapaxes(-1, -2) for k in keys))
    weights = mx.softmax(mx.where(age >= 0, scores, -float("inf")), axis=-1)
    return mx.where(near, weights, 0) @ values[0] + mx.where(near, 0, weights) @ values[1]


def calibration_texts(windows):
    """Windows that no study measures among its first four, in several numbers."""
    return {
        "1 window, number 35": windows[[35]],
        "1 window, number 71": windows[[71]],
        "4 windows": windows[[17, 35, 53, 71]],
        "8 windows": windows[8::9],
        "the same, their first 256 tokens": windows[8::9, :256],
        "32 windows": windows[40:],
    }


def study_modes(name, c, others):
    """{row name: slot -> cache} of a study; `c` are the centres, `others` those of other calibration texts."""

    def simple(key_bits, value_bits=None, centred=True, **how):
        value_bits = value_bits or key_bits
        centre = (lambda slot: c[slot]) if centred else (lambda slot: (None, None))
        return lambda slot: modes.FloatCache(
            coder(key_bits, centre(slot)[0], **how), coder(value_bits, centre(slot)[1], **how)
        )

    if name == "scale":
        rows = {}
        for bits in (4, 3, 2):
            for scale in ("plain", "same length", "unbiased", "least squares"):
                rows[f"{bits} bits, {scale}"] = simple(bits, centred=False, scale=scale)
        return rows
    if name == "centres":
        rows = {f"{b} bits, centred, {s}": simple(b, scale=s) for b in (4, 3, 2) for s in ("same length", "unbiased")}

        def affine(bits):
            return lambda slot: modes.FloatCache(modes.affine(bits))

        return rows | {f"MLX affine, {b} bits": affine(b) for b in (4, 3, 2)}
    if name == "mixed":

        def mixed(bits, key_scale, value_scale):
            return lambda slot: modes.FloatCache(
                coder(bits, c[slot][0], key_scale), coder(bits, c[slot][1], value_scale)
            )

        kinds = ("same length", "unbiased")
        return {f"{b} bits, K {k}, V {v}": mixed(b, k, v) for b in (3, 2) for k in kinds for v in kinds}
    if name == "shrink":

        def shrunk(key_scale, value_scale):
            return lambda slot: modes.FloatCache(coder(3, c[slot][0], key_scale), coder(3, c[slot][1], value_scale))

        pairs = [(0.0, 0.0), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
        return {f"3 bits, K {k:g}, V {v:g} of the way to least squares": shrunk(k, v) for k, v in pairs}
    if name == "calibration":

        def centred(c):
            return lambda slot: modes.FloatCache(coder(3, c[slot][0]), coder(3, c[slot][1]))

        return {"no centres": simple(3, centred=False)} | {text: centred(c) for text, c in others.items()}
    if name == "search":
        kinds = {"nearest codes": 0, "best of 5 scales": 5, "best of 17 scales": 17}
        return {f"{b} bits, {what}": simple(b, search=n) for b in (3, 4, 2) for what, n in kinds.items()}
    if name == "sides":
        pairs = [(3, 16), (16, 3), (4, 3), (3, 4), (4, 2), (2, 4), (3, 2), (2, 3), (3, 3)]
        return {f"K{k} V{v}": simple(k, v) for k, v in pairs}
    if name == "sinks":

        def sinks(count):
            return lambda slot: Sinks(count, coder(3, c[slot][0]), coder(3, c[slot][1]))

        return {f"{n} first tokens as float16": sinks(n) for n in (0, 4, 64)}
    if name == "recent":

        def recent(count):
            return lambda slot: Recent(count, coder(3, c[slot][0]), coder(3, c[slot][1]))

        return {f"{n} last tokens as float16": recent(n) for n in (0, 1, 16, 64, 128)}
    if name == "layers":
        slots = sorted(c)

        def layers(bits):
            return lambda slot: modes.FloatCache(*(coder(bits[slots.index(slot)], side) for side in c[slot]))

        pairs = [(3, 3), (4, 3), (3, 4), (3, 16), (16, 3)]
        return {", ".join(f"layer {s}: {b}" for s, b in zip(slots, p, strict=True)): layers(p) for p in pairs}
    raise ValueError(f"unknown study {name!r}")


def against(record, other):
    """What a row changes against another one, window by window: in mean KLD and in perplexity (ratio - 1), each with its
    standard error.  Rows err alike on the same window, so these are smaller than the rows' own errors."""

    def mean(x):
        x = x.mean(1, dtype=np.float64)
        return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")

    (kld, kld_error), (nll, nll_error) = mean(record.kld - other.kld), mean(record.nll - other.nll)
    return {"kld_to_first": kld, "kld_to_first_stderr": kld_error, "perplexity_to_first": float(np.expm1(nll))} | {
        "perplexity_to_first_stderr": float(np.exp(nll)) * nll_error
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "qwen35-tiny-4bit")
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "valid.txt")
    parser.add_argument(
        "--study",
        required=True,
        choices=("scale", "centres", "calibration", "mixed", "shrink", "search", "sides", "sinks", "recent", "layers"),
    )
    parser.add_argument("--calibrate-text", type=Path, nargs="*", default=[], help="more texts for `calibration`")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--first-window", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--name", help="of the table's file (default: the study's)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args.model)
    tokens = read_tokens(tokenizer, args.text)
    windows = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    measured = [i for i in range(len(windows)) if i % 9 != 8][args.first_window :][: args.windows]
    centres = calibrate(model, spread_windows(tokens, LENGTH, len(windows) // 9), feedback=False)
    others = {}
    if args.study == "calibration":
        texts = calibration_texts(windows)
        for path in args.calibrate_text:
            texts[f"8 windows of {path.name}"] = spread_windows(read_tokens(tokenizer, path), LENGTH, 8)
        if len(args.calibrate_text) > 1:
            texts["all of these files"] = np.concatenate([texts[f"8 windows of {p.name}"] for p in args.calibrate_text])
        others = {name: calibrate(model, text, feedback=False) for name, text in texts.items() if args.only in name}
    apply_patch()
    hook = base.quantized_scaled_dot_product_attention
    if args.study == "recent":
        base.quantized_scaled_dot_product_attention = attend_recent
    makers = {"float16": lambda slot: modes.FloatCache(modes.to_half)} | {
        k: v for k, v in study_modes(args.study, centres, others).items() if args.only in k
    }
    caches = {
        k: replace_kv_caches(own_caches(model), lambda path, make=make: make(path[0])) for k, make in makers.items()
    }
    with tqdm(total=len(measured) * LENGTH * len(caches), unit="tok", disable=None) as bar:
        records = divergence.compare(model, windows[measured], caches, progress=bar.update)
    base.quantized_scaled_dot_product_attention = hook
    rows, first = [], list(records.values())[1]
    for name, record in records.items():
        rows.append({"row": name, **divergence.summarise(record, records["float16"]), **against(record, first)})
        r = rows[-1]
        print(
            f"{name:32} {r['mean_kld']:8.5f} +- {r['mean_kld_stderr']:.5f}  {r['perplexity_change']:+8.3%} "
            f"+- {r['perplexity_change_stderr']:.3%}  against the first row {r['kld_to_first']:+.5f} "
            f"+- {r['kld_to_first_stderr']:.5f}, {r['perplexity_to_first']:+.3%} +- "
            f"{r['perplexity_to_first_stderr']:.3%}",
            flush=True,
        )
    write_table(args.out / f"{args.name or args.study}.tsv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
