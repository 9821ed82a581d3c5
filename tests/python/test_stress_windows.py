"""Random histories of packed windows: they see what mlx-lm's own see, which hold the decoded vectors."""

import copy
import os

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlx_lm.models.cache import BatchRotatingKVCache, RotatingKVCache, load_prompt_cache, save_prompt_cache
from stress import HELD, add_tests, count, draw_settings, few, report, seeds, which
from stress_model import numbers
from turboquant_mlx import TurboQuantRotatingKVCache, apply_patch

OF_OUTPUT = 1e-3  # where mlx-lm's float32 attention is what is compared with: as in test_protocol.py


@pytest.fixture(autouse=True, scope="module")
def counted():
    apply_patch()
    yield
    report()


class Windows(RuleBasedStateMachine):
    """Windows and batches of them, beside mlx-lm's."""

    @initialize(data=st.data(), size=st.sampled_from([1, 2, 8, 20, 64]), batched=st.booleans())
    def begin(self, data, size, batched):
        self.coding = draw_settings(data)
        self.coding.recent = self.coding.sink = 0
        self.coding.key_map, self.size = None, size
        self.rng = np.random.default_rng(data.draw(seeds))
        self.keep = 0 if batched else data.draw(st.integers(0, min(4, size - 1)))
        self.pairs = [self.single()]
        if batched:
            self.merge([0, 0])

    def arguments(self):
        return self.coding.arguments(copies="recent" in (TurboQuantRotatingKVCache.__init__.__kwdefaults__ or {}))

    def single(self):
        ours = TurboQuantRotatingKVCache(self.size, self.keep, **self.arguments())
        return [ours, RotatingKVCache(self.size, self.keep), 1]

    def one(self, i, batch):
        fit = [p for p in self.pairs if isinstance(p[1], BatchRotatingKVCache) == batch]
        return fit[i % len(fit)] if fit else None

    def add(self, *pair):
        self.pairs.append(list(pair))
        if len(self.pairs) > HELD:
            self.pairs.pop(0)

    def append_to(self, pair, n, window=None, pads=None):
        count("window append")
        ours, theirs, rows = pair
        c = self.coding
        kv = [mx.array(self.rng.normal(size=(rows, c.heads, n, c.dim)).astype(np.float32)) for _ in range(2)]
        floats = [mx.array(x) for x in c.coded(*kv)]
        masks = [x.make_mask(n, window_size=window, return_array=False) for x in (ours, theirs)]
        held = int(theirs.size())
        view, _ = ours.update_and_fetch(*kv)
        keys, values = theirs.update_and_fetch(*floats)
        assert view.shape == keys.shape
        q = mx.array(self.rng.normal(size=(rows, 2 * c.heads, n, c.dim)).astype(np.float32))
        got = numbers(view.attend(q, 0.2, masks[0]))
        want = numbers(mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.2, mask=masks[1]))
        left = theirs.left_padding.tolist() if isinstance(theirs, BatchRotatingKVCache) else [0]
        for b in range(rows):
            # A query in the padding sees nothing: its output is anybody's.
            behind, end = max(0, left[b] - (view.length - n)), n - (pads[b] if pads else 0)
            error = np.linalg.norm(got[b, :, behind:end] - want[b, :, behind:end], axis=-1)
            bound = OF_OUTPUT * (np.linalg.norm(want[b, :, behind:end], axis=-1) + 1)
            assert (error <= bound).all(), ((error / bound).max(), b, n, held)

    @rule(
        i=which,
        batch=st.booleans(),
        n=st.sampled_from([1, 1, 1, 2, 5, 9, 30, 100]),
        window=st.sampled_from([None, None, 5]),
    )
    def append(self, i, batch, n, window):
        pair = self.one(i, batch)
        if pair is not None:
            self.append_to(pair, n, window if window and window <= self.size else None)

    @precondition(lambda self: self.keep == 0)
    @rule(numbers=st.lists(which, min_size=1, max_size=3))
    def merge(self, numbers):
        picked = [self.one(i, False) for i in numbers]
        if None not in picked:
            count("window merge")
            self.add(*(type(picked[0][k]).merge([p[k] for p in picked]) for k in (0, 1)), len(picked))

    @rule()
    def new(self):
        count("window new")
        self.add(*self.single())

    @precondition(lambda self: self.one(0, True))
    @rule(i=which, j=which)
    def extend(self, i, j):
        a, b = self.one(i, True), self.one(j, True)
        if a is None or a is b or a[2] + b[2] > 5:
            return
        count("window extend")
        for k in (0, 1):
            a[k].extend(copy.deepcopy(b[k]))
        a[2] += b[2]

    @precondition(lambda self: self.one(0, True))
    @rule(i=which, data=st.data())
    def filter(self, i, data):
        pair = self.one(i, True)
        if pair is not None:
            count("window filter")
            rows = data.draw(st.lists(st.integers(0, pair[2] - 1), min_size=1, max_size=pair[2], unique=True))
            pair[0].filter(rows)
            pair[1].filter(mx.array(rows))
            pair[2] = len(rows)

    @precondition(lambda self: self.one(0, True))
    @rule(i=which, row=which)
    def extract(self, i, row):
        pair = self.one(i, True)
        if pair is not None and not pair[1].empty():
            count("window extract")
            ours, theirs = (x.extract(row % pair[2]) for x in pair[:2])
            self.add(ours, theirs if theirs.size() else RotatingKVCache(self.size), 1)

    @rule(i=which, batch=st.booleans())
    def copy(self, i, batch):
        pair = self.one(i, batch)
        if pair is not None:
            count("window copy")
            self.add(copy.copy(pair[0]), copy.deepcopy(pair[1]), pair[2])

    @rule(i=which, batch=st.booleans(), n=few)
    def trim(self, i, batch, n):
        pair = self.one(i, batch)
        if pair is None or pair[1].empty():
            return
        assert pair[0].is_trimmable() == pair[1].is_trimmable()
        if pair[1].is_trimmable() and n <= int(pair[1].size()):
            count("window trim")
            assert pair[0].trim(n) == pair[1].trim(n)

    @rule()
    def save_and_load(self):
        count("window save")
        path = f"/tmp/turboquant-stress-{os.getpid()}.safetensors"
        try:
            save_prompt_cache(path, [p[0] for p in self.pairs])
            loaded = load_prompt_cache(path)
        finally:
            os.unlink(path)
        for pair, cache in zip(self.pairs, loaded, strict=True):
            assert str(cache.state[-1]) == str(pair[0].state[-1])
            pair[0] = cache

    @invariant()
    def counted(self):
        for ours, theirs, _ in getattr(self, "pairs", []):
            assert ours.size() == theirs.size() and ours.empty() == theirs.empty()
            assert mx.array_equal(mx.array(ours.offset), mx.array(theirs.offset))


add_tests(globals(), Windows)
