"""Exact copies of the newest and the first tokens: whatever happens to a cache, a query reads what positions say."""

import copy
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.models import qwen3
from mlx_lm.models.cache import KVCache, RotatingKVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache
from small_models import FAMILIES, build
from turboquant_mlx import (
    BatchTurboQuantKVCache,
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    apply_patch,
    decode,
    enable,
    encode,
)
from turboquant_mlx.caches import arguments, to_turboquant
from turboquant_mlx.eval.modes import parse_mode
from turboquant_mlx.overlay.saving import load_prompt_cache as tq_load
from turboquant_mlx.overlay.saving import save_prompt_cache as tq_save

MODEL = Path(__file__).parents[2] / "models" / "qwen35-tiny-4bit"

H_KV, H_Q, D = 2, 4, 64
EXACT = {"recent": 128, "sink": 4}
SPARE = 256  # tokens that the ring holds beyond `recent`


def vectors(n, seed=0, batch=1):
    key, value = mx.random.split(mx.random.key(seed))
    return [mx.random.normal((batch, H_KV, n, D), key=k) for k in (key, value)]


def queries(n, seed=0, batch=1):
    return mx.random.normal((batch, H_Q, n, D), key=mx.random.key(1000 + seed))


def attend(cache, q, keys, values, mask="causal"):
    view, _ = cache.update_and_fetch(keys, values)
    out = view.attend(q, D**-0.5, mask)
    mx.eval(out)
    return np.array(out)


def run(cache, q, kv, cuts, start=0):
    """Outputs of the queries [start, cuts[-1]) of a history that is appended in pieces."""
    outs = []
    for end in cuts:
        outs.append(attend(cache, q[:, :, start:end], *[x[:, :, start:end] for x in kv]))
        start = end
    return np.concatenate(outs, 2)


