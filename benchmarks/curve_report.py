"""Summary, pictures and table of the publication curve, from its raw rows alone."""

import json
import re
import statistics

from turboquant_mlx.eval.command import write_table
from turboquant_mlx.eval.pictures import line_style, pyplot

MEASURED = ("prompt_tps", "decode_tps", "first_token_s", "attention_bytes", "peak_bytes")
CODES = {"": "", "c": ", centred", "f": ", feedback"}


def cache_name(mode, activations):
    """Of a mode, for people; a float cache is named by the numbers it holds."""
    if mode == "fp16":
        return f"{activations} cache"
    if match := re.fullmatch(r"affine(\d)", mode):
        return f"MLX affine, {match[1]} bits"
    bits, kind = re.fullmatch(r"(tq\d|k\dv\d)([cf]?)", mode).groups()
    return (bits.upper() if bits.startswith("tq") else f"K{bits[1]} V{bits[3]}") + CODES[kind]


def ratios(rows, own, name):
    """`own` rows' speeds over the float cache's in the same repetition; of decoding, those that were taken by turns."""
    out = []
    for r in own:
        if name == "decode_tps" and r.get("decode_ratio"):
            out.append(float(r["decode_ratio"]))
            continue
        for other in rows:
            same = all(other[k] == r[k] for k in ("scale", "prompt_tokens", "repetition", "synthetic"))
            if same and other["mode"] == "fp16" and other["status"] == "ok" and other[name] and r[name]:
                out.append(float(r[name]) / float(other[name]))
    return out


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
                found = ratios(rows, good, name)
                for end, f in (("", statistics.median), ("_min", min), ("_max", max)):
                    row[name.replace("_tps", "_ratio") + end] = f(found) if found else ""
        row["load_max"] = max((float(r["load"]) for r in good), default="")
        for name in ("fp16_equivalent_bytes", "linear_bytes", "kernel"):
            row[name] = good[0][name] if good else ""
        row["error"] = next((r["error"] for r in own if r["status"] != "ok"), "")
        out.append(row)
    return sorted(out, key=lambda r: int(r["prompt_tokens"]))


def machine(metadata):
    """The device that computed, and its host."""
    device, host = metadata["identity"]["device"], f"{metadata['processor']}, {metadata['cores']} cores"
    if "gpu" not in device:
        return f"{host}, {device}"
    return f"{metadata['device_info'].get('device_name', 'GPU')}, {device}; host {host}"


def draw(args, summary, metadata):
    """Speed and memory against context; lines differ in dash and marker as well as in colour."""
    plt = pyplot()
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
            first = (max(real) * min(filled)) ** 0.5 if real else min(filled) / 2
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
    figure.suptitle(f"{metadata['identity']['model']} on {machine(metadata)}", fontsize=9)
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
    return f" ({middle:.2f}x{spread})"


def markdown(summary, metadata):
    """The table for people."""
    about = metadata["identity"]
    runs, load = (max((r[k] for r in summary if r[k] != ""), default=0) for k in ("runs", "load_max"))
    turns = f" in turns of {about['block']}" if "block" in about else ", one mode after the other"
    filled = ""
    if any(int(r["synthetic"]) for r in summary):
        filled = (
            " Rows marked (filled): caches filled with random numbers, no prompt was read; the peak is of decoding."
        )
    lines = [
        f"{about['model']}; {machine(metadata)}; activations "
        f"{metadata['activations']}; MLX {metadata['versions']['mlx']}; BLAS: {metadata['blas']}; linear attention: "
        f"{about['linear_attention']}. Medians of up to {runs} runs in rotated order; prompt read "
        f"{about['step']} tokens at a time, then {about['decode_tokens']} tokens decoded{turns}. In brackets the median "
        f"(smallest to largest) of the ratios to the {metadata['activations']} cache's speed within a repetition. The machine's load average "
        f"went up to {load}.{filled}",
        "",
        "| context | cache | prompt tok/s | decode tok/s | first token s | attention MiB | of float16 | peak MiB "
        "| kernel |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in summary:
        context = f"{r['prompt_tokens']}{' (filled)' if int(r['synthetic']) else ''}"
        share = float(r["attention_bytes"]) / float(r["fp16_equivalent_bytes"]) if r["attention_bytes"] != "" else ""
        what = r["kernel"] or f"failed: {r['error']}"
        if r["failed"] and r["kernel"]:
            what += f" ({r['failed']} of {r['runs']} runs failed)"
        cells = [
            _number(r["prompt_tps"]) + _ratio(r, "prompt"),
            _number(r["decode_tps"]) + _ratio(r, "decode"),
            _number(r["first_token_s"], digits=2),
            _number(r["attention_bytes"], 2**-20, 2),
            f"{share:.3f}" if share else "",
            _number(r["peak_bytes"], 2**-20, 0),
            what.replace("|", "/"),
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
    label = args.label or f"{metadata['identity']['model']} on {metadata['identity']['device']}"
    into_readme(args.readme, label, markdown(summary, metadata))
    print(markdown(summary, metadata))
