"""The publication curve: speed and memory against context for float and packed caches.

    python benchmarks/qwen35_9b_publication_curve.py --model path/to/Qwen3.5-9B-MLX-4bit
    python benchmarks/qwen35_9b_publication_curve.py --shape 9b --long      # the 9B's shape, random weights
    python benchmarks/qwen35_9b_publication_curve.py --model models/qwen35-tiny-4bit --out benchmarks

At each context and repetition the modes read the prompt one after the other and then decode in turns of some tokens
(curve/run.py).  Every run is one row of raw_rows.tsv, so an interrupted sweep goes on where it stopped (curve_rows.py);
a run that fails, that the process does not survive, or that would be over the limit is a row with its error.
Repetitions rotate the order of the modes.  summary_rows.tsv (medians), curve.png, curve.svg and the table of README.md
are made from the raw rows alone (--report makes them again).

Modes are those of `python -m turboquant_mlx eval`: fp16 (the model's own float caches), affine4, tq3, k4v3, tq3c (with the
model's centres), tq3f (with its centres and feedback).
"""

import argparse
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
from curve import report as curve_report
from curve.models import Subject, as_numpy, attention_slots, build_shape, prompt_tokens, synthetic_calibration
from curve.rows import ROOT, Mark, RowFile, metadata, previous_rows, read_rows, sources
from curve.run import make_caches, measure
from tqdm import tqdm
from turboquant_mlx import apply_patch
from turboquant_mlx.calibration import FILE_NAME, load_calibration
from turboquant_mlx.eval.files import write_json
from turboquant_mlx.eval.model import load_model, message
from turboquant_mlx.eval.modes import parse_mode
from turboquant_mlx.overlay.gated_delta import disable_chunked_recurrence, enable_chunked_recurrence

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
    parser.add_argument(
        "--limit", type=float, default=600, help="seconds after which a run fails, and longer ones of its mode"
    )
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds after which nothing is begun")
    parser.add_argument("--long", action="store_true", help="also 32K, 64K and 128K over synthetically filled caches")
    parser.add_argument("--prefill-long", action="store_true", help="also 32K, 64K and 128K with the prompt read")
    parser.add_argument("--loop", action="store_true", help="mlx-lm's own loop over tokens in linear attention")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", help="of the table in README.md (default: model and machine)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the tables")
    parser.add_argument("--assets", type=Path, help="folder of the pictures (default: assets/, or --out when given)")
    parser.add_argument("--readme", type=Path, default=ROOT / "benchmarks" / "README.md")
    parser.add_argument("--fresh", action="store_true", help="forget rows of an earlier run in the folder")
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed")
    parser.add_argument("--mix", action="store_true", help="add to rows of another machine, version or commit")
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
    for wanted, synthetic in ((args.prefill_long, False), (args.long, True)):
        out += [(f"{n // 1024}K", n, synthetic) for n in LONG if wanted]
    return out


def plan_runs(args, rows):
    """What is not yet in `rows`: (scale, tokens, synthetic, repetition, modes in rotated order) of each context."""
    done = {(r["scale"], int(r["synthetic"]), r["mode"], int(r["repetition"])) for r in rows}
    plan = []
    for repetition in range(args.repetitions):
        turn = repetition % len(args.modes)
        order = args.modes[turn:] + args.modes[:turn]
        for scale, tokens, synthetic in contexts(args):
            if modes := [mode for mode in order if (scale, int(synthetic), mode, repetition) not in done]:
                plan.append((scale, tokens, synthetic, repetition, modes))
    return plan


def own_columns(subject, scale, tokens, synthetic, repetition, name):
    """What a row says before anything is measured; the bits of a float cache are its numbers'."""
    mode, width = parse_mode(name), 8 * subject.dtype.size
    key_bits, value_bits = (width, width) if mode.kind == "fp16" else (mode.key_bits, mode.value_bits)
    row = {"scale": scale, "prompt_tokens": tokens, "mode": name, "key_bits": key_bits, "value_bits": value_bits}
    return row | {"repetition": repetition, "synthetic": int(synthetic)}


def over_limit(rows, mode, tokens, synthetic):
    """Why this mode is not run over this context: it took too long over one as long or shorter.  None otherwise."""
    for r in rows:
        same = r["mode"] == mode and int(r["synthetic"]) == synthetic and int(r["prompt_tokens"]) <= tokens
        if same and r["error"].startswith("TimeoutError: "):
            return f"not run: {r['error'].removeprefix('TimeoutError: ')} at {r['prompt_tokens']} tokens"
    return None


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


def warm_up(args, subject, prompt, plan, mark):
    """Every mode once; what fails here, the rows will record.  On a GPU MLX compiles a kernel when it first meets a size,
    which takes seconds: a prompt's last chunk has its own, and so may one token over a longer context."""

    def begin(mode, doing):
        lost = [own_columns(subject, *run, mode) for *run, modes in plan if mode in modes]
        mark.set(lost, f"{mode} was {doing} in the warm-up")

    lengths = [2 * args.step]
    if mx.default_device() == mx.gpu:
        lengths += [args.step + n % args.step for _, n, synthetic in contexts(args) if not synthetic]
    modes = list(dict.fromkeys(mode for *_, modes in plan for mode in modes))
    for length in dict.fromkeys(lengths):
        measure(subject, args, modes, prompt[:length], length, False, begin)
    if mx.default_device() == mx.gpu:
        once = argparse.Namespace(**vars(args) | {"decode_tokens": 1})
        for length in dict.fromkeys(n for _, n, synthetic in contexts(args) if not synthetic):
            measure(subject, once, modes, prompt, length, True, begin)


def sweep(args):
    rows, aborted, elsewhere = previous_rows(args)
    plan = plan_runs(args, [*rows, *aborted])
    if not plan and not aborted:
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
    commit, changed = sources()
    if changed:
        print(f"[curve] {changed} source files differ from commit {commit}; the metadata say so", file=sys.stderr)
    mark = Mark(args.out)
    if not rows and not aborted:
        write_json(args.out / "run_metadata.json", metadata(args, subject))
    with (
        RowFile(args.out / "raw_rows.tsv", rows) as file,
        tqdm(total=sum(len(modes) for *_, modes in plan), unit="run") as bar,
    ):
        for row in aborted:
            file.add(row)
        mark.clear()
        try:
            warm_up(args, subject, prompt, plan, mark)
            mark.clear()
            for scale, tokens, synthetic, repetition, modes in plan:
                if time.perf_counter() - started > args.stop_after:
                    print("[curve] stopped by --stop-after; the same command goes on from here", file=sys.stderr)
                    break
                context = (subject, scale, tokens, synthetic, repetition)
                own = {mode: own_columns(*context, mode) | {"elsewhere": elsewhere} for mode in modes}
                measured = {}
                for mode in modes:
                    if reason := over_limit(file.rows, mode, tokens, synthetic):
                        measured[mode] = {"status": "failed", "error": reason}

                def begin(mode, doing, own=own):
                    mark.set([own[mode]], f"{mode} was {doing}")

                left = [mode for mode in modes if mode not in measured]
                measured |= measure(subject, args, left, prompt[:tokens], tokens, synthetic, begin)
                for mode in modes:
                    file.add(own[mode] | measured[mode])
                mark.clear()
                bar.update(len(modes))
        finally:
            mark.clear()


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
        print(message("curve", error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: not what was running is to blame
    sys.exit(main())
