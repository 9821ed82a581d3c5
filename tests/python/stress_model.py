"""What packed caches stand for, in plain numpy: every vector went through decode(encode(.)) once, and a query reads it or
its 8-bit copy as positions say (docs/format.md, include/turboquant/turboquant.h).  test_stress.py compares the two."""

import copy
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from turboquant_mlx import _core, decode, encode

# A kernel's errors.  It rounds a query to 1 / 65,024 of its largest rotated coordinate, 3.5 standard deviations: a score
# moves by that times 1 / sqrt(3) of the key's length, four times that in a bad case, and the weight by as much of itself.
# It rounds every weight to 1 / 65,024 of the largest near it, likewise; the rest is float32.
OF_SCORE, OF_WEIGHT, OF_OUTPUT = 3.5 * 4 / 3**0.5 / 65024, 4 / 3**0.5 / 65024, 1e-5
ROUNDING = {mx.float32: 0, mx.float16: 2**-11, mx.bfloat16: 2**-8}


def numbers(x):
    return np.array(x.astype(mx.float32))


@dataclass
class Coding:
    """The settings of a cache, and what its vectors become; pairs are (keys, values)."""

    heads: int
    dim: int
    bits: tuple[int, int]
    code: str
    seed: int
    recent: int
    sink: int
    dtype: mx.Dtype
    centres: tuple | None = None
    feedback: tuple | None = None
    key_map: mx.array | None = None

    def arguments(self, copies=True):
        own = {"recent": self.recent, "sink": self.sink} if copies else {}
        return own | {
            "key_bits": self.bits[0],
            "value_bits": self.bits[1],
            "code": self.code,
            "seed": self.seed,
            "centres": self.centres,
            "feedback": self.feedback,
            "key_map": self.key_map,
        }

    def ring(self):
        """Slots of the ring of copies."""
        return (self.recent + 256) // 128 * 128 if self.recent else 0

    def _through(self, pair, widths, feedback):
        """decode(encode(.)) of (B, H, N, D) keys and values, (2, B, H, N, D)."""
        found = []
        for side, (x, bits) in enumerate(zip(pair, widths, strict=True)):
            centre = None if self.centres is None else self.centres[side]
            mapped = side == 0 and self.key_map is not None
            if mapped:
                x, centre = _core.transform(x, self.key_map, centre=centre), None
            how = {"seed": self.seed, "centre": centre, "code": self.code}
            fed = feedback[side] if feedback else None
            got = numbers(decode(*encode(x, bits, feedback=fed, **how), bits, **how))
            if mapped:
                got = got @ np.linalg.inv(np.array(self.key_map, np.float64)) + (
                    0 if self.centres is None else np.array(self.centres[0])[:, None]
                )
            found.append(got.astype(np.float32))
        return np.stack(found)

    def coded(self, keys, values):
        """What the codes of these vectors stand for."""
        return self._through((keys, values), self.bits, self.feedback)

    def exact(self, keys, values):
        """What their 8-bit copies stand for."""
        return self._through((keys, values), (8, 8), None)

    def transcoded(self, codes):
        """What copies stand for that were made from codes, (2, H, N, D) as these decode."""
        if codes.shape[2] == 0:
            return codes
        return self.exact(*(mx.array(x)[None] for x in codes))[:, 0]


