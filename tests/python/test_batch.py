"""Batches of requests give each request the tokens that it gets alone."""

import copy
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm import batch_generate
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache, trim_prompt_cache
from needles import ANSWER, question, read_page
from packed_caches import fill
from small_models import FAMILIES, greedy, prompt, small_llama, sure
from turboquant_mlx import (
    BatchTurboQuantKVCache,
    DelayedTurboQuantKVCache,
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    disable,
    enable,
)
from turboquant_mlx.caches import older

pytestmark = pytest.mark.quick

NO_END = SimpleNamespace(eos_token_ids=[], decode=str)
LENGTHS = (5, 70, 33, 1, 100)

gives_token_ids = pytest.mark.skipif(older.OLD, reason="batch_generate of mlx-lm 0.31.3 gives no token ids")


@gives_token_ids
@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_gives_every_prompt_its_own_tokens(family):
    """Prompts come in three at a time, are read 32 tokens a chunk, and join a batch that is already decoding."""
    model = FAMILIES[family]()
    assert enable(model, bits=3) == 2
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    alone = [greedy(model, p, 20, prefill_step_size=32) for p in prompts]
    assert len({tuple(t) for t in alone}) == len(alone) and len(set(sum(alone, []))) > 8
    together = batch_generate(
        model,
        NO_END,
        prompts,
        max_tokens=20,
        return_token_ids=True,
        prefill_step_size=32,
        prefill_batch_size=3,
        completion_batch_size=4,
    )
    assert together.token_ids == alone


def test_requests_of_different_lengths_leave_and_join_a_running_batch():
    """Continuous batching: rows finish at different times (filter), new ones join (extend), each row that leaves is
    extracted and goes on alone."""
    model = small_llama()
    enable(model, bits=3)
    prompts = [prompt(n, seed=n) for n in (40, 7, 90, 20, 3, 64)]
    counts = [5, 30, 12, 3, 25, 18]
    alone = [greedy(model, p, n + 10) for p, n in zip(prompts, counts, strict=True)]
    generator = BatchGenerator(model, completion_batch_size=3, prefill_batch_size=2, prefill_step_size=16)
    uids = generator.insert(prompts, counts)
    tokens, caches = {uid: [] for uid in uids}, {}
    while responses := generator.next_generated():
        for r in responses:
            tokens[r.uid].append(r.token)
            if r.finish_reason:
                caches[r.uid] = r.prompt_cache
        held = generator._generation_batch.prompt_cache
        assert all(type(c) is BatchTurboQuantKVCache for c in held)
        assert generator.prompt_cache_nbytes >= sum(c.nbytes for c in held)
    generator.close()
    for i, uid in enumerate(uids):
        assert tokens[uid] == alone[i][: counts[i]]
        assert trim_prompt_cache(caches[uid], 1) == 1  # mlx-lm has read the last token already
        assert greedy(model, tokens[uid][-1:], 10, caches[uid]) == alone[i][counts[i] :]


@gives_token_ids
def test_prompts_with_caches_of_their_own_form_a_batch():
    """Prefix reuse: caches of different lengths are merged, and stay as they were."""
    model = small_llama()
    enable(model, bits=4)
    prompts = [prompt(n, seed=n) for n in (50, 9, 31)]
    alone = [greedy(model, p, 12) for p in prompts]
    caches = []
    for p in prompts:
        caches.append(make_prompt_cache(model))
        model(mx.array(p[:-3])[None], cache=caches[-1])
    got = batch_generate(
        model,
        NO_END,
        [p[-3:] for p in prompts],
        caches,
        max_tokens=12,
        return_token_ids=True,
        return_prompt_caches=True,
    )
    assert got.token_ids == alone
    assert [c[0].offset for c in caches] == [47, 6, 28]
    for p, cache, tokens in zip(prompts, got.caches, got.token_ids, strict=True):
        assert cache[0].offset == len(p) + 12 and trim_prompt_cache(cache, 1) == 1
        assert greedy(model, tokens[-1:], 5, cache) == greedy(model, p + tokens, 5)


