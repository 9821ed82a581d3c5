"""Our caches beside mlx-lm's: the same calls in the same order, and attention must see the same tokens.

mlx-lm's float cache is fed the decoded vectors, ours the originals, so both stand for the same numbers.  What is left
is the rounding inside one attention, at most 1e-3 of the output's norm; a token too many or too few moves it by 1e-2
and more, since each case holds at most a hundred tokens of equal size.  So few tokens are all among the newest, which
caches read from 8-bit copies by default: every case runs so, and from codes alone."""

import copy

import mlx.core as mx
import pytest
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache
from turboquant_mlx import (
    BatchTurboQuantKVCache,
    BatchTurboQuantRotatingKVCache,
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    decode,
    encode,
)

HEADS, DIM = 2, 64
LIMIT = 1e-3
CODES = {"recent": 0, "sink": 0}


@pytest.fixture(params=["codes", "copies"], autouse=True)
def settings_of(request, monkeypatch):
    """How the caches of a test are made, and the width that its queries read."""
    if request.param == "copies":  # the default of a cache; a window has no copies, but it can hold 8 bits
        for name, value in (("FULL", {}), ("WINDOW", {"bits": 8}), ("READ", 8)):
            monkeypatch.setitem(globals(), name, value)


FULL, WINDOW, READ = CODES, {}, 3


def vectors(batch, tokens):
    x = mx.random.normal((batch, HEADS, tokens, DIM))
    return x, decode(*encode(x, READ), READ)


class Pair:
    """One of our caches and one of mlx-lm's."""

    def __init__(self, ours, theirs, batch=1):
        self.ours, self.theirs, self.batch = ours, theirs, batch

    def call(self, name, *args, **kwargs):
        got, want = (getattr(c, name)(*args, **kwargs) for c in (self.ours, self.theirs))
        return got, want

    def append(self, tokens, window=None, padding=None):
        """Appends tokens, and compares what the new queries see; `padding` rows end in that many pads."""
        (k, k_hat), (v, v_hat) = vectors(self.batch, tokens), vectors(self.batch, tokens)
        settings = {"window_size": window, "return_array": False}
        mask = self.ours.make_mask(tokens, **settings)
        want_mask = self.theirs.make_mask(tokens, **settings)
        view, _ = self.ours.update_and_fetch(k, v)
        keys, values = self.theirs.update_and_fetch(k_hat, v_hat)
        assert view.shape == keys.shape
        q = mx.random.normal((self.batch, HEADS, tokens, DIM))
        got = view.attend(q, 0.2, mask)
        want = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.2, mask=want_mask)
        for b in range(self.batch):
            # A query in the padding sees nothing: its output is anybody's.
            real = slice(0, tokens - (padding[b] if padding else 0))
            behind = max(0, int(self.left()[b]) - (view.length - tokens))
            if real.stop > behind:
                part = slice(behind, real.stop)
                error = relative_error(got[b, :, part], want[b, :, part])
                assert error < LIMIT, (error, b, tokens)
        self.check()

    def left(self):
        return self.theirs.left_padding.tolist() if hasattr(self.theirs, "left_padding") else [0]

    def check(self):
        for name in ("offset", "left_padding"):
            if hasattr(self.theirs, name):
                assert mx.array_equal(mx.array(getattr(self.ours, name)), mx.array(getattr(self.theirs, name))), name
        assert self.ours.size() == self.theirs.size()
        assert self.ours.empty() == self.theirs.empty()
        assert self.ours.is_trimmable() == self.theirs.is_trimmable()


CHUNKS = [7, 1, 1, 12, 1, 3, 40, 1, 1, 1, 2, 1]


def test_kv_cache_follows_mlx_lms():
    pair = Pair(TurboQuantKVCache(**FULL), KVCache())
    for n in CHUNKS:
        pair.append(n)
    for n in (5, 1):
        pair.append(n, window=4)
    assert pair.call("trim", 20) == (20, 20)
    pair.append(3)
    got, want = pair.call("trim", 1000)
    assert got == want and pair.ours.offset == 0
    pair.append(2)


