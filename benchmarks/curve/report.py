"""Summary, pictures and table of the publication curve, from its raw rows alone."""

import json
import re
import statistics

from turboquant_mlx.eval.files import write_table
from turboquant_mlx.eval.pictures import line_style, pyplot

MEASURED = ("prompt_tps", "decode_tps", "first_token_s", "attention_bytes", "peak_bytes")
CODES = {"": "", "c": ", centred", "f": ", feedback"}


def cache_name(mode, activations):
    """The name of a mode in tables and pictures; a float cache is named by the numbers it holds."""
    if mode == "fp16":
        return f"{activations} cache"
    if match := re.fullmatch(r"affine(\d)", mode):
        return f"MLX affine, {match[1]} bits"
    bits, code, kind, recent, sink = re.fullmatch(r"(tq\d|k\dv\d)([ts]?)([cf]?)(?:r(\d+))?(?:s(\d+))?", mode).groups()
    name = (bits.upper() if bits.startswith("tq") else f"K{bits[1]} V{bits[3]}") + CODES[kind]
    name += {"": "", "t": ", trellis codes", "s": ", scalar codes"}[code]
    exact = [f"{what} {n}" for what, n in (("newest", recent), ("first", sink)) if n]
    return name + (f", {' and '.join(exact)} exact" if exact else "")


def ratios(rows, own, name):
    """(ratios of `own` rows' speeds to the float cache's in the same repetition, how many of those of decoding were not
    taken in turns).  A mode that was measured without the float cache beside it, as after an interruption, is compared
    with what the float cache did at another time."""
    out, apart = [], 0
    for r in own:
        if name == "decode_tps" and r.get("decode_ratio"):
            out.append(float(r["decode_ratio"]))
            continue
        for other in rows:
            same = all(other[k] == r[k] for k in ("scale", "prompt_tokens", "repetition", "synthetic"))
            if same and other["mode"] == "fp16" and other["status"] == "ok" and other[name] and r[name]:
                out.append(float(r[name]) / float(other[name]))
                apart += name == "decode_tps"
    return out, apart


def summarise(rows):
    """One row a context and mode: medians, and beside each speed the smallest and largest value and the median, smallest
    and largest ratio to the float cache's speed within a repetition."""
    out = []
    for key in dict.fromkeys((r["scale"], r["prompt_tokens"], r["mode"], r["synthetic"]) for r in rows):
        own = [r for r in rows if (r["scale"], r["prompt_tokens"], r["mode"], r["synthetic"]) == key]
        good = [r for r in own if r["status"] == "ok"]
        row = dict(zip(("scale", "prompt_tokens", "mode", "synthetic"), key, strict=True))
        row |= {"runs": len(own), "failed": len(own) - len(good)}
        for name in MEASURED:
            values = [float(r[name]) for r in good if r[name]]
            row[name] = statistics.median(values) if values else ""
            if name.endswith("_tps"):
                row[name + "_min"], row[name + "_max"] = (min(values), max(values)) if values else ("", "")
                found, apart = ratios(rows, good, name)
                for end, f in (("", statistics.median), ("_min", min), ("_max", max)):
                    row[name.replace("_tps", "_ratio") + end] = f(found) if found else ""
        row["decode_apart"] = apart
        row["elsewhere"] = sum(1 for r in own if r.get("elsewhere"))
        row["load_max"] = max((float(r["load"]) for r in good), default="")
        for name in ("fp16_equivalent_bytes", "linear_bytes", "kernel"):
            row[name] = good[0][name] if good else ""
        row["error"] = next((r["error"] for r in own if r["status"] != "ok"), "")
        out.append(row)
    return sorted(out, key=lambda r: int(r["prompt_tokens"]))


def machine(metadata):
    """(name of what computed, its host's)."""
    about = metadata["identity"]
    if "machine" in about:
        return about["machine"], about["host"]
    host = f"{metadata['processor']}, {metadata['cores']} cores"  # rows from before these were part of the identity
    return metadata["device_info"]["device_name"] if "gpu" in about["device"] else host, host