class Row:
    """One row of a cache by positions: from `pad` on stand its tokens."""

    def __init__(self, coding, pad=0):
        self.coding, self.pad = coding, pad
        self.code = np.zeros((2, coding.heads, 0, coding.dim), np.float32)
        self.ring = self.code  # the copies of every token, as if the ring were endless
        self.first = np.zeros((2, coding.heads, coding.sink, coding.dim), np.float32)

    def __len__(self):
        return self.code.shape[2]

    def append(self, code, exact):
        for i in range(self.coding.sink):
            at = self.pad + i - len(self)
            if 0 <= at < code.shape[2]:
                self.first[:, :, i] = exact[:, :, at]
        self.code = np.concatenate([self.code, code], 2)
        self.ring = np.concatenate([self.ring, exact], 2)

    def truncate(self, length):
        self.code, self.ring = self.code[:, :, :length], self.ring[:, :, :length]

    def refill(self, begin, end):
        """The copies of tokens [begin, end) are made from their codes."""
        if begin < end:
            self.ring = self.ring.copy()
            self.ring[:, :, begin:end] = self.coding.transcoded(self.code[:, :, begin:end])

    def shift(self, by):
        """Moves the tokens: zeros in front, or `-by` positions less there."""
        if by <= 0:
            self.code, self.ring = self.code[:, :, -by:], self.ring[:, :, -by:]
        else:
            room = ((0, 0), (0, 0), (by, 0), (0, 0))
            self.code, self.ring = np.pad(self.code, room), np.pad(self.ring, room)
        self.pad += by

    def roll(self, by):
        self.code, self.ring = np.roll(self.code, by, 2), np.roll(self.ring, by, 2)
        self.pad += by

    def floats(self, copies=True):
        """What the row decodes to, (2, H, length, D): copies where the newest query reads them."""
        coding, out, n = self.coding, self.code.copy(), len(self)
        if not copies:
            return out
        have = max(0, min(coding.sink, n - self.pad))
        out[:, :, self.pad : self.pad + have] = self.first[:, :, :have]
        if coding.recent:
            out[:, :, max(0, n - coding.recent) :] = self.ring[:, :, max(0, n - coding.recent) :]
        return out

    def attend(self, q, scale, visible, bias, sinks):
        """(outputs, how far a kernel's may be from them), for q (H_q, L, D) of the last L positions; `visible` and `bias`
        are (H_q or 1, L, length)."""
        coding, n, count = self.coding, len(self), q.shape[1]
        at, token = n - count + np.arange(count)[:, None], np.arange(n)[None]
        recent = (token > at - coding.recent) & (coding.recent > 0)
        first = (token < self.pad + coding.sink) & (token >= self.pad) & ~recent & (coding.sink > 0)
        tail = np.zeros_like(self.code)
        have = max(0, min(coding.sink, n - self.pad))
        tail[:, :, self.pad : self.pad + have] = self.first[:, :, :have]
        group = q.shape[0] // coding.heads
        sources = [(self.code, ~recent & ~first), (self.ring, recent), (tail, first)]
        sources = [(np.repeat(x, group, axis=1), mask) for x, mask in sources if mask.any()]
        scores = sum(np.where(mask, q @ x[0].swapaxes(-1, -2), 0) for x, mask in sources) * scale + bias
        scores = np.where(visible & (token >= self.pad), scores, -np.inf)
        logit = np.full((q.shape[0], 1, 1), -np.inf) if sinks is None else sinks[:, None, None]
        top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), logit)
        top[np.isinf(top)] = 0
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True) + np.exp(logit - top)
        weights = weights / np.where(total == 0, 1, total)
        out = sum(np.where(mask, weights, 0) @ x[1] for x, mask in sources)
        spread = (
            scale * np.linalg.norm(q, axis=-1)[..., None] * coding.dim**-0.5 * (2 if coding.key_map is not None else 1)
        )
        norm, bound, squares = np.linalg.norm(out, axis=-1), 0, 0
        for x, mask in sources:
            key, value = np.linalg.norm(x, axis=-1)[:, :, None]
            part = np.where(mask, weights, 0)
            weighed = x[1]
            if coding.centres is not None:  # a kernel weighs what is left without the centre, which it adds at the end
                weighed = weighed - np.repeat(np.array(coding.centres[1]), group, axis=0)[:, None]
            bound += (part * spread * key * (value + norm[..., None])).sum(-1) * OF_SCORE
            squares += ((part > 0) * (weighed**2).sum(-1)[:, None]).sum(-1)
        bound += OF_WEIGHT * weights.max(-1, initial=0) * squares**0.5
        return out, bound + (OF_OUTPUT + ROUNDING[coding.dtype]) * norm


class History:
    """The rows of a cache, and how far back its ring of copies must reach."""

    def __init__(self, rows):
        self.rows, self.high = rows, 0

    def __len__(self):
        return len(self.rows[0]) if self.rows else 0

    def copy(self):
        return copy.deepcopy(self, {id(r.coding): r.coding for r in self.rows})

    def append(self, keys, values):
        coding = self.rows[0].coding
        code = coding.coded(keys, values)
        exact = coding.exact(keys, values) if coding.recent or coding.sink else code
        for b, row in enumerate(self.rows):
            row.append(code[:, b], exact[:, b])
        self.high = max(self.high, len(self))

    def trim(self, n, held_from):
        """`held_from`: the first token that the ring held before."""
        length = len(self) - n
        for row in self.rows:
            row.truncate(length)
            if row.coding.recent:
                row.refill(max(0, length - row.coding.recent), min(held_from, length))

    def finalize(self, right, known):
        for row, by in zip(self.rows, right, strict=True):
            row.roll(by)
            if not known:
                row.refill(0, len(row))
                index = np.minimum(row.pad + np.arange(row.coding.sink), len(row) - 1)
                row.first = row.coding.transcoded(row.code[:, :, index])
        self.high += max(right)

    def filter(self, which):
        rows = [copy.deepcopy(self.rows[i], {id(self.rows[i].coding): self.rows[i].coding}) for i in which]
        shared = min(r.pad for r in rows) if len(self) else 0
        for row in rows:
            row.shift(-shared)
        self.rows, self.high = rows, self.high - shared

    @staticmethod
    def joined(parts):
        """Histories side by side, right-justified."""
        longest = max(map(len, parts))
        out = History([])
        for part in map(History.copy, parts):
            by = longest - len(part)
            out.high = max(out.high, part.high + by)
            for row in part.rows:
                row.shift(by)
            out.rows += part.rows
        return out

    def extract(self, i):
        row = copy.deepcopy(self.rows[i], {id(self.rows[i].coding): self.rows[i].coding})
        out = History([row])
        out.high = self.high - row.pad
        row.shift(-row.pad)
        return out