def expected(q, kv, bits=3, recent=128, sink=4, start=0, begin=0):
    """By the rule, query by query, with both kinds of codes decoded to floats; for the queries from `start` on."""
    both = [[decode(*encode(x, b), b) for x in kv] for b in (bits, 8)]
    n = kv[0].shape[2]
    at, key = np.arange(n)[:, None], np.arange(n)[None]
    exact = mx.array(((key > at - recent) & (recent > 0)) | (key < begin + sink))[start:, :, None]  # (L, N, 1)
    visible = mx.array((key <= at) & (key >= begin))[start:]
    outs = []
    for h in range(H_Q):
        k, v = (mx.where(exact, both[1][i][0, h // 2], both[0][i][0, h // 2]) for i in (0, 1))
        scores = (q[0, h, start:, None] * k).sum(-1) * D**-0.5
        weights = mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1)
        outs.append((weights[:, :, None] * v).sum(1))
    return np.array(mx.stack(outs)[None])


def close(a, b, tolerance=1e-3):
    error = np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)
    assert error.max() < tolerance, (error.max(), np.argmax(error.max((0, 1))))


@pytest.mark.parametrize(
    "exact", [EXACT, {"recent": 16, "sink": 0}, {"recent": 0, "sink": 5}, {"recent": 0, "sink": 0}]
)
def test_queries_read_what_the_rule_says_however_a_prompt_is_cut(exact):
    n = 900
    kv, q = vectors(n), queries(n)
    want = expected(q, kv, **exact)
    for cuts in (
        [n],
        [1, 2, 3, 40, n],
        [300, 600, n],
        [*range(100, 800, 100), *range(800, n + 1)],
        [700, *range(701, 830), n],
    ):
        close(run(TurboQuantKVCache(3, **exact), q, kv, cuts), want)


def test_codes_alone_are_further_away():
    kv, q = vectors(500), queries(500)
    plain = run(TurboQuantKVCache(3, recent=0, sink=0), q, kv, [500])
    with pytest.raises(AssertionError):
        close(plain, expected(q, kv), 0.05)


@pytest.mark.parametrize("back", [1, 20, 250])
def test_what_was_trimmed_leaves_no_trace(back):
    n = 700
    kv, q = vectors(n), queries(n)
    want = run(TurboQuantKVCache(3, **EXACT), q, kv, [n])
    cache = TurboQuantKVCache(3, **EXACT)
    run(cache, q, kv, [550, 600])
    wrong = vectors(back, 5)
    run(cache, queries(back, 5), wrong, range(1, back + 1) if back < 30 else [back])
    assert cache.trim(back) == back
    close(run(cache, q, kv, [601, 605, n], 600), want[:, :, 600:], 5e-4)


def test_behind_the_ring_the_codes_serve():
    n = 900
    kv, q = vectors(n), queries(n)
    cache = TurboQuantKVCache(3, recent=128, sink=0)
    run(cache, q, kv, [n])
    cache.trim(500)  # the ring held 384 tokens
    got = attend(cache, q[:, :, 400:401], *[x[:, :, 400:401] for x in kv], None)
    plain = TurboQuantKVCache(3, recent=1, sink=0)  # its own token exact, the others not
    run(plain, q, kv, [400])
    close(got, attend(plain, q[:, :, 400:401], *[x[:, :, 400:401] for x in kv], None), 1e-2)
    close(
        run(cache, q, kv, [530, n], 401)[:, :, 130:],
        run(TurboQuantKVCache(3, recent=128, sink=0), q, kv, [n])[:, :, 531:],
        5e-4,
    )


def test_the_first_tokens_are_written_again_after_a_trim():
    kv, q = vectors(300), queries(300)
    cache = TurboQuantKVCache(3, recent=0, sink=40)
    run(cache, queries(30, 3), vectors(30, 3), [30])
    cache.trim(30)
    close(run(cache, q, kv, [10, 25, 300]), expected(q, kv, recent=0, sink=40))


def test_copies_share_no_later_write():
    kv, q = vectors(400), queries(400)
    cache = TurboQuantKVCache(3, **EXACT)
    run(cache, q, kv, [200])
    other = copy.copy(cache)
    run(other, queries(100, 9), vectors(100, 9), [50, 100])
    close(run(cache, q, kv, [201, 300, 400], 200), expected(q, kv)[:, :, 200:])


LENGTHS = [700, 3, 420, 131]
SHORT = [20, 3, 40, 29]  # their rings hold 32 and 64 tokens, and grow


def rows(of=LENGTHS):
    return [vectors(n + 150, seed) for seed, n in enumerate(of)], [queries(n + 150, seed) for seed, n in enumerate(of)]


def alone(kv, q, of=LENGTHS, **coding):
    return [
        run(TurboQuantKVCache(3, **EXACT, **coding), x, row, [n, n + 150]) for x, row, n in zip(q, kv, of, strict=True)
    ]


def decode_batch(batch, kv, q, which, done, steps, of=LENGTHS):
    """`steps` more tokens of the rows `which`, of which `done` were decoded so far."""
    parts = []
    for step in range(done, done + steps):
        at = [of[r] + step for r in which]
        k, v = (mx.concatenate([kv[r][i][:, :, t : t + 1] for r, t in zip(which, at, strict=True)]) for i in (0, 1))
        parts.append(
            attend(batch, mx.concatenate([q[r][:, :, t : t + 1] for r, t in zip(which, at, strict=True)]), k, v, None)
        )
    return np.concatenate(parts, 2)


def check_batch(batch, which, done, steps, of=LENGTHS, tolerance=5e-4):
    kv, q = rows(of)
    got, want = decode_batch(batch, kv, q, which, done, steps, of), alone(kv, q, of)
    for i, r in enumerate(which):
        close(got[i], want[r][0, :, of[r] + done : of[r] + done + steps], tolerance)


def merged(of=LENGTHS):
    kv, q = rows(of)
    singles = [TurboQuantKVCache(3, **EXACT) for _ in of]
    for cache, row, x, n in zip(singles, kv, q, of, strict=True):
        run(cache, x, row, [n])
    return TurboQuantKVCache.merge(singles)


def padded(side, cuts, lengths=True, of=LENGTHS, **coding):
    """A batch whose prompts were padded on one side and read in pieces."""
    kv, q = rows(of)
    longest = max(of)
    batch = BatchTurboQuantKVCache([0] * len(of), 3, **EXACT, **coding)
    pads = [longest - n for n in of]
    left = [p if side == "left" else 0 for p in pads]
    width = [(0, 0), (0, 0)]
    k, v, x = (
        mx.concatenate(
            [
                mx.pad(row[:, :, :n], [*width, (p, 0) if side == "left" else (0, p), (0, 0)])
                for row, n, p in zip(every, of, pads, strict=True)
            ]
        )
        for every in ([r[0] for r in kv], [r[1] for r in kv], q)
    )
    if side == "left":
        batch.prepare(left_padding=left)
    else:
        batch.prepare(lengths=of if lengths else None, right_padding=pads)
    out = run(batch, x, (k, v), cuts)
    batch.finalize()
    want = alone(kv, q, of, **coding)
    for r, n in enumerate(of):
        close(out[r][:, left[r] : left[r] + n], want[r][0, :, :n], 5e-4)
    return batch


@pytest.mark.parametrize(
    "make",
    [
        merged,
        lambda: padded("left", [700]),
        lambda: padded("left", [500, 520, 700]),
        lambda: padded("right", [700]),
        lambda: padded("right", [100, 150, 640, 700]),
    ],
)
def test_a_batch_reads_as_its_rows_alone(make):
    batch = make()
    check_batch(batch, [0, 1, 2, 3], 0, 20)
    batch.filter([3, 1, 2])  # drops the longest and the padding that the others share
    check_batch(batch, [3, 1, 2], 20, 20)
    other = batch.extract(0)
    batch.filter([2, 1])
    batch.extend(BatchTurboQuantKVCache.merge([other]))
    check_batch(batch, [2, 1, 3], 40, 10)
    assert batch.trim(7) == 7
    check_batch(batch, [2, 1, 3], 43, 10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: merged(SHORT),
        lambda: padded("left", [40], of=SHORT),
        lambda: padded("right", [40], of=SHORT),
        lambda: padded("right", [10, 25, 40], of=SHORT),
    ],
)
def test_rings_of_short_rows_grow_and_shrink_with_them(make):
    batch = make()
    assert slots(batch) == 64 + 4
    check_batch(batch, [0, 1, 2, 3], 0, 30, SHORT)  # 70 tokens
    assert slots(batch) == 128 + 4
    one = batch.extract(1)
    assert (one.size(), slots(one)) == (33, 64 + 4)
    batch.filter([3, 1])  # drops the longest and 11 pads
    check_batch(batch, [3, 1], 30, 80, SHORT)  # 139 tokens
    assert slots(batch) == 256 + 4
    assert batch.trim(82) == 82  # back to where row 1 was taken out, less two
    batch.extend(BatchTurboQuantKVCache.merge([one]))
    other = batch.extract(2)
    other.trim(2)
    batch.filter([0, 1])
    batch.extend(BatchTurboQuantKVCache.merge([other]))
    check_batch(batch, [3, 1, 1], 28, 100, SHORT)


