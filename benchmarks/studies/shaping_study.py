"""What noise shaping in the encoder buys: codes that make the errors attention does not see out of those it does.

    python benchmarks/studies/shaping_study.py --rows "bits=3" "bits=3; K metric=queries block=32 eps=0.03"

An error e of a key counts through the scores q . e, so by e' S e with S = E[q q'] over the queries of the KV head's group;
one of a value by e' M e, where M comes from the output gate and the output projection.  `fisher` takes for either the mean
of g g', g the gradient of the log-likelihood of a token drawn from the model: half of e' F e is the divergence to second
order.  In the rotated basis S = U D U', U unit upper triangular, so e' S e = sum of D_i (e_i + sum over j < i of U_ji e_j)^2:
coordinate i is coded as the nearest level to x_i - sum over j < i of U_ji e_j, which keeps bytes, format and decoding.

A row is the width and what each side (K, V or KV) does, by the fields of `Shaping`.  Codes are simulated as they enter a
float cache, with the package's signs and levels, always centred.  Matrices and centres come from every ninth window, which
is never measured.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache
from quality_study import LENGTH, LEVELS, ROOT, UNITS, against
from tqdm import tqdm
from turboquant_mlx.caches.slots import own_caches, replace_kv_caches
from turboquant_mlx.eval import divergence, modes
from turboquant_mlx.eval.files import write_table
from turboquant_mlx.eval.model import load_model, read_tokens

SIDES = ("K", "V")


@dataclass(frozen=True)
class Shaping:
    """How one side is coded."""

    metric: str = ""  # queries (S of keys, M of values), fisher, or none: nearest codes
    block: int = 32  # coordinates coded at once, without feedback among them
    eps: float = 0.03  # of the metric's mean diagonal, added to it
    scale: str = "length"  # keep, length, unbiased, or weighted-length, weighted-unbiased, weighted-least
    damp: float = 1.0  # of the feedback
    widen: float = 1.0  # of the scale that codes are chosen with
    rank: int = 0  # of the metric that is left, beside a multiple of the identity; 0: all
    transform: float = 0.0  # power of the transform that balances the metric and the vectors; 0: none, 1: whole
    bits: int = 0  # 0: the row's


def parse_row(text):
    """(bits, {"K": Shaping, "V": Shaping}) of a row's name."""
    head, *parts = text.split(";")
    bits = int(head.strip().removeprefix("bits="))
    sides = dict.fromkeys(SIDES, Shaping(bits=bits))
    for part in parts:
        which, *fields = part.split()
        for side in which:
            for field in fields:
                key, value = field.split("=")
                kind = type(getattr(sides[side], key))
                sides[side] = replace(sides[side], **{key: kind(value)})
    return bits, sides


class Watched(KVCache):
    """A cache whose attention goes through `watch`."""

    bits, group_size = 0, 0

    def __init__(self, slot, notes):
        super().__init__()
        self.slot, self.notes = slot, notes

    def update_and_fetch(self, keys, values):
        self.notes[self.slot] = {"k": keys, "v": values}
        keys, values = super().update_and_fetch(keys, values)
        return (self, keys), values


def watch(queries, q_keys, q_values, scale, mask, group_size, bits):
    cache, keys = q_keys
    cache.notes[cache.slot]["q"] = queries
    return mx.fast.scaled_dot_product_attention(queries, keys, q_values, scale=scale, mask=mask)


class Gate:
    """A query projection that notes the gate beside the queries."""

    def __init__(self, inner, heads):
        self.inner, self.heads = inner, heads

    def __call__(self, x):
        y = self.inner(x)
        gate = mx.split(y.reshape(*y.shape[:-1], self.heads, -1), 2, axis=-1)[1]
        self.gate = mx.sigmoid(gate).transpose(0, 2, 1, 3)
        return y


def second(x, heads):
    """Sum of x x' for each of `heads` equal groups of x's heads: (heads, D, D)."""
    x = np.array(x.astype(mx.float32))
    x = x.transpose(1, 0, 2, 3).reshape(heads, -1, x.shape[-1])
    return (x.swapaxes(1, 2) @ x).astype(np.float64)


