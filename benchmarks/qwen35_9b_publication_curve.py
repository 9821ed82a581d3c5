"""The publication curve: speed and memory against context for float and packed caches.

    python benchmarks/qwen35_9b_publication_curve.py --model path/to/Qwen3.5-9B-MLX-4bit
    python benchmarks/qwen35_9b_publication_curve.py --shape 9b --long      # the 9B's shape, random weights
    python benchmarks/qwen35_9b_publication_curve.py --model models/qwen35-tiny-4bit --out benchmarks/bundled-cpu

At each context and repetition the modes read the prompt one after the other and then decode in turns of some tokens
(curve_run.py).  Every run is one row of raw_rows.tsv, written when its context ends, so an interrupted sweep goes on
where it stopped; a run that fails is a row with its error.  Repetitions rotate the order of the modes.
summary_rows.tsv (medians), curve.png, curve.svg and the table of README.md are made from the raw rows alone (--report
makes them again).

Modes are those of `python -m turboquant_mlx eval`: fp16 (the model's own float caches), affine4, tq3, k4v3, tq3c (with the
model's centres), tq3f (with its centres and feedback).
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import curve_report
import mlx.core as mx
from curve_models import Subject, as_numpy, attention_slots, build_shape, prompt_tokens, synthetic_calibration
from curve_run import make_caches, measure
from mlx.utils import tree_flatten
from tqdm import tqdm
from turboquant_mlx import apply_patch
from turboquant_mlx.calibration import FILE_NAME, fingerprint, load_calibration
from turboquant_mlx.eval.model import load_model
from turboquant_mlx.eval.modes import parse_mode
from turboquant_mlx.gated_delta import disable_chunked_recurrence, enable_chunked_recurrence

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "scale prompt_tokens mode key_bits value_bits repetition status prompt_tps decode_tps decode_ratio first_token_s "
    "attention_bytes fp16_equivalent_bytes linear_bytes resident_bytes peak_bytes kernel load synthetic error"
).split()
LONG = (32768, 65536, 131072)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, help="a local model directory (default: the bundled model)")
    source.add_argument("--shape", choices=("9b",), help="random weights in this shape: speed and memory alone")
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "valid.txt", help="prompts come from it")
    parser.add_argument("--tokens", type=int, default=3600, help="prompt tokens at 1.00x")
    parser.add_argument("--scales", default="1,1.5,2.25,3")
    parser.add_argument("--modes", help="default: fp16,tq4,tq3,affine4, and tq3f where there is a calibration")
    parser.add_argument(
        "--calibration",
        type=Path,
        help="a directory or a file of `calibrate` (default: the model's; synthetic for --shape)",
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--block", type=int, default=16, help="tokens a mode decodes before the next mode's turn")
    parser.add_argument("--step", type=int, default=512, help="prompt tokens given to the model at a time")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run is recorded as failed")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds after which nothing is begun")
    parser.add_argument("--long", action="store_true", help="also 32K, 64K and 128K over synthetically filled caches")
    parser.add_argument("--loop", action="store_true", help="mlx-lm's own loop over tokens in linear attention")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", help="of the table in README.md (default: model and device)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the tables")
    parser.add_argument("--assets", type=Path, help="folder of the pictures (default: assets/, or --out when given)")
    parser.add_argument("--readme", type=Path, default=ROOT / "benchmarks" / "README.md")
    parser.add_argument("--fresh", action="store_true", help="forget rows of an earlier run in the folder")
    parser.add_argument("--report", action="store_true", help="measure nothing: summary, pictures and table again")
    args = parser.parse_args(argv)
    args.scales = [float(s) for s in args.scales.split(",")]
    if not args.shape:
        args.model = args.model or ROOT / "models" / "qwen35-tiny-4bit"
        if args.calibration is None and (args.model / FILE_NAME).is_file():
            args.calibration = args.model / FILE_NAME
    if args.modes is None:
        args.modes = "fp16,tq4,tq3,affine4" + (",tq3f" if args.shape or args.calibration else "")
    args.modes = args.modes.split(",")
    for name in args.modes:
        parse_mode(name)  # raises
    if (
        min(args.tokens * s for s in args.scales) < 2
        or min(args.repetitions, args.decode_tokens, args.block, args.step) < 1
    ):
        raise ValueError(
            "[curve] --tokens x --scales must be at least 2; --repetitions, --decode-tokens, --block, --step 1"
        )
    if args.assets is None:
        args.assets = ROOT / "assets" if args.out.resolve() == ROOT / "benchmarks" else args.out
    return args


def contexts(args):
    """(scale, prompt tokens, synthetic) of every context length."""
    out = [(f"{s:.2f}x", round(s * args.tokens), False) for s in args.scales]
    return out + [(f"{n // 1024}K", n, True) for n in LONG if args.long]


def command_output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor():
    if platform.system() == "Darwin":
        return command_output("sysctl", "-n", "machdep.cpu.brand_string")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def identity(args):
    """What rows must share to stand in one table."""
    return {
        "model": args.model.name if args.model else f"shape {args.shape}, random weights",
        "fingerprint": fingerprint(args.model) if args.model else None,
        "device": str(mx.default_device()),
        "tokens": args.tokens,
        "decode_tokens": args.decode_tokens,
        "block": args.block,
        "step": args.step,
        "seed": args.seed,
        "linear_attention": "mlx-lm's loop" if args.loop else "chunks of 64 off Metal",
    }


def metadata(args, subject):
    return {
        "identity": identity(args),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device_info": {
            k: v for k, v in mx.device_info().items() if isinstance(v, (str, int)) and k not in ("uuid", "pci_bus_id")
        },
        "blas": Path(os.environ.get("LD_PRELOAD", "")).name or "as MLX was built",
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("mlx", "mlx-lm", "turboquant-kv-mlx")},
        "commit": command_output("git", "rev-parse", "HEAD") or os.environ.get("TURBOQUANT_COMMIT"),
        "changed_files": len((command_output("git", "status", "--porcelain", "-uno") or "").splitlines()),
        "activations": str(subject.dtype).split(".")[-1],
        "weight_bytes": sum(v.nbytes for _, v in tree_flatten(subject.model.parameters())),
        "repetitions": args.repetitions,
        "order": f"rotated each repetition; decoded in turns of {args.block} tokens",
        "started_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "clock": "time.perf_counter",
    }


def read_rows(path):
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def previous_rows(args):
    """Rows of an interrupted sweep of the same identity; refuses a folder that holds another one's."""
    described = args.out / "run_metadata.json"
    rows = [] if args.fresh else read_rows(args.out / "raw_rows.tsv")
    if rows:
        before = json.loads(described.read_text()).get("identity", {}) if described.exists() else {}
        if differing := sorted(k for k, v in identity(args).items() if before.get(k) != v):
            raise ValueError(
                f"[curve] {args.out} holds rows of another run ({', '.join(differing)} differ): use --fresh or --out"
            )
    return rows


