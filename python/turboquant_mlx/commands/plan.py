"""python -m turboquant_mlx plan: what a model's caches take, before any weights are loaded."""

import argparse
import json
import sys
from pathlib import Path


def main(argv=None):
    """Prints the table; returns the exit status."""
    from .cli import tq_options
    from .program_options import tokens

    parser = argparse.ArgumentParser(
        prog="python -m turboquant_mlx plan",
        description="Prints what a model's caches take: bytes of one sequence and of a batch at a context, at each width, "
        "exact copies, recurrent states and checkpoints included.  Reads config.json; no weights.",
        parents=[tq_options()],
        allow_abbrev=False,
    )
    parser.set_defaults(tq_bits=None)
    parser.add_argument("--model", required=True, help="a local model directory")
    parser.add_argument("--context", type=tokens, nargs="+", default=[4096, 16384, 32768, 131072], metavar="N")
    parser.add_argument("--batch", type=tokens, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument(
        "--width", type=int, nargs="+", choices=(2, 3, 4, 8), help="bits (default: --tq-bits, else 2 3 4 8)"
    )
    parser.add_argument("--prefill-step-size", type=tokens, default=2048)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    args = parser.parse_args(argv)
    try:
        rows = table(args)
    except (ValueError, OSError) as error:
        print(f"turboquant_mlx plan: {error}", file=sys.stderr)
        return 1
    if args.json:
        for row in rows:
            print(json.dumps(row))
        return 0
    print(f"{'caches':>8}  {'context':>8}  {'batch':>5}  {'a sequence':>15}  {'caches, all':>15}  {'workspace':>15}")
    for r in rows:
        print(
            f"{r['caches']:>8}  {r['context']:>8}  {r['batch']:>5}  {r['sequence_bytes']:>15,}  {r['cache_bytes']:>15,}  "
            f"{r['workspace_bytes']:>15,}"
        )
    weights = sum(
        file.stat().st_size for file in Path(args.model).glob("*.safetensors") if "calibration" not in file.name
    )
    print(
        f"weights on disk: {weights:,} bytes; workspace: of a prompt's chunk of {args.prefill_step_size} tokens, estimated"
    )
    return 0


def unread_model(directory):
    """The model of a directory as mlx-lm builds it, whose weights are not read."""
    from mlx_lm.utils import load_model

    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise OSError(f"there is no {directory / 'config.json'}")
    held = any(directory.glob("model*.safetensors"))
    return load_model(directory, lazy=True, strict=held)[0]


def _chosen(args):
    """The bits that stand in the calibration file; of the rest of it bytes of a sequence do not depend."""
    from ..calibration import Calibrations, load_calibration

    where = args.model if args.tq_calibration in ("auto", "none") else args.tq_calibration
    found = Calibrations()
    found.policy = load_calibration(where, directory=False).policy
    return found


def table(args):
    """Rows of the plan, as dicts: caches, context, batch, sequence_bytes, cache_bytes, workspace_bytes."""
    from ..caches.slots import own_caches
    from ..enable import packing
    from ..memory import CacheSizes
    from .prepare import coding

    if args.tq_start:
        raise ValueError(f"--tq-start {args.tq_start} is not counted: caches are those that are packed; leave it out")
    if args.width and args.tq_bits:
        raise ValueError(f"--width and --tq-bits exclude each other; got {args.width} and {args.tq_bits}")
    model = unread_model(args.model)
    widths = args.width or ([args.tq_bits] if args.tq_bits else (2, 3, 4, 8))
    kinds = [("float", lambda: own_caches(model))]
    for bits in widths:
        maker, _ = packing(
            model,
            bits,
            **coding(args),
            calibration=_chosen(args) if bits == "auto" else {},
            checkpoints=False if args.tq_checkpoints is False else args.tq_checkpoints or "auto",
            strict=args.tq_strict,
            named=False,
        )
        kinds.append((f"{bits} bits", maker))
    rows = []
    for name, make in kinds:
        sizes = CacheSizes(model, make)
        for context in args.context:
            for batch in args.batch:
                one = sizes.at(context)
                workspace = batch * sizes.workspace(min(args.prefill_step_size, context))
                rows.append(
                    {
                        "caches": name,
                        "context": context,
                        "batch": batch,
                        "sequence_bytes": one,
                        "cache_bytes": batch * one,
                        "workspace_bytes": workspace,
                    }
                )
    return rows
