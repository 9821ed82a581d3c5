"""An environment that does not fit is named before anything breaks."""

import importlib.metadata
import re
import subprocess
import sys

import pytest
from turboquant_mlx import _checks


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    "setup, message",
    [
        (
            "import mlx.core as mx; mx.__version__ = '9.9.9'",
            r"built for MLX \d+\.\d+\.\d+, this is MLX 9\.9\.9",
        ),
        (
            "import sys; sys.modules['mlx'] = None; sys.modules['mlx.core'] = None",
            "MLX cannot be imported",
        ),
        (
            "import sys; sys.modules['turboquant_mlx._build_info'] = None",
            r"the C\+\+ extension is missing",
        ),
        (
            # A foreign array type is what an extension of another nanobind ABI sees.
            "import mlx.core as mx; mx.array = lambda x: object()",
            r"does not recognise mx\.array",
        ),
        (
            "import sys, types; sys.modules['turboquant_mlx._core'] = types.ModuleType('_core')",
            r"built from other sources \(its API is 0, these need \d+\); rebuild it",
        ),
    ],
)
def test_import_fails_with_the_reason(setup, message):
    done = run(f"{setup}\nimport turboquant_mlx")
    assert done.returncode != 0
    assert "ImportError" in done.stderr and re.search(message, done.stderr), done.stderr


def test_another_package_of_this_name_is_named(tmp_path):
    (tmp_path / "turboquant_mlx").mkdir()
    (tmp_path / "turboquant_mlx" / "__init__.py").write_text("")
    done = run(f"import sys; sys.path.append({str(tmp_path)!r}); import turboquant_mlx")
    assert done.returncode == 0
    assert "another package uses this import name" in done.stderr and str(tmp_path) in done.stderr


def distribution(folder, name, **files):
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    for file, text in files.items():
        (info / file.replace("_txt", ".txt")).write_text(text)


@pytest.mark.parametrize(
    "files",
    [{"RECORD": "turboquant_mlx/__init__.py,,\n"}, {"top_level_txt": "turboquant_mlx\n", "RECORD": "some.py,,\n"}],
)
def test_another_distribution_of_this_name_is_found(tmp_path, monkeypatch, files):
    assert not any("1.2" in found for found in _checks.other_packages())
    distribution(tmp_path, "quite-another-name", **files)
    distribution(tmp_path, "TurboQuant_KV.mlx", RECORD="turboquant_mlx/cache.py,,\n")  # ours, written otherwise
    distribution(tmp_path, "unrelated", RECORD="unrelated/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [found for found in _checks.other_packages() if "1.2" in found] == ["quite-another-name 1.2"]


def test_import_names_a_distribution_that_shares_the_folder(tmp_path):
    distribution(tmp_path, "mlx-turboquant", RECORD="turboquant_mlx/__init__.py,,\n")
    distribution(tmp_path, "turboquant-other", RECORD="turboquant_other/__init__.py,,\n")
    done = run(f"import sys; sys.path.append({str(tmp_path)!r}); import turboquant_mlx")
    assert done.returncode == 0
    assert "import name (mlx-turboquant 1.2)" in done.stderr


def test_the_look_at_each_import_finds_only_our_own_distribution():
    assert importlib.metadata.version(_checks.DISTRIBUTION)
    assert _checks.other_folders() == []
