"""Builds ggml from the llama-cpp-python sdist outside this repository and times its attention on our shape.

    python benchmarks/kernels/llama_cpp.py [--build DIR] [--threads N] [TOKENS ...]

DIR (default: ~/.cache/turboquant-llama-cpp) receives the sdist, fetched with pip, and the build for this processor.
Prints one line a type and length: TYPE TOKENS MEDIAN_MICROSECONDS.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def build(where: Path) -> Path:
    """Path of the benchmark program, built when it is missing or older than its source."""
    where.mkdir(parents=True, exist_ok=True)
    program, source = where / "llama_cpp_bench", HERE / "llama_cpp.cpp"
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    if not list(where.glob("llama_cpp_python-*.tar.gz")):
        fetch = ["pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "llama-cpp-python"]
        subprocess.run([sys.executable, "-m", *fetch, "-d", str(where)], check=True)
    archive = sorted(where.glob("llama_cpp_python-*.tar.gz"))[-1]
    tree = where / archive.name.removesuffix(".tar.gz")
    if not tree.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(where)
    ggml, project, out = tree / "vendor/llama.cpp/ggml", where / "project", where / "ggml"
    project.mkdir(exist_ok=True)  # a parent project: on its own ggml wants files that the sdist leaves out
    (project / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.14)\nproject(bench C CXX)\nadd_subdirectory({ggml} ggml)\n"
    )
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DGGML_OPENMP=OFF", "-DBUILD_SHARED_LIBS=OFF"]
    if not (out / "ggml/src/libggml-cpu.a").exists():
        subprocess.run(["cmake", "-S", str(project), "-B", str(out), *options], check=True, stdout=sys.stderr)
        subprocess.run(["cmake", "--build", str(out), "-j2", "--target", "ggml-cpu"], check=True, stdout=sys.stderr)
    libraries = [str(out / "ggml/src" / f"lib{name}.a") for name in ("ggml-cpu", "ggml-base")]
    flags = ["-std=c++20", "-O2", f"-I{ggml / 'include'}", str(source), *libraries, "-lpthread", "-ldl"]
    subprocess.run(["g++", *flags, "-o", str(program)], check=True)
    return program


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path.home() / ".cache/turboquant-llama-cpp")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("tokens", type=int, nargs="*", default=[1024, 32768, 131072])
    args = parser.parse_args()
    subprocess.run([str(build(args.build)), str(args.threads), *map(str, args.tokens)], check=True)


if __name__ == "__main__":
    main()
