"""Why the package cannot work here, said plainly and before anything is loaded."""

import importlib.metadata
import re
import sys
import warnings
from pathlib import Path

DISTRIBUTION = "turboquant-kv-mlx"
API = 8  # of the extension: raise it here and in bindings.cpp when a binding changes
_REBUILD = "rebuild it in this environment: pip install --no-build-isolation -e . (in the repository's root)"


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def other_folders():
    """What a look at sys.path finds: folders, and distributions with turboquant in their name, that are imported as
    turboquant_mlx and are not ours.  Takes about a millisecond, so every import does it."""
    ours = Path(__file__).resolve().parent
    found = set()
    for entry in sys.path:
        root = Path(entry or ".")
        folder = root / "turboquant_mlx"
        if (folder / "__init__.py").is_file() and folder.resolve() != ours:
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


def before_loading():
    """Raises ImportError when the extension does not fit this environment; warns when the import name is shared."""
    clash = other_folders()
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
    api = getattr(_core, "API", 0)
    if api != API:
        raise ImportError(
            f"[turboquant_mlx] the extension was built from other sources (its API is {api}, these need {API}); "
            f"{_REBUILD}"
        )
    try:
        _core.accepts(mx.array(0))
    except TypeError as error:
        raise ImportError(
            f"[turboquant_mlx] the extension does not recognise mx.array: it was built with nanobind "
            f"{NANOBIND_VERSION}, whose ABI is not that of MLX {mx.__version__}'s own module; {_REBUILD}"
        ) from error