@pytest.mark.parametrize("max_size", [8, 20, 64])
@pytest.mark.parametrize("keep", [0, 4])
def test_rotating_cache_follows_mlx_lms(max_size, keep):
    pair = Pair(TurboQuantRotatingKVCache(max_size, keep, **WINDOW), RotatingKVCache(max_size, keep))
    for n in CHUNKS:
        pair.append(n)
    for _ in range(2 * max_size):
        pair.append(1)
    for window in (5, 7):
        pair.append(1, window=window)
        pair.append(3, window=window)


def test_rotating_cache_trims_until_it_wraps():
    pair = Pair(TurboQuantRotatingKVCache(32, **WINDOW), RotatingKVCache(32))
    pair.append(20)
    assert pair.call("trim", 6) == (6, 6)
    for n in (1, 5, 1):
        pair.append(n)
    pair.append(30)
    assert not pair.ours.is_trimmable() and pair.ours.trim(3) == 0


def batch_pair(kind, left_padding):
    n = len(left_padding)
    if kind == "full":
        return Pair(BatchTurboQuantKVCache(left_padding, **FULL), BatchKVCache(left_padding), n)
    return Pair(BatchTurboQuantRotatingKVCache(16, left_padding, **WINDOW), BatchRotatingKVCache(16, left_padding), n)


@pytest.mark.parametrize("kind", ["full", "rotating"])
def test_left_padded_batch_follows_mlx_lms(kind):
    pair = batch_pair(kind, [2, 0, 5])
    for n in (8, 1, 1, 5, *[1] * 20, 3, 1):
        pair.append(n)
    pair.append(1, window=6)
    pair.append(4, window=6)


@pytest.mark.parametrize("kind", ["full", "rotating"])
def test_right_padded_batch_follows_mlx_lms(kind):
    pair = batch_pair(kind, [0, 0, 0])
    for lengths, chunks in (([3, 9, 6], (9,)), ([1, 2, 3], (3,)), ([20, 4, 11], (20,))):
        padding = [sum(chunks) - n for n in lengths]
        pair.call("prepare", lengths=lengths, right_padding=padding)
        for n in chunks:
            pair.append(n, padding=padding)
        pair.call("finalize")
        pair.check()
        for _ in range(5):
            pair.append(1)


@pytest.mark.parametrize("kind", ["full", "rotating"])
def test_filter_and_extend_follow_mlx_lms(kind):
    a, b = batch_pair(kind, [4, 1, 2]), batch_pair(kind, [0, 3])
    for n in (9, 1, 1):
        a.append(n)
    for n in (5, 1):
        b.append(n)
    a.call("filter", [2, 0])
    a.batch = 2
    a.append(1)
    a.ours.extend(b.ours)
    a.theirs.extend(b.theirs)
    a.batch = 4
    a.check()
    for n in (1, 1, 3, *[1] * 14):
        a.append(n)
    a.call("filter", mx.array([3, 1]))
    a.batch = 2
    for n in (1, 2):
        a.append(n)
    row, want = a.call("extract", 1)
    single = Pair(row, want)
    single.check()
    for n in (1, 4, 1):
        single.append(n)


def filled(length, kind="full"):
    if kind == "full":
        pair = Pair(TurboQuantKVCache(**FULL), KVCache())
    else:
        pair = Pair(TurboQuantRotatingKVCache(16, **WINDOW), RotatingKVCache(16))
    if length:
        pair.append(length)
    return pair


