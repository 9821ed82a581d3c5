"""python -m turboquant_mlx calibrate."""

import argparse
import sys
import tempfile
from pathlib import Path

from ..eval.model import load_model, message, read_text
from .default import LENGTH, TEXT, WINDOWS, Bar, windows_of
from .files import calibration_path, save_calibration
from .measure import calibrate


def main(argv=None):
    """Makes the calibration file of a model, centres, maps of keys and feedback, from windows spread over a text."""
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
    parser.add_argument("--out", type=Path, help="a file; default: beside the weights")
    args = parser.parse_args(argv)
    try:
        if args.windows < 1 or args.length < 1:
            raise ValueError("[calibrate] --windows and --length must be at least 1")
        if args.positions is not None and args.positions < 0:
            raise ValueError(f"[calibrate] --positions must be at least 0; got {args.positions}")
        with tempfile.TemporaryFile(dir=calibration_path(args.out or args.model).parent):
            pass  # an unwritable folder is found before the work
        model, tokenizer = load_model(args.model)
        windows = windows_of(tokenizer, read_text(args.text), args.windows, args.length)
        bar = Bar("calibrate", windows.size)
        found = calibrate(
            model, windows, seed=args.seed, balance=not args.plain, positions=args.positions, progress=bar
        )
        bar.close()
        source = f"{len(windows)} windows of {args.length} tokens spread over {args.text.name}"
        path = save_calibration(found, args.out or args.model, directory=args.model, source=source)
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
    return 0