@gives_token_ids
def test_the_bundled_model_answers_a_ragged_batch_as_it_answers_one(bundled):
    """With the hybrid model's ArraysCache beside packed slots.  One row comes with a prefix of 4K tokens in its cache;
    the others are read in the batch, a needle at another depth of each but the last."""
    model, tokenizer = bundled
    prompts = [question(tokenizer, *where) for where in ((300, 0.8), (700, 0.1), (0, 0))]
    long, prefix = read_page(model, tokenizer)
    enable(model, bits=3)
    try:
        fresh = [make_prompt_cache(model) for _ in prompts]
        assert sum(type(c) is ArraysCache for c in prefix) == 6
        alone = [sure(model, long[-1:], 16, copy.deepcopy(prefix))]
        alone += [sure(model, p, 16, prefill_step_size=512) for p in prompts]
        got = batch_generate(
            model,
            NO_END,
            [long[-1:], *prompts],
            [prefix, *fresh],
            max_tokens=16,
            return_token_ids=True,
            prefill_step_size=512,
        )
    finally:
        disable(model)
    assert sum(map(len, alone)) > 48
    assert [tokens[: len(want)] for tokens, want in zip(got.token_ids, alone, strict=True)] == alone
    assert all(ANSWER in tokenizer.decode(tokens) for tokens in got.token_ids[:3])


def test_rows_of_the_bundled_model_go_on_alone_after_a_step_together(bundled):
    """Merged slot by slot, recurrent states too, run one step as a batch, extracted: the tokens of the row that was
    never in a batch."""
    model, tokenizer = bundled
    prompts = [question(tokenizer, *where) for where in ((300, 0.8), (0, 0), (600, 0.1))]
    enable(model, bits=3)
    try:
        alone = [sure(model, p, 16, prefill_step_size=512) for p in prompts]
        caches = [make_prompt_cache(model) for _ in prompts]
        for p, cache in zip(prompts, caches, strict=True):
            for at in range(0, len(p) - 1, 512):
                mx.eval(model(mx.array(p[at : min(at + 512, len(p) - 1)])[None], cache=cache))
        merged = [slots[0].merge(list(slots)) for slots in zip(*caches, strict=True)]
        assert sum(type(c) is BatchTurboQuantKVCache for c in merged) == 2
        logits = model(mx.array([p[-1:] for p in prompts]), cache=merged)
        first = mx.argmax(logits[:, -1], axis=-1).tolist()
        for i, want in enumerate(alone):
            row = [c.extract(i) for c in merged]
            assert [type(c) for c in row] == [type(c) for c in caches[i]]
            got = [first[i], *sure(model, [first[i]], len(want) - 1, row)]
            assert len(want) > 8 and got == want
    finally:
        disable(model)


def test_batches_of_several_kinds_are_refused_by_name(patched):
    """Float caches beside packed ones, in either order, filled or empty, and batches that are extended with the other
    kind."""
    for n in (5, 0):
        packed, floats = fill(TurboQuantKVCache(), *[n] * (n > 0)), fill(KVCache(), *[n] * (n > 0))
        window, float_window = TurboQuantRotatingKVCache(16), RotatingKVCache(16)
        later = fill(DelayedTurboQuantKVCache(9), *[n] * (n > 0))
        for a, b in ((packed, floats), (floats, packed), (packed, window), (window, floats), (floats, later)):
            with pytest.raises(ValueError, match=rf"\[merge\].*got {kinds(a, b)}.*to_turboquant"):
                a.merge([a, b])
        with pytest.raises(ValueError, match="to_turboquant"):
            float_window.merge([float_window, window])
        with pytest.raises(ValueError, match="DelayedTurboQuantKVCache"):
            packed.merge([packed, later])
        batches = [packed.merge([packed]), floats.merge([floats]), window.merge([window])]
        for a in batches:
            for b in batches:
                if type(a) is not type(b):
                    with pytest.raises(ValueError, match=rf"\[extend\].*got {kinds(a, b)}.*to_turboquant"):
                        a.extend(b)


def kinds(*caches):
    return ", ".join(sorted(type(c).__name__ for c in caches))
