"""`python -m turboquant_mlx eval`: one command from a model and a text to tables and pictures."""

import argparse
import csv
import json
import math
import sys
from pathlib import Path

from mlx_lm.models.cache import KVCache
from tqdm import tqdm

from ..cache import leaves
from ..calibration import _float_caches, calibrate, fingerprint, load_calibration
from . import divergence, pictures, reconstruction, retrieval
from .model import cut_windows, load_model, read_tokens, spread_windows, window_numbers
from .modes import parse_mode

PARTS = ("divergence", "needle", "list", "reconstruction")


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="turboquant_mlx eval",
        description="Perplexity, KL divergence, retrieval and reconstruction error of packed caches.",
    )
    parser.add_argument("--model", type=Path, required=True, help="a local model directory")
    parser.add_argument("--text", type=Path, required=True, help="held-out text: windows and filler come from it")
    parser.add_argument("--out", type=Path, required=True, help="a folder for TSV, JSON and pictures")
    parser.add_argument(
        "--modes",
        default="fp16,affine4,tq4,tq3,tq2",
        help="fp16, affine4, tq3, k4v3, tq3c (centred), tq3f (with feedback)",
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=4, help="how many of them")
    parser.add_argument("--first-window", type=int, default=0, help="number of the first window in the text")
    parser.add_argument("--without", default="", help="numbers of windows to leave out, as those of calibration: 8,17")
    parser.add_argument("--batch", type=int, default=6, help="windows read side by side")
    parser.add_argument("--step", type=int, default=256, help="positions given to the model at a time")
    parser.add_argument("--lengths", default="1024,4096", help="needle contexts, tokens")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="needle places, 0 is the context's beginning")
    parser.add_argument("--trials", type=int, default=1, help="contexts a length, and lists")
    parser.add_argument("--pairs", type=int, default=50, help="keys in a list")
    parser.add_argument(
        "--calibration", type=Path, help="a model directory or a file of `calibrate` (default: the model's)"
    )
    parser.add_argument("--calibrate-text", type=Path, help="calibrate with 8 windows spread over this text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.modes = [parse_mode(name) for name in args.modes.split(",")]
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - set(PARTS):
        raise ValueError(f"[eval] --parts are {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    args.lengths = [int(x) for x in args.lengths.split(",")]
    args.depths = [float(x) for x in args.depths.split(",")]
    args.without = {int(x) for x in args.without.split(",") if x}
    if (
        min(args.context, args.windows, args.batch, args.step, args.trials, args.pairs, *args.lengths) < 1
        or args.first_window < 0
    ):
        raise ValueError(
            "[eval] --context, --windows, --batch, --step, --trials, --pairs and --lengths must be at least 1"
        )
    if len(args.depths) > len(retrieval.NAMES) or not all(0 <= d <= 1 for d in args.depths):
        raise ValueError(f"[eval] --depths must be at most {len(retrieval.NAMES)} numbers from 0 to 1")
    return args


def write_table(path, rows):
    """A TSV with the keys of the first row as its header."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


class _Bar:
    def __init__(self, name, total):
        self.bar = tqdm(total=total, desc=name, unit="tok", disable=None)

    def __call__(self, tokens):
        self.bar.update(tokens)

    def close(self):
        self.bar.close()


def _divergence(args, model, tokens, calibration):
    windows = cut_windows(tokens, args.context, args.windows, args.first_window, args.without)
    bar = _Bar("divergence", windows.size * len(args.modes))
    parts = []
    for start in range(0, len(windows), args.batch):
        caches = {mode.name: mode.make_caches(model, calibration) for mode in args.modes}
        parts.append(
            divergence.compare(model, windows[start : start + args.batch], caches, step=args.step, progress=bar)
        )
        records = {name: divergence.joined([part[name] for part in parts]) for name in caches}
        rows = _divergence_tables(args, records)  # after each batch: what was measured stays when the rest is not
    bar.close()
    pictures.divergence_by_position(args.out / "divergence.png", rows, args.modes[0].name)
    print(f"{'mode':10} {'perplexity':>10} {'change':>8} {'+-':>6} {'mean KLD':>9} {'99 %':>7} {'top-1':>7}")
    for r in rows:
        if r["band"] == "all":
            print(
                f"{r['mode']:10} {r['perplexity']:10.3f} {r['perplexity_change']:+8.2%} "
                f"{r['perplexity_change_stderr']:6.2%} {r['mean_kld']:9.5f} {r['p99_kld']:7.4f} {r['top1_agreement']:7.2%}"
            )
    return rows


def _divergence_tables(args, records):
    """Writes divergence.tsv (by mode and band) and windows.tsv (by mode and window); returns the first one's rows."""
    first = args.modes[0].name
    rows = []
    for name, record in records.items():
        for start, stop in [(0, args.context), *divergence.bands(args.context)]:
            whole = (start, stop) == (0, args.context) and not any(r["mode"] == name for r in rows)
            figures = divergence.summarise(record, records[first], start, stop)
            rows.append({"mode": name, "band": "all" if whole else "part", "start": start, "stop": stop, **figures})
    write_table(args.out / "divergence.tsv", rows)
    own, numbers = [], window_numbers(args.windows, args.first_window, args.without)
    for name, record in records.items():
        for number, nll, kld, agree in zip(numbers, record.nll, record.kld, record.agree, strict=False):
            figures = {"nll": float(nll.mean()), "mean_kld": float(kld.mean()), "top1_agreement": float(agree.mean())}
            own.append({"mode": name, "window": number, **figures})
    write_table(args.out / "windows.tsv", own)
    return rows


def _needle(args, model, tokenizer, tokens, calibration):
    bar = _Bar("needles", sum(args.lengths) * args.trials * len(args.modes))
    rows = []
    for mode in args.modes:
        for length in args.lengths:
            for trial in range(args.trials):
                rng = retrieval.seeded(args.seed, length, trial)
                context, questions = retrieval.needle_context(tokenizer, tokens, length, args.depths, rng)
                caches = mode.make_caches(model, calibration)
                for a in retrieval.ask(model, tokenizer, caches, context, questions, progress=bar):
                    row = {"mode": mode.name, "tokens": length, "depth": a.depth, "trial": trial}
                    rows.append({**row, "passed": int(a.passed), "log_prob": a.log_prob})
    bar.close()
    write_table(args.out / "needle.tsv", rows)
    cells = {mode.name: {} for mode in args.modes}
    for mode in cells:
        for length in args.lengths:
            for depth in args.depths:
                own = [r for r in rows if (r["mode"], r["tokens"], r["depth"]) == (mode, length, depth)]
                cells[mode][length, depth] = sum(r["passed"] for r in own) / len(own)
    pictures.needle_heat_map(args.out / "needle.png", cells, args.lengths, args.depths)
    return _retrieved("needles", rows)


def _list(args, model, tokenizer, tokens, calibration):
    bar = _Bar("lists", len(args.modes) * args.trials * (1000 + 20 * args.pairs))
    rows = []
    for mode in args.modes:
        for trial in range(args.trials):
            rng = retrieval.seeded(args.seed, args.pairs, trial)
            context, questions = retrieval.list_context(tokenizer, tokens, args.pairs, 1000, rng)
            caches = mode.make_caches(model, calibration)
            for place, a in enumerate(retrieval.ask(model, tokenizer, caches, context, questions, progress=bar)):
                row = {"mode": mode.name, "tokens": a.tokens, "place": place, "trial": trial}
                rows.append({**row, "passed": int(a.passed), "log_prob": a.log_prob})
    bar.close()
    write_table(args.out / "list.tsv", rows)
    return _retrieved("look-ups", rows)


def _retrieved(what, rows):
    """Prints and returns {mode: (found, asked, mean log-probability of the answers)}."""
    summary = {}
    for mode in dict.fromkeys(r["mode"] for r in rows):
        own = [r for r in rows if r["mode"] == mode]
        mean = sum(r["log_prob"] for r in own) / len(own)
        summary[mode] = {"found": sum(r["passed"] for r in own), "asked": len(own), "mean_log_prob": mean}
        print(f"{what:9} {mode:10} {summary[mode]['found']:4d} of {len(own):4d}   log-probability {mean:.4f}")
    return summary


def _reconstruction(args, model, tokens, calibration):
    captured = reconstruction.capture(
        model, cut_windows(tokens, args.context, args.windows, args.first_window, args.without)
    )
    rows = []
    for bits in sorted({b for m in args.modes if m.kind == "tq" for b in (m.key_bits, m.value_bits)}):
        least, stored = reconstruction.theoretical(bits)
        for row in reconstruction.table(captured, bits, calibration):
            rows.append({"bits": bits, **row, "lloyd_max": least, "lloyd_max_same_length": stored})
    if rows:
        write_table(args.out / "reconstruction.tsv", rows)
    return rows


def run(args):
    """Everything the arguments ask for; returns the summary that is also written as JSON."""
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "summary.json").write_text("{}\n")  # an unwritable folder is found before the work
    pictures.pyplot()
    model, tokenizer = load_model(args.model)
    if not any(type(c) is KVCache for _, c in leaves(_float_caches(model))):
        raise ValueError(f"[eval] {args.model} has no KVCache slot, so there is nothing to compress")
    tokens = read_tokens(tokenizer, args.text)
    calibration, source = None, None
    if args.calibrate_text:
        text = read_tokens(tokenizer, args.calibrate_text)
        calibration = calibrate(model, spread_windows(text, min(2048, len(text)), 8))
        source = args.calibrate_text.name
    elif args.calibration or any(mode.centred for mode in args.modes):
        calibration = load_calibration(args.calibration or args.model, directory=args.model)
        source = "file"
    summary = {
        "model": args.model.name,
        "fingerprint": fingerprint(args.model),
        "text": args.text.name,
        "windows": [args.first_window, args.windows, args.context],
        "without": sorted(args.without),
        "seed": args.seed,
        "calibration": source,
    }
    if "divergence" in args.parts:
        summary["divergence"] = _divergence(args, model, tokens, calibration)
    if "reconstruction" in args.parts:
        summary["reconstruction"] = _reconstruction(args, model, tokens, calibration)
    if "list" in args.parts:
        summary["list"] = _list(args, model, tokenizer, tokens, calibration)
    if "needle" in args.parts:
        summary["needle"] = _needle(args, model, tokenizer, tokens, calibration)
    text = json.dumps(_plain(summary), indent=1)
    (args.out / "summary.json").write_text(text + "\n")
    return summary


def _plain(x):
    """JSON has no NaN."""
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def main(argv=None):
    """Entry of the command line; returns the exit status."""
    try:
        run(_parse(argv))
    except (ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
