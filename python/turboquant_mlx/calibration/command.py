"""python -m turboquant_mlx calibrate."""

import argparse
import sys
import tempfile
from pathlib import Path

from ..eval.model import load_model, message, read_text
from . import automatic, choice
from .budget import parse_budget
from .default import LENGTH, TEXT, WINDOWS, Bar, windows_of
from .files import calibration_path, save_calibration
from .measure import calibrate

IN_PART = 3  # exit status when some layers lack a part of their calibration


def main(argv=None):
    """Makes the calibration file of a model, centres, maps of keys and feedback, from windows spread over a text.  Exits
    with 3 when some layers lack a part, which stderr names."""
    parser = argparse.ArgumentParser(prog="turboquant_mlx calibrate", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a local model directory")
    parser.add_argument(
        "--text", type=Path, default=TEXT, help="any text of the kind the model reads; default: the package's"
    )
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a window, with <bos> where texts have it")
    parser.add_argument(
        "--positions",
        type=int,
        help="up to where in a context keys will stand; 0: where they stand in the windows (default: the model's context)",
    )
    parser.add_argument("--plain", action="store_true", help="centres and feedback alone, without maps of keys")
    parser.add_argument("--seed", type=int, default=0, help="--tq-seed of the caches that will use it")
    parser.add_argument(
        "--budget",
        help="choose bits for each layer's keys and values, and how many tokens stay exact, for --tq-bits auto: kld=0.01 "
        "(the fewest bytes of at most that divergence), bytes=400 (the least divergence of at most so many bytes a token) "
        "or context=128k,memory=8GB (of at most so many bytes at that context); takes some minutes more",
    )
    parser.add_argument("--out", type=Path, help="a file; default: beside the weights")
    args = parser.parse_args(argv)
    try:
        _check(args)
        budget = parse_budget(args.budget) if args.budget else None
        with tempfile.TemporaryFile(dir=calibration_path(args.out or args.model).parent):
            pass  # an unwritable folder is found before the work
        model, tokenizer = load_model(args.model)
        text = read_text(args.text)
        if budget is None:
            windows = windows_of(tokenizer, text, args.windows, args.length)
        else:
            windows, *others = choice.split(tokenizer, text, args.windows, args.length)
        bar = Bar("calibrate", windows.size)
        found = calibrate(
            model, windows, seed=args.seed, balance=not args.plain, positions=args.positions, progress=bar
        )
        bar.close()
        if budget is not None:
            bar = Bar("choose bits", None)
            found.policy = choice.choose(model, found, budget, *others, seed=args.seed, progress=bar)
            bar.close()
        source = f"{len(windows)} windows of {args.length} tokens spread over {args.text.name}"
        path = save_calibration(found, args.out or args.model, directory=args.model, source=source)
        if found.policy is not None:
            automatic.keep_choice(found, seed=args.seed)
    except KeyboardInterrupt:
        print("[calibrate] interrupted; nothing was written", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(message("calibrate", error), file=sys.stderr)
        return 1
    maps, keys, values = (sum(c[side] is not None for c in found.values()) for side in (5, 2, 3))
    print(
        f"{path}: centres of {len(found)} layers, maps of {maps} layers' keys, feedback of {keys} layers' keys and "
        f"{values} layers' values"
    )
    print(f"from {source}")
    if found.policy is not None:
        print(choice.described(found.policy))
    for slot, missing in found.missing.items():
        print(f"[calibrate] layer {slot} has not {missing}", file=sys.stderr)
    return IN_PART if found.missing else 0


def _check(args):
    """ValueError for numbers that are out of range."""
    if args.windows < 1 or args.length < 1:
        raise ValueError("[calibrate] --windows and --length must be at least 1")
    if args.positions is not None and args.positions < 0:
        raise ValueError(f"[calibrate] --positions must be at least 0; got {args.positions}")
