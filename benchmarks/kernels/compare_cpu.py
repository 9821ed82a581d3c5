"""Attention of one query over a long context, 16 query heads, 4 KV heads, head_dim 256: ours against others, in one run.

    python benchmarks/kernels/compare_cpu.py --kernels build/release/benchmarks/turboquant_kernels
        [--llama DIR] [--torch PYTHON] [--mlx-half] [--threads N] [TOKENS ...]

Ours is the C++ kernel benchmark; MLX is this interpreter's; torch is another interpreter's, if given; llama.cpp's ggml
is built by llama_cpp.py under DIR, if given.  Prints microseconds (medians) and how many times faster ours is.  With
one thread all times are CPU time, which other programs on the machine disturb least; with more, wall-clock time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

HEADS, KV_HEADS, DIM = 16, 4, 256
HERE = Path(__file__).resolve().parent


def micros(call, threads, budget=2.0, most=15):
    """Median over as many calls as the budget of seconds allows, after one warm-up if that was short."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times = []
    start = time.perf_counter()
    while not times or (time.perf_counter() - start < budget and len(times) < most):
        t = clock()
        call()
        times.append(1e6 * (clock() - t))
    return median(times[1:] or times)


def ours(program: str, tokens: list[int], threads: int) -> dict:
    """{(name, tokens): (microseconds, times faster than reading fp16)}"""
    lengths = "|".join(map(str, tokens))
    command = [program, f"--benchmark_filter=(attend/[34]/({lengths})/1/|attend/3/8192/512)", "--benchmark_format=json"]
    command += ["--benchmark_repetitions=5", "--benchmark_min_time=0.1", "--benchmark_report_aggregates_only=true"]
    env = os.environ | {"TURBOQUANT_NUM_THREADS": str(threads)}
    report = json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    found = {}
    for run in report["benchmarks"]:
        if run["aggregate_name"] != "median":
            continue
        _, bits, length, queries, isa = run["run_name"].split("/")[:5]
        found[f"TQ{bits} {isa}" + (", 512 queries" if queries == "512" else ""), int(length)] = (
            run["real_time"],
            run["x_fp16_read"],
        )
    return found


TORCH = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from compare_cpu import micros, HEADS, KV_HEADS, DIM
torch.set_num_threads(int(sys.argv[2]))
import torch.nn.functional as F
for n in map(int, sys.argv[3:]):
    k, v = (torch.randn(1, KV_HEADS, n, DIM).bfloat16() for _ in range(2))
    q = torch.randn(1, HEADS, 1, DIM).bfloat16()
    rows = q.view(1, KV_HEADS, HEADS // KV_HEADS, DIM)
    def products():  # the query heads of a KV head as rows of one matrix product
        return torch.softmax(rows @ k.transpose(-1, -2) / DIM**0.5, -1) @ v
    forms = [lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
             lambda: F.scaled_dot_product_attention(rows, k, v), products]
    with torch.no_grad():
        print(n, min(micros(f, int(sys.argv[2]), 1.0) for f in forms), flush=True)
"""


def torch_bf16(python: str, tokens: list[int], threads: int) -> dict:
    command = [python, "-c", TORCH, str(HERE), str(threads), *map(str, tokens)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {("torch bf16", int(n)): float(t) for n, t in (line.split() for line in lines)}


def mlx(tokens: list[int], threads: int, half: bool) -> dict:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    found = {}
    for dtype, name in [(mx.float32, "MLX float32"), (mx.float16, "MLX float16")][: 2 if half else 1]:
        for n in tokens:
            q = mx.random.normal((1, HEADS, 1, DIM)).astype(dtype)
            k, v = (mx.random.normal((1, KV_HEADS, n, DIM)).astype(dtype) for _ in range(2))
            mx.eval(q, k, v)
            sdpa = mx.fast.scaled_dot_product_attention
            found[name, n] = micros(lambda: mx.eval(sdpa(q, k, v, scale=DIM**-0.5)), threads)  # noqa: B023
    n = 8192
    q = mx.random.normal((1, HEADS, 512, DIM))
    k, v = (mx.random.normal((1, KV_HEADS, n, DIM)) for _ in range(2))
    mx.eval(q, k, v)
    run = lambda: mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=DIM**-0.5, mask="causal"))  # noqa: E731
    found["MLX float32, 512 queries", n] = micros(run, threads, 1.0, 3)
    return found


def llama(build: str, tokens: list[int], threads: int) -> dict:
    command = [sys.executable, str(HERE / "llama_cpp.py"), "--build", build, "--threads", str(threads)]
    lines = subprocess.run(
        [*command, *map(str, tokens)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {(f"llama.cpp {kind}", int(n)): float(t) for kind, n, t in (line.split() for line in lines)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", required=True)
    parser.add_argument("--llama")
    parser.add_argument("--torch")
    parser.add_argument("--mlx-half", action="store_true", help="time MLX float16 too: seconds a call at 128K")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("tokens", type=int, nargs="*", default=[1024, 32768, 131072])
    args = parser.parse_args()
    tq = ours(args.kernels, args.tokens, args.threads)
    best = {
        n: tq[next(key for key in tq if key[1] == n and key[0].startswith("TQ3") and "queries" not in key[0])][0]
        for n in args.tokens
    }
    best_prefill = next(t for (name, _), (t, _) in tq.items() if "queries" in name)
    print(f"{args.threads} threads, microseconds")
    for (name, n), (t, ratio) in tq.items():
        print(f"{name:28} {n:7} {t:12.1f}   {ratio:.2f}x faster than reading fp16")
    others = {}
    if args.llama:
        others |= llama(args.llama, args.tokens, args.threads)
    if args.torch:
        others |= torch_bf16(args.torch, args.tokens, args.threads)
    others |= mlx(args.tokens, args.threads, args.mlx_half)
    for (name, n), t in others.items():
        print(f"{name:28} {n:7} {t:12.1f}   ours {t / (best_prefill if 'queries' in name else best[n]):.1f}x faster")


if __name__ == "__main__":
    main()
