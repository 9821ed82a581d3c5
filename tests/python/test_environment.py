"""An environment that does not fit is named before anything breaks."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from turboquant_mlx import _checks, _versions


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


ABI_NAMES = [
    (b"\0v20_system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1\0", "v20", "2.13.0"),
    (b"\0v19_system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1\0", "v19", "2.12.0"),
    (b"\0v21_system_libcpp_abi1\0", "v21", "2.15.0"),
    (b"\0nanobind_system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1_a1_v22\0", "v22", "3.1.0"),
    (b"\0v99_system_x\0", "v99", None),
    (b"\0nothing of the kind\0", None, None),
]


@pytest.mark.parametrize("data, abi, nanobind", ABI_NAMES)
def test_nanobind_is_chosen_by_the_abi_of_mlxs_module(tmp_path, data, abi, nanobind):
    (tmp_path / "mlx").mkdir()
    module = tmp_path / "mlx" / "core.so"
    module.write_bytes(b"ELF" + data + b"more")
    assert _versions.abi(module) == abi and _versions.nanobind_for(module) == nanobind
    (tmp_path / "mlx-0.32.1.dist-info").mkdir()
    needed = _versions.build_requirements([str(tmp_path)])
    assert needed[:2] == [f"nanobind=={nanobind or '3.1.0'}", "mlx==0.32.1"]
    assert (_versions.why_nanobind_is_wrong("2.11.0", module) is None) == (nanobind is None)
    if nanobind:
        assert _versions.why_nanobind_is_wrong(nanobind, module) is None


def test_a_build_without_one_of_our_mlx_takes_the_newest(tmp_path):
    newest = [f"nanobind=={_versions.NANOBIND['v22'][0]}", f"mlx=={_versions.MLX[1]}"]
    assert _versions.build_requirements([str(tmp_path)])[:2] == newest
    (tmp_path / "mlx-0.20.0.dist-info").mkdir()
    assert _versions.build_requirements([str(tmp_path)])[:2] == newest


def test_the_extension_here_has_mlxs_abi():
    import turboquant_mlx._core as core

    assert _versions.abi(Path(core.__file__)) == _versions.abi(_versions.mlx_module()) in _versions.NANOBIND


def test_pyproject_has_the_ranges_of_the_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    mlx, mlx_lm = (f">={low},<={high}" for low, high in (_versions.MLX, _versions.MLX_LM))
    assert {f"mlx{mlx}", f"mlx-lm{mlx_lm}"} < set(project["dependencies"])
    extras = project["optional-dependencies"]
    assert extras["cpu"] == [f"mlx[cpu]{mlx}"] and extras["cuda13"] == [f"mlx[cuda13]{mlx}"]
    assert extras["vlm"] == [f"mlx-vlm=={_versions.MLX_VLM}"]
    assert project["requires-python"] == f">={_versions.PYTHON[0]}"


@pytest.fixture
def environment(monkeypatch):
    """Pretends that distributions have other versions; nothing is loaded."""

    def environment(**versions):
        real = _versions.installed
        named = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(_versions, "installed", lambda name, path=None: named.get(name, real(name, path)))
        return list(_checks.problems(modules=True))

    return environment


def test_an_environment_that_fits_has_no_problems(environment):
    assert environment() == []


@pytest.mark.parametrize(
    "versions, message",
    [
        ({"mlx_cpu": "0.32.0"}, r"MLX 0\.32\.4 has a backend of another version \(mlx-cpu 0\.32\.0\): pip install "),
        ({"mlx": "0.32.0", "mlx_cpu": "0.32.0"}, r"built for MLX 0\.32\.4, this is MLX 0\.32\.0; rebuild .* --no-deps"),
        (
            {"mlx": "0.20.0", "mlx_cpu": "0.20.0"},
            r"this is MLX 0\.20\.0, which is not one of 0\.31\.2 to .*: pip install",
        ),
        ({"mlx_lm": "0.31.2"}, r"mlx-lm 0\.31\.2 is not one of .*: pip install mlx-lm==0\.32\.2"),
        ({"mlx_lm": "0.33.0"}, r"mlx-lm 0\.33\.0 is not one of"),
    ],
)
def test_a_problem_names_the_line_that_mends_it(environment, versions, message):
    found = environment(**versions)
    assert len(found) == 1 and re.search(message, found[0])


def test_replaced_and_missing_files_are_found(tmp_path, monkeypatch):
    package = tmp_path / "turboquant_mlx"
    (package / "caches").mkdir(parents=True)
    info = tmp_path / "turboquant_kv_mlx-0.1.0.dist-info"
    info.mkdir()
    lines = []
    for name in ("__init__.py", "ops.py", "caches/packed.py"):
        (package / name).write_text(f"# {name}\n")
        lines.append(f"turboquant_mlx/{name},{_checks._digest(package / name)},{(package / name).stat().st_size}")
    (info / "RECORD").write_text("\n".join([*lines, "turboquant_mlx/_core.so,sha256=x,5", "other.py,sha256=x,5", ""]))
    monkeypatch.setattr(_checks, "_HERE", package)
    assert _checks.replaced_files() == []
    (package / "ops.py").write_text("# ops.px\n")  # of the same size
    (package / "caches" / "packed.py").unlink()
    assert _checks.replaced_files() == ["turboquant_mlx/ops.py", "turboquant_mlx/caches/packed.py (missing)"]
    assert "uninstall that one, then reinstall this" in next(_checks.problems())


def test_doctor_tells_what_is_wrong_where_the_package_cannot_be_imported(tmp_path):
    (tmp_path / "mlx_lm-0.31.2.dist-info").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "turboquant_mlx", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"FAILED +mlx-lm 0\.31\.2 is not one of .*: pip install mlx-lm==", done.stdout)
    done = subprocess.run([*command[:-1], "inspect"], capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "ImportError: [turboquant_mlx] mlx-lm 0.31.2" in done.stderr