def slots(cache):
    return cache._core.copies[0][1].shape[2]


def test_right_padding_of_unknown_lengths_leaves_the_codes():
    batch = padded("right", [700], lengths=False, code="scalar")  # the bound is that of scalar codes
    kv, q = rows()
    got = decode_batch(batch, kv, q, range(4), 0, 140)  # by then all of the newest are new
    for r, want in enumerate(alone(kv, q, code="scalar")):
        if r == 1:
            continue  # three tokens, all of them first ones
        close(got[r][:, 130:], want[0, :, LENGTHS[r] + 130 : LENGTHS[r] + 140], 0.06)


@pytest.mark.parametrize("cut", [2, 30, 600])
def test_a_saved_cache_goes_on_with_the_same_numbers(tmp_path, cut):
    apply_patch()
    kv, q = vectors(700), queries(700)
    cache = TurboQuantKVCache(3, **EXACT)
    run(cache, q, kv, [cut])
    save_prompt_cache(str(tmp_path / "c.safetensors"), [cache])
    loaded = load_prompt_cache(str(tmp_path / "c.safetensors"))[0]
    assert (loaded.recent, loaded.sink, loaded.nbytes) == (128, 4, loaded.inspect()["resident_bytes"])
    np.testing.assert_array_equal(run(loaded, q, kv, [700], cut), run(cache, q, kv, [700], cut))
    for of in (LENGTHS, SHORT):
        save_prompt_cache(str(tmp_path / "b.safetensors"), [merged(of)])
        check_batch(load_prompt_cache(str(tmp_path / "b.safetensors"))[0], [0, 1, 2, 3], 0, 5, of)


