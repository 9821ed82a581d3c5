"""Prompt tokens a second with mlx-lm's loop over tokens in linear attention and with chunks of 64 tokens.

    LD_PRELOAD=libopenblas.so.0 python benchmarks/studies/recurrence.py          # the bundled model; --shape 9b on a GPU

Both read the same prompt into TQ3 caches, alternating; medians and the median of the repetitions' ratios.  On Metal
mlx-lm has a kernel of its own and the two are the same.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from curve.models import build_shape, prompt_tokens
from mlx_lm.models.cache import make_prompt_cache
from turboquant_mlx import enable
from turboquant_mlx.eval.model import load_model
from turboquant_mlx.overlay.gated_delta import disable_chunked_recurrence, enable_chunked_recurrence

ROOT = Path(__file__).resolve().parents[2]


def read(model, prompt, step):
    """Seconds for a prompt, as mlx-lm's generate_step reads it."""
    caches = make_prompt_cache(model)
    started = time.perf_counter()
    for start in range(0, len(prompt), step):
        model(mx.array([prompt[start : start + step]]), cache=caches)
        mx.eval([c.state for c in caches])
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, default=ROOT / "models" / "qwen35-tiny-4bit")
    source.add_argument("--shape", choices=("9b",))
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "valid.txt")
    parser.add_argument("--lengths", default="512,2048")
    parser.add_argument("--step", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    model, tokenizer = (build_shape(args.shape), None) if args.shape else load_model(args.model)
    enable(model, 3)
    prompt = prompt_tokens(model, tokenizer, args.text, max(lengths), 0)
    print("| prompt | loop, tok/s | chunks, tok/s | ratio | smallest | largest |")
    print("| ---: " * 6 + "|")
    for length in lengths:
        seconds = {disable_chunked_recurrence: [], enable_chunked_recurrence: []}
        for repetition in range(-1, args.repetitions):  # the first of each warms up
            for switch, own in seconds.items():
                switch()
                taken = read(model, prompt[:length], args.step)
                if repetition >= 0:
                    own.append(taken)
        loop, chunks = seconds.values()
        ratios = [a / b for a, b in zip(loop, chunks, strict=True)]
        speeds = " | ".join(f"{length / statistics.median(own):.0f}" for own in (loop, chunks))
        print(f"| {length} | {speeds} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