def draw(args, summary, metadata):
    """Speed and memory against context; lines differ in dash and marker as well as in colour."""
    plt = pyplot()
    read = {(r["mode"], r["prompt_tokens"]) for r in summary if not int(r["synthetic"]) and r["kernel"]}
    summary = [r for r in summary if not int(r["synthetic"]) or (r["mode"], r["prompt_tokens"]) not in read]
    panels = [("prompt_tps", "prompt, tokens/s", 1), ("decode_tps", "decode, tokens/s", 1)]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    modes = list(dict.fromkeys(r["mode"] for r in summary))
    for axis, (name, label, unit) in zip(
        axes, [*panels, ("attention_bytes", "attention caches, MiB", 2**-20)], strict=True
    ):
        for i, mode in enumerate(modes):
            own = [r for r in summary if r["mode"] == mode and r[name] != ""]
            x = [int(r["prompt_tokens"]) for r in own]
            axis.plot(
                x,
                [float(r[name]) * unit for r in own],
                label=cache_name(mode, metadata["activations"]),
                **line_style(i),
            )
        if name == "attention_bytes":
            own = [r for r in summary if r["mode"] == modes[0] and r["fp16_equivalent_bytes"]]
            if own and float(own[0]["attention_bytes"]) > 1.5 * float(own[0]["fp16_equivalent_bytes"]):
                x = [int(r["prompt_tokens"]) for r in own]
                y = [float(r["fp16_equivalent_bytes"]) * unit for r in own]
                axis.plot(x, y, label="float16 (computed)", color="0.5", linewidth=1)
        real = [int(r["prompt_tokens"]) for r in summary if not int(r["synthetic"])]
        filled = [int(r["prompt_tokens"]) for r in summary if int(r["synthetic"])]
        if filled and name != "prompt_tps":
            below = max((n for n in real if n < min(filled)), default=min(filled) / 4)
            first = (below * min(filled)) ** 0.5
            axis.axvspan(first, 1.2 * max(filled), color="0.92", label="caches filled synthetically")
        places = sorted({int(r["prompt_tokens"]) for r in summary if r[name] != ""})
        if places and places[-1] > 8 * places[0]:
            axis.set_xscale("log")
            axis.set_xticks(places, [f"{n / 1000:.3g}k" for n in places], rotation=60)
            axis.set_xticks([], minor=True)
        axis.set(xlabel="context, tokens", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize=8)
    figure.suptitle(f"{metadata['identity']['model']} on {machine(metadata)[0]}", fontsize=9)
    figure.tight_layout()
    for suffix in ("png", "svg"):
        figure.savefig(args.assets / f"curve.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)


def _number(value, unit=1.0, digits=1):
    return "" if value == "" else f"{float(value) * unit:.{digits}f}"


def _ratio(row, what):
    middle, low, high = (row[f"{what}_ratio{end}"] for end in ("", "_min", "_max"))
    if middle == "" or row["mode"] == "fp16":
        return ""
    spread = "" if low == high else f", {low:.2f} to {high:.2f}"
    return f" ({middle:.2f}x{spread})" + (" \\*" if what == "decode" and row["decode_apart"] else "")


def caption(summary, metadata):
    """What was measured, where, and how to read the table."""
    about, (name, host) = metadata["identity"], machine(metadata)
    most = max(r["runs"] - r["failed"] for r in summary)
    load = max((r["load_max"] for r in summary if r["load_max"] != ""), default=0)
    turns = f" in turns of {about['block']}" if "block" in about else ", one mode after the other"
    out = (
        f"{about['model']}; {name}{'' if name == host else f'; host {host}'}; activations {metadata['activations']}; MLX "
        f"{metadata['versions']['mlx']}; BLAS: {metadata['blas']}; linear attention: {about['linear_attention']}. Medians "
        f"of up to {most} {'run' if most == 1 else 'runs'} in rotated order; prompt read {about['step']} tokens at a time, "
        f"then {about['decode_tokens']} tokens decoded{turns}. In brackets the median (smallest to largest) of the ratios to "
        f"the {metadata['activations']} cache's speed within a repetition. The machine's load average went up to {load}."
    )
    if any(int(r["synthetic"]) for r in summary):
        out += " Rows marked (filled): caches filled with random numbers, no prompt was read; the peak is of decoding."
    if any(r["decode_apart"] for r in summary):
        out += " \\* measured without the float cache beside it: the ratio is between different times."
    if about.get("calibration") == "synthetic" and any(r["mode"][-1] in "cf" for r in summary):
        out += " Centres and feedback are random, as the weights are: their cost in time is the real ones'."
    if metadata["changed_files"]:
        out += f" {metadata['changed_files']} source files differed from the commit."
    if elsewhere := sum(r["elsewhere"] for r in summary):
        out += f" {elsewhere} runs come from another machine, version or commit (raw_rows.tsv says which)."
    return out


def _route(row, most):
    """The kernel, and what kept runs out of the median."""
    failed, error = row["failed"], row["error"]
    if len(error) > 100:
        error = error[:97] + "..."  # whole in the tables of rows
    if not row["kernel"]:
        return error if error.startswith("not run") else f"failed: {error}"
    if failed:
        return f"{row['kernel']} ({failed} of {row['runs']} runs failed: {error})"
    return row["kernel"] + (f" ({row['runs']} of {most} runs)" if row["runs"] < most else "")


def markdown(summary, metadata):
    """The report: a caption and a table in Markdown."""
    most = max(r["runs"] - r["failed"] for r in summary)
    lines = [
        caption(summary, metadata),
        "",
        "| context | cache | prompt tok/s | decode tok/s | first token s | attention MiB | of float16 | peak MiB "
        "| kernel |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in summary:
        context = f"{r['prompt_tokens']}{' (filled)' if int(r['synthetic']) else ''}"
        share = float(r["attention_bytes"]) / float(r["fp16_equivalent_bytes"]) if r["attention_bytes"] != "" else ""
        cells = [
            _number(r["prompt_tps"]) + _ratio(r, "prompt"),
            _number(r["decode_tps"]) + _ratio(r, "decode"),
            _number(r["first_token_s"], digits=2),
            _number(r["attention_bytes"], 2**-20, 2),
            f"{share:.3f}" if share else "",
            _number(r["peak_bytes"], 2**-20, 0),
            _route(r, most).replace("|", "/"),
        ]
        lines.append(f"| {context} | {cache_name(r['mode'], metadata['activations'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def into_readme(path, label, text):
    """Puts the text between this label's marks in the README's section, or adds them."""
    begin, end = f"<!-- curve {label} -->", f"<!-- end of curve {label} -->"
    block = f"{begin}\n### {label}\n\n{text}\n{end}"
    old = path.read_text() if path.exists() else "# Benchmarks\n"
    if "## Publication curve" not in old:
        old = (
            old.rstrip()
            + "\n\n## Publication curve\n\n`benchmarks/qwen35_9b_publication_curve.py` wrote these tables.\n"
        )
    if begin in old and end in old:
        head, rest = old.split(begin, 1)
        new = head + block + rest.split(end, 1)[1]
    else:
        head, rest = old.split("## Publication curve", 1)
        section, *after = rest.split("\n## ", 1)
        new = f"{head}## Publication curve{section.rstrip()}\n\n{block}\n" + (f"\n## {after[0]}" if after else "")
    path.write_text(new)


def write(args, rows):
    """summary_rows.tsv, the pictures and the table."""
    if not rows:
        raise ValueError(f"[curve] {args.out}/raw_rows.tsv holds no rows to report")
    metadata = json.loads((args.out / "run_metadata.json").read_text())
    summary = summarise(rows)
    write_table(args.out / "summary_rows.tsv", summary)
    draw(args, summary, metadata)
    label = args.label or f"{metadata['identity']['model']} on {machine(metadata)[0]}"
    text = markdown(summary, metadata)
    into_readme(args.readme, label, text)
    print(text)
