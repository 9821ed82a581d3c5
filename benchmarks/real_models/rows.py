"""The judge's rows on disk, and the table that is made of them."""

import csv

import numpy as np
from turboquant_mlx.eval.files import write_table

KEY = ("model", "mode", "length", "prompt", "window", "of")
NUMBERS = {"length": int, "prompt": int, "window": int, "of": int}
FIGURES = ("nll", "reference_nll", "mean_kld", "p99_kld", "top1")


class Rows:
    """A TSV with one row a model, mode and window, complete after every addition.

    Args:
        path: the file; what it holds stays.
        length, prompt, of (int): the settings of this run; rows of others are kept and not used."""

    def __init__(self, path, **settings):
        self.path, self.settings, self.rows = path, settings, {}
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file, delimiter="\t"):
                    kinds = NUMBERS | dict.fromkeys(FIGURES, float)
                    row = {name: kinds.get(name, str)(value) for name, value in row.items()}
                    self.rows[tuple(row[name] for name in KEY)] = row

    def has(self, model, mode, window):
        """Whether this window was measured, with the settings of this run."""
        return (
            tuple(({"model": model, "mode": mode, "window": window} | self.settings)[name] for name in KEY) in self.rows
        )

    def add(self, rows):
        """Adds rows and writes the file."""
        self.rows |= {tuple(row[name] for name in KEY): row for row in rows}
        write_table(self.path, list(self.rows.values()))

    def of_models(self, models):
        """The rows of this run's settings, by model in the order given."""
        own = [r for r in self.rows.values() if all(r[name] == value for name, value in self.settings.items())]
        return {model: [r for r in own if r["model"] == model] for model in models}


def means(rows):
    """Figures of one model and mode over its windows; errors are standard errors over windows, nan of one."""
    figures = {name: np.array([r[name] for r in rows]) for name in FIGURES}

    def error(x):
        return float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")

    change = figures["nll"] - figures["reference_nll"]
    return {
        "windows": len(rows),
        "mean_kld": figures["mean_kld"].mean(),
        "mean_kld_stderr": error(figures["mean_kld"]),
        "p99_kld": figures["p99_kld"].mean(),
        "perplexity": np.exp(figures["nll"].mean()),
        "change": np.expm1(change.mean()),
        "change_stderr": np.exp(change.mean()) * error(change),
        "top1": figures["top1"].mean(),
    }


def markdown(of_models):
    """One table a model: means over windows, `99 %` of a window being averaged too."""
    lines = []
    for model, rows in of_models.items():
        lines += [
            f"| {model} | windows | mean KLD | +- | 99 % KLD | same top token | perplexity | change | +- |",
            "| --- " + "| ---: " * 8 + "|",
        ]
        for mode in dict.fromkeys(r["mode"] for r in rows):
            m = means([r for r in rows if r["mode"] == mode])
            lines.append(
                f"| {mode} | {m['windows']} | {m['mean_kld']:.5f} | {m['mean_kld_stderr']:.5f} | {m['p99_kld']:.4f} | "
                f"{m['top1']:.2%} | {m['perplexity']:.3f} | {m['change']:+.2%} | {m['change_stderr']:.2%} |"
            )
        lines.append("")
    return "\n".join(lines)
