"""Run by mlx.launch on every rank: what pipeline and tensor parallelism make of packed caches; one JSON line a rank.

pipelines.py answers          tokens of several models under `pipeline` and `shard`, alone and batched
pipelines.py refuse           rank 1's layers cannot be packed: every rank prints the reason
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
mx.set_default_device(mx.cpu)

from conftest import MODEL  # noqa: E402
from latent_models import deepseek  # noqa: E402
from mlx_lm import batch_generate  # noqa: E402
from mlx_lm.models import llama, qwen2  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from small_models import build, greedy, prompt  # noqa: E402
from turboquant_mlx import enable  # noqa: E402
from turboquant_mlx.calibration import calibrate, load_calibration  # noqa: E402
from turboquant_mlx.overlay.gated_delta import enable_chunked_recurrence  # noqa: E402

LENGTHS = (40, 9)
NO_END = SimpleNamespace(eos_token_ids=[], decode=str)


def small_qwen2():
    return build(qwen2, hidden_size=128, num_hidden_layers=5)


def bundled():
    """Qwen3.5: three linear layers, then one of attention, twice."""
    enable_chunked_recurrence()
    model = load_model(MODEL)[0]
    model.set_dtype(mx.float32)
    return model


def found_for(model):
    return calibrate(model, prompt(60))


# name: (the model, its calibration, settings of enable)
PIPELINES = {
    "qwen2": (small_qwen2, found_for, {}),
    "qwen2, codes and copies": (small_qwen2, found_for, {"recent": 8, "sink": 2}),
    "deepseek_v3": (deepseek, found_for, {}),
    "qwen2, packs later": (small_qwen2, None, {"start": 20}),
    "qwen3.5": (bundled, lambda _: load_calibration(MODEL), {}),
}
SHARDS = {
    "deepseek_v3": (deepseek, found_for, {}),
    "llama": (lambda: build(llama, num_attention_heads=8, num_key_value_heads=4), found_for, {"recent": 8, "sink": 2}),
    "qwen3.5": (bundled, lambda _: load_calibration(MODEL), {}),
}


def tokens(model, settings, sized=None):
    """Greedy tokens of each prompt alone, then of all as one batch."""
    enable(model, bits=3, **settings)
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    alone = [greedy(model, p, 6, make_prompt_cache(model, sized), prefill_step_size=16) for p in prompts]
    if "start" in settings or sized:
        return {"alone": alone}
    together = batch_generate(model, NO_END, prompts, max_tokens=6, return_token_ids=True).token_ids
    return {"alone": alone, "together": together}


def answers(group):
    out = {}
    for kind, models in (("pipeline", PIPELINES), ("shard", SHARDS)):
        for name, (make, calibration, settings) in models.items():
            model = make()
            settings = settings | ({"calibration": calibration(model)} if calibration else {})
            if group is not None:
                model.model.pipeline(group) if kind == "pipeline" else model.shard(group)
            out[f"{kind}, {name}"] = tokens(model, settings)
    model = small_qwen2()
    if group is not None:
        model.model.pipeline(group)
    out["pipeline, windows"] = tokens(model, {}, 24)
    return out


def refusal(group):
    """The reason why enable() refused: the layers of rank 1, the first ones, have keys that nobody can pack."""
    model = small_qwen2()
    for layer in model.model.layers[:2]:
        layer.self_attn.__class__ = Odd
    model.model.pipeline(group)
    try:
        enable(model, strict=True)
    except ValueError as error:
        return str(error)


class Odd(qwen2.Attention):
    """Attention that reads its cache in a way of its own."""

    def __call__(self, x, mask=None, cache=None):
        keys = self.k_proj(x).reshape(*x.shape[:2], self.n_kv_heads, -1).swapaxes(1, 2)
        keys, _ = cache.update_and_fetch(keys, keys)
        return self.o_proj(mx.tile(mx.sum(keys * 2, axis=1)[:, -x.shape[1] :], self.n_heads))


if __name__ == "__main__":
    group = mx.distributed.init(strict=True, backend="ring")
    found = json.dumps({"rank": group.rank(), "found": {"answers": answers, "refuse": refusal}[sys.argv[1]](group)})
    for rank in range(group.size()):  # one line at a time: the ranks share a terminal
        mx.eval(mx.distributed.all_sum(mx.zeros(1), group=group))
        if rank == group.rank():
            print(found, flush=True)
