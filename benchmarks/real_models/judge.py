"""What packed caches cost on real models: divergence from float16 caches, by the package's own caches.

    python benchmarks/real_models/judge.py                                   # three models (fetch.py), calibrated and not
    python benchmarks/real_models/judge.py --models smollm2 --windows 2
    python benchmarks/real_models/judge.py --model path/to/model --modes tq3,tq3f,tq4f
    python benchmarks/real_models/judge.py --models qwen2.5 --prompt 1792    # answers after a prompt of 1,792 tokens
    python benchmarks/real_models/judge.py --models qwen2.5 --modes tq3f --by-layer

Windows are of texts that nobody calibrated on (texts.py), each beginning as the model's texts begin.  Modes with c or f
take the model's calibration (`python -m turboquant_mlx calibrate`), or make one in passing from the text that the package
ships.  Results: a table on the screen, rows in --out.
"""

import argparse
import sys
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).resolve().parent))
import texts  # noqa: E402
from fetch import MODELS, fetch  # noqa: E402
from turboquant_mlx.caches.slots import leaves  # noqa: E402
from turboquant_mlx.calibration import load_calibration  # noqa: E402
from turboquant_mlx.eval import divergence  # noqa: E402
from turboquant_mlx.eval.files import write_table  # noqa: E402
from turboquant_mlx.eval.model import load_model  # noqa: E402
from turboquant_mlx.eval.modes import parse_mode  # noqa: E402

REFERENCE = "fp16"


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}, with commas between them")
    parser.add_argument("--model", type=Path, help="a model directory of mlx-lm instead")
    parser.add_argument("--modes", default="affine4,tq4,tq3,tq2,tq4f,tq3f,tq2f", help="as for turboquant_mlx eval")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--prompt", type=int, default=0, help="tokens at the window's beginning that are not counted")
    parser.add_argument("--by-layer", action="store_true", help="each mode in one layer at a time, the others float16")
    parser.add_argument(
        "--calibration", type=Path, help="a file or a model directory; default: the model's own, or made"
    )
    parser.add_argument("--out", type=Path, help="a TSV file of the rows")
    return parser.parse_args(argv)


def calibration_of(model, tokenizer, folder, where):
    """The model's calibration; made from the package's text when there is no file."""
    try:
        return load_calibration(where or folder, directory=folder)
    except FileNotFoundError:
        if where:
            raise
    from turboquant_mlx.calibration import calibrate_by_default

    print(f"[judge] {folder.name} has no calibration; it is calibrated now", file=sys.stderr)
    return calibrate_by_default(model, tokenizer)


def in_one_layer(layer, mode, model, calibration):
    """Caches of a mode in one layer, float16 in the others."""
    floats, packed = parse_mode(REFERENCE).make_caches(model), mode.make_caches(model, calibration)
    return [packed[i] if i == layer else c for i, c in enumerate(floats)]


def columns(modes, model, calibration, by_layer):
    """{name of a column: function that makes its caches}, the reference first."""
    made = {REFERENCE: lambda: parse_mode(REFERENCE).make_caches(model)}
    layers = sorted({path[0] for path, c in leaves(made[REFERENCE]()) if hasattr(c, "code_keys")})
    for mode in map(parse_mode, modes):
        own = calibration if mode.centred else None
        if by_layer:
            for layer in layers:
                made[f"{mode.name}@{layer}"] = lambda m=mode, n=layer, o=own: in_one_layer(n, m, model, o)
        else:
            made[mode.name] = lambda m=mode, o=own: m.make_caches(model, o)
    return made


def judge(folder, args):
    """Rows of one model, printed after each window."""
    model, tokenizer = load_model(folder)
    modes = [name for name in args.modes.split(",") if name != REFERENCE]
    calibration = None
    if any(parse_mode(name).centred for name in modes):
        calibration = calibration_of(model, tokenizer, folder, args.calibration)
    windows, kinds = texts.windows(tokenizer, args.length, args.windows)
    make = columns(modes, model, calibration, args.by_layer)
    parts, rows = [], []
    for window, kind in zip(windows, kinds, strict=True):
        parts.append(divergence.compare(model, window[None], {name: f() for name, f in make.items()}))
        records = {name: divergence.joined([part[name] for part in parts]) for name in make}
        rows = [
            {"model": folder.name, "mode": name, "windows": len(parts), "length": args.length, "prompt": args.prompt}
            | divergence.summarise(record, records[REFERENCE], args.prompt)
            for name, record in records.items()
        ]
        print(f"[judge] {folder.name}: {len(parts)} of {len(windows)} windows, the last of {kind}", file=sys.stderr)
    show(rows)
    return rows


def show(rows):
    print(f"\n| {rows[0]['model']} | mean KLD | +- | 99 % | perplexity | change | +- | same top token |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        print(
            f"| {r['mode']} | {r['mean_kld']:.5f} | {r['mean_kld_stderr']:.5f} | {r['p99_kld']:.4f} | "
            f"{r['perplexity']:.3f} | {r['perplexity_change']:+.2%} | {r['perplexity_change_stderr']:.2%} | "
            f"{r['top1_agreement']:.2%} |",
            flush=True,
        )


def main(argv=None):
    args = parse(argv)
    mx.set_default_device(mx.cpu)
    rows = []
    for folder in [args.model] if args.model else map(fetch, args.models.split(",")):
        rows += judge(folder, args)
        if args.out:
            write_table(args.out, rows)


if __name__ == "__main__":
    main()
