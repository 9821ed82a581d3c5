"""Why the package cannot work here, said plainly and before anything is loaded."""

import importlib.metadata
import sys
import warnings
from pathlib import Path

DISTRIBUTION = "turboquant-kv-mlx"
_REBUILD = "rebuild it in this environment: pip install --no-build-isolation -e . (in the repository's root)"


def _installed(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def other_packages():
    """Folders and distributions, other than ours, that are imported as turboquant_mlx."""
    ours = Path(__file__).resolve().parent
    found = []
    for entry in sys.path:
        folder = Path(entry or ".") / "turboquant_mlx"
        if (folder / "__init__.py").is_file() and folder.resolve() != ours:
            found.append(str(folder.resolve()))
    for name in ("turboquant-mlx", "turboquant_mlx", "mlx-turboquant"):
        version = _installed(name)
        if version and any(str(f).startswith("turboquant_mlx/") for f in importlib.metadata.files(name) or []):
            found.append(f"{name} {version}")
    return sorted(set(found))


def before_loading():
    """Raises ImportError when the extension does not fit this environment; warns when the import name is shared."""
    clash = other_packages()
    if clash:
        warnings.warn(
            f"[turboquant_mlx] another package uses this import name ({', '.join(clash)}); this is {DISTRIBUTION} in "
            f"{Path(__file__).resolve().parent}. Uninstall the other one.",
            stacklevel=3,
        )
    try:
        import mlx.core as mx
    except ImportError as error:
        raise ImportError(
            f"[turboquant_mlx] MLX cannot be imported ({error}). Install it: "
            'pip install "mlx[cpu]" on Linux, "mlx[cuda13]" for NVIDIA GPUs, mlx on macOS.'
        ) from error
    try:
        from ._build_info import MLX_VERSION, NANOBIND_VERSION
    except ImportError as error:
        raise ImportError(
            "[turboquant_mlx] the C++ extension is missing: this folder holds the sources only. "
            "Run pip install -e . in the repository's root, or make demo."
        ) from error
    if mx.__version__ != MLX_VERSION:
        raise ImportError(
            f"[turboquant_mlx] the extension was built for MLX {MLX_VERSION}, this is MLX {mx.__version__}; {_REBUILD}"
        )
    try:
        from . import _core
    except ImportError as error:
        raise ImportError(f"[turboquant_mlx] the extension cannot be loaded ({error}); {_REBUILD}") from error
    try:
        _core.accepts(mx.array(0))
    except TypeError as error:
        raise ImportError(
            f"[turboquant_mlx] the extension does not recognise mx.array: it was built with nanobind {NANOBIND_VERSION}, "
            f"whose ABI is not that of MLX {mx.__version__}'s own module; {_REBUILD}"
        ) from error