def test_copies_that_do_not_fit_are_refused():
    cache = TurboQuantKVCache(3, **EXACT)
    run(cache, queries(200), vectors(200), [200])
    arrays, begin = cache._core.copies
    for slots in (36, 132, 150):
        with pytest.raises(
            ValueError, match=r"copies of 200 tokens must be a multiple of 32 from 256 to 384 slots and 4"
        ):
            cache._core.restore(cache._core.view().arrays, 200, ([x[:, :, :slots] for x in arrays], begin))
    want = [mx.concatenate([x[:, :, :200], mx.zeros_like(x[:, :, :184]), x[:, :, -4:]], 2) for x in arrays]
    cache._core.restore(cache._core.view().arrays, 200, (want, begin))  # the full ring, as earlier versions saved it
    kv, q = [mx.concatenate([a, b], 2) for a, b in zip(vectors(200), vectors(300, 1), strict=True)], queries(500)
    close(run(cache, q, kv, [201, 430, 500], 200), expected(q, kv)[:, :, 200:], 5e-4)


def test_a_cache_without_copies_gets_them_from_its_codes():
    kv, q = vectors(700), queries(700)
    old = TurboQuantKVCache(3, recent=0, sink=0)
    want = run(old, q, kv, [400, 401])[:, :, 400:]
    other = TurboQuantKVCache(3, recent=0, sink=0)
    run(other, q, kv, [400])
    other.keep_exact(**EXACT)
    assert (other.recent, other.sink) == (128, 4)
    got = attend(other, q[:, :, 400:401], *[x[:, :, 400:401] for x in kv], None)
    assert np.linalg.norm(got - want) < 0.2 * np.linalg.norm(want)  # its own token alone is more exact
    close(
        run(other, q, kv, [700], 401)[:, :, 130:],
        run(TurboQuantKVCache(3, recent=128, sink=0), q, kv, [700])[:, :, 531:],
        0.02,
    )


def test_bytes_are_counted_and_end_to_grow_with_the_context():
    kv, q = vectors(3000), queries(3000)
    cache = TurboQuantKVCache(3, **EXACT)
    sizes = []
    for n in (1, 100, 1000, 3000):
        run(cache, q, kv, [n], cache.size())
        cache.state  # noqa: B018  what mlx-lm evaluates after a chunk
        note = cache.inspect()
        codes = sum(x.nbytes for x in cache._core.arrays)
        assert note["resident_bytes"] == cache.nbytes == codes + note["exact_bytes"]
        sizes.append(note["exact_bytes"])
    assert sizes == [2 * H_KV * (ring + 4) * (D + 2) for ring in (32, 128, 384, 384)]
    assert sizes[-1] <= 2 * H_KV * (D + 2) * (128 + 4 + SPARE)
    cache.trim(2990)
    run(cache, q, kv, [20], 10)
    assert cache.inspect()["exact_bytes"] == sizes[-1]  # a ring that has grown stays


def test_a_short_cache_takes_less_than_floats():
    """Whose buffers grow by 256 tokens, too."""
    for n in (1, 20, 60, 120, 250):
        kv = [mx.random.normal((1, H_KV, n, 256)) for _ in range(2)]
        cache, floats = TurboQuantKVCache(3), KVCache()
        cache.update_and_fetch(*kv)
        floats.update_and_fetch(*[x.astype(mx.float16) for x in kv])
        assert cache.nbytes < floats.keys.nbytes + floats.values.nbytes


def test_floats_come_from_the_copies_where_there_are_any():
    kv, _ = vectors(600), None
    cache = TurboQuantKVCache(3, **EXACT)
    cache.update_and_fetch(*kv)
    floats = cache.to_float(mx.float32)
    error = np.linalg.norm(np.array(floats.keys - kv[0]), axis=-1) / np.linalg.norm(np.array(kv[0]), axis=-1)
    exact = np.zeros(600, bool)
    exact[:4] = exact[-128:] = True
    assert error[..., exact].max() < 0.02 < 0.1 < error[..., ~exact].min()
    again = to_turboquant(floats, 3, **EXACT)
    assert (again.size(), again.recent, again.sink) == (600, 128, 4)


