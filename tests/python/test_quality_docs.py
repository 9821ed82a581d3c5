"""The tables of docs/quality.md hold the numbers that the commands wrote."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "quality"


def documented():
    """The cells of every table row of the page."""
    lines = (ROOT / "docs" / "quality.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def percent(x, sign="+"):
    return f"{100 * float(x):{sign}.2f} %"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.tsv")), ids=lambda path: path.stem)
def test_studies(path):
    rows = documented()
    for r in table(path):
        if r["row"] == "float16":
            continue
        expected = [
            r["row"],
            f"{float(r['mean_kld']):.5f}",
            f"{float(r['mean_kld_stderr']):.5f}",
            percent(r["perplexity_change"]),
        ]
        if "perplexity_change_stderr" in r:
            expected.append(percent(r["perplexity_change_stderr"], ""))
        assert any([re.sub(r"K(\d+) ?V", r"K\1 V", row[0]), *row[1:]][: len(expected)] == expected for row in rows), (
            f"no row of docs/quality.md is {expected}"
        )


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/divergence.tsv")), ids=lambda path: path.parent.name)
def test_divergence(path):
    rows = documented()
    for r in table(path):
        if r["band"] != "all" or float(r["mean_kld"]) == 0:
            continue
        expected = {
            f"{float(r['mean_kld']):.5f}",
            f"{float(r['p99_kld']):.4f}",
            percent(r["top1_agreement"], ""),
            percent(r["perplexity_change"]),
        }
        assert any(row[0] == r["mode"] and expected <= set(row) for row in rows), (
            f"no row of docs/quality.md has {r['mode']} with {sorted(expected)}"
        )


def test_looks_at_something():
    assert len(list(RESULTS.glob("*.tsv"))) >= 8 and len(list(RESULTS.glob("*/divergence.tsv"))) >= 3