class Shifted(KVCache):
    """Adds to its keys and values, so that a gradient by what is added is one by them."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(keys + self.shift[0], values + self.shift[1])


def moments(model, windows):
    """{slot: {"K": {...}, "V": {...}}}, of each side the centre, the vectors' second moment about it, and both metrics."""
    notes, gates, sums = {}, {}, {}
    layers = model.layers
    base.quantized_scaled_dot_product_attention, hook = watch, base.quantized_scaled_dot_product_attention

    def add(slot, name, x):
        sums[slot, name] = sums.get((slot, name), 0) + x

    def watched(path):
        attention = layers[path[0]].self_attn
        if not isinstance(attention.q_proj, Gate):
            attention.q_proj = Gate(attention.q_proj, attention.num_attention_heads)
        gates[path[0]] = attention.q_proj
        return Watched(path[0], notes)

    for window in tqdm(windows, desc="calibration", unit="window", disable=None):
        tokens = mx.array(window)[None]
        mx.eval(model(tokens, cache=replace_kv_caches(own_caches(model), watched)))
        for slot, seen in notes.items():
            heads = seen["k"].shape[1]
            for name in ("k", "v"):
                add(slot, f"sum {name}", np.array(seen[name]).sum((0, 2), dtype=np.float64))
                add(slot, name, second(seen[name], heads))
            add(slot, "q", second(seen["q"], heads))
            attention = layers[slot].self_attn
            query_heads, size = attention.num_attention_heads, attention.head_dim
            out = np.array(attention.o_proj.weight).reshape(-1, query_heads, size).transpose(1, 0, 2)
            products = second(gates[slot].gate, query_heads) * (out.swapaxes(1, 2) @ out)
            add(slot, "m", products.reshape(heads, -1, size, size).sum(1))
    base.quantized_scaled_dot_product_attention = hook
    for slot, gate in gates.items():
        layers[slot].self_attn.q_proj = gate.inner
    shapes = {slot: seen["k"].shape for slot, seen in notes.items()}
    for number, window in enumerate(tqdm(windows, desc="gradients", unit="window", disable=None)):
        tokens = mx.array(window)[None]

        def loss(shifts, tokens=tokens, number=number):
            caches = replace_kv_caches(own_caches(model), lambda path: Shifted(shifts[path[0]]))
            logits = model(tokens, cache=caches)
            drawn = mx.random.categorical(mx.stop_gradient(logits), key=mx.random.key(number))
            chosen = mx.take_along_axis(logits, drawn[..., None], axis=-1)[..., 0]
            return (mx.logsumexp(logits, axis=-1) - chosen).sum()

        gradient = mx.grad(loss)({slot: [mx.zeros(shape)] * 2 for slot, shape in shapes.items()})
        mx.eval(gradient)
        for slot, sides in gradient.items():
            for name, x in zip(("fk", "fv"), sides, strict=True):
                add(slot, name, second(x, x.shape[1]))
    count, result = windows.size, {}
    for slot in shapes:
        result[slot] = {}
        for side, x, weak in (("K", "k", "q"), ("V", "v", "m")):
            mean = sums[slot, f"sum {x}"] / count
            result[slot][side] = {
                "centre": mean,
                "vectors": sums[slot, x] / count - mean[:, :, None] * mean[:, None],
                "queries": sums[slot, weak] / count,
                "fisher": sums[slot, f"f{x}"] / count,
            }
    return result


