"""What an installation says in environments that do not fit, and which versions of MLX and mlx-lm pass the tests.

    python tests/environments.py [--broken] [--pairs]      both, unless one is named

Each case makes a scratch environment and prints what the package says there.  It exits with 1 when a case says something
else than it should.  Run by `make environments`, not by `make test`: it downloads, and builds the extension once a pair."""

import argparse
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python" / "turboquant_mlx"))
import _versions  # noqa: E402

NEWEST, OLDEST = _versions.MLX[1], _versions.MLX[0]
# mlx-lm 0.31.3 is what vllm-mlx and Rapid-MLX pin.
PAIRS = ((OLDEST, _versions.MLX_LM[0]), (NEWEST, _versions.MLX_LM[1]))
QUICK = ["-q", "-m", "quick", "-p", "no:cacheprovider", str(ROOT / "tests" / "python")]


class Environment:
    """A scratch environment with some distributions and nothing that they depend on."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin" / "python"
        venv.create(folder, with_pip=False)

    def install(self, *what: object, deps: bool = False) -> None:
        words = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--disable-pip-version-check"]
        words += [*([] if deps else ["--no-deps"]), *what]
        subprocess.run([str(word) for word in words], check=True)

    def says(self, *arguments: object, **environment: str) -> str:
        """What Python prints, run outside of the repository."""
        done = subprocess.run(
            [str(word) for word in (self.python, *arguments)],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={"PATH": f"{self.folder}/bin:/usr/bin:/bin", "HOME": str(self.folder), **environment},
        )
        return done.stdout + done.stderr


def mlx(version: str, backend: str | None = None) -> list[str]:
    return [f"mlx=={version}", f"mlx-cpu=={backend or version}"] if sys.platform == "linux" else [f"mlx=={version}"]


def other_package(folder: Path) -> Path:
    """A wheel of another package with our import name."""
    wheel = folder / "mlx_turboquant-1.2-py3-none-any.whl"
    info = "mlx_turboquant-1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as out:
        out.writestr("turboquant_mlx/ops.py", "def quantize(): pass\n")
        out.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: mlx-turboquant\nVersion: 1.2\n")
        out.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(f"{info}/RECORD", f"turboquant_mlx/ops.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return wheel


def of_another_abi(environment: Environment) -> None:
    """Makes the installed extension one of nanobind 2.13's, as far as a look at the file tells."""
    module = next(environment.folder.glob("lib/python*/site-packages/turboquant_mlx/_core*.so"))
    data = module.read_bytes()
    module.write_bytes(re.sub(rb"_v22\0", b"_v20\0", data))


def broken(wheel: Path, folder: Path) -> bool:
    """Runs the cases; returns whether each said what it should."""
    lm = f"mlx-lm=={_versions.MLX_LM[1]}"
    cases = {  # name: distributions, what is done then, what the import must say
        "no MLX": ([lm, wheel], None, 'MLX cannot be imported.*pip install "mlx\\[cpu\\]"'),
        "MLX newer than its backend": (
            [*mlx(NEWEST, "0.32.0"), lm, wheel],
            None,
            rf'MLX {NEWEST} has a backend of another version \(mlx-cpu 0\.32\.0\): pip install "mlx\[cpu\]=={NEWEST}"',
        ),
        "an older MLX of ours": (
            [*mlx("0.32.0"), lm, wheel],
            None,
            rf"built for MLX {NEWEST}, this is MLX 0\.32\.0; .*pip install nanobind==2\.13\.0 .*--no-build-isolation --no-deps",
        ),
        "another MLX of ours": ([*mlx("0.32.2"), lm, wheel], None, r"pip install nanobind==2\.15\.0 .*--no-deps"),
        "an MLX that is none of ours": (
            [*mlx("0.30.6"), lm, wheel],
            None,
            rf'not one of {OLDEST} to {NEWEST}: pip install "mlx\[cpu\]=={NEWEST}"',
        ),
        "an older mlx-lm": (
            [*mlx(NEWEST), "mlx-lm==0.31.2", wheel],
            None,
            r"mlx-lm 0\.31\.2 is not one of 0\.31\.3 to",
        ),
        "the extension of another nanobind": (
            [*mlx(NEWEST), lm, wheel],
            of_another_abi,
            r"does not recognise mx\.array.*pip install nanobind==3\.1\.0",
        ),
        "another package over ours": (
            [*mlx(NEWEST), lm, wheel],
            lambda e: e.install(other_package(folder)),
            r"replaced by another one of the same import name \(turboquant_mlx/ops\.py\).*reinstall",
        ),
        "its removal took a file of ours": (
            [*mlx(NEWEST), lm, wheel],
            lambda e: next(e.folder.glob("lib/python*/site-packages/turboquant_mlx/ops.py")).unlink(),
            r"turboquant_mlx/ops\.py \(missing\).*reinstall",
        ),
    }
    right = True
    for name, (what, then, must) in cases.items():
        environment = Environment(folder / re.sub(r"\W+", "-", name))
        environment.install(*what)
        if then:
            then(environment)
        said = environment.says("-c", "import turboquant_mlx")
        doctor = environment.says("-m", "turboquant_mlx", "doctor")
        ok = all(re.search(must, text, re.DOTALL) for text in (said, doctor)) and "Traceback" not in doctor
        right &= ok
        last = next((line for line in reversed(said.splitlines()) if "turboquant_mlx]" in line), said[-300:])
        print(f"{'ok' if ok else 'WRONG':6}{name}: {last}", flush=True)
        if not ok:
            print(f"      doctor: {doctor}")
    sources = Environment(folder / "sources")
    sources.install(*mlx(NEWEST), lm)
    said = sources.says("-c", "import turboquant_mlx", PYTHONPATH=str(ROOT / "python"))
    ok = "the C++ extension is missing" in said
    print(f"{'ok' if ok else 'WRONG':6}the sources alone: {said.splitlines()[-1]}", flush=True)
    return right and ok


