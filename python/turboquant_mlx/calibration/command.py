"""python -m turboquant_mlx calibrate."""

import argparse
import sys
import tempfile
from pathlib import Path

from ..eval.model import load_model, message, read_tokens, spread_windows
from .files import calibration_path, save_calibration
from .measure import calibrate


def main(argv=None):
    """Makes the calibration file of a model, centres and feedback, from windows spread over a text."""
    parser = argparse.ArgumentParser(prog="turboquant_mlx calibrate", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a local model directory")
    parser.add_argument("--text", type=Path, required=True, help="any text of the kind the model reads")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--seed", type=int, default=0, help="--tq-seed of the caches that will use it")
    parser.add_argument("--out", type=Path, help="a file; default: beside the weights")
    args = parser.parse_args(argv)
    try:
        if args.windows < 1 or args.length < 1:
            raise ValueError("[calibrate] --windows and --length must be at least 1")
        with tempfile.TemporaryFile(dir=calibration_path(args.out or args.model).parent):
            pass  # an unwritable folder is found before the work
        model, tokenizer = load_model(args.model)
        windows = spread_windows(read_tokens(tokenizer, args.text), args.length, args.windows)
        found = calibrate(model, windows, seed=args.seed)
        source = f"{len(windows)} windows of {args.length} tokens spread over {args.text.name}"
        path = save_calibration(found, args.out or args.model, directory=args.model, source=source)
    except KeyboardInterrupt:
        print("[calibrate] interrupted; nothing was written", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(message("calibrate", error), file=sys.stderr)
        return 1
    keys, values = (sum(c[side] is not None for c in found.values()) for side in (2, 3))
    print(f"{path}: centres of {len(found)} layers, feedback of {keys} layers' keys and {values} layers' values")
    print(f"from {source}")
    return 0
