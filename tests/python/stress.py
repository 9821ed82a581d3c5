"""What the random histories of test_stress.py and test_stress_windows.py share: settings, effort, and the count of
operations.

The short form is the same at every run.  `make stress` runs others on all processors: TURBOQUANT_STRESS=N tries N histories
of each machine in each of TURBOQUANT_STRESS_PARTS tests."""

import collections
import os

import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from stress_model import Coding
from turboquant_mlx import _core

LONG = int(os.environ.get("TURBOQUANT_STRESS", "0"))
PARTS = int(os.environ.get("TURBOQUANT_STRESS_PARTS", "1"))
REPORT = os.environ.get("TURBOQUANT_STRESS_REPORT")  # a folder
EFFORT = settings(
    max_examples=LONG or 100,
    stateful_step_count=50 if LONG else 30,
    deadline=None,
    derandomize=not LONG,
    database=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.generate],  # a failure names its steps; to shorten them add Phase.shrink
    suppress_health_check=list(HealthCheck),
)
HELD = 5  # caches at a time
counts: collections.Counter = collections.Counter()
errors = [0.0]  # of attention, as a part of its bound

few = st.integers(1, 4)
which = st.integers(0, 1000)
seeds = st.integers(0, 2**32 - 1)


def count(name):
    counts[name] += 1


def report():
    """Prints what was done since the last report, or adds it to a file of this process."""
    lines = [f"{n} {name}" for name, n in sorted(counts.items())]
    lines += [f"{max(errors):.2f} largest error of attention, of its bound", f"{sum(counts.values())} operations"]
    counts.clear()
    print("", *lines, sep="\n")
    if REPORT:
        with open(f"{REPORT}/{os.getpid()}.txt", "a") as file:
            print(*lines, sep="\n", file=file)


def add_tests(module, machine):
    """Adds the machine's tests to a module."""
    for part in range(PARTS):
        name = f"Test{machine.__name__}{part}"
        module[name] = type(name, (machine.TestCase,), {"settings": EFFORT})


def draw_settings(data):
    """A Coding of anything that a cache can be asked for."""
    pick = lambda *of: data.draw(st.sampled_from(of))  # noqa: E731
    heads, dim, seed = pick(1, 2), pick(32, 64, 96), pick(0, 1, 2**64 - 1)
    rng = np.random.default_rng(heads * dim)
    centres = feedback = key_map = None
    if pick(False, False, True):
        centres = tuple(mx.array(rng.normal(size=(heads, dim)).astype(np.float32)) for _ in range(2))
    if pick(False, False, True):
        feedback = tuple(mx.array((0.05 * rng.normal(size=(heads, dim, dim))).astype(np.float16)) for _ in range(2))
    if pick(False, False, False, True):
        key_map = mx.array((np.eye(dim) + 0.3 / dim**0.5 * rng.normal(size=(heads, dim, dim))).astype(np.float32))
    bits = pick((3, 3), (2, 2), (4, 4), (8, 8), (8, 3), (2, 4), (3, 2), (4, 8))
    recent, sink = pick((0, 0), (128, 4), (16, 0), (0, 5), (40, 3), (128, 4))
    if not _core.reads_exact_copies():
        recent = sink = 0
    dtype = pick(mx.float32, mx.float16, mx.bfloat16)
    code = pick("trellis", "scalar")
    return Coding(heads, dim, bits, code, seed, recent, sink, dtype, centres, feedback, key_map)
