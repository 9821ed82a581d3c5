"""Packed caches beside mlx-vlm's own TurboQuant, in mlx-vlm, on one model and one text.

    python benchmarks/beside_mlx_vlm.py --model models/qwen35-tiny-4bit --prompt-tokens 2048 --decode-tokens 64

Each cache reads the same prompt in the same chunks and then the same tokens one by one (teacher forcing), so that the caches
alone differ.  Divergence is the mean KL divergence of the next token's distribution from the float caches', over the decoded
tokens; bytes are those of the attention slots when all is read, spare room not counted.  The caches take turns, `--turns`
times; speeds are medians.  mlx-vlm by itself leaves the last slot of a model as floats: the rows named `all slots` pack it, too."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_vlm import load
from mlx_vlm.generate.common import maybe_quantize_kv_cache
from mlx_vlm.models import cache as host
from mlx_vlm.turboquant import TurboQuantKVCache as Theirs
from turboquant_mlx import disable, enable
from turboquant_mlx.caches import PackedCache

ROOT = Path(__file__).resolve().parents[1]


def _fresh(model: Any) -> list[Any]:
    return host.make_prompt_cache(model)


def _theirs(model: Any, bits: int, whole: bool) -> list[Any]:
    """mlx-vlm's packed slots: as its maybe_quantize_kv_cache chooses them, or all."""
    caches = _fresh(model)
    if whole:
        return [Theirs(bits=bits) if type(c) is host.KVCache else c for c in caches]
    maybe_quantize_kv_cache(caches, 0, 64, bits, "turboquant")
    return caches


def _ours(whole: Any, bits: int, **settings: Any) -> list[Any]:
    enable(whole, bits, **settings)
    caches = _fresh(whole.language_model)
    disable(whole)
    return caches


def _bytes(caches: list[Any]) -> int:
    """Of the tokens held in the attention slots: arrays of `state` and exact copies, without spare room."""
    found = 0
    for c in caches:
        if isinstance(c, PackedCache):
            found += sum(x.nbytes for x in c.state[:4]) + c.inspect()["exact_bytes"]
        elif type(c) is not host.ArraysCache:
            found += sum(x.nbytes for _, x in tree_flatten(c.state) if isinstance(x, mx.array))
    return found


def _read(model: Any, caches: list[Any], tokens: list[int], prompt: int, step: int) -> tuple[mx.array, float, float]:
    """(log-probabilities after each decoded token, seconds of the prompt, seconds of decoding)."""
    text, began = mx.array(tokens)[None], time.perf_counter()
    model._position_ids = model._rope_deltas = None
    for at in range(0, prompt, step):
        logits = model(text[:, at : min(at + step, prompt)], cache=caches).logits
        mx.eval(logits[:, -1], [c.state for c in caches])
    read, found = time.perf_counter(), []
    for at in range(prompt, len(tokens)):
        logits = model(text[:, at : at + 1], cache=caches).logits[0, -1].astype(mx.float32)
        mx.eval(logits)
        found.append(logits - mx.logsumexp(logits))
    ended = time.perf_counter()
    return mx.stack(found), read - began, ended - read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "qwen35-tiny-4bit"))
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "valid.txt")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--prefill-step-size", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    whole, processor = load(args.model)
    whole.set_dtype(mx.float32) if mx.default_device() == mx.Device(mx.cpu) else None
    model = whole.language_model
    tokenizer = getattr(processor, "tokenizer", processor)
    count = args.prompt_tokens + args.decode_tokens
    tokens = tokenizer.encode(args.text.read_text())[:count]
    if len(tokens) < count:
        raise SystemExit(f"{args.text} has {len(tokens)} tokens; {count} are needed")
    bits = args.bits
    rows: dict[str, Callable[[], list[Any]]] = {
        "float caches": lambda: _fresh(model),
        f"mlx-vlm's TurboQuant, {bits} bits": lambda: _theirs(model, bits, whole=False),
        f"mlx-vlm's TurboQuant, {bits} bits, all slots": lambda: _theirs(model, bits, whole=True),
        f"packed, {bits} bits, no exact copies, no calibration": lambda: _ours(
            whole, bits, calibration={}, recent=0, sink=0
        ),
        f"packed, {bits} bits": lambda: _ours(whole, bits, calibration=args.model),
    }
    found: dict[str, list[tuple[mx.array, float, float, int]]] = {name: [] for name in rows}
    for _ in range(args.turns):
        for name, make in rows.items():
            caches = make()
            out = _read(model, caches, tokens, args.prompt_tokens, args.prefill_step_size)
            found[name].append((*out, _bytes(caches)))
    reference = found["float caches"][0][0]
    print(
        f"{args.prompt_tokens} tokens of prompt, {args.decode_tokens} decoded, {args.turns} turns, {mx.default_device()}\n"
    )
    print(
        "| caches | bytes | KL divergence | prompt tokens/s | decoded tokens/s |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for name, turns in found.items():
        divergence = mx.mean(mx.sum(mx.exp(reference) * (reference - turns[0][0]), axis=-1)).item()
        prompt = args.prompt_tokens / statistics.median(turn[1] for turn in turns)
        decode = args.decode_tokens / statistics.median(turn[2] for turn in turns)
        print(f"| {name} | {turns[0][3]:,} | {divergence:.5f} | {prompt:.0f} | {decode:.1f} |")


if __name__ == "__main__":
    main()