def pairs(folder: Path, chosen: tuple[tuple[str, str], ...]) -> bool:
    """Builds and tests the package with each pair of MLX and mlx-lm; returns whether all passed."""
    right = True
    for mlx_version, lm_version in chosen:
        environment = Environment(folder / f"mlx-{mlx_version}-lm-{lm_version}")
        extra = "[cpu]" if sys.platform == "linux" else ""
        environment.install(
            f"mlx{extra}=={mlx_version}",
            f"mlx-lm=={lm_version}",
            "numpy",
            "tqdm",
            "pytest",
            "hypothesis",
            "matplotlib",
            deps=True,
        )
        environment.install(ROOT)  # an isolated build: the backend chooses nanobind by the MLX of the environment
        info = environment.says(
            "-c", "import turboquant_mlx._build_info as b; print(b.MLX_VERSION, b.NANOBIND_VERSION)"
        )
        doctor = environment.says("-m", "turboquant_mlx", "doctor").splitlines()[-1:]
        old = _versions.release(lm_version) < (0, 32)  # it lacks a model of that file
        skipped = [f"--ignore={ROOT / 'tests' / 'python' / 'test_latent.py'}"] if old else []
        tests = environment.says("-m", "pytest", *QUICK, *skipped).splitlines()
        summary = next(
            (line for line in reversed(tests) if re.search(r"\d+ (passed|failed|error)", line)), "no tests ran"
        )
        ok = doctor == ["all is well"] and " failed" not in summary and " error" not in summary and "passed" in summary
        right &= ok
        print(
            f"{'ok' if ok else 'WRONG':6}MLX {mlx_version}, mlx-lm {lm_version}, built as {info.strip()}: {summary}",
            flush=True,
        )
        if not ok:
            print("\n".join([*doctor, *tests[-30:]]))
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broken", action="store_true", help="the environments that do not fit")
    parser.add_argument("--pairs", action="store_true", help="the oldest and the newest versions")
    parser.add_argument("--pair", nargs=2, action="append", metavar=("MLX", "MLX_LM"), help="this pair instead")
    args = parser.parse_args()
    print(f"Python {sys.version.split()[0]} on {sys.platform}", flush=True)
    right = True
    with tempfile.TemporaryDirectory() as folder:
        if args.broken or not (args.pairs or args.pair):
            words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)]
            subprocess.run(words, check=True)
            right &= broken(next(Path(folder).glob("*.whl")), Path(folder))
        if args.pairs or args.pair or not args.broken:
            right &= pairs(Path(folder), tuple(map(tuple, args.pair)) if args.pair else PAIRS)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
