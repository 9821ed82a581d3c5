"""Why the package cannot work here, said plainly and before anything is loaded."""

import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from . import _versions

DISTRIBUTION = "turboquant-kv-mlx"
API = 8  # of the extension: raise it here and in bindings.cpp when a binding changes
_HERE = Path(__file__).resolve().parent


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def other_folders():
    """What a look at sys.path finds: folders, and distributions with turboquant in their name, that are imported as
    turboquant_mlx and are not ours.  Takes about a millisecond, so every import does it."""
    found = set()
    for entry in sys.path:
        root = Path(entry or ".")
        folder = root / "turboquant_mlx"
        if (folder / "__init__.py").is_file() and folder.resolve() != _HERE:
            found.add(str(folder.resolve()))
        for info in root.glob("*turboquant*.dist-info"):
            other = importlib.metadata.Distribution.at(info)
            name = other.metadata["Name"] or info.name
            files = (str(file) for file in other.files or [])
            if _normal(name) != DISTRIBUTION and any(file.startswith("turboquant_mlx/") for file in files):
                found.add(f"{name} {other.version}")
    return sorted(found)


def other_packages():
    """Folders and all installed distributions, other than ours, that are imported as turboquant_mlx.  Reads every
    distribution's list of files: about 0.1 s for 60 of them."""
    names = importlib.metadata.packages_distributions().get("turboquant_mlx", [])
    others = {f"{name} {importlib.metadata.version(name)}" for name in names if _normal(name) != DISTRIBUTION}
    return sorted(others.union(other_folders()))


def replaced_files() -> list[str]:
    """Files of an installed wheel that are not those that it brought: another package of this import name was installed
    over it, or its removal took them along.  A checkout has no list to compare with."""
    found = []
    for info in _HERE.parent.glob(f"{DISTRIBUTION.replace('-', '_')}-*.dist-info"):
        record = info / "RECORD"
        for name, digest, size in csv.reader(record.read_text().splitlines() if record.is_file() else []):
            if not name.startswith("turboquant_mlx/") or not name.endswith(".py") or not digest:
                continue
            file = _HERE.parent / name
            if not file.is_file():
                found.append(f"{name} (missing)")
            elif file.stat().st_size != int(size) or _digest(file) != digest:
                found.append(name)
    return found


