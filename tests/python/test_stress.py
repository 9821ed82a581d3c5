"""Random histories of caches: whatever is done to one, in whatever order, it holds and attends what a plain model of it
says (stress_model.py)."""

import copy
import os

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache
from stress import HELD, add_tests, count, draw_settings, errors, few, report, seeds, which
from stress_model import ROUNDING, History, Row, numbers
from turboquant_mlx import BatchTurboQuantKVCache, DelayedTurboQuantKVCache, TurboQuantKVCache, apply_patch
from turboquant_mlx.caches import to_turboquant

MOST = 1500  # tokens of a row
tokens = st.one_of(st.just(1), few, st.integers(1, 40), st.integers(1, 600))


@pytest.fixture(autouse=True, scope="module")
def counted():
    apply_patch()
    yield
    report()


class Held:
    """A cache, its kind, and what it must hold."""

    def __init__(self, kind, cache, history, floats=None, start=0):
        self.kind, self.cache, self.history = kind, cache, history
        self.floats, self.start = floats, start  # of a cache that packs itself later: what came so far
        self.queries = 1  # that may be asked: only those of the chunk appended last read copies from far back


class Sequences(RuleBasedStateMachine):
    """Single caches and batches."""

    @initialize(data=st.data())
    def begin(self, data):
        self.coding, self.held = draw_settings(data), []
        self.rng = np.random.default_rng(data.draw(seeds))
        self.new_single(None)
        self.new_batch([5, 0], 3)

    def add(self, held):
        self.held.append(held)
        if len(self.held) > HELD:
            self.held.pop(0)

    def normal(self, *shape):
        return mx.array(self.rng.normal(size=shape).astype(np.float32)).astype(self.coding.dtype)

    def vectors(self, batch, n):
        """Keys and values; of some tokens zero, or of another size."""
        sizes = self.rng.choice([1, 1, 1, 1, 1, 1, 0.01, 3, 0], size=(2, batch, 1, n, 1))
        return [
            mx.array((size * self.rng.normal(size=(batch, self.coding.heads, n, self.coding.dim))).astype(np.float32))
            .astype(self.coding.dtype)
            for size in sizes
        ]  # fmt: skip

    def has(self, kind):
        return any(h.kind == kind for h in self.held)

    def one(self, number, *kinds):
        """One of the caches of these kinds, or None."""
        fit = [h for h in self.held if h.kind in kinds]
        return fit[number % len(fit)] if fit else None

    # Making caches

    @rule(start=st.sampled_from([None, 0, 20, 300]))
    def new_single(self, start):
        count("new")
        history = History([Row(self.coding)])
        if start is None:
            self.add(Held("single", TurboQuantKVCache(**self.coding.arguments()), history))
        else:
            cache = DelayedTurboQuantKVCache(start, **self.coding.arguments())
            self.add(Held("delayed", cache, history, [], start))

    @rule(pads=st.lists(st.integers(0, 40), min_size=1, max_size=3), more=few)
    def new_batch(self, pads, more):
        count("new")
        cache = BatchTurboQuantKVCache(pads, **self.coding.arguments())
        self.add(Held("batch", cache, History([Row(self.coding, p) for p in pads])))
        if any(pads):  # and then the tokens that they are pads of
            keys, values = self.vectors(len(pads), max(pads) + more)
            cache.update_and_fetch(keys, values)
            self.held[-1].history.append(keys, values)

    @rule(i=which, deep=st.booleans())
    def copy(self, i, deep):
        count("copy")
        h = self.held[i % len(self.held)]
        other = Held(h.kind, (copy.deepcopy if deep else copy.copy)(h.cache), h.history.copy(), h.floats, h.start)
        other.floats, other.queries = None if h.floats is None else list(h.floats), h.queries
        self.add(other)

    # What a server does

    @rule(i=which, n=tokens, data=st.data())
    def append(self, i, n, data):
        self.append_to(self.held[i % len(self.held)], n, data)

    @rule(i=which, n=tokens, data=st.data())
    def append_to_a_single(self, i, n, data):
        if (h := self.one(i, "single")) is not None:
            self.append_to(h, n, data)

    @precondition(lambda self: self.has("batch"))
    @rule(i=which, n=tokens, data=st.data())
    def append_to_a_batch(self, i, n, data):
        self.append_to(self.one(i, "batch"), n, data)

    def append_to(self, h, n, data):
        if len(h.history) + n > MOST:
            return
        count("append")
        keys, values = self.vectors(len(h.history.rows), n)
        view, _ = h.cache.update_and_fetch(keys, values)
        h.queries = n
        if h.floats is not None:
            h.floats.append((keys, values))
            if sum(k.shape[2] for k, _ in h.floats) <= h.start:
                got = h.cache.keys_and_values()
                want = [mx.concatenate(x, axis=2) for x in zip(*h.floats, strict=True)]
                assert all(mx.array_equal(a, b) for a, b in zip(got, want, strict=True))
                return
            *before, _ = h.floats
            if before:
                h.history.append(*[mx.concatenate(x, axis=2) for x in zip(*before, strict=True)])
            h.floats = None
        h.history.append(keys, values)
        self.compare(h, view, data.draw(st.integers(1, n)), data)

    @precondition(lambda self: self.has("batch"))
    @rule(i=which, n=tokens, known=st.booleans(), cut=st.booleans(), data=st.data())
    def append_with_pads_behind(self, i, n, known, cut, data):
        h = self.one(i, "batch")
        if h is None or len(h.history) + n > MOST:
            return
        count("append ragged")
        lengths = [data.draw(st.integers(1, n)) for _ in h.history.rows]
        lengths[data.draw(which) % len(lengths)] = n
        pads = [n - m for m in lengths]
        h.cache.prepare(right_padding=pads, lengths=lengths if known else None)
        first = data.draw(st.integers(1, n - 1)) if cut and n > 1 else n
        for m in (first, n - first):
            if m:
                keys, values = self.vectors(len(lengths), m)
                h.cache.update_and_fetch(keys, values)
                h.history.append(keys, values)
        h.cache.finalize()
        if any(pads):
            h.history.finalize(pads, known)
        h.queries = 1

    @rule(i=which, n=tokens)
    def trim(self, i, n):
        h = self.held[i % len(self.held)]
        n = min(n, len(h.history) - max(r.pad for r in h.history.rows)) if h.floats is None else n
        if n < 0:
            return
        count("trim")
        if h.floats is not None:
            total = sum(k.shape[2] for k, _ in h.floats)
            assert h.cache.trim(n) == min(n, total)
            whole = [mx.concatenate(x, axis=2) for x in zip(*h.floats, strict=True)] if h.floats else None
            h.floats = [[x[:, :, : total - n] for x in whole]] if total > n else []
            return
        begin = h.cache._core.copies[1] if h.cache._core.copies else 0
        assert h.cache.trim(n) == n
        h.history.trim(n, begin)
        h.queries = 1

    @rule(numbers=st.lists(which, min_size=1, max_size=3))
    def merge(self, numbers):
        picked = [self.one(i, "single") for i in numbers]
        if None in picked or sum(len(h.history) for h in picked) > 2 * MOST:
            return
        count("merge")
        cache = TurboQuantKVCache.merge([h.cache for h in picked])
        self.add(Held("batch", cache, History.joined([h.history for h in picked])))

    @precondition(lambda self: self.has("batch"))
    @rule(i=which, j=which)
    def extend(self, i, j):
        a, b = self.one(i, "batch"), self.one(j, "batch")
        if a is None or len(a.history.rows) + len(b.history.rows) > 5:
            return
        count("extend")
        joined = History.joined([a.history, b.history])
        a.cache.extend(copy.copy(b.cache) if a is b else b.cache)
        a.history, a.queries = joined, 1

    @precondition(lambda self: self.has("batch"))
    @rule(i=which, data=st.data())
    def filter(self, i, data):
        h = self.one(i, "batch")
        if h is None:
            return
        count("filter")
        n = len(h.history.rows)
        rows = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
        h.cache.filter(rows)
        h.history.filter(rows)
        h.queries = 1

    @precondition(lambda self: self.has("batch"))
    @rule(i=which, row=which)
    def extract(self, i, row):
        h = self.one(i, "batch")
        if h is None:
            return
        count("extract")
        row %= len(h.history.rows)
        history = h.history.extract(row) if len(h.history) > h.history.rows[row].pad else History([Row(self.coding)])
        self.add(Held("single", h.cache.extract(row), history))

    # What goes through files and floats

    @rule()
    def save_and_load(self):
        count("save")
        path = f"/tmp/turboquant-stress-{os.getpid()}.safetensors"
        try:
            save_prompt_cache(path, [h.cache for h in self.held])
            loaded = load_prompt_cache(path)
        finally:
            os.unlink(path)
        for h, cache in zip(self.held, loaded, strict=True):
            assert type(cache) is type(h.cache) and str(cache.state[-1]) == str(h.cache.state[-1])
            h.cache, h.queries = cache, 1

    @rule(i=which, dtype=st.sampled_from([mx.float32, mx.float16]))
    def through_floats(self, i, dtype):
        h = self.one(i, "single")
        if h is None or len(h.history) == 0:
            return
        count("convert")
        floats = h.cache.to_float(dtype)
        assert isinstance(floats, KVCache) and floats.offset == len(h.history)
        keys, values = floats.keys_and_values()
        self.same_floats(np.stack([numbers(keys), numbers(values)])[:, 0], h.history.rows[0], ROUNDING[dtype])
        history = History([Row(self.coding)])
        history.append(keys, values)
        self.add(Held("single", to_turboquant(floats, **self.coding.arguments()), history))

    # What is wrong

    @rule(i=which, wrong=st.sampled_from(["heads", "dtype", "dim", "rank", "batch"]))
    def refused(self, i, wrong):
        h = self.held[i % len(self.held)]
        if h.floats is not None or len(h.history) == 0:
            return
        count("refused")
        rows, c = len(h.history.rows), self.coding
        shape = {"heads": (rows, c.heads + 1, 3, c.dim), "dim": (rows, c.heads, 3, c.dim + 32)}.get(wrong)
        shape = {"rank": (rows, 3, c.dim), "batch": (rows + 1, c.heads, 3, c.dim)}.get(wrong, shape)
        x = mx.zeros(shape or (rows, c.heads, 3, c.dim), mx.int32 if wrong == "dtype" else c.dtype)
        with pytest.raises(ValueError):
            h.cache.update_and_fetch(x, x)

    # Comparing

    @rule(i=which, data=st.data())
    def attend(self, i, data):
        h = self.held[i % len(self.held)]
        if h.floats is not None or len(h.history) == 0:
            return
        most = h.queries if self.coding.recent or self.coding.sink else len(h.history)
        self.compare(h, h.cache.keys_and_values()[0], data.draw(st.integers(1, min(most, len(h.history)))), data)

    def compare(self, h, view, queries, data):
        """Attention of the last `queries` positions, with a random mask."""
        count("attend")
        c, rows, length = self.coding, h.history.rows, len(h.history)
        heads = c.heads * data.draw(st.sampled_from([1, 2]))
        q = self.normal(len(rows), heads, queries, c.dim)
        kind = data.draw(st.sampled_from([None, "causal", "causal", "bool", "float"]))
        visible, bias, mask = np.ones((1, 1, queries, length), bool), np.zeros((1, 1, 1, 1)), kind
        if kind == "causal":
            visible = np.arange(length) <= (length - queries + np.arange(queries))[:, None]
            visible = visible[None, None]
        elif kind is not None:
            shape = (data.draw(st.sampled_from([1, len(rows)])), data.draw(st.sampled_from([1, heads])))
            visible = self.rng.random((*shape, queries, length)) > self.rng.choice([0.1, 0.6, 0.99])
            mask = mx.array(visible)
            if kind == "float":
                bias = self.rng.normal(size=visible.shape).astype(np.float32)
                mask = mx.array(np.where(visible, bias, -np.inf)).astype(c.dtype)
                bias = np.where(visible, numbers(mask), 0)
        sinks = self.rng.normal(size=heads).astype(np.float32) if data.draw(st.booleans()) else None
        scale = float(data.draw(st.sampled_from([1, 0.3])) * c.dim**-0.5)
        got = numbers(view.attend(q, scale, mask, None if sinks is None else mx.array(sinks)))
        x = numbers(q)
        for b, row in enumerate(rows):
            at = [min(b, a.shape[0] - 1) for a in (visible, bias)]
            want, bound = row.attend(x[b], scale, visible[at[0]], bias[at[1]], sinks)
            error, bound = np.linalg.norm(got[b] - want, axis=-1), bound + 1e-7
            real = length - queries + np.arange(queries) >= row.pad
            worst = np.where(real, error / bound, 0).max()
            errors[0] = max(errors[0], worst)
            assert worst <= 1, (worst, b, kind, queries, length)

    def same_floats(self, got, row, rounding=0, copies=True):
        want = row.floats(copies)
        error = np.linalg.norm(got - want, axis=-1)[:, :, row.pad :]
        assert (error <= (2e-6 + rounding) * (1 + np.linalg.norm(want, axis=-1)[:, :, row.pad :])).all(), error.max()

    @rule(i=which)
    def contents(self, i):
        h = self.held[i % len(self.held)]
        if h.floats is None and len(h.history):
            count("decode")
            both = np.stack([numbers(x) for x in h.cache.keys_and_values()[0].decode(mx.float32)])
            for b, row in enumerate(h.history.rows):
                self.same_floats(both[:, b], row, copies=not any(r.pad for r in h.history.rows))

    @invariant()
    def counted(self):
        for h in getattr(self, "held", []):
            n = len(h.history) if h.floats is None else sum(k.shape[2] for k, _ in h.floats)
            if h.kind == "batch":
                assert h.cache.offset.tolist() == [n - r.pad for r in h.history.rows]
                assert h.cache.left_padding.tolist() == [r.pad for r in h.history.rows]
            else:
                assert h.cache.offset == n
            if self.coding.recent and h.cache._core.copies:
                needed = max(0, n - self.coding.recent)
                assert h.cache._core.copies[1] <= max(0, h.history.high - self.coding.ring(), needed)


add_tests(globals(), Sequences)