def plan_runs(args, rows):
    """What is not yet in `rows`: (scale, tokens, synthetic, repetition, modes in rotated order) of each context."""
    done = {(r["scale"], r["mode"], int(r["repetition"])) for r in rows}
    plan = []
    for repetition in range(args.repetitions):
        turn = repetition % len(args.modes)
        order = args.modes[turn:] + args.modes[:turn]
        for scale, tokens, synthetic in contexts(args):
            if modes := [mode for mode in order if (scale, mode, repetition) not in done]:
                plan.append((scale, tokens, synthetic, repetition, modes))
    return plan


def own_columns(subject, scale, tokens, synthetic, repetition, name):
    """What a row says before anything is measured; the bits of a float cache are its numbers'."""
    mode, width = parse_mode(name), 8 * subject.dtype.size
    key_bits, value_bits = (width, width) if mode.kind == "fp16" else (mode.key_bits, mode.value_bits)
    row = {"scale": scale, "prompt_tokens": tokens, "mode": name, "key_bits": key_bits, "value_bits": value_bits}
    return row | {"repetition": repetition, "synthetic": int(synthetic)}


def load(args):
    """The Subject, and its tokenizer."""
    model, tokenizer = (build_shape(args.shape), None) if args.shape else load_model(args.model)
    (disable_chunked_recurrence if args.loop else enable_chunked_recurrence)()
    slots = attention_slots(model)
    calibration = None
    if any(parse_mode(name).centred for name in args.modes):
        if args.shape:
            calibration = synthetic_calibration(slots, args.seed)
        else:
            calibration = as_numpy(load_calibration(args.calibration or args.model, directory=args.model))
    return Subject(model, slots, calibration), tokenizer


def sweep(args):
    rows = previous_rows(args)
    plan = plan_runs(args, rows)
    if not plan:
        return
    started = time.perf_counter()
    apply_patch()
    mx.random.seed(args.seed)
    subject, tokenizer = load(args)
    for name in args.modes:  # a model that cannot be packed is found before the work
        if parse_mode(name).kind == "tq":
            make_caches(subject, name)
    longest = max(tokens for _, tokens, synthetic in contexts(args) if not synthetic)
    prompt = prompt_tokens(subject.model, tokenizer, args.text, longest, args.seed)
    if not rows:
        (args.out / "run_metadata.json").write_text(json.dumps(metadata(args, subject), indent=1) + "\n")
    with (
        (args.out / "raw_rows.tsv").open("a" if rows else "w", newline="") as file,
        tqdm(total=sum(len(modes) for *_, modes in plan), unit="run") as bar,
    ):
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n", restval="")
        if not rows:
            writer.writeheader()
        warm = list(dict.fromkeys(mode for *_, modes in plan for mode in modes))
        # What fails in the warm-up, the rows will record.  On a GPU MLX compiles a kernel when it first meets a size, which
        # takes seconds, and a prompt's last chunk has its own.
        lengths = [2 * args.step]
        if mx.default_device() == mx.gpu:
            lengths += [args.step + n % args.step for _, n, synthetic in contexts(args) if not synthetic]
        for length in dict.fromkeys(lengths):
            measure(subject, args, warm, prompt[:length], length, False)
        for scale, tokens, synthetic, repetition, modes in plan:
            if time.perf_counter() - started > args.stop_after:
                print("[curve] stopped by --stop-after; the same command goes on from here", file=sys.stderr)
                break
            measured = measure(subject, args, modes, prompt[:tokens], tokens, synthetic)
            for mode in modes:
                own = own_columns(subject, scale, tokens, synthetic, repetition, mode)
                writer.writerow(own | measured[mode])
            file.flush()
            bar.update(len(modes))


def main(argv=None):
    try:
        args = parse(argv)
        for folder in (args.out, args.assets):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()  # an unwritable folder is found before the work
            (folder / ".writable").unlink()
        if not args.report:
            sweep(args)
        curve_report.write(args, read_rows(args.out / "raw_rows.tsv"))
    except KeyboardInterrupt:
        print("[curve] interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
