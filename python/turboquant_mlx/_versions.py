"""The versions of MLX, mlx-lm and nanobind that this package works with: the one place that knows them.

Only Python's own modules are imported, for this is read before anything is loaded: by the checks at import, by the build
backend (python/build_backend), which chooses nanobind by the MLX that is there, and by CMake."""

import re
import sys
from pathlib import Path

MLX = ("0.31.2", "0.32.4")  # the oldest and the newest
MLX_LM = ("0.31.3", "0.32.2")
PYTHON = ("3.11", "3.14")
MLX_VLM = "0.7.10"
# The ABI of nanobind that MLX's own module has: what makes it, and what else does.  Only a module of the same ABI sees
# mx.array.
NANOBIND = {
    "v19": ("2.12.0",),
    "v20": ("2.13.0", "2.14.0"),
    "v21": ("2.15.0",),
    "v22": ("3.1.0",),
}
# MLX's backends are distributions of their own, which pip does not keep at MLX's version: the extra of each.
BACKENDS = {"mlx-cpu": "cpu", "mlx-cuda-13": "cuda13", "mlx-cuda-12": "cuda12", "mlx-metal": ""}
TOOLS = '"scikit-build-core>=0.11" "cmake>=3.25" ninja'


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: "0.32.4.dev1" is (0, 32, 4)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def within(version: str, bounds: tuple[str, str]) -> bool:
    """Whether a version is one of those from bounds[0] to bounds[1]."""
    return release(bounds[0]) <= release(version) <= release(bounds[1])


def installed(name: str, path: list[str] | None = None) -> str | None:
    """The version of a distribution that lies in a folder of `path` (sys.path), or None.  Reads file names alone: a
    tenth of a millisecond a folder, where importlib.metadata takes milliseconds."""
    stem = name.replace("-", "_")
    for entry in sys.path if path is None else path:
        for info in Path(entry or ".").glob(f"{stem}-*.dist-info"):
            return info.name[len(stem) + 1 : -len(".dist-info")]
    return None


def backends(path: list[str] | None = None) -> dict[str, str]:
    """MLX's backends that are installed: name to version."""
    found = {name: installed(name, path) for name in BACKENDS}
    return {name: version for name, version in found.items() if version}


def requirement(version: str, path: list[str] | None = None) -> str:
    """MLX of a version, with the backend that is installed, as pip reads it."""
    here = backends(path)
    extra = next((BACKENDS[name] for name in here), "cpu" if sys.platform == "linux" else "")
    return f'"mlx[{extra}]=={version}"' if extra else f"mlx=={version}"


def mlx_module(path: list[str] | None = None) -> Path | None:
    """The file of mlx.core, found without loading it."""
    for entry in sys.path if path is None else path:
        for file in sorted((Path(entry or ".") / "mlx").glob("core*.so")):
            return file
    return None


def abi(module: Path) -> str | None:
    """The ABI of nanobind in an extension module, as in NANOBIND, read from the file; None if it has none."""
    data = module.read_bytes()
    # Up to 2.15 "v20_system_libstdcpp_..."; from 3.0 on "nanobind_system_libstdcpp_..._a1_v22".
    found = re.search(rb"\0(v\d{2})_[a-z]\w*\0", data) or re.search(rb"\0nanobind_\w+_a\d+_(v\d{2})\0", data)
    return found[1].decode() if found else None


def nanobind_for(module: Path | None) -> str | None:
    """The version of nanobind that makes extensions for MLX's module, or None if that is not known."""
    found = abi(module) if module else None
    return NANOBIND[found][0] if found in NANOBIND else None


def rebuild(module: Path | None) -> str:
    """The line that builds this package for the MLX whose module that is, and changes nothing else."""
    nanobind = nanobind_for(module)
    needed = f"nanobind=={nanobind}" if nanobind else "the nanobind that MLX was built with,"
    return (
        f"pip install {needed} {TOOLS} && pip install --no-build-isolation --no-deps --force-reinstall -e . "
        "(in the repository's root)"
    )


def build_requirements(path: list[str]) -> list[str]:
    """What an isolated build needs: the MLX of the environment, where that is one of ours, else the newest, with a
    nanobind of its ABI."""
    version = installed("mlx", path)
    if version is None or not within(version, MLX):
        version = MLX[1]
        nanobind = NANOBIND["v22"][0]
    else:
        nanobind = nanobind_for(mlx_module(path)) or NANOBIND["v22"][0]
    linux = [f"mlx-cpu=={version}"] if sys.platform == "linux" else []
    return [f"nanobind=={nanobind}", f"mlx=={version}", *linux]


def why_nanobind_is_wrong(version: str, module: Path | None) -> str | None:
    """Why an extension made by this nanobind would not see mx.array, with the line that mends it; None if it would."""
    found = abi(module) if module else None
    if found not in NANOBIND or any(release(version)[:2] == release(one)[:2] for one in NANOBIND[found]):
        return None
    return f"MLX's module has nanobind's ABI {found}, nanobind {version} has another: {rebuild(module)}"


if __name__ == "__main__":  # CMake: the version of nanobind; prints why it is wrong, or nothing
    print(why_nanobind_is_wrong(sys.argv[1], mlx_module()) or "")
