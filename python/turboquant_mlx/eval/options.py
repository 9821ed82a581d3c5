"""The options of `python -m turboquant_mlx eval`, checked as far as they can be without the model."""

import argparse
import sys
from pathlib import Path

from ..calibration.default import TEXT
from .modes import parse_mode
from .retrieval import NAMES
from .tasks import COUNTS

PARTS = ("divergence", "reconstruction", "list", "needle", "tasks")  # in the order in which they are measured
MODES = "fp16,affine4,tq4,tq3,tq2"
TASK_MODES = "fp16,tq4fr128s4,tq3fr128s4"  # the last is what enable(model) gives where there is a calibration
REFERENCE = "fp16"


def parse(argv=None):
    """The arguments, with lists for what has commas; ValueError names the option and the value found."""
    parser = argparse.ArgumentParser(
        prog="turboquant_mlx eval",
        description="Perplexity, KL divergence, retrieval and reconstruction error of packed caches.",
    )
    parser.add_argument("--model", type=Path, required=True, help="a local model directory")
    parser.add_argument(
        "--text",
        type=Path,
        help="held-out text: windows and filler come from it; tasks alone take the package's where none is given",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("turboquant-eval"),
        help="a folder for TSV, JSON and pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--modes",
        help="fp16, affine4, tq3, k4v3, tq3c (centred), tq3f (with feedback), tq3fr128s4 (and exact tokens), auto (chosen "
        "bits); fp16 is the reference of all others, and is measured first whether or not it is named (default: "
        f"{MODES}; of tasks alone {TASK_MODES})",
    )
    parser.add_argument("--parts", default=",".join(PARTS[:-1]), help=f"of {', '.join(PARTS)} (default: all but tasks)")
    parser.add_argument("--tasks", default=",".join(COUNTS), help=f"of {', '.join(COUNTS)}")
    parser.add_argument(
        "--prompts",
        type=int,
        help="of each task (default: " + ", ".join(f"{name} {n}" for name, n in COUNTS.items()) + ")",
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=4, help="how many of them")
    parser.add_argument("--first-window", type=int, default=0, help="number of the first window in the text")
    parser.add_argument("--without", default="", help="numbers of windows to leave out, as those of calibration: 8,17")
    parser.add_argument("--batch", type=int, default=6, help="windows read side by side")
    parser.add_argument("--step", type=int, default=256, help="positions given to the model at a time")
    parser.add_argument("--lengths", default="1024,4096", help="needle contexts, tokens")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="needle places, 0 is the context's beginning")
    parser.add_argument("--trials", type=int, default=1, help="needle contexts of each length")
    parser.add_argument("--lists", type=int, default=1, help="lists of keys")
    parser.add_argument("--pairs", type=int, default=50, help="keys in a list")
    parser.add_argument(
        "--calibration", type=Path, help="a model directory or a file of `calibrate` (default: the model's)"
    )
    parser.add_argument("--calibrate-text", type=Path, help="calibrate with 8 windows spread over this text")
    parser.add_argument("--seed", type=int, default=0, help="of needles and lists, at least 0")
    args = parser.parse_args(argv)
    if unknown := set(args.parts.split(",")) - set(PARTS):
        raise ValueError(f"[eval] --parts are {', '.join(PARTS)}; got {', '.join(map(repr, sorted(unknown)))}")
    args.parts = [part for part in PARTS if part in args.parts.split(",")]
    args.modes = _modes(args.modes or (TASK_MODES if args.parts == ["tasks"] else MODES))
    if args.text is None and args.parts != ["tasks"]:
        raise ValueError(f"[eval] --parts {','.join(args.parts)} needs --text, a text that nobody calibrated on")
    args.text = args.text or TEXT
    args.tasks = args.tasks.split(",")
    if unknown := set(args.tasks) - set(COUNTS):
        raise ValueError(f"[eval] --tasks are {', '.join(COUNTS)}; got {', '.join(map(repr, sorted(unknown)))}")
    if args.prompts is not None and args.prompts < 1:
        raise ValueError(f"[eval] --prompts must be at least 1; got {args.prompts}")
    args.lengths = _numbers("--lengths", args.lengths, int)
    args.depths = _numbers("--depths", args.depths, float)
    args.without = set(_numbers("--without", args.without, int)) if args.without else set()
    least = {"context": 2, "first_window": 0, "seed": 0}  # of one token nothing is predicted
    for name in ("context", "windows", "first_window", "batch", "step", "trials", "lists", "pairs", "seed"):
        if (value := getattr(args, name)) < least.get(name, 1):
            raise ValueError(f"[eval] --{name.replace('_', '-')} must be at least {least.get(name, 1)}; got {value}")
    if len(args.depths) > len(NAMES) or not all(0 <= d <= 1 for d in args.depths):
        raise ValueError(f"[eval] --depths must be at most {len(NAMES)} numbers from 0 to 1; got {args.depths}")
    return args


def _modes(text):
    """The modes, the reference first."""
    names = list(dict.fromkeys(text.split(",")))
    modes = [parse_mode(name) for name in names]
    if names[0] != REFERENCE:
        print(f"[eval] {REFERENCE} is measured first: it is what the others are compared with", file=sys.stderr)
        modes = [parse_mode(REFERENCE), *(mode for mode in modes if mode.name != REFERENCE)]
    return modes


def _numbers(option, text, kind):
    try:
        return [kind(x) for x in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"[eval] {option} must be {what} with commas between them; got {text!r}") from None
