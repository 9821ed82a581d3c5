"""The oracle of whole models: the model's own float caches, holding decode(encode(.)) wherever packed caches hold codes."""

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from turboquant_mlx.caches.slots import own_caches, replace_slots
from turboquant_mlx.eval.modes import FloatCache, FloatWindow
from turboquant_mlx.ops import decode, encode
from turboquant_mlx.overlay.patch import float_attention

# Attention over codes rounds a query to 1 / 32,512 of its largest coordinate and softmax's weights to 1 / 255 of a
# block's: an output is off by up to this part of its length, which the shared table holds every kernel to.
ATTENTION = 5e-4
ROUNDING = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}  # of an output in the model's own type


def coded(bits, **coding):
    """x -> decode(encode(x)), of x's dtype."""

    def code(x):
        if x.shape[-1] == 0:
            return x
        return decode(*encode(x, bits, **coding), bits, dtype=x.dtype, **coding)

    return code


def decoded_caches(model):
    """Float caches of an enabled model, with the numbers of its codes; no exact copies, no calibration."""
    maker = model.make_cache

    def make(path, original):
        packed = maker.unfilled(path, original)
        if packed is None:
            return None
        keys, values = packed._core.coding.keys, packed._core.coding.values
        coders = [coded(side.bits, code=side.code, seed=side.seed) for side in (keys, values)]
        if hasattr(original, "max_size"):
            return FloatWindow(original.max_size, original.keep, *coders)
        return FloatCache(*coders)

    return replace_slots(own_caches(model), make)


def logits(model, chunks, caches):
    """The last logits of each chunk of tokens, (chunks, vocabulary) float32."""
    out = [model(mx.array([chunk]), cache=caches)[0, -1].astype(mx.float32) for chunk in chunks]
    return mx.stack(out)


def deviation(a, b):
    """max |a - b| over the spread of b."""
    return (mx.abs(a - b).max() / mx.std(b)).item()


def noise_bound(model, chunks, exact):
    """How far logits may be off: what attention's own bound does to the oracle's logits.  A random error of ATTENTION
    times an output's length is added to every output of the float model; small random models multiply it, and a later
    key that lay on a threshold takes another code."""

    def noisy(queries, keys, values, scale, mask, sinks):
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        error = mx.random.normal(out.shape)
        length = mx.linalg.norm(out.astype(mx.float32), axis=-1, keepdims=True)
        error *= (ATTENTION + ROUNDING.get(out.dtype, 0)) * length / mx.linalg.norm(error, axis=-1, keepdims=True)
        return (out.astype(mx.float32) + error).astype(out.dtype)

    mx.random.seed(11)
    with float_attention(noisy):
        return max(deviation(logits(model, chunks, decoded_caches(model)), exact) for _ in range(4))


def check_logits(model, chunks, caches=None):
    """Packed caches of an enabled model give the oracle's logits, and other logits than plain floats."""
    exact = logits(model, chunks, decoded_caches(model))
    packed = logits(model, chunks, caches or make_prompt_cache(model))
    bound = noise_bound(model, chunks, exact)
    assert deviation(packed, exact) <= bound
    assert deviation(logits(model, chunks, own_caches(model)), exact) > bound
