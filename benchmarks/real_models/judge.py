"""What packed caches cost on real models: divergence from float16 caches, by the package's own caches.

    python benchmarks/real_models/judge.py                                   # the table: three models (fetch.py), 8 windows
    python benchmarks/real_models/judge.py --models smollm2 --windows 2
    python benchmarks/real_models/judge.py --model path/to/model --modes tq3,tq3f,tq4f
    python benchmarks/real_models/judge.py --models qwen2.5 --prompt 1792    # answers after a prompt of 1,792 tokens
    python benchmarks/real_models/judge.py --models qwen2.5 --modes tq3f --by-layer

Windows are of texts that nobody calibrated on (texts.py), each beginning as the model's texts begin.  Modes with c or f
take the model's calibration (`python -m turboquant_mlx calibrate`), or one made in passing from the text that the package
ships.  --out has windows.tsv, one row a model, mode and window, written as it is finished: the same command goes on where
an interrupted one ended.  table.md has the means.  Modes are measured some at a time, the first ones over all windows
before the next.
"""

import argparse
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import texts  # noqa: E402
from fetch import MODELS, cache_folder, fetch  # noqa: E402
from rows import Rows, markdown  # noqa: E402
from turboquant_mlx.caches.slots import leaves  # noqa: E402
from turboquant_mlx.calibration import load_calibration, save_calibration  # noqa: E402
from turboquant_mlx.eval import divergence  # noqa: E402
from turboquant_mlx.eval.model import load_model  # noqa: E402
from turboquant_mlx.eval.modes import parse_mode  # noqa: E402

REFERENCE = "fp16"
MODES = "tq3fr128s4,tq3fs4,tq2fr128s4,tq4fr128s4,tq3,tq4,affine4,tq3f,tq2,tq4fs4,tq2fs4"
GROUP = 4  # modes that walk over a window side by side, beside the reference


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}, with commas between them")
    parser.add_argument("--model", type=Path, help="a model directory of mlx-lm instead")
    parser.add_argument("--modes", default=MODES, help="as for turboquant_mlx eval, the most wanted first")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--prompt", type=int, default=0, help="tokens at the window's beginning that are not counted")
    parser.add_argument("--by-layer", action="store_true", help="each mode in one layer at a time, the others float16")
    parser.add_argument(
        "--calibration", type=Path, help="a file or a model directory; default: the model's own, or made"
    )
    parser.add_argument("--out", type=Path, default=cache_folder() / "table", help="a folder; default: %(default)s")
    return parser.parse_args(argv)


class Judged:
    """A model with its windows and the caches that are compared on it."""

    def __init__(self, folder, args):
        self.name, self.args = folder.name, args
        self.model, self.tokenizer = load_model(folder)
        self.windows, self.kinds = texts.windows(self.tokenizer, args.length, args.windows)
        self.modes = [parse_mode(name) for name in args.modes.split(",") if name != REFERENCE]
        self.calibration = None
        if any(mode.centred for mode in self.modes):
            self.calibration = self._calibration(folder)
        self.columns = self._columns()

    def _calibration(self, folder):
        """The model's calibration; made from the package's text when there is no file, and kept for the next run."""
        made = self.args.out / f"{self.name}.calibration.safetensors"
        for where in [self.args.calibration] if self.args.calibration else [folder, made]:
            try:
                return load_calibration(where, directory=folder)
            except FileNotFoundError:
                if self.args.calibration:
                    raise
        from turboquant_mlx.calibration import calibrate_by_default

        print(f"[judge] {self.name} has no calibration; it is calibrated now", file=sys.stderr)
        found = calibrate_by_default(self.model, self.tokenizer)
        save_calibration(found, made, directory=folder, source="the package's text")
        return found

    def _columns(self):
        """{name: function that makes its caches}, without the reference."""
        made, layers = {}, sorted({path[0] for path, c in leaves(self.reference()) if hasattr(c, "code_keys")})
        for mode in self.modes:
            own = self.calibration if mode.centred else None
            if self.args.by_layer:
                for layer in layers:
                    made[f"{mode.name}@{layer}"] = lambda m=mode, n=layer, o=own: self._in_one_layer(n, m, o)
            else:
                made[mode.name] = lambda m=mode, o=own: m.make_caches(self.model, o)
        return made

    def reference(self):
        """Float16 caches."""
        return parse_mode(REFERENCE).make_caches(self.model)

    def _in_one_layer(self, layer, mode, calibration):
        floats, packed = self.reference(), mode.make_caches(self.model, calibration)
        return [packed[i] if i == layer else c for i, c in enumerate(floats)]

    def measure(self, number, names):
        """Rows of one window: the reference's and those of the columns named."""
        caches = {REFERENCE: self.reference()} | {name: self.columns[name]() for name in names}
        prompt = self.args.prompt
        records = divergence.compare(self.model, self.windows[number][None], caches, prompt=prompt)
        first = records[REFERENCE]
        rows = []
        for name, record in records.items():
            kld = record.kld[0]
            rows.append(
                {
                    "model": self.name,
                    "mode": name,
                    "length": self.args.length,
                    "prompt": prompt,
                    "window": number,
                    "of": len(self.windows),
                    "kind": self.kinds[number],
                    "nll": float(record.nll[0].mean(dtype=np.float64)),
                    "reference_nll": float(first.nll[0].mean(dtype=np.float64)),
                    "mean_kld": float(kld.mean(dtype=np.float64)),
                    "p99_kld": float(np.quantile(kld, 0.99)),
                    "top1": float(record.agree[0].mean()),
                }
            )
        return rows


def judge(args):
    """Measures what `windows.tsv` lacks; returns the rows that belong to these arguments."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out / "windows.tsv", length=args.length, prompt=args.prompt, of=args.windows)
    models = [Judged(folder, args) for folder in ([args.model] if args.model else map(fetch, args.models.split(",")))]
    rounds = max(-(-len(m.columns) // GROUP) for m in models)
    for turn in range(rounds):
        for number in range(args.windows):
            for m in models:
                wanted = list(m.columns)[turn * GROUP : (turn + 1) * GROUP]
                missing = [name for name in wanted if not rows.has(m.name, name, number)]
                if missing:
                    rows.add(m.measure(number, missing))
                    print(f"[judge] {m.name}: window {number}, {', '.join(missing)}", file=sys.stderr, flush=True)
    return rows.of_models([m.name for m in models])


def main(argv=None):
    args = parse(argv)
    mx.set_default_device(mx.cpu)
    table = markdown(judge(args))
    (args.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
