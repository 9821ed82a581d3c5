"""Run by mlx.launch on every rank: a sharded model with packed caches; each rank prints one JSON line."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
mx.set_default_device(mx.cpu)

from mlx_lm import batch_generate  # noqa: E402
from mlx_lm.models import llama, qwen3  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from small_models import build, greedy, prompt  # noqa: E402
from turboquant_mlx import enable  # noqa: E402

LENGTHS = (40, 9, 25)


def answers(group):
    """Tokens of each family, one request at a time and as a batch, and the bytes of this rank's caches."""
    out = {}
    for module in (llama, qwen3):
        model = build(module, num_attention_heads=8, num_key_value_heads=4)
        if group is not None:
            model.shard(group)
        enable(model, bits=3)
        prompts = [prompt(n, seed=n) for n in LENGTHS]
        cache = make_prompt_cache(model)
        alone = [greedy(model, prompts[0], 16, cache), *(greedy(model, p, 16) for p in prompts[1:])]
        no_end = SimpleNamespace(eos_token_ids=[], decode=str)
        together = batch_generate(model, no_end, prompts, max_tokens=16, return_token_ids=True).token_ids
        heads = cache[0]._core.view().shape[1]
        out[module.__name__] = {"alone": alone, "together": together, "bytes": cache[0].nbytes, "heads": heads}
    return out


if __name__ == "__main__":
    group = mx.distributed.init(strict=True, backend="ring")
    found = json.dumps({"rank": group.rank(), "size": group.size(), "answers": answers(group)})
    for rank in range(group.size()):  # one line at a time: the ranks share a terminal
        mx.eval(mx.distributed.all_sum(mx.zeros(1), group=group))
        if rank == group.rank():
            print(found, flush=True)
