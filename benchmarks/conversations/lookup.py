"""Decoding with prompt lookup against plain decoding, on a text that repeats its context.

    python benchmarks/conversations/lookup.py --model models/qwen35-tiny-4bit

The prompt is a passage, the same passage again, and its beginning: the model goes on with the passage.  Both ways take turns;
printed are the median of the ratios of tokens per second, that of the ratios of the process's CPU seconds, and whether the
tokens were equal.  `--verify N` times a step of N drafts against a step of one token instead, on caches of `--context` tokens.
"""

import argparse
import statistics
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model
from turboquant_mlx import PromptLookup, enable
from turboquant_mlx.overlay import drafts

ROOT = Path(__file__).resolve().parents[2]


def passage(characters):
    return (ROOT / "tests" / "data" / "valid.txt").read_text()[60_000 : 60_000 + characters]


def answer(model, tokenizer, prompt, count, drafter):
    """(tokens, seconds, CPU seconds, share of drafted tokens) of decoding, the prompt excluded."""
    tokens, drafted, start, spent = [], 0, 0.0, 0.0
    for found in stream_generate(model, tokenizer, prompt, max_tokens=count, draft_model=drafter):
        if not tokens:
            start, spent = time.perf_counter(), time.process_time()
        tokens.append(found.token)
        drafted += found.from_draft
    return tokens, time.perf_counter() - start, time.process_time() - spent, drafted / len(tokens)


def compare(model, tokenizer, args):
    text = passage(args.characters)
    prompt = tokenizer.encode(f"{text}\n\n{text}\n\n{text[: args.characters // 5]}")
    rows = []
    for _ in range(args.repeat):
        plain = answer(model, tokenizer, prompt, args.tokens, None)
        looked = answer(model, tokenizer, prompt, args.tokens, PromptLookup(args.lookup))
        rows.append((plain[1] / looked[1], plain[2] / looked[2], plain[0] == looked[0], looked[3]))
    wall, cpu = (statistics.median(row[i] for row in rows) for i in (0, 1))
    print("| drafts | prompt | tokens | drafted | equal | tokens/s, lookup : plain | CPU seconds, plain : lookup |")
    print("| ---: | ---: | ---: | ---: | --- | ---: | ---: |")
    equal = all(row[2] for row in rows)
    print(f"| {args.lookup} | {len(prompt)} | {args.tokens} | {rows[0][3]:.2f} | {equal} | {wall:.2f} | {cpu:.2f} |")


def verify(model, args):
    """Seconds of a step of one token and of one that checks drafts, on caches of `context` random tokens."""
    caches, _ = drafts._stood_in(make_prompt_cache(model))
    vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]
    drafts._read(model, caches, mx.random.randint(0, vocabulary, (args.context,)), 2048)
    single, several = mx.array([1]), mx.arange(1, args.verify + 2)
    times = {1: [], args.verify + 1: []}
    for _ in range(args.repeat):
        for tokens in (single, several):
            start = time.perf_counter()
            mx.eval(drafts._call(model, caches, tokens, keep=True), [c.state for c in caches])
            times[tokens.size].append(time.perf_counter() - start)
            drafts._take_back(caches, tokens.size)
    one, more = (statistics.median(found) for found in times.values())
    print(f"one token {1e3 * one:.2f} ms, {args.verify} drafts {1e3 * more:.2f} ms: {more / one:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "qwen35-tiny-4bit"))
    parser.add_argument("--characters", type=int, default=1500, help="of the passage")
    parser.add_argument("--tokens", type=int, default=200, help="of the answer")
    parser.add_argument("--lookup", type=int, default=8, help="drafts a round at most")
    parser.add_argument("--verify", type=int, default=0, help="time the checking of so many drafts instead")
    parser.add_argument("--context", type=int, default=4096, help="tokens held while that is timed")
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    if mx.default_device() == mx.Device(mx.cpu):
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
    enable(
        model,
        3,
        calibration=args.model if (Path(args.model) / "turboquant_calibration.safetensors").is_file() else {},
        chunked_recurrence=True,
    )
    verify(model, args) if args.verify else compare(model, tokenizer, args)


if __name__ == "__main__":
    main()