def _digest(file: Path) -> str:
    """As RECORD writes it."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest())
    return f"sha256={digest.rstrip(b'=').decode()}"


def problems(modules: bool = False) -> Iterator[str]:
    """What is wrong here, each with the line that mends it, by looking at files: nothing is loaded.  With `modules` the
    extension modules are read, too, which takes longer than loading them."""
    replaced = replaced_files()
    if replaced:
        yield (
            f"files of this package were replaced by another one of the same import name ({', '.join(replaced[:3])}"
            f"{', ...' if len(replaced) > 3 else ''}): uninstall that one, then reinstall this: pip install "
            f"--force-reinstall --no-deps {DISTRIBUTION} (or . in the repository's root)"
        )
    mlx, module = _versions.installed("mlx"), _versions.mlx_module()
    if mlx is None and module is None:
        yield (
            'MLX cannot be imported (it is not installed). Install it: pip install "mlx[cpu]" on Linux, "mlx[cuda13]" for '
            "NVIDIA GPUs, mlx on macOS."
        )
        return
    backends = _versions.backends()
    if mlx and backends and mlx not in backends.values():
        others = ", ".join(f"{name} {version}" for name, version in backends.items())
        right = mlx if _versions.within(mlx, _versions.MLX) else _versions.MLX[1]
        yield f"MLX {mlx} has a backend of another version ({others}): pip install {_versions.requirement(right)}"
    mlx_lm = _versions.installed("mlx-lm")
    if mlx_lm is None and importlib.util.find_spec("mlx_lm") is None:
        yield f"mlx-lm is not installed: pip install mlx-lm=={_versions.MLX_LM[1]}"
    elif mlx_lm and not _versions.within(mlx_lm, _versions.MLX_LM):
        yield (
            f"mlx-lm {mlx_lm} is not one of {_versions.MLX_LM[0]} to {_versions.MLX_LM[1]}, which this works with: "
            f"pip install mlx-lm=={_versions.MLX_LM[1]}"
        )
    try:
        from ._build_info import MLX_VERSION
    except ImportError:
        yield (
            "the C++ extension is missing: this folder holds the sources only. Run pip install -e . in the repository's "
            "root, or make demo."
        )
        return
    if mlx and mlx != MLX_VERSION:
        yield _other_mlx(MLX_VERSION, mlx)
    elif modules and module:
        extension = importlib.util.find_spec("turboquant_mlx._core")
        if extension and extension.origin and _versions.abi(Path(extension.origin)) != _versions.abi(module):
            yield _other_abi(mlx)


def _other_mlx(built: str, here: str) -> str:
    """The advice when MLX changed since the build."""
    said = f"the extension was built for MLX {built}, this is MLX {here}"
    back = f"pip install {_versions.requirement(built)}"
    if not _versions.within(here, _versions.MLX):
        return f"{said}, which is not one of {_versions.MLX[0]} to {_versions.MLX[1]}: {back}"
    return f"{said}; rebuild it for this MLX: {_versions.rebuild(_versions.mlx_module())}; or go back: {back}"


def _other_abi(mlx: str | None) -> str:
    from ._build_info import NANOBIND_VERSION

    return (
        f"the extension does not recognise mx.array: it was built with nanobind {NANOBIND_VERSION}, whose ABI is not that of "
        f"MLX {mlx}'s own module; rebuild it: {_versions.rebuild(_versions.mlx_module())}"
    )


def _raise(problem: str, cause: Exception | None = None) -> NoReturn:
    raise ImportError(f"[turboquant_mlx] {problem}") from cause


def before_loading() -> None:
    """Raises ImportError when the extension does not fit this environment; warns when the import name is shared."""
    clash = other_folders()
    if clash:
        warnings.warn(
            f"[turboquant_mlx] another package uses this import name ({', '.join(clash)}); this is {DISTRIBUTION} in "
            f"{_HERE}. Uninstall the other one, then reinstall this one.",
            stacklevel=3,
        )
    for problem in problems():
        _raise(problem)
    try:
        import mlx.core as mx
    except ImportError as error:
        _raise(
            f"MLX cannot be imported ({error}). Install it: "
            'pip install "mlx[cpu]" on Linux, "mlx[cuda13]" for NVIDIA GPUs, mlx on macOS.',
            error,
        )
    from ._build_info import MLX_VERSION

    here: str = mx.__version__  # type: ignore[attr-defined]
    if here != MLX_VERSION:
        _raise(_other_mlx(MLX_VERSION, here))
    rebuild = f"rebuild it: {_versions.rebuild(_versions.mlx_module())}"
    try:
        from . import _core
    except ImportError as error:
        _raise(f"the extension cannot be loaded ({error}); {rebuild}", error)
    api = getattr(_core, "API", 0)
    if api != API:
        _raise(f"the extension was built from other sources (its API is {api}, these need {API}); {rebuild}")
    try:
        _core.accepts(mx.array(0))
    except TypeError as error:
        _raise(_other_abi(here).split("; rebuild")[0] + f"; {rebuild}", error)


def only_doctor() -> bool:
    """Whether this process is `python -m turboquant_mlx doctor`, which tells what is wrong instead of failing."""
    words = sys.orig_argv
    module = "-m" in words and words[words.index("-m") + 1 :][:2] == ["turboquant_mlx", "doctor"]
    return module or (Path(sys.argv[0]).name == "turboquant-mlx" and sys.argv[1:2] == ["doctor"])


def report() -> int:
    """What doctor prints where the package cannot be loaded; returns the exit status."""
    for name in ("turboquant-kv-mlx", "mlx", *_versions.BACKENDS, "mlx-lm", "mlx-vlm"):
        version = _versions.installed(name)
        if version or name in ("turboquant-kv-mlx", "mlx", "mlx-lm"):
            print(f"{name:18} {version or 'not installed'}")
    print(f"{'Python':18} {sys.version.split()[0]} in {sys.prefix}")
    print(f"{'import name':18} {', '.join(other_packages()) or 'ours alone'}")
    found = list(problems(modules=True))
    if not found:
        try:
            before_loading()
        except ImportError as error:
            found = [str(error).removeprefix("[turboquant_mlx] ")]
    for problem in found:
        print(f"{'FAILED':18} {problem}")
    return 1 if found else 0