@pytest.mark.parametrize("kind", ["full", "rotating"])
@pytest.mark.parametrize("lengths", [[3, 9, 6], [0, 5], [12, 0, 40], [0, 0]])
def test_merge_follows_mlx_lms(kind, lengths):
    singles = [filled(n, kind) for n in lengths]
    batch = Pair(
        type(singles[0].ours).merge([s.ours for s in singles]),
        type(singles[0].theirs).merge([s.theirs for s in singles]),
        len(lengths),
    )
    batch.check()
    batch.append(3)
    for _ in range(20):
        batch.append(1)
    empty = Pair(
        type(singles[0].ours).merge([filled(0, kind).ours]),
        type(singles[0].theirs).merge([filled(0, kind).theirs]),
    )
    batch.ours.extend(empty.ours)
    batch.theirs.extend(empty.theirs)
    batch.batch += 1
    batch.check()


@pytest.mark.parametrize("kind", ["full", "rotating"])
@pytest.mark.parametrize("first, second", [([5, 3], [0, 0, 0]), ([0, 0, 0], [4, 6]), ([0], [0, 0])])
def test_batches_with_nothing_in_them_extend_and_are_extended(kind, first, second):
    """Of other sizes than the side that holds tokens, and a right-padded prompt follows."""
    rows = [[filled(n, kind) for n in lengths] for lengths in (first, second)]
    a, b = (
        Pair(type(r[0].ours).merge([x.ours for x in r]), type(r[0].theirs).merge([x.theirs for x in r]), len(r))
        for r in rows
    )
    a.ours.extend(b.ours)
    a.theirs.extend(b.theirs)
    a.batch += b.batch
    a.check()
    pads = [2, 4, 0, 5, 1][: a.batch]
    a.call("prepare", lengths=[12 - n for n in pads], right_padding=pads)
    a.append(12, padding=pads)
    a.call("finalize")
    a.check()
    for _ in range(10):
        a.append(1)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_history_of_a_batch_keeps_each_rows_bytes(data):
    """Rows that are merged, appended raggedly, trimmed, filtered, extended and extracted hold the very bytes of a
    single sequence that saw the same tokens."""
    fresh = iter(range(1, 10**6))

    def token_vectors(ids):
        return mx.concatenate([mx.random.normal((1, 1, 1, 32), key=mx.random.key(i)) for i in ids], axis=2)

    def single(ids):
        cache = TurboQuantKVCache()
        if ids:
            cache.update_and_fetch(token_vectors(ids), -token_vectors(ids))
        return cache

    def new_rows():
        lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
        rows = [[next(fresh) for _ in range(n)] for n in lengths]
        return rows, TurboQuantKVCache.merge([single(ids) for ids in rows])

    rows, batch = new_rows()
    for _ in range(data.draw(st.integers(1, 6))):
        step = data.draw(st.sampled_from(["append", "ragged", "trim", "filter", "extend", "copy"]))
        if step in ("append", "ragged"):
            n = data.draw(st.integers(1, 6))
            lengths = [data.draw(st.integers(1, n)) if step == "ragged" else n for _ in rows]
            padding = [max(lengths) - m for m in lengths]
            new = [[next(fresh) for _ in range(m)] for m in lengths]
            batch.prepare(lengths=lengths, right_padding=padding)
            x = mx.concatenate([token_vectors(ids + [0] * p) for ids, p in zip(new, padding, strict=True)])
            batch.update_and_fetch(x, -x)
            batch.finalize()
            rows = [row + ids for row, ids in zip(rows, new, strict=True)]
        elif step == "trim":
            n = data.draw(st.integers(0, max(0, min(map(len, rows)))))
            batch.trim(n)
            rows = [row[: len(row) - n] for row in rows]
        elif step == "filter":
            keep = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=3, unique=True))
            batch.filter(keep)
            rows = [rows[i] for i in keep]
        elif step == "extend":
            more, other = new_rows()
            batch.extend(other)
            rows = rows + more
        else:
            batch = copy.deepcopy(batch)
    assert batch.offset.tolist() == [len(row) for row in rows]
    for i, ids in enumerate(rows):
        row, want = batch.extract(i), single(ids)
        assert row.offset == len(ids)
        if ids:
            assert all(
                mx.array_equal(a, b) for a, b in zip(row._core.view().arrays, want._core.view().arrays, strict=True)
            )


