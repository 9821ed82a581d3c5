"""Windows of texts that nobody calibrated on, the same on every machine with this repository and Python.

Three kinds, taken in turn: prose (tests/data/valid.txt), code (modules of Python's standard library) and documentation
(pydoc_data.topics).  Other versions of Python have slightly other code and documentation."""

import argparse
import inspect
import pydoc_data.topics
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from turboquant_mlx.calibration.default import beginning

VALID = Path(__file__).resolve().parents[2] / "tests" / "data" / "valid.txt"


def texts():
    """{kind: text}."""
    modules = (argparse, inspect, subprocess, tarfile)
    return {
        "prose": VALID.read_text(encoding="utf-8"),
        "code": "".join(Path(module.__file__).read_text(encoding="utf-8") for module in modules),
        "documentation": "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())),
    }


def windows(tokenizer, length, count):
    """(token ids (count, length), the kind of each).  Windows of a kind are spread over its text.

    Raises ValueError when a text is shorter than its windows."""
    own = {kind: np.array(ids(tokenizer, text), np.int32) for kind, text in texts().items()}
    start = beginning(tokenizer)
    body = length - len(start)
    kinds = [list(own)[i % len(own)] for i in range(count)]
    made = []
    for i, kind in enumerate(kinds):
        total, of_kind = len(own[kind]) // body, kinds.count(kind)
        if total < of_kind:
            raise ValueError(f"[windows] {of_kind} windows of {length} tokens do not fit the {kind}: {len(own[kind])}")
        at = (2 * kinds[:i].count(kind) + 1) * total // (2 * of_kind) * body
        made.append(np.concatenate([start, own[kind][at : at + body]]))
    return np.stack(made).astype(np.int32), kinds


def ids(tokenizer, text):
    """Token ids of a text without anything in front or behind."""
    return tokenizer.encode(text, add_special_tokens=False)