def test_caches_that_keep_other_tokens_do_not_mix():
    with pytest.raises(ValueError, match="keep the same tokens exact; got recent 128 and 64"):
        TurboQuantKVCache.merge([TurboQuantKVCache(3, **EXACT), TurboQuantKVCache(3, recent=64, sink=4)])
    with pytest.raises(ValueError, match="recent must be at least 0; got -1"):
        TurboQuantKVCache(3, recent=-1)
    with pytest.raises(ValueError, match="sink must be a whole number; got 1.5"):
        TurboQuantKVCache(3, sink=1.5)
    plain = KVCache()
    plain.update_and_fetch(*vectors(5))
    assert to_turboquant(plain, 3, recent=7, sink=2).inspect()["recent"] == 7


def widths(cache):
    return cache.key_bits, cache.value_bits


@pytest.mark.parametrize(
    "size, settings, want",
    [
        (64, {}, (8, 8)),
        (1024, {}, (8, 8)),
        (1025, {}, (3, 3)),
        (64, {"recent": 0}, (3, 3)),
        (64, {"recent": 0, "sink": 0, "key_bits": 4}, (4, 3)),
        (64, {"recent": 7, "sink": 0, "key_bits": 4}, (8, 8)),
    ],
)
def test_a_small_window_is_held_at_eight_bits(size, settings, want):
    """It has no copies; a larger one has its codes alone."""
    window = RotatingKVCache(max_size=size)
    window.update_and_fetch(*vectors(5))
    packed = to_turboquant(window, 3, feedback=(mx.zeros((H_KV, D, D), mx.float16),) * 2, **settings)
    assert widths(packed) == want and (packed.feedback is None) == (want == (8, 8))
    assert packed.inspect()["exact_bytes"] == 0
    assert widths(TurboQuantRotatingKVCache(size, bits=3)) == (3, 3)  # by itself it is what it is asked to be
    full = build(qwen3, head_dim=D)
    enable(full, 3, **settings)
    assert {widths(c) for c in full.make_cache.sized(size)} == {want}
    if size == 64:
        mixed = FAMILIES["llama, sliding window"]()  # of 32 tokens, in every second layer
        enable(mixed, 3, **settings)
        plain = settings.get("key_bits", 3), 3
        assert [widths(c) for c in mixed.make_cache()] == [want if i % 2 == 0 else plain for i in range(2)]


def test_what_is_kept_exact_by_default(monkeypatch):
    """128 and 4, wherever a kernel reads copies."""
    assert (TurboQuantKVCache().recent, TurboQuantKVCache().sink) == (128, 4)
    assert (TurboQuantKVCache(recent=0).recent, TurboQuantKVCache(recent=0).sink) == (0, 4)
    monkeypatch.setattr(arguments._core, "reads_exact_copies", lambda: False)
    assert (TurboQuantKVCache().recent, BatchTurboQuantKVCache([0]).sink) == (0, 0)
    with pytest.raises(ValueError, match="cannot read exact copies: recent and sink must be 0; got 128 and 0"):
        TurboQuantKVCache(recent=128)


def test_modes_name_them():
    mode = parse_mode("tq3tfr128s4")
    assert (mode.code, mode.fed, mode.recent, mode.sink) == ("trellis", True, 128, 4)
    assert (parse_mode("k4v3c").recent, parse_mode("k4v3c").sink) == (0, 0)


def test_a_model_says_what_it_keeps(tmp_path):
    model, tokenizer = load(str(MODEL))
    model.set_dtype(mx.float32)
    tokens = mx.array(tokenizer.encode("The newest tokens matter most. " * 60))[None]
    enable(model, 3, **EXACT)
    whole = make_prompt_cache(model)
    wanted = model(tokens, cache=whole)[:, -1]
    pieces = make_prompt_cache(model)
    for at in range(0, tokens.shape[1], 97):
        got = model(tokens[:, at : at + 97], cache=pieces)[:, -1]
    assert mx.abs(got - wanted).max() < 0.02 * mx.abs(wanted).max()
    packed = [c for c in whole if isinstance(c, TurboQuantKVCache)]
    assert packed
    assert all((c.recent, c.sink) == (128, 4) for c in packed)
    enable(model, 3, recent=0, sink=0)  # a file of a version without copies, loaded for a model with them
    plain = make_prompt_cache(model)
    mx.eval(model(tokens, cache=plain))
    tq_save(str(tmp_path / "old.safetensors"), plain)
    enable(model, 3, **EXACT)
    loaded = tq_load(str(tmp_path / "old.safetensors"), model)
    assert all((c.recent, c.sink) == (128, 4) for c in loaded if isinstance(c, TurboQuantKVCache))
