"""The rows of the publication curve on the disk: what they must share, and what an interrupted sweep leaves behind."""

import csv
import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from turboquant_mlx import _core
from turboquant_mlx.calibration import FILE_NAME, directory_hash
from turboquant_mlx.eval.files import write_text

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    "scale prompt_tokens mode key_bits value_bits repetition status prompt_tps decode_tps decode_ratio first_token_s "
    "attention_bytes fp16_equivalent_bytes linear_bytes resident_bytes peak_bytes kernel load synthetic elsewhere error"
).split()
SOURCES = ("python", "src", "include", "cmake", "CMakeLists.txt", "benchmarks/*.py", "benchmarks/curve/*.py")
# What describes where rows were measured.  With --mix it may differ, and the rows say so; settings never may.
PLACE = ("device", "machine", "host", "threads", "mlx", "mlx_lm", "blas", "tf32", "commit", "changed_files")


def command_output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor():
    if platform.system() == "Darwin":
        return command_output("sysctl", "-n", "machdep.cpu.brand_string")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def sources():
    """(commit of the sources, how many of them differ from it; None where git cannot tell).

    TURBOQUANT_COMMIT wins over git: a copy of the tree on another host may have no history, or another one."""
    commit = os.environ.get("TURBOQUANT_COMMIT") or command_output("git", "rev-parse", "HEAD")
    changed = commit and command_output("git", "diff", "--name-only", commit, "--", *SOURCES)
    return commit, None if changed is None else len(changed.splitlines())


def calibration_name(args):
    """A hash of the calibration file, "synthetic" for a shape, None without any."""
    if args.shape:
        return "synthetic"
    path = args.calibration and (args.calibration / FILE_NAME if args.calibration.is_dir() else args.calibration)
    return path and hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def identity(args):
    """What rows must share to stand in one table."""
    commit, changed = sources()
    # Clouds give processors of several generations one name: the instruction set tells them apart.
    host = f"{processor()}, {cores()} cores, {_core.current_isa()}"
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return {
        "model": args.model.name if args.model else f"shape {args.shape}, random weights",
        "fingerprint": directory_hash(args.model) if args.model else None,
        "calibration": calibration_name(args),
        "device": str(mx.default_device()),
        "machine": host if on_cpu else mx.device_info(mx.default_device()).get("device_name", "GPU"),
        "host": host,
        "threads": _core.num_threads(),
        "mlx": mx.__version__,
        "mlx_lm": version("mlx-lm"),
        "blas": Path(os.environ.get("LD_PRELOAD", "")).name or "as MLX was built",
        "tf32": os.environ.get("MLX_ENABLE_TF32", "1") != "0",  # MLX's own reading of it, and default
        "commit": commit,
        "changed_files": changed,
        "tokens": args.tokens,
        "decode_tokens": args.decode_tokens,
        "block": args.block,
        "step": args.step,
        "seed": args.seed,
        "linear_attention": "mlx-lm's loop" if args.loop else "chunks of 64 off Metal",
    }


def metadata(args, subject):
    about = identity(args)
    return {
        "identity": about,
        "processor": processor(),
        "cores": cores(),
        "device_info": {
            k: v for k, v in mx.device_info().items() if isinstance(v, (str, int)) and k not in ("uuid", "pci_bus_id")
        },
        "blas": about["blas"],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("mlx", "mlx-lm", "turboquant-kv-mlx")},
        "commit": about["commit"],
        "changed_files": about["changed_files"],
        "activations": str(subject.dtype).split(".")[-1],
        "weight_bytes": sum(v.nbytes for _, v in tree_flatten(subject.model.parameters())),
        "repetitions": args.repetitions,
        "order": f"rotated each repetition; decoded in turns of {args.block} tokens",
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "clock": "time.perf_counter",
    }


def read_rows(path):
    """The rows of a table; a last line that was cut short is left out, and said."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        print(f"[curve] {path}: the last line was cut short and is left out", file=sys.stderr)
        lines.pop()
    header, *rows = list(csv.reader(lines, delimiter="\t")) or [[]]
    if rows and len(rows[-1]) != len(header):
        print(
            f"[curve] {path}: the last line has {len(rows[-1])} of {len(header)} fields and is left out",
            file=sys.stderr,
        )
        rows.pop()
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"[curve] {path}, line {number} must have {len(header)} fields; it has {len(row)}")
    return [dict(zip(header, row, strict=True)) for row in rows]


def previous_rows(args):
    """(rows of an interrupted sweep, rows of what its process did not survive, how this place differs from its own as
    text); refuses a folder that holds another sweep's."""
    mark = Mark(args.out)
    if args.fresh:
        mark.clear()
        return [], [], ""
    described = args.out / "run_metadata.json"
    rows, aborted = read_rows(args.out / "raw_rows.tsv"), mark.left()
    if not rows and not aborted:
        return [], [], ""
    before = json.loads(described.read_text()).get("identity", {}) if described.exists() else {}
    now = identity(args)
    differing = sorted(k for k, v in now.items() if before.get(k) != v)
    if refused := [k for k in differing if k not in PLACE or not args.mix]:
        fields = "; ".join(f"{k}: {before.get(k)!r} there, {now[k]!r} here" for k in refused)
        raise ValueError(
            f"[curve] {args.out} holds rows of another run ({', '.join(refused)} differ): use --fresh or --out, or, where "
            f"only machine, versions or commit differ, --mix.  {fields}"
        )
    if args.retry_failed:
        rows, aborted = [r for r in rows if r["status"] == "ok"], []
    return rows, aborted, "; ".join(f"{k}: {now[k]}" for k in differing)


class RowFile:
    """raw_rows.tsv, open for more: a row is on the disk when add() returns."""

    def __init__(self, path, rows):
        """rows: those that stay; the file is written again with them alone."""
        self.rows = rows
        beside = path.with_name(path.name + ".new")
        self.file = beside.open("w", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, delimiter="\t", lineterminator="\n", restval="")
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()
        beside.replace(path)

    def add(self, row):
        self.rows.append({k: str(row.get(k, "")) for k in COLUMNS})
        self.writer.writerow(row)
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


class Mark:
    """running.json: the rows that fail if the process does not survive what it is doing (killed for memory, aborted by
    CUDA).  Anything the process can still answer to removes it."""

    def __init__(self, folder):
        self.path = folder / "running.json"

    def left(self):
        """Failed rows of the runs that an earlier process did not survive."""
        return json.loads(self.path.read_text()) if self.path.exists() else []

    def set(self, rows, doing):
        error = f"aborted: the process ended without a word while {doing}"
        write_text(self.path, json.dumps([{**row, "status": "failed", "error": error} for row in rows]))

    def clear(self):
        self.path.unlink(missing_ok=True)