@pytest.mark.parametrize(
    "other",
    [
        {"bits": 4},
        {"seed": 7},
        {"centres": (mx.ones((HEADS, DIM)), mx.ones((HEADS, DIM)))},
        {"feedback": (None, mx.ones((HEADS, DIM, DIM), mx.float16))},
    ],
)
def test_caches_of_different_coding_do_not_mix(other):
    a, b = TurboQuantKVCache(), TurboQuantKVCache(**other)
    for c in (a, b):
        c.update_and_fetch(*[vectors(1, 3)[0]] * 2)
    with pytest.raises(ValueError, match="same (bits|seed|centres|feedback)"):
        TurboQuantKVCache.merge([a, b])
    batch = TurboQuantKVCache.merge([a])
    with pytest.raises(ValueError, match="same (bits|seed|centres|feedback)"):
        batch.extend(TurboQuantKVCache.merge([b]))
    assert batch.offset.tolist() == [3]


def test_bad_batches_are_refused():
    batch = BatchTurboQuantKVCache([0, 1])
    with pytest.raises(ValueError, match="batch must stay 2; got 3"):
        batch.update_and_fetch(*[vectors(3, 2)[0]] * 2)
    batch.update_and_fetch(*[vectors(2, 4)[0]] * 2)
    for call, message in (
        (lambda: batch.filter([0, 2]), "rows must be from 0 to 1; got 2"),
        (lambda: batch.extract(-1), "rows must be from 0 to 1; got -1"),
        (lambda: batch.prepare(left_padding=[1, 1]), "only to an empty batch"),
        (lambda: batch.prepare(right_padding=[1]), "one number for each of 2 rows; got 1"),
        (lambda: BatchTurboQuantKVCache([-1]), "left_padding must be at least 0; got -1"),
        (lambda: TurboQuantKVCache.merge([KVCache()]), "of the kind TurboQuantKVCache; got KVCache"),
        (lambda: TurboQuantRotatingKVCache(8, 2).merge([TurboQuantRotatingKVCache(8, 2)]), "keep = 2"),
        (lambda: TurboQuantRotatingKVCache(8, 8), "keep must be from 0 to max_size - 1 = 7; got 8"),
        (lambda: TurboQuantRotatingKVCache(0), "max_size must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert batch.offset.tolist() == [4, 3]


def test_masks_are_arrays_only_when_they_must_be():
    batch = BatchTurboQuantKVCache([2, 0])
    batch.update_and_fetch(*[vectors(2, 4)[0]] * 2)
    assert batch.make_mask(1) is None and batch.make_mask(5) == "causal"
    want = BatchKVCache([2, 0])
    want.update_and_fetch(*[vectors(2, 4)[0]] * 2)
    assert mx.array_equal(batch.make_mask(3, return_array=True), want.make_mask(3))
    assert mx.array_equal(batch.make_mask(3, window_size=2), want.make_mask(3, window_size=2))
    window = TurboQuantRotatingKVCache(8)
    assert window.make_mask(1) is None and window.make_mask(8) == "causal"
    assert window.make_mask(9).shape == (9, 9) and window.make_mask(3, return_array=True).shape == (3, 3)


def test_an_extracted_row_does_not_hold_the_batch():
    """A server keeps finished rows in its prompt cache: each must cost its own bytes only."""
    rows = [TurboQuantKVCache(**CODES) for _ in range(2)]
    for row, n in zip(rows, (40, 400), strict=True):
        row.update_and_fetch(*[vectors(1, n)[0]] * 2)
    batch = TurboQuantKVCache.merge(rows)
    batch.update_and_fetch(*[vectors(2, 1)[0]] * 2)
    mx.eval(batch._core.arrays)
    del rows
    row = batch.extract(0)
    mx.eval(row._core.arrays)
    assert row.nbytes == 41 * HEADS * 2 * (3 * DIM // 8 + 2)
    before = mx.get_active_memory()
    held = batch.nbytes
    del batch
    assert before - mx.get_active_memory() >= held * 0.99
