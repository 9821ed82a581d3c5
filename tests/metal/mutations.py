"""Breaks the Metal kernels one line at a time, and expects the tests to notice.

    python tests/metal/mutations.py BUILD_DIRECTORY [NAME ...]

The sources are copied to BUILD_DIRECTORY/mutant, built once as they are (the tests must pass), and rebuilt with each
mutation (the tests must fail).  Takes about a minute a mutation.
"""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# name: (file, text, replacement).  The text must occur.
MUTATIONS = {
    "spare bits of TQ3 from the wrong word": (
        "attention.metal", "(words[1] >> 2 & 0x22222222u)", "(words[0] >> 2 & 0x22222222u)"),
    "no maximum carried between blocks": (
        "decode.metal", "const float top = fmax(m[r], simd_max(score));", "const float top = simd_max(score);"),
    "sums not rescaled when the maximum moves": (
        "decode.metal", "x[8 * r + i] *= old;", "x[8 * r + i] *= 1.0f;"),
    "a barrier less between scores and weights": (
        "decode.metal",
        "block, range.y, mine, lane, simdgroup);\n    simdgroup_barrier(mem_flags::mem_threadgroup);",
        "block, range.y, mine, lane, simdgroup);"),
    "reads one row beyond the last": (
        "decode.metal", "min(block + t, last - 1)", "min(block + t, last)"),
    "a barrier that only some SIMD-groups reach": (
        "prefill.metal", "threadgroup_barrier(mem_flags::mem_threadgroup);\n    unpack_tile<VB, D>",
        "if (simdgroup) threadgroup_barrier(mem_flags::mem_threadgroup);\n    unpack_tile<VB, D>"),
    "no barrier before the values replace the keys": (
        "prefill.metal", "threadgroup_barrier(mem_flags::mem_threadgroup);\n    unpack_tile<VB, D>", "unpack_tile<VB, D>"),
    "a tile without the padding of its rows": (
        "prefill.metal", "TQ_ARRAY(half, tile, metal_layout::kBlock * (D + 8))",
        "TQ_ARRAY(half, tile, metal_layout::kBlock * D)"),
    "one number beyond a row in threadgroup memory": (
        "decode.metal", "shared->q[r][32 * i + lane] = half(x[i]);", "shared->q[r][32 * i + lane + 1] = half(x[i]);"),
    "keys not transposed": (
        "prefill.metal", "pitch, ulong2(0, 0), true)", "pitch, ulong2(0, 0), false)"),
    "window one key too wide": (
        "attention.metal", "position - window + 1", "position - window"),
    "hidden NaN gets through": (
        "decode.metal", "score == -INFINITY ? 0.0f : weight * scale_v", "weight * scale_v"),
    "sinks forgotten": (
        "attention.metal", "total = sum * part + exp2_difference(sink, top);", "total = sum * part;"),
    "threshold off by one level": (
        "codec.metal", "float(double_threshold(B, k))", "float(double_threshold(B, k) + 1)"),
    "signs forgotten on the way back": (
        "common.metal", "x[r] = with_sign(x[r] * hadamard_scale<D>(),", "x[r] = with_sign(x[r] * hadamard_scale<D>(), 0u *"),
}


def run(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test(build):
    """Builds and runs; returns the failures' first lines, or None when all tests pass."""
    made = run("cmake", "--build", str(build), "--target", "turboquant_metal_tests", "-j", "2")
    if made.returncode:
        raise SystemExit("a mutation must compile:\n" + made.stdout[-3000:])
    tests = run(str(build / "tests/metal/turboquant_metal_tests"), "--gtest_brief=1")
    if tests.returncode == 0:
        return None
    failed = [line for line in tests.stdout.splitlines() if line.startswith("[  FAILED  ]")]
    reason = next((line for line in tests.stdout.splitlines() if "emulator]" in line or "actual" in line), "")
    return f"{len(failed)} tests fail, the first: {reason.strip()[:160]}" if failed else f"crash ({tests.returncode})"


def main():
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    copy = pathlib.Path(sys.argv[1]).resolve() / "mutant"
    shutil.rmtree(copy / "source", ignore_errors=True)
    ignore = shutil.ignore_patterns("build", ".git", ".venv", "models", "assets")
    shutil.copytree(ROOT, copy / "source", ignore=ignore)
    build = copy / "build"
    run("cmake", "-S", str(copy / "source"), "-B", str(build))
    failure = test(build)
    if failure:
        raise SystemExit("the unchanged kernels fail: " + failure)
    survivors = []
    for name, (file, text, replacement) in MUTATIONS.items():
        if len(sys.argv) > 2 and not any(wanted in name for wanted in sys.argv[2:]):
            continue
        path = copy / "source/src/metal" / file
        original = path.read_text()
        if text not in original:
            raise SystemExit(f"{name}: {file} no longer has {text!r}")
        path.write_text(original.replace(text, replacement))
        failure = test(build)
        path.write_text(original)
        print(f"{name}: {failure or 'NOT NOTICED'}", flush=True)
        if failure is None:
            survivors.append(name)
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
