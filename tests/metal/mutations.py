"""Breaks the Metal kernels one line at a time, and expects the tests to notice.

    python tests/metal/mutations.py BUILD_DIRECTORY [NAME ...]

The sources are copied to BUILD_DIRECTORY/mutant, built once as they are (the tests must pass), and rebuilt with each
mutation (the tests must fail).  The tests are those without the shared table, which take half the time.  Prints a table
for docs/metal.md.  Takes about a minute a mutation.
"""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# name: (file, text, replacement).  The text must occur.
MUTATIONS = {
    "spare bits of TQ3 from the wrong word": (
        "unpack.metal",
        "(packed[1] >> 2 & 0x22222222u)",
        "(packed[0] >> 2 & 0x22222222u)",
    ),
    "no maximum carried between blocks": (
        "few_rows.metal",
        "top = fmax(softmax.m[r], simd_max(score));",
        "top = simd_max(score);",
    ),
    "sums not rescaled when the maximum moves": (
        "few_rows.metal",
        "softmax.x[8 * (R * s + r) + i] *= old;",
        "softmax.x[8 * (R * s + r) + i] *= V::kPairTables ? old : 1.0f;",
    ),
    "a barrier less between scores and weights": (
        "few_rows.metal",
        "mine, lane, simdgroup);\n      simdgroup_barrier(mem_flags::mem_threadgroup);",
        "mine, lane, simdgroup);",
    ),
    "a barrier less between weights and values": (
        "few_rows.metal",
        "    simdgroup_barrier(mem_flags::mem_threadgroup);\n    const int count",
        "    const int count",
    ),
    "a SIMD-group function in place of a barrier": (
        "few_rows.metal",
        "mine, lane, simdgroup);\n      simdgroup_barrier(mem_flags::mem_threadgroup);",
        "mine, lane, simdgroup);\n      simd_any(true);",
    ),
    "no barrier before the sums of SIMD-groups": (
        "few_rows.metal",
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n  for (int g = 0;",
        "for (int g = 0;",
    ),
    "2 bits: sums not rescaled when the maximum moves": (
        "few_rows.metal",
        "softmax.x[8 * (R * s + r) + i] *= old;",
        "softmax.x[8 * (R * s + r) + i] *= V::kPairTables ? 1.0f : old;",
    ),
    "2 bits: half of the second code of a pair": (
        "few_rows_pairs.metal",
        "(b >> shift & 0x33333333u) << 2",
        "(b >> shift & 0x11111111u) << 2",
    ),
    "2 bits: hidden NaN gets through": (
        "few_rows.metal",
        "hidden ? -INFINITY : score + log2_scale_v",
        "score + log2_scale_v",
    ),
    "2 bits: the wrong coordinate shares a nibble": (
        "few_rows_pairs.metal",
        "shared->x[r][coordinate + 16]",
        "shared->x[r][coordinate + 8]",
    ),
    "2 bits: a barrier less before the pairs' table is read": (
        "few_rows_pairs.metal",
        "kBothSigns)] = negative;\n    simdgroup_barrier(mem_flags::mem_threadgroup);",
        "kBothSigns)] = negative;",
    ),
    "2 bits: a barrier less before the pairs' table is written again": (
        "few_rows_pairs.metal",
        "      }\n    }\n    simdgroup_barrier(mem_flags::mem_threadgroup);\n  }\n}",
        "      }\n    }\n  }\n}",
    ),
    "2 bits: the other half of the keys' table not negative": (
        "few_rows_pairs.metal",
        "negative[r] = -dots[r];",
        "negative[r] = dots[r];",
    ),
    "2 bits: the other half of the values' table not negative": (
        "few_rows_pairs.metal",
        "negative[r] = -sums[r];",
        "negative[r] = sums[r];",
    ),
    "prefill: NaN in a fragment": (
        "prefill.metal",
        "half(fits ? exp2_difference(with_scale, top_v) : 0.0f)",
        "half(exp2_difference(with_scale, top_v))",
    ),
    "prefill: garbage beside the diagonal": ("prefill.metal", "  diagonal[lane + 32] = 0.0f;\n", ""),
    "sums start from what was there": (
        "few_rows.metal",
        "(g == 0 ? 0.0f : shared->x[r][d])",
        "shared->x[r][d]",
    ),
    "prefill: a float32 query without its second half": (
        "prefill.metal",
        "part ? half(x[k] - float(rounded)) : rounded",
        "part ? half(0.0f) : rounded",
    ),
    "tiles and splits exchanged": (
        "few_rows.metal",
        "tile = place.group.x, split = place.group.y",
        "tile = place.group.y, split = place.group.x",
    ),
    "a split of NaN forgotten": (
        "attention.metal",
        "sum += in.stats[its + metal_layout::kSum] * factor;",
        "sum += factor == 0.0f ? 0.0f : in.stats[its + metal_layout::kSum] * factor;",
    ),
    "partial results without their unit": (
        "attention.metal",
        "factor * in.stats[its + metal_layout::kLargest]",
        "factor",
    ),
    "prefill: the values' own maximum the wrong way round": (
        "prefill.metal",
        "exp2_difference(of_row.mv, of_row.m)",
        "exp2_difference(of_row.m, of_row.mv)",
    ),
    "the scales of values bound as those of keys": (
        "../launch.h",
        '{"key_scales", a.key_scales}',
        '{"key_scales", a.value_scales}',
    ),
    "codes with the sign turned": (
        "codec.metal",
        "x < 0.0f ? m + magnitudes(B) : m",
        "x > 0.0f ? m + magnitudes(B) : m",
    ),
    "reads one row beyond the last": ("few_rows.metal", "min(t, last - 1 - block)", "min(t, last - block)"),
    "a barrier that only some SIMD-groups reach": (
        "prefill.metal",
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    unpack_tile<V, D>",
        "if (simdgroup) threadgroup_barrier(mem_flags::mem_threadgroup);\n    unpack_tile<V, D>",
    ),
    "no barrier before the values replace the keys": (
        "prefill.metal",
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    unpack_tile<V, D>",
        "unpack_tile<V, D>",
    ),
    "a tile without the padding of its rows": (
        "prefill.metal",
        "TQ_ARRAY(half, tile, metal_layout::kBlock * (D + 8))",
        "TQ_ARRAY(half, tile, metal_layout::kBlock * D)",
    ),
    "one number beyond a row in threadgroup memory": (
        "few_rows.metal",
        "shared->q[r][16 * i + pair_index<K>(lane)]",
        "shared->q[r][16 * i + pair_index<K>(lane) + 1]",
    ),
    "keys not transposed": ("prefill.metal", "pitch, ulong2(0, 0), true)", "pitch, ulong2(0, 0), false)"),
    "window one key too wide": ("attention.metal", "position - window + 1", "position - window"),
    "hidden NaN gets through": ("few_rows.metal", "hidden ? 0.0f : weight * scale_v", "weight * scale_v"),
    "keys' centre not taken from the sink": (
        "attention.metal",
        "(float(ending.sinks[row.head]) - shift) * log2_e()",
        "(float(ending.sinks[row.head]) - shift * 0.0f) * log2_e()",
    ),
    "additive mask in the wrong base": ("attention.metal", "fma(value, log2_e(), score)", "value + score"),
    "sinks forgotten": ("attention.metal", "total = sum * part + exp2_difference(sink, top);", "total = sum * part;"),
    "threshold off by one level": ("codec.metal", "float(double_threshold(B, k))", "float(double_threshold(B, k) + 1)"),
    "signs forgotten on the way back": (
        "common.metal",
        "x[r] = with_sign(x[r] * hadamard_scale<D>(),",
        "x[r] = with_sign(x[r] * hadamard_scale<D>(), 0u *",
    ),
    "trellis, keys: rotated by a wrong amount": (
        "unpack.metal",
        "u1 = rotate(u, 1u), u3 = rotate(u, 3u)",
        "u1 = rotate(u, 1u), u3 = rotate(u, 2u)",
    ),
    "trellis, values: rotated by a wrong amount": (
        "unpack.metal",
        "near = rotate(u, part & 1 ? 3u : 1u)",
        "near = rotate(u, part & 1 ? 3u : 2u)",
    ),
    "trellis, keys: a group's edge treated as open": ("unpack.metal", "u3 = rotate(u, 3u);", "u3 = u << 3u;"),
    "trellis, values: a group's edge treated as open": (
        "unpack.metal",
        "far = rotate(u, part & 1 ? 1u : 3u)",
        "far = u << (part & 1 ? 1u : 3u)",
    ),
    "trellis: the other subset's order": ("unpack.metal", "+ 2 * z1 + z0)", "+ 2 * z0 + z1)"),
    "trellis: w of the neighbour": ("unpack.metal", "w >> (word & 1) & 1 : w", "w >> (1 - (word & 1)) & 1 : w"),
    "trellis: halves of nibbles not exchanged": (
        "unpack.metal",
        "words[2] = change02 ^ a;",
        "words[2] = change02 ^ p02;",
    ),
    "search: a path need not close": (
        "trellis.metal",
        "s == (back ? reversed(start) : start) ? 0.0f : 1e30f",
        "back || s == start ? 0.0f : 1e30f",
    ),
    "search: the same subsets on the way back": (
        "trellis.metal",
        "differ && back ? its[z ^ 3]",
        "differ && !back ? its[z ^ 3]",
    ),
    "search: u of the way back a step off": ("trellis.metal", "back ? 28 - i : i", "back ? 29 - i : i"),
    "search: u of the last steps forgotten": ("trellis.metal", "uint(reversed(start)) << 29", "0u"),
    "search: the first of 8 states alone": (
        "trellis.metal",
        "select(best, its, other < least)",
        "select(best, its, step == 0 && other < least)",
    ),
    "search: no barrier before costs are read": (
        "trellis.metal",
        "simdgroup_barrier(mem_flags::mem_threadgroup);\n  const uint path",
        "const uint path",
    ),
    "search: no barrier before costs are written again": (
        "trellis.metal",
        "simdgroup_barrier(mem_flags::mem_threadgroup);  // after the search before",
        "",
    ),
    "search: the second level of a subset": ("trellis.metal", "select(its, uint(w), square < least)", "uint(w)"),
    "feedback: a trellis at the plain unit": ("codec.metal", "feedback_unit(K::kBits)", "unit(K::kBits, K::kTrellis)"),
    "decode: a trellis without its subsets": ("codec.metal", "* 4 + subset_of(", "* 4 + 0 * subset_of("),
    "8 bits: the sign not turned": ("unpack.metal", "^ 0x64806480u", "^ 0x64006400u"),
    "8 bits: neighbours as pairs": ("unpack.metal", "return K::kTables == 0 ? 2 : 1;", "return 1;"),
    "8 bits: beyond the largest level": (
        "codec.metal",
        "fmin(0.5f * doubled + 0.5f, 127.0f)",
        "(0.5f * doubled + 0.5f)",
    ),
    "8 bits: not at the largest coordinate's unit": ("codec.metal", "127.0f / simd_max(largest)", "127.0f / largest"),
    "a scale beyond the largest half": ("codec.metal", "fmin(scale, largest_scale())", "scale"),
    "copies: codes of the same tokens too": ("attention.metal", "row.last = min(row.last, row.recent);", ""),
    "copies: the first tokens twice": ("attention.metal", "row.first = max(row.first, row.first_end);", ""),
    "copies: a token in both places read twice": ("attention.metal", "min(row.first_end, row.recent)", "row.first_end"),
    "copies: the ring a token off": ("attention.metal", "return newest - (", "return newest - 1 - ("),
    "copies: a block's older tokens left out": (
        "attention.metal",
        "(before < tokens.y &&",
        "(false && before < tokens.y &&",
    ),
    "copies: their splits forgotten": (
        "attention.metal",
        "  add_splits<D>(copies, first_copy, copy_splits, m, sum, x, lane);\n",
        "",
    ),
    "feedback with the sign turned": ("codec.metal", "target -= moved;", "target += moved;"),
    "feedback: errors against the targets": (
        "codec.metal",
        "error[b] = float(nearest) - u[b];",
        "error[b] = float(nearest) - target;",
    ),
    "feedback: a block's own errors": (
        "codec.metal",
        "if (r >= b) continue;",
        "if (r > b) continue;\n          if (r == b) error[b] = float(level(B, int(code[b]))) - u[b];",
    ),
    "feedback: not at the nearest codes' scale": ("codec.metal", "float(D / odd_part(D))", "float(D)"),
    "feedback of the first head for all": ("codec.metal", "feedback + h * (D * D)", "feedback + h * 0"),
    "feedback of the first side for both": ("../launch.h", '"y_feedback", feedback[1]', '"y_feedback", feedback[0]'),
}


def run(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test(build):
    """Builds and runs; returns (tests that fail, the first of them, what it says), or None when all tests pass."""
    made = run("cmake", "--build", str(build), "--target", "turboquant_metal_tests", "-j", "2")
    if made.returncode:
        raise SystemExit("a mutation must compile:\n" + made.stdout[-3000:])
    tests = run(str(build / "tests/metal/turboquant_metal_tests"))
    if tests.returncode == 0:
        return None
    failed, running, first, reason = set(), "", "", ""
    for line in tests.stdout.splitlines():
        if line.startswith("[ RUN      ] "):
            running = line[13:]
        elif line.startswith("[  FAILED  ] "):
            failed.add(line[13:].split(",")[0].split(" (")[0])
        elif not reason and (
            "[emulator]" in line or "actual" in line or "Which is" in line or "The difference" in line
        ):
            first, reason = running, line.strip()
    failed = {name for name in failed if "." in name}
    if not failed:
        return "the program ends", running, f"signal {-tests.returncode}"
    return str(len(failed)), first, reason


def main():
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    copy = pathlib.Path(sys.argv[1]).resolve() / "mutant"
    shutil.rmtree(copy / "source", ignore_errors=True)
    ignore = shutil.ignore_patterns("build", ".git", ".venv", "models", "assets")
    shutil.copytree(ROOT, copy / "source", ignore=ignore)
    for path in (copy / "source/src/metal/device").iterdir():
        path.touch()  # an interrupted run may have left objects of a mutation
    build = copy / "build"
    run("cmake", "-S", str(copy / "source"), "-B", str(build), "-DTURBOQUANT_METAL_VARIANTS_ONLY=ON")
    failure = test(build)
    if failure:
        raise SystemExit("the unchanged kernels fail: " + ", ".join(failure))
    print("| mutation | tests that fail | the first | what it says |\n| --- | --- | --- | --- |", flush=True)
    survivors = []
    for name, (file, text, replacement) in MUTATIONS.items():
        if len(sys.argv) > 2 and not any(wanted in name for wanted in sys.argv[2:]):
            continue
        path = copy / "source/src/metal/device" / file
        original = path.read_text()
        if text not in original:
            raise SystemExit(f"{name}: {file} no longer has {text!r}")
        path.write_text(original.replace(text, replacement))
        failure = test(build)
        path.write_text(original)
        count, first, reason = failure or ("NONE", "", "")
        print(f"| {name} | {count} | `{first}` | `{reason[:140]}` |", flush=True)
        if failure is None:
            survivors.append(name)
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
