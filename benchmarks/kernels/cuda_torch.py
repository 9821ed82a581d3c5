"""FP16 attention of PyTorch on the same shapes as cuda_kernels.cpp: medians of replayed CUDA graphs, microseconds a call.

Each graph makes 100 calls or more and walks over enough copies of keys and values to leave the L2 cache (256 MiB).

    python cuda_torch.py [--tokens 1024 4096 ...] [--queries 1]
"""

import argparse

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

FOOTPRINT = 256 << 20


def time_graph(calls):
    """Median microseconds of one of `calls`, a list of functions."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(23):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return 1000 * sorted(times[3:])[10] / len(calls)


def attention(backend, tokens, queries, query_heads=16, kv_heads=4, dim=256):
    def random(heads, length):
        return torch.randn(1, heads, length, dim, device="cuda", dtype=torch.float16)

    copies = max(2, min(64, FOOTPRINT // (4 * kv_heads * tokens * dim) + 1))
    q = random(query_heads, queries)
    cache = [(random(kv_heads, tokens), random(kv_heads, tokens)) for _ in range(copies)]

    def call(k, v):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return time_graph([lambda k=k, v=v: call(k, v) for k, v in cache] * -(-100 // copies))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 32768, 131072])
    parser.add_argument("--queries", type=int, default=1)
    args = parser.parse_args()
    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    for tokens in args.tokens:
        for name, backend in backends.items():
            try:
                print(
                    f"torch {name} fp16, {args.queries} queries, {tokens:6d} tokens: "
                    f"{attention(backend, tokens, args.queries):9.2f} us",
                    flush=True,
                )
            except RuntimeError as error:
                print(f"torch {name} fp16, {args.queries} queries, {tokens:6d} tokens: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
