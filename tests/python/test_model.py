"""The bundled model end to end: packed caches against float ones on a text it never saw."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache
from turboquant_mlx import TurboQuantKVCache

LENGTH = 2048


def logits_of(model, tokens, make, chunks):
    """Logits (len(tokens), vocabulary) with make() in the KVCache slots, prompt fed in `chunks`."""
    cache = [make() if type(c) is KVCache else c for c in model.make_cache()]
    out, at = [], 0
    for n in chunks:
        out.append(model(mx.array(tokens[at : at + n])[None], cache=cache)[0])
        mx.eval(out, [c.state for c in cache if not isinstance(c, TurboQuantKVCache)])
        at += n
    assert at == len(tokens)
    return mx.concatenate(out)


def divergence(reference, other):
    """Mean KL divergence of the next-token distributions, in nats."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (reference, other))
    return (mx.exp(p) * (p - q)).sum(axis=-1).mean().item()


@pytest.fixture(scope="module")
def exact(bundled, tokens):
    return logits_of(bundled[0], tokens[:LENGTH], KVCache, [LENGTH])


@pytest.fixture(scope="module")
def tq3(bundled, tokens):
    from turboquant_mlx import apply_patch

    apply_patch()
    return logits_of(bundled[0], tokens[:LENGTH], TurboQuantKVCache, [LENGTH])


# Measured on this text: 0.00260 and 0.00992 (docs/quality.md has the table over more windows).
@pytest.mark.parametrize("bits, bound", [(4, 0.0028), (3, 0.0106)])
def test_divergence_from_float_caches_is_bounded(patched, bundled, tokens, exact, bits, bound):
    got = logits_of(bundled[0], tokens[:LENGTH], lambda: TurboQuantKVCache(bits), [LENGTH])
    kld = divergence(exact, got)
    print(f"TQ{bits}: {kld:.5f}")
    assert 0 < kld < bound


# The same codes reach attention whatever the chunks, except where a float product of another shape rounds a coordinate
# across a threshold: a code then moves by one level, which shifts a logit by less than the codes' own error does by
# three orders of magnitude.
@pytest.mark.parametrize("chunks", [[512] * 4, [1000, 1, 7, 1040]])
def test_chunked_prefill_equals_one_shot(patched, bundled, tokens, tq3, chunks):
    got = logits_of(bundled[0], tokens[:LENGTH], TurboQuantKVCache, chunks)
    assert divergence(tq3, got) < 1e-5
    assert (mx.argmax(got, -1) == mx.argmax(tq3, -1)).mean() > 0.999


def test_decode_equals_prefill(patched, bundled, tokens, tq3):
    got = logits_of(bundled[0], tokens[:LENGTH], TurboQuantKVCache, [LENGTH - 64] + [1] * 64)
    assert divergence(tq3[-64:], got[-64:]) < 1e-5
    assert mx.array_equal(mx.argmax(got[-64:], -1), mx.argmax(tq3[-64:], -1))
