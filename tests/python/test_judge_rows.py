"""The judge's rows: kept after an interruption, told apart by their settings, averaged over windows."""

import math

import pytest


@pytest.fixture
def rows(monkeypatch):
    from conftest import MODEL

    monkeypatch.syspath_prepend(str(MODEL.parents[1] / "benchmarks" / "real_models"))
    import rows

    return rows


def row(mode, window, nll, kld, length=64):
    own = {"model": "m", "mode": mode, "length": length, "prompt": 0, "window": window, "of": 2, "kind": "prose"}
    return own | {"nll": nll, "reference_nll": 2.0, "mean_kld": kld, "p99_kld": 4 * kld, "top1": 0.5}


def test_rows_outlive_the_process_and_belong_to_their_settings(rows, tmp_path):
    path, settings = tmp_path / "windows.tsv", {"length": 64, "prompt": 0, "of": 2}
    first = rows.Rows(path, **settings)
    first.add([row("tq3", 0, 2.1, 0.1)])
    again = rows.Rows(path, **settings)
    assert again.has("m", "tq3", 0) and not again.has("m", "tq3", 1) and not again.has("m", "tq4", 0)
    again.add([row("tq3", 1, 2.3, 0.3)])
    other = rows.Rows(path, **settings | {"length": 128})
    assert not other.has("m", "tq3", 0) and other.of_models(["m"]) == {"m": []}
    other.add([row("tq3", 0, 9.0, 9.0, length=128)])
    assert [r["mean_kld"] for r in rows.Rows(path, **settings).of_models(["m"])["m"]] == [0.1, 0.3]


def test_means_and_errors_are_over_windows(rows):
    two = [row("tq3", 0, 2.1, 0.1), row("tq3", 1, 2.3, 0.3)]
    found = rows.means(two)
    assert found["mean_kld"] == pytest.approx(0.2) and found["mean_kld_stderr"] == pytest.approx(0.1)
    assert found["change"] == pytest.approx(math.expm1(0.2))
    assert found["change_stderr"] == pytest.approx(math.exp(0.2) * 0.1)
    assert math.isnan(rows.means(two[:1])["mean_kld_stderr"])
    text = rows.markdown({"m": two})
    assert "| tq3 | 2 | 0.20000 | 0.10000 | 0.8000 | 50.00% | 9.025 | +22.14% | 12.21% |" in text
