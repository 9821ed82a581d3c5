"""An environment that does not fit is named before anything breaks."""

import subprocess
import sys

import pytest


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
    ],
)
def test_import_fails_with_the_reason(setup, message):
    done = run(f"{setup}\nimport turboquant_mlx")
    assert done.returncode != 0
    import re

    assert "ImportError" in done.stderr and re.search(message, done.stderr), done.stderr


def test_another_package_of_this_name_is_named(tmp_path):
    (tmp_path / "turboquant_mlx").mkdir()
    (tmp_path / "turboquant_mlx" / "__init__.py").write_text("")
    done = run(f"import sys; sys.path.append({str(tmp_path)!r}); import turboquant_mlx")
    assert done.returncode == 0
    assert "another package uses this import name" in done.stderr and str(tmp_path) in done.stderr
