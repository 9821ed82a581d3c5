"""Results on disk.  A file is written beside its place and then moved there, so an interruption leaves the old one."""

import csv
import io
import json
import math
import os


def write_text(path, text):
    """Writes a text file at once or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_table(path, rows):
    """A TSV with the keys of the first row as its header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_text(path, text.getvalue())


def write_json(path, x):
    """JSON with null for numbers that are not finite."""
    write_text(path, json.dumps(_plain(x), indent=1) + "\n")


def _plain(x):
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
