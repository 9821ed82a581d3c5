"""Kills a process that writes prefixes, again and again, and checks what it left each time.

    python tests/python/scripts/kills.py [--times 200]

Every file that has its name must load and give the tokens of a model that reads the prompt afresh; no temporary file may
outlive its process.  Two seconds a time, most of which are the process's start."""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_prefixes_on_disk import hybrid, killed_while_writing  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    random.seed(args.seed)
    model, left = hybrid(), 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.times):
            left += killed_while_writing(Path(folder), model, 100 * i, random.uniform(0, 0.4))
            if (i + 1) % 20 == 0:
                print(f"{i + 1} kills, {left} whole files, no wrong answer, no refused start", flush=True)


if __name__ == "__main__":
    main()
