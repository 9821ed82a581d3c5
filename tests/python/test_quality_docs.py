"""The tables of docs/quality.md and docs/quality_studies.md hold the numbers that the commands wrote."""

import csv
import re
from pathlib import Path

import pytest
from turboquant_mlx.eval import retrieval

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
PAGE = "\n\n".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("quality.md", "quality_studies.md"))


def documented():
    """(header, row) of every row of the pages' tables: lists of cells."""
    header, out = None, []
    for line in PAGE.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
        elif set(line) - set("|:- "):
            out.append((header, cells))
    return out


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def percent(x, sign="+", digits=2):
    return f"{100 * float(x):{sign}.{digits}f} %"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.tsv")), ids=lambda path: path.stem)
def test_studies(path):
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
        rows = [[re.sub(r"K(\d+) ?V", r"K\1 V", row[0]), *row[1:]] for _, row in documented()]
        # Not every table has a column for the error of perplexity.
        assert any(row[: len(expected)] in (expected, expected[:4]) for row in rows), (
            f"no row of the pages is {expected}"
        )


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/divergence.tsv")), ids=lambda path: path.parent.name)
def test_divergence(path):
    for r in table(path):
        if r["band"] != "all" or float(r["mean_kld"]) == 0:
            continue
        expected = {
            f"{float(r['mean_kld']):.5f}",
            f"{float(r['p99_kld']):.4f}",
            percent(r["top1_agreement"], ""),
            percent(r["perplexity_change"]),
        }

        def errors(header, r=r):
            """What the columns +- hold: errors of KLD, then of perplexity."""
            kld, perplexity = r["mean_kld_stderr"], r.get("perplexity_change_stderr")
            return set([f"{float(kld):.5f}", perplexity and percent(perplexity, "")][: header.count("+-")]) - {None}

        assert any(row[0] == r["mode"] and expected | errors(header) <= set(row) for header, row in documented()), (
            f"no row of the pages has {r['mode']} with {sorted(expected)}"
        )


def test_bands():
    """Each row by position is that of one file."""
    files = [table(path) for path in sorted(RESULTS.glob("*/divergence.tsv"))]
    held = set()
    for file in files:
        for mode in {r["mode"] for r in file}:
            own = [r for r in file if r["mode"] == mode and r["band"] == "part"]
            held.add((mode, *((f"{r['start']} to {r['stop']}", f"{float(r['mean_kld']):.5f}") for r in own)))
    rows = [(header, row) for header, row in documented() if "0 to 256" in header]
    assert len(rows) >= 10
    for header, row in rows:
        assert (row[0], *zip(header[1:], row[1:], strict=True)) in held, f"no file holds {row}"


def retrieved(folder):
    """{cache: cells} of the table of retrieval."""
    needles, lists = table(folder / "needle.tsv"), table(folder / "list.tsv")
    for r in needles + lists:
        r |= {"passed": int(r["passed"]), "log_prob": float(r["log_prob"])}
    out = {}
    for mode in dict.fromkeys(r["mode"] for r in needles):
        cells = []
        for length in ("1024", "4096", "16384"):
            own = [r["passed"] for r in needles if (r["mode"], r["tokens"]) == (mode, length)]
            cells.append(f"{sum(own)} of {len(own)}")
        out[mode] = cells
    for mode, r in retrieval.summarise(lists, "fp16").items():
        each = r["found_in_each"]
        out[mode] += [f"{r['found']} of {r['asked']}", f"{min(each)} to {max(each)}", f"{r['mean_log_prob']:.3f}"]
        out[mode] += ["", ""] if mode == "fp16" else [f"{r['change']:+.3f}", f"{r['change_stderr']:.3f}"]
    return out


def test_retrieval():
    rows = {row[0]: row[1:] for header, row in documented() if "needles at 1K" in header}
    assert rows == retrieved(RESULTS / "retrieval")


def test_reconstruction():
    rows = [row for header, row in documented() if "energy of the mean" in header]
    expected = [
        [r["slot"], r["side"], r["head"], percent(r["mean_share"], "", 1)]
        + [f"{float(r[name]):.4f}" for name in ("tq", "tq_centred", "tq_feedback", "affine")]
        for r in table(RESULTS / "reconstruction" / "reconstruction.tsv")
        if r["bits"] == "3"
    ]
    assert rows == expected and len(rows) == 8


def test_spectra():
    """The pages state ranges, in a sentence."""
    rows = table(RESULTS / "feedback" / "spectra.tsv")

    def of(side):
        left = [float(r["queries: shaping"]) for r in rows if r["side"] == side]
        return f"{min(left):.2f} to {max(left):.2f}"

    sentence = f"leave {of('K')} of a key's error by S, and {of('V')} of a value's by M"
    assert sentence in " ".join(PAGE.split())


def test_looks_at_something():
    assert len(list(RESULTS.glob("*.tsv"))) >= 8 and len(list(RESULTS.glob("*/divergence.tsv"))) >= 3
