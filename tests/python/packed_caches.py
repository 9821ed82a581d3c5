"""Small caches with something in them, for the tests of what is done with whole caches."""

import mlx.core as mx
from mlx_lm.models.cache import (
    CacheList,
    KVCache,
)


def kv(tokens, batch=1, dtype=mx.float16):
    return [mx.random.normal((batch, 2, tokens, 64)).astype(dtype) for _ in range(2)]


def fill(cache, *chunks, batch=1):
    for n in chunks:
        cache.update_and_fetch(*kv(n, batch))
    return cache


CENTRES = (mx.full((2, 64), 0.25), mx.full((2, 64), -0.5))
FEEDBACK = tuple((0.06 * mx.random.normal((2, 64, 64), key=mx.random.key(i))).astype(mx.float16) for i in range(2))


def trimmed(cache, n):
    assert cache.trim(n) == n
    return cache


def same(a, b):
    """Whether two caches hold the same and go on the same way."""
    if isinstance(a, CacheList):
        return all(same(x, y) for x, y in zip(a.caches, b.caches, strict=True))
    if isinstance(a, KVCache):
        return a.offset == b.offset and mx.array_equal(a.keys_and_values()[0], b.keys_and_values()[0])
    return type(a) is type(b) and str(a.state[-1]) == str(b.state[-1])
