"""Judges packed caches of every family of mlx-lm (judged.py); minutes.  Prints one line a family and ends with an error when
one disagrees.

    .venv/bin/python tests/python/scripts/judge_families.py [family ...]"""

import gc
import pathlib
import sys
import traceback
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
warnings.simplefilter("ignore")

import families  # noqa: E402
from judged import judge  # noqa: E402

UNJUDGED = {
    "phi3small": "the process ends with a segmentation fault on mlx-lm's own float caches, too (CPU, MLX 0.32.4)"
}


def main(names):
    wrong = refused = 0
    for name in names:
        if name in UNJUDGED:
            refused += 1
            print(f"{name:24} not judged: {UNJUDGED[name]}", flush=True)
            continue
        try:
            found = judge(families.make(name))
        except (ValueError, RuntimeError) as error:
            refused += 1
            print(f"{name:24} refused: {str(error).splitlines()[-1].strip()[:140]}", flush=True)
            continue
        except Exception:
            wrong += 1
            print(f"{name:24} ends: {traceback.format_exc(limit=-2)}", flush=True)
            continue
        off = [what for what, (far, bound) in found.items() if not far <= bound]
        wrong += bool(off)
        told = ", ".join(f"{what} {far:.1e} of {bound:.1e}" for what, (far, bound) in found.items())
        print(f"{name:24} {'DISAGREES: ' + ' '.join(off) + ': ' if off else ''}{told}", flush=True)
        gc.collect()
    print(
        f"{len(names)} families: {len(names) - wrong - refused} agree, {wrong} do not, {refused} are refused or not judged"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or families.names()))
