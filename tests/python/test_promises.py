"""docs/limits.md says which test keeps each promise: all of them exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_promise_names_tests_that_exist():
    promises = (ROOT / "docs" / "limits.md").read_text().partition("# What it promises")[2]
    rows = [line for line in promises.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 20
    for row in rows:
        file, found = None, 0
        for name in re.findall(r"`([^`]+)`", row.split("|")[2]):
            if name.endswith((".py", ".cpp")):
                file = (ROOT / "tests" / ("python" if name.endswith(".py") else "cpp") / name).read_text()
                found += 1
                continue
            suite, _, test = name.rpartition(".")
            wanted = rf"^TEST(_P|_F)?\({suite}, {test}\)" if suite else rf"^def {test}\("
            assert file is not None and re.search(wanted, file, re.M), f"{name} of: {row}"
        assert found, f"no test: {row}"