def signed_hadamard(size):
    """The package's rotation for seed 0 as a matrix (rotation.h)."""
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    signs, mask = [], 2**64 - 1
    for word in range(size // 32):
        z = 0x9E3779B97F4A7C15 * (word + 1) & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        z = (z ^ z >> 31) >> 32
        signs += [1 - 2 * (z >> i & 1) for i in range(32)]
    return h * np.array(signs) / np.sqrt(size)


def power(a, exponent):
    w, v = np.linalg.eigh(a)
    return (v * np.maximum(w, w[-1] * 1e-9) ** exponent) @ v.T


def balance(metric, vectors, how_much):
    """A, for which codes of A x err least by the metric: A' A is the geometric mean of metric and vectors^-1."""
    ridge = 0.01 * np.trace(metric) / len(metric) * np.eye(len(metric))
    half = power(metric + ridge, 0.5)
    return power(half @ power(half @ vectors @ half, -0.5) @ half, 0.5 * how_much)


def low_rank(metric, rank):
    """The metric's first eigenvectors, and the mean of the other eigenvalues for all else."""
    w, v = np.linalg.eigh(metric)
    w[:-rank] = w[:-rank].mean()
    return (v * w) @ v.T


def feedback(metric, block):
    """G, strictly lower by blocks: target = x - G e.  Also the D of a whole triangle, for predictions."""
    flipped = np.linalg.cholesky(metric[::-1, ::-1])[::-1, ::-1]  # upper: metric = flipped flipped'
    d = np.diag(flipped)
    lower = (flipped / d).T
    g = np.zeros_like(lower)
    for start in range(block, len(lower), block):
        rows = np.s_[start : start + block]
        g[rows, :start] = np.linalg.solve(lower[rows, rows], lower[rows, :start])
    return g, d**2


class Coder:
    """x -> x^ of one side of a layer; adds up what its errors are worth."""

    def __init__(self, how, moment):
        self.how, self.heads = how, []
        self.centre = moment["centre"].astype(np.float32)
        self.square = self.error = self.clipped = self.count = 0
        rotation = signed_hadamard(self.centre.shape[-1])
        for vectors, queries, fisher in zip(moment["vectors"], moment["queries"], moment["fisher"], strict=True):
            metric = fisher if how.metric == "fisher" else queries
            a = balance(metric, vectors, how.transform) if how.transform else np.eye(len(metric))
            there, back = rotation @ a, np.linalg.inv(a) @ rotation.T
            metric = back.T @ metric @ back
            judged = back.T @ (fisher if how.metric in ("", "fisher") else queries) @ back
            metric = low_rank(metric, how.rank) if how.rank else metric
            metric = metric + how.eps * np.trace(metric) / len(metric) * np.eye(len(metric))
            g = how.damp * feedback(metric, how.block)[0] if how.metric and how.block < len(metric) else None
            self.heads.append([x if x is None else x.astype(np.float32) for x in (there, back, g, judged)])
        positive = np.array(LEVELS[how.bits], np.float32) / UNITS[how.bits]
        self.levels = np.concatenate([-positive[::-1], positive])
        self.thresholds = (self.levels[1:] + self.levels[:-1]) / 2

    def __call__(self, x):
        y = np.array(x.astype(mx.float32)) - self.centre[None, :, None]
        out = np.empty_like(y)
        for head, (there, back, g, judged) in enumerate(self.heads):
            rows = y[:, head].reshape(-1, y.shape[-1])
            out[:, head] = (self.code(rows @ there.T, g, judged) @ back.T).reshape(y[:, head].shape)
        return mx.array(out + self.centre[None, :, None]).astype(x.dtype)

    def nearest(self, u):
        index = np.zeros(u.shape, np.uint8)
        for threshold in self.thresholds:
            index += u > threshold
        return self.levels[index]

    def code(self, y, g, judged):
        norm = np.linalg.norm(y, axis=-1, keepdims=True)
        rms = norm / np.sqrt(y.shape[-1]) + 1e-30
        found = self.nearest(y / rms)
        scale = norm / np.linalg.norm(found, axis=-1, keepdims=True)
        if g is not None:
            scale = scale * self.how.widen
            u, error, found = y / scale, np.zeros_like(y), found.copy()
            for start in range(0, y.shape[-1], self.how.block):
                at = np.s_[start : start + self.how.block]
                target = u[:, at] - error[:, :start] @ g[at, :start].T
                found[:, at] = self.nearest(target)
                error[:, at] = found[:, at] - u[:, at]
                self.clipped += (abs(target) > 2 * self.levels[-1] - self.thresholds[-1]).sum()
        y_hat = found * self.rescaled(found, y, scale, judged)
        e = y_hat - y
        self.count += y.size
        self.error += float(((e @ judged) * e).sum(dtype=np.float64))
        self.square += float(((y @ judged) * y).sum(dtype=np.float64))
        return y_hat

    def rescaled(self, found, y, scale, metric):
        rule = self.how.scale
        if rule == "keep":
            return scale
        by = found, y
        if rule.startswith("weighted"):
            by = found @ metric, y @ metric
        ff, fy, yy = ((a * b).sum(-1, keepdims=True) for a, b in ((by[0], found), (by[0], y), (by[1], y)))
        kind = rule.rsplit("-", 1)[-1]
        return {"length": np.sqrt(yy / ff), "unbiased": yy / fy, "least": fy / ff}[kind]


def spectra(moment):
    """Rows of what the matrices promise: of each head, effective ranks, and predicted errors against nearest codes."""
    rows = []
    rotation = signed_hadamard(next(iter(moment.values()))["K"]["centre"].shape[-1])
    for slot, sides in moment.items():
        for side in SIDES:
            for head, vectors in enumerate(sides[side]["vectors"]):
                row = {"slot": slot, "side": side, "head": head}
                row["rank of vectors"] = np.trace(vectors) ** 2 / np.square(vectors).sum()
                for name in ("queries", "fisher"):
                    s = sides[side][name][head]
                    half = power(s, 0.5)
                    both = np.trace(power(half @ vectors @ half, 0.5))
                    row[f"rank of {name}"] = np.trace(s) ** 2 / np.square(s).sum()
                    row[f"{name}: transform"] = both**2 / np.trace(s) / np.trace(vectors)
                    turned = rotation @ s @ rotation.T
                    turned += 0.03 * np.trace(s) / len(s) * np.eye(len(s))
                    row[f"{name}: shaping"] = feedback(turned, 1)[1].sum() / np.trace(turned)
                rows.append({k: round(float(v), 4) if isinstance(v, np.floating) else v for k, v in row.items()})
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "qwen35-tiny-4bit")
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "valid.txt")
    parser.add_argument("--rows", nargs="*", default=[], help="what is compared, with the first of them")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--first-window", type=int, default=0)
    parser.add_argument("--calibrate", type=int, nargs="*", help="numbers of the windows to calibrate with")
    parser.add_argument("--moments", type=Path, help="a file that keeps the matrices from one run to the next")
    parser.add_argument("--name", default="shaping", help="of the table's file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(args.model)
    tokens = read_tokens(tokenizer, args.text)
    windows = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    measured = [i for i in range(len(windows)) if i % 9 != 8][args.first_window :][: args.windows]
    if args.moments and args.moments.is_file():
        moment = np.load(args.moments, allow_pickle=True)["moment"].item()
    else:
        moment = moments(model, windows[args.calibrate or slice(8, None, 9)])
        if args.moments:
            np.savez(args.moments, moment=np.array(moment))
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.rows:
        write_table(args.out / f"{args.name}-spectra.tsv", table := spectra(moment))
        print("\n".join(str(row) for row in table))
        return 0
    coders, caches = {}, {"float16": replace_kv_caches(own_caches(model), lambda path: modes.FloatCache(modes.to_half))}
    for name in args.rows:
        sides = parse_row(name)[1]

        def make(path, name=name, sides=sides):
            made = coders[name, path[0]] = [Coder(sides[s], moment[path[0]][s]) for s in SIDES]
            return modes.FloatCache(*made)

        caches[name] = replace_kv_caches(own_caches(model), make)
    with tqdm(total=len(measured) * LENGTH * len(caches), unit="tok", disable=None) as bar:
        records = divergence.compare(model, windows[measured], caches, progress=bar.update)
    rows = []
    for name in args.rows:
        row = {"row": name, **divergence.summarise(records[name], records["float16"])}
        row |= against(records[name], records[args.rows[0]])
        for i, side in enumerate(SIDES):
            of_side = [c[i] for (row_name, _), c in coders.items() if row_name == name]
            row[f"weighted error {side}"] = float(np.mean([c.error / c.square for c in of_side]))
            row[f"clipped {side}"] = float(np.mean([c.clipped / c.count for c in of_side]))
        rows.append(row)
        print(
            f"{name:60} {row['mean_kld']:.5f} +- {row['mean_kld_stderr']:.5f} {row['perplexity_change']:+.3%} +- "
            f"{row['perplexity_change_stderr']:.3%}, to the first {row['kld_to_first']:+.5f} +- "
            f"{row['kld_to_first_stderr']:.5f} {row['perplexity_to_first']:+.3%} +- "
            f"{row['perplexity_to_first_stderr']:.3%}; errors {row['weighted error K']:.4f} {row['weighted error V']:.4f}"
            f" clipped {row['clipped K']:.4f} {row['clipped V']:.4f}",
            flush=True,
        )
    write_table(args.out / f"{args.name}.tsv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
