"""Rows of the publication curve: who may add to them, and what is left of a sweep that did not end."""

import contextlib
import json

import pytest
from test_curve import curve, run, tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("curve")


@pytest.fixture
def rows_module(curve):  # noqa: F811
    from curve import rows as curve_rows

    return curve_rows


def test_places_are_not_mixed(run, rows_module, monkeypatch, capsys, tmp_path):  # noqa: F811
    """Rows of another machine, version or commit are refused, with both values, or marked."""
    monkeypatch.setenv("TURBOQUANT_COMMIT", "abc")
    before = run("--scales", "1")[1]
    assert len(before) == 2 and json.loads((tmp_path / "out" / "run_metadata.json").read_text())["commit"] == "abc"
    assert run("--scales", "1,2")[0] == 0  # another process of the same place goes on
    monkeypatch.setattr(rows_module, "processor", lambda: "Another")
    monkeypatch.setenv("TURBOQUANT_COMMIT", "def")
    assert run("--scales", "1,2,3")[0] == 1
    error = capsys.readouterr().err
    assert "(commit, host, machine differ)" in error and "commit: 'abc' there, 'def' here" in error
    status, after = run("--scales", "1,2,3", "--mix")
    assert status == 0 and [r["elsewhere"][:11] for r in after] == [""] * 4 + ["commit: def"] * 2
    assert "2 runs come from another machine, version or commit" in (tmp_path / "README.md").read_text()
    # Settings are never mixed.
    assert run("--scales", "1,2,3", "--mix", "--block", "1")[0] == 1
    assert "(block differ)" in capsys.readouterr().err


def test_changed_sources_are_said(run, rows_module, monkeypatch, capsys, tmp_path):  # noqa: F811
    def output(command, what, *rest):
        assert (command, what) == ("git", "diff") and rest[1] == "abc"
        return "python/a.py\nsrc/b.cpp"

    monkeypatch.setenv("TURBOQUANT_COMMIT", "abc")
    monkeypatch.setattr(rows_module, "command_output", output)
    assert run("--scales", "1")[0] == 0
    assert "2 source files differ from commit abc" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "run_metadata.json").read_text())["changed_files"] == 2
    assert "2 source files differed from the commit" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_row_is_run_again(run, capsys, tmp_path, cut):  # noqa: F811
    path = tmp_path / "out" / "raw_rows.tsv"
    before = run()[1]
    path.write_bytes(path.read_bytes()[:-cut])
    status, after = run()
    assert status == 0 and after[:3] == before[:3] and len(after) == 4
    assert "the last line was cut short" in capsys.readouterr().err
    # A line that ends, and lacks fields; nothing is written while it is refused in the middle.
    path.write_text(path.read_text() + "1.00x\t40\n")
    assert run("--report")[0] == 0 and "has 2 of 21 fields" in capsys.readouterr().err
    path.write_text(path.read_text() + "1.00x\t40\n")
    assert run()[0] == 1 and "line 6 must have 21 fields; it has 2" in capsys.readouterr().err


class Killed(BaseException):
    """Nothing runs after it, like SIGKILL: the mark stays (see `killed`)."""


@pytest.fixture
def killed(rows_module):
    """Context: the process dies when tq3 begins `where` for the times-th time."""
    from curve import run as curve_run

    @contextlib.contextmanager
    def killed(where, times):
        real, calls = getattr(curve_run.Run, where), []

        def dying(self, *args):
            calls.extend([1] * (self.mode == "tq3"))
            if self.mode == "tq3" and len(calls) == times:
                patch.setattr(rows_module.Mark, "clear", lambda self: None)
                raise Killed
            return real(self, *args)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(curve_run.Run, where, dying)
            yield

    return killed


@pytest.mark.parametrize("where, doing", [("read", "reading"), ("decode", "decoding")])
def test_a_run_that_kills_the_process_is_a_row(run, killed, tmp_path, where, doing):  # noqa: F811
    with killed(where, {"read": 2, "decode": 4}[where]):  # after a warm-up, and that decodes in two turns
        run()
    status, rows = run()
    assert status == 0 and len(rows) == 4 and not (tmp_path / "out" / "running.json").exists()
    failed = {(r["scale"], r["mode"]): r["error"] for r in rows if r["status"] == "failed"}
    assert failed == {("1.00x", "tq3"): f"aborted: the process ended without a word while tq3 was {doing}"}


def test_a_mode_that_kills_the_process_in_the_warm_up(run, killed):  # noqa: F811
    with killed("read", 1):
        run()
    _, rows = run()
    assert [r["mode"] for r in rows if r["status"] == "ok"] == ["fp16", "fp16"]
    failed = [r["error"] for r in rows if r["mode"] == "tq3"]
    assert failed == ["aborted: the process ended without a word while tq3 was reading in the warm-up"] * 2
    # Whoever thinks that something else killed it tries again.
    assert {r["status"] for r in run("--retry-failed")[1]} == {"ok"}
