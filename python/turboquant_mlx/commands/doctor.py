"""What was found here, and whether it works: python -m turboquant_mlx doctor."""

import argparse
import copy
import math
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from .. import _checks, _core
from .._build_info import MLX_VERSION, NANOBIND_VERSION
from ..caches import BatchTurboQuantKVCache, TurboQuantKVCache
from ..ops import attention, decode, encode
from . import gpu_report

# |x - x^|^2 / |x|^2 of the codebooks for Gaussian coordinates (docs/format.md).
DISTORTION = {
    (2, "scalar"): 0.117482,
    (3, "scalar"): 0.034549,
    (4, "scalar"): 0.009506,
    (8, "scalar"): 0.000048,
    (2, "trellis"): 0.08483,
    (3, "trellis"): 0.02315,
}


def findings():
    """(name, what was found), each a line of the report."""
    gpu, why = _core.gpu_supported()
    yield "turboquant-kv-mlx", f"{version(_checks.DISTRIBUTION)} in {Path(_checks.__file__).resolve().parent}"
    yield "MLX", f"{mx.__version__} (built for {MLX_VERSION})"
    yield "nanobind", f"{NANOBIND_VERSION} (its ABI is MLX's: arrays are recognised)"
    yield "mlx-lm", version("mlx-lm")
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "device", f"{mx.default_device()}"
    yield "GPU kernels", "available" if gpu else f"none: {why}"
    yield (
        "CPU kernels",
        f"{_core.current_isa()} of {', '.join(_core.available_isas())}; {_core.num_threads()} threads",
    )
    if sys.platform == "linux" and mx.default_device() == mx.Device(mx.cpu):
        fast = "/libopenblas" in Path("/proc/self/maps").read_text()  # numpy brings one of another name
        yield (
            "BLAS",
            "OpenBLAS" if fast else "MLX's reference BLAS; LD_PRELOAD=libopenblas.so.0 multiplies much faster",
        )
    others = _checks.other_packages()
    yield (
        "import name",
        f"shared with {', '.join(others)}: uninstall the other, then reinstall this" if others else "ours alone",
    )


def _error(got, want):
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()


def _codec(bits, code):
    x = mx.random.normal((4096, 256))
    found = _error(decode(*encode(x, bits, code=code), bits, code=code), x) ** 2
    # The scale gives x^ the norm of x.  Vectors of a fixed norm err up to 3 % less than Gaussian ones.
    want = 2 - 2 * math.sqrt(1 - DISTORTION[bits, code])
    ok = 0.96 < found / want < 1.01
    return ok, f"distortion {found:.5f}, expected {want:.5f} or a little less"


def _attention(bits, code, queries):
    k, v = (mx.random.normal((1, 2, 300, 128)) for _ in range(2))
    q = mx.random.normal((1, 8, queries, 128))
    keys, values = encode(k, bits, code=code), encode(v, bits, code=code)
    got = attention(q, keys, values, scale=0.1, mask="causal", key_bits=bits, value_bits=bits, code=code)
    k, v = decode(*keys, bits, code=code), decode(*values, bits, code=code)
    found = _error(got, mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask="causal"))
    return found < 1e-3, f"{found:.1e} from MLX's attention on the decoded history"


def _caches():
    k = mx.random.normal((1, 2, 40, 64))
    cache = TurboQuantKVCache()
    cache.update_and_fetch(k, k)
    other = copy.deepcopy(cache)
    other.trim(10)
    other.update_and_fetch(k[:, :, 30:], k[:, :, 30:])
    row = BatchTurboQuantKVCache.merge([cache, other]).extract(1)
    again = TurboQuantKVCache.from_state((*row.state[:-1], str(row.state[-1])))
    pairs = zip(cache._core.view().arrays, again._core.view().arrays, strict=True)
    return all(
        mx.array_equal(a, b) for a, b in pairs
    ), "append, trim, copy, merge, extract, save and load keep the bytes"


def self_test():
    """(name, passed, what was found)."""
    mx.random.seed(0)
    for bits, code in DISTORTION:
        yield f"codec, {bits} bits, {code}", *_codec(bits, code)
    for bits, code in DISTORTION:
        for queries in (1, 4, 40):
            yield f"attention, {bits} bits, {code}, {queries} queries", *_attention(bits, code, queries)
    yield "caches", *_caches()


def _use_gpu(kind):
    """Makes the GPU asked for the default device; exits with the reason when there is none."""
    found = {"metal": mx.metal, "cuda": mx.cuda}[kind].is_available()
    supported, why = _core.gpu_supported()
    if not found or not supported:
        sys.exit(f"[doctor] --{kind}: MLX finds no such GPU here ({why})")
    mx.set_default_device(mx.gpu)


def _test_suite(kind):
    """Runs the table and the GPU tests of a source checkout, if this is one; returns their exit code."""
    tests = [Path.cwd() / "tests" / "python" / name for name in ("test_table.py", "test_gpu.py")]
    if not all(path.is_file() for path in tests):
        print("tests/python is not here: run this in a checkout to have the whole table tested")
        return 0
    marker = {"metal": "metal", "cuda": "gpu"}[kind]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", marker, *map(str, tests)], check=False
    ).returncode


def main(argv=None):
    """Prints the findings and runs the self-test; returns 1 when a test failed."""
    parser = argparse.ArgumentParser(prog="python -m turboquant_mlx doctor", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--metal", action="store_true", help="test and time the kernels on this Mac's GPU")
    which.add_argument("--cuda", action="store_true", help="test and time the kernels on this NVIDIA GPU")
    args = parser.parse_args(argv)
    kind = "metal" if args.metal else "cuda" if args.cuda else None
    if kind:
        _use_gpu(kind)
    for name, found in findings():
        print(f"{name:18} {found}")
    passed = True
    for name, ok, found in self_test():
        passed &= bool(ok)
        print(f"{'ok' if ok else 'FAILED':6} {name}: {found}")
    if kind:
        passed &= _test_suite(kind) == 0
        gpu_report.report()
    print("all is well" if passed else "the self-test failed: rebuild with make install, or report this output")
    return 0 if passed else 1
