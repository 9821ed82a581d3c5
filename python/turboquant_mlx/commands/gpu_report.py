"""The speed of attention on this GPU, as a table to paste into an issue: doctor --metal, doctor --cuda."""

import statistics
import time

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from ..ops import attention, encode
from ..overlay.patch import original_quantized_attention

HEADS, KV_HEADS, DIM = 16, 4, 256  # a full-attention layer of Qwen3.5-9B
LENGTHS = (1024, 4096, 16384, 32768, 131072)


def _seconds(call, repeats):
    """Median time of a call, after a warm-up; several calls are queued so that launching one does not count alone."""
    mx.eval(call(), call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval([call() for _ in range(8)])
        times.append((time.perf_counter() - start) / 8)
    return statistics.median(times)


def _extra_bytes(call):
    """What one call needs at its peak beyond what was there before it: its output and its workspace."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(call())
    return mx.get_peak_memory() - before


def rows(lengths=LENGTHS, queries=1, repeats=9):
    """For each length a dict: tokens, and (milliseconds, extra bytes) of float16, MLX's 4-bit affine codes, TQ4 and TQ3;
    "failed: ..." instead for a kind that this backend cannot run."""
    mx.random.seed(0)
    for tokens in lengths:
        q = mx.random.normal((1, HEADS, queries, DIM)).astype(mx.float16)
        k, v = (mx.random.normal((1, KV_HEADS, tokens, DIM)).astype(mx.float16) for _ in range(2))
        mask = create_causal_mask(queries, tokens - queries) if queries > 1 else None
        name = "causal" if queries > 1 else None
        scale = DIM**-0.5
        affine = [mx.quantize(x, group_size=64, bits=4) for x in (k, v)]
        packed = {bits: (encode(k, bits), encode(v, bits)) for bits in (4, 3)}
        mx.eval(q, k, v, affine, packed, mask)

        def affine_call(q=q, affine=affine, mask=mask, scale=scale):
            return original_quantized_attention(q + 0, *affine, scale=scale, mask=mask, group_size=64, bits=4)

        def packed_call(bits, q=q, packed=packed, name=name, scale=scale):
            return attention(q, *packed[bits], scale=scale, mask=name, key_bits=bits, value_bits=bits)

        calls = {
            "float16": lambda q=q, k=k, v=v, name=name: mx.fast.scaled_dot_product_attention(
                q, k, v, scale=DIM**-0.5, mask=name
            ),
            "affine4": affine_call,
            "tq4": lambda: packed_call(4),
            "tq3": lambda: packed_call(3),
        }
        row = {"tokens": tokens}
        for kind, call in calls.items():
            try:
                row[kind] = 1e3 * _seconds(call, repeats), _extra_bytes(call)
            except Exception as error:  # a kind that this backend cannot run is a result too
                row[kind] = f"failed: {type(error).__name__}"
        yield row


def _cell(row, kind, memory):
    value, base = row[kind], row["float16"]
    if isinstance(value, str):
        return value
    text = f"{value[0]:.3f}"
    if kind != "float16" and not isinstance(base, str):
        text += f" ({base[0] / value[0]:.2f}x)"
    return text + (f", {value[1] / 2**20:.0f} MiB" if memory else "")


def table(title, found, memory=False):
    """Markdown: milliseconds a call, how many times faster than float16, and if asked what a call takes in memory."""
    kinds = ("float16", "affine4", "tq4", "tq3")
    more = "; with it the memory a call takes beside its inputs" if memory else ""
    lines = [f"{title}, ms a call (times faster than float16){more}", "", "| tokens | " + " | ".join(kinds) + " |"]
    lines.append("|---:" * (len(kinds) + 1) + "|")
    lines += [f"| {row['tokens']} | " + " | ".join(_cell(row, kind, memory) for kind in kinds) + " |" for row in found]
    return "\n".join(lines)


def report():
    """Prints the tables for the default device."""
    info = mx.device_info(mx.default_device())
    print(f"\n{info.get('device_name', mx.default_device())}, MLX {mx.__version__}")
    print(f"{HEADS} query heads, {KV_HEADS} KV heads, head_dim {DIM}, float16 queries, medians\n")
    print(table("one query", rows()))
    for queries, lengths in ((512, (8192, 32768)), (2048, (32768,))):
        print()
        print(table(f"{queries} causal queries", rows(lengths, queries=queries, repeats=5), memory=True))
