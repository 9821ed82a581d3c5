"""Whether packed caches of a whole model give what its codes say: alone, batched, trimmed, saved and reloaded.

Each is compared with float caches that hold decode(encode(.)), within noise_bound (decoded.py)."""

import pathlib
import tempfile

import mlx.core as mx
from decoded import decoded_caches, deviation, logits, noise_bound
from mlx.utils import tree_map
from mlx_lm.generate import _merge_caches
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from turboquant_mlx import enable, load_prompt_cache, save_prompt_cache
from turboquant_mlx.caches.slots import own_caches

VOCAB = 128


def _tokens(count, seed):
    mx.random.seed(seed)
    return mx.random.randint(0, VOCAB, (count,)).tolist()


def _steps(tokens):
    return [[token] for token in tokens]


def _not_zero(x):
    """Weights that begin as zeros (gates, convolutions, sinks) take part."""
    if not mx.issubdtype(x.dtype, mx.floating) or mx.any(x != 0).item():
        return x
    return 0.1 * mx.random.normal(x.shape, x.dtype)


def judge(model, bits=8, read=21, single=4):
    """{what was tried: (deviation, bound)} of a model that this call enables; deviations are of logits, in units of their
    spread.  What the model's caches cannot do (trim) is left out.

    By default at 8 bits: there a key that lay on a threshold moves by 1 / 255 of its vector, at 3 bits by enough to hide what
    else went wrong."""
    model.update(tree_map(_not_zero, model.parameters()))
    enable(model, bits, recent=0, sink=0, calibration={})
    tokens = _tokens(read + single, 1)
    chunks = [tokens[:read], *_steps(tokens[read:])]
    exact = logits(model, chunks, decoded_caches(model))
    bound = noise_bound(model, chunks, exact)
    found, cache = {}, make_prompt_cache(model)
    alone = logits(model, chunks[:1], cache)
    with tempfile.TemporaryDirectory() as folder:
        file = str(pathlib.Path(folder) / "cache.safetensors")
        save_prompt_cache(file, cache)
        reloaded = load_prompt_cache(file, model)
    rest = logits(model, chunks[1:], cache)
    found["alone"] = deviation(mx.concatenate([alone, rest]), exact), bound
    found["reloaded"] = deviation(logits(model, chunks[1:], reloaded), rest), 0.0
    if (far := _batched(model, tokens, read, rest)) is not None:
        found["batched"] = far, 2 * bound
    trimmed = make_prompt_cache(model)
    logits(model, [tokens[:read] + _tokens(3, 2)], trimmed)
    if can_trim_prompt_cache(trimmed) and trim_prompt_cache(trimmed, 3) == 3:
        found["trimmed"] = deviation(logits(model, chunks[1:], trimmed), exact[1:]), bound
    return found


def _batched(model, tokens, read, alone):
    """How far a row that is batched behind a shorter one is off from itself alone; None where the model cannot read
    batches of float caches either."""

    def run(make_caches):
        rows = []
        for text in (_tokens(read - 8, 3), tokens[:read]):
            rows.append(make_caches())
            logits(model, [text], rows[-1])
        batch = _merge_caches(rows)
        out = [model(mx.array([[5], [token]]), cache=batch)[1, -1].astype(mx.float32) for token in tokens[read:]]
        return mx.stack(out)

    try:
        run(lambda: own_caches(model))
    except Exception:  # whatever a model makes of a batch
        return None
    return deviation(run(lambda: make_prompt_cache(model)), alone)
