"""`python -m turboquant_mlx eval`: one command from a model and a text to tables and pictures."""

import math
import sys
import tempfile
from collections import Counter

from tqdm import tqdm

from ..caches import leaves
from ..caches.arguments import code_name
from ..caches.slots import kv_slots, own_caches
from ..calibration import automatic, calibrate, directory_hash, load_calibration
from ..calibration.default import beginning
from . import answers, divergence, pictures, reconstruction, retrieval, tasks
from .files import write_json, write_table
from .model import cut_windows, load_model, message, read_tokens, spread_windows, window_numbers
from .options import REFERENCE, parse


class _Bar:
    def __init__(self, name, total):
        self.bar = tqdm(total=total, desc=name, unit="tok", disable=None)

    def __call__(self, tokens):
        self.bar.update(tokens)

    def close(self):
        self.bar.close()


def _divergence(args, model, windows, calibration):
    bar = _Bar("divergence", windows.size * len(args.modes))
    parts = []
    for start in range(0, len(windows), args.batch):
        caches = {mode.name: mode.make_caches(model, calibration) for mode in args.modes}
        parts.append(
            divergence.compare(model, windows[start : start + args.batch], caches, step=args.step, progress=bar)
        )
        records = {name: divergence.joined([part[name] for part in parts]) for name in caches}
        rows = _divergence_tables(args, records)  # after each batch: what was measured stays when the rest is not
    bar.close()
    pictures.divergence_by_position(args.out / "divergence.png", rows, REFERENCE)
    print(f"{'mode':10} {'perplexity':>10} {'change':>8} {'+-':>6} {'mean KLD':>9} {'99 %':>7} {'top-1':>7}")
    for r in rows:
        if r["band"] == "all":
            print(
                f"{r['mode']:10} {r['perplexity']:10.3f} {r['perplexity_change']:+8.2%} "
                f"{_error(r['perplexity_change_stderr'], '.2%'):>6} {r['mean_kld']:9.5f} {r['p99_kld']:7.4f} {r['top1_agreement']:7.2%}"
            )
    return rows


def _divergence_tables(args, records):
    """Writes divergence.tsv (by mode and band) and windows.tsv (by mode and window); returns the first one's rows."""
    rows = []
    for name, record in records.items():
        for start, stop in [(0, args.context), *divergence.bands(args.context)]:
            whole = (start, stop) == (0, args.context) and not any(r["mode"] == name for r in rows)
            figures = divergence.summarise(record, records[REFERENCE], start, stop)
            rows.append({"mode": name, "band": "all" if whole else "part", "start": start, "stop": stop, **figures})
    write_table(args.out / "divergence.tsv", rows)
    own, numbers = [], window_numbers(args.windows, args.first_window, args.without)
    for name, record in records.items():
        for number, nll, kld, agree in zip(numbers, record.nll, record.kld, record.agree, strict=False):
            figures = {"nll": float(nll.mean()), "mean_kld": float(kld.mean()), "top1_agreement": float(agree.mean())}
            own.append({"mode": name, "window": number, **figures})
    write_table(args.out / "windows.tsv", own)
    return rows


def _error(x, form):
    """A standard error as text; of one window or context there is none."""
    return "n/a" if math.isnan(x) else f"{x:{form}}"


def _needle_contexts(args, tokenizer, tokens):
    """{(length, trial): (context, questions)}, the same for every mode."""
    return {
        (length, trial): retrieval.needle_context(
            tokenizer, tokens, length, args.depths, retrieval.seeded(args.seed, length, trial)
        )
        for length in args.lengths
        for trial in range(args.trials)
    }


def _list_contexts(args, tokenizer, tokens):
    """{trial: (context, questions)}, the same for every mode."""
    return {
        trial: retrieval.list_context(
            tokenizer, tokens, args.pairs, retrieval.LIST_FILLER, retrieval.seeded(args.seed, args.pairs, trial)
        )
        for trial in range(args.lists)
    }


def _needle(args, model, tokenizer, contexts, calibration):
    bar = _Bar("needles", sum(len(context) for context, _ in contexts.values()) * len(args.modes))
    rows = []
    for (length, trial), (context, questions) in contexts.items():
        for mode in args.modes:
            caches = mode.make_caches(model, calibration)
            for a in retrieval.ask(model, tokenizer, caches, context, questions, progress=bar):
                row = {"mode": mode.name, "tokens": length, "depth": a.depth, "trial": trial}
                rows.append({**row, "passed": int(a.passed), "log_prob": a.log_prob})
        _write_answers(args, "needle.tsv", rows)
    bar.close()
    cells = {mode.name: {} for mode in args.modes}
    for mode in cells:
        for length in args.lengths:
            for depth in args.depths:
                own = [r for r in rows if (r["mode"], r["tokens"], r["depth"]) == (mode, length, depth)]
                cells[mode][length, depth] = sum(r["passed"] for r in own) / len(own)
    pictures.needle_heat_map(args.out / "needle.png", cells, args.lengths, args.depths)
    return _retrieved("needles", rows)


def _list(args, model, tokenizer, contexts, calibration):
    bar = _Bar("lists", sum(len(context) for context, _ in contexts.values()) * len(args.modes))
    rows = []
    for trial, (context, questions) in contexts.items():
        for mode in args.modes:
            caches = mode.make_caches(model, calibration)
            for place, a in enumerate(retrieval.ask(model, tokenizer, caches, context, questions, progress=bar)):
                row = {"mode": mode.name, "tokens": a.tokens, "place": place, "trial": trial}
                rows.append({**row, "passed": int(a.passed), "log_prob": a.log_prob})
        _write_answers(args, "list.tsv", rows)
    bar.close()
    return _retrieved("look-ups", rows)


def _write_answers(args, name, rows):
    """After each context, mode after mode: what was measured stays when the rest is not."""
    order = [mode.name for mode in args.modes]
    write_table(args.out / name, sorted(rows, key=lambda r: order.index(r["mode"])))


def _retrieved(what, rows):
    """Prints and returns the figures of each mode."""
    summary = retrieval.summarise(rows, REFERENCE)
    for mode, r in summary.items():
        print(
            f"{what:9} {mode:10} {r['found']:4d} of {r['asked']:4d}   log-probability {r['mean_log_prob']:8.4f}   "
            f"change {r['change']:+.4f} +- {_error(r['change_stderr'], '.4f')}"
        )
    return summary


def _task_prompts(args, tokenizer, tokens):
    """{task: its prompts}, the same for every mode."""
    filler = tasks.fillers(tokenizer, tokens)
    shared = {"filler": filler, "lengths": args.lengths, "depths": args.depths}
    return {name: tasks.prompts(name, args.prompts or tasks.COUNTS[name], args.seed, **shared) for name in args.tasks}


def _tasks(args, model, tokenizer, prompts, calibration):
    modes = {mode.name: (lambda m=mode: m.make_caches(model, calibration)) for mode in args.modes}
    bar = _Bar("tasks", sum(map(len, prompts.values())) * len(modes))
    rows, summary = [], {}
    for task, own in prompts.items():

        def write(some, before=tuple(rows), task=task):
            write_table(args.out / "tasks.tsv", [*before, *({"task": task, **row} for row in some)])

        found = answers.ask_all(model, tokenizer, modes, own, progress=bar, done=write)
        rows += [{"task": task, **row} for row in found]
        summary[task] = answers.summarise(found)
    bar.close()
    print(f"{'task':10} {'mode':12} {'pass':>9} {'as fp16':>9} {'every token':>12}")
    for task, by_mode in summary.items():
        for mode, r in by_mode.items():
            shares = (f"{r[name]} of {r['asked']}" for name in ("passed", "same", "same_tokens"))
            print("{:10} {:12} {:>9} {:>9} {:>12}".format(task, mode, *shares))
    return summary


def _reconstruction(args, model, windows, calibration):
    captured = reconstruction.capture(model, windows)
    rows = []
    widths = {(b, code_name("eval", m.code)) for m in args.modes if m.kind == "tq" for b in (m.key_bits, m.value_bits)}
    for bits, code in sorted(widths):
        least, stored = reconstruction.theoretical(bits, code)
        for row in reconstruction.table(captured, bits, calibration, code):
            rows.append({"bits": bits, "code": code, **row, "least": least, "least_same_length": stored})
    if rows:
        write_table(args.out / "reconstruction.tsv", rows)
    return rows


def _slots(args, model):
    """({kind of slot: how many are replaced}, {kind: how many stay}); says so on stderr."""
    caches = own_caches(model)
    slots = kv_slots(caches, "eval", args.model)
    replaced = dict(Counter(kind.__name__ for kind in slots.values()))
    kept = dict(Counter(type(c).__name__ for path, c in leaves(caches) if path not in slots))
    words = [", ".join(f"{n} x {kind}" for kind, n in some.items()) or "nothing" for some in (replaced, kept)]
    print(f"[eval] each mode replaces {words[0]}; unchanged: {words[1]}", file=sys.stderr)
    return replaced, kept


def _calibration(args, model, tokenizer):
    """(calibration or None, where it came from)."""
    if args.calibrate_text:
        text = read_tokens(tokenizer, args.calibrate_text)
        return calibrate(model, spread_windows(text, min(2048, len(text)), 8)), args.calibrate_text.name
    if args.calibration or any(mode.centred for mode in args.modes):
        chosen = any(mode.kind == "auto" for mode in args.modes) and not args.calibration
        try:
            found = load_calibration(args.calibration or args.model, directory=args.model)
            if not chosen or found.policy is not None:
                return found, "file"
        except FileNotFoundError:
            if not chosen and (args.calibration or not automatic.wanted(model)):
                raise
        if chosen:  # as `enable` does: beside the weights there is no choice of bits, but one may be kept elsewhere
            if (kept := automatic.chosen(model)) is None:
                raise ValueError(
                    "[eval] the mode auto needs bits that were chosen for this model, and there are none: run "
                    "python -m turboquant_mlx calibrate --model FOLDER --budget kld=0.01 once"
                )
            return kept, "what calibrate --budget kept"
        return automatic.calibrated(model, tokenizer), "the package's text"
    return None, None


def run(args):
    """Everything the arguments ask for; returns the summary, which is also written as JSON after each part."""
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=args.out):
        pass  # an unwritable folder is found before the work
    if set(args.parts) & {"divergence", "needle"}:
        pictures.pyplot()
    model, tokenizer = load_model(args.model)
    replaced, kept = _slots(args, model)
    tokens = read_tokens(tokenizer, args.text)
    # All that can be refused is made before anything is measured.
    windows = contexts = lists = prompts = None
    if {"divergence", "reconstruction"} & set(args.parts):
        start = beginning(tokenizer)
        windows = cut_windows(tokens, args.context, args.windows, args.first_window, args.without, start)
    if "list" in args.parts:
        lists = _list_contexts(args, tokenizer, tokens)
    if "needle" in args.parts:
        contexts = _needle_contexts(args, tokenizer, tokens)
    if "tasks" in args.parts:
        prompts = _task_prompts(args, tokenizer, tokens)
    calibration, source = _calibration(args, model, tokenizer)
    for mode in args.modes:
        mode.check(model, calibration)
    summary = {
        "model": args.model.name,
        "fingerprint": directory_hash(args.model),
        "slots": {"replaced": replaced, "kept": kept},
        "text": args.text.name,
        "windows": [args.first_window, args.windows, args.context],
        "without": sorted(args.without),
        "seed": args.seed,
        "calibration": source,
    }
    measure = {
        "divergence": lambda: _divergence(args, model, windows, calibration),
        "reconstruction": lambda: _reconstruction(args, model, windows, calibration),
        "list": lambda: _list(args, model, tokenizer, lists, calibration),
        "needle": lambda: _needle(args, model, tokenizer, contexts, calibration),
        "tasks": lambda: _tasks(args, model, tokenizer, prompts, calibration),
    }
    for part in args.parts:
        summary[part] = measure[part]()
        write_json(args.out / "summary.json", summary)
    return summary


def main(argv: list[str] | None = None) -> int:
    """Entry of the command line; returns the exit status."""
    try:
        run(parse(argv))
    except KeyboardInterrupt:
        print("[eval] interrupted; the tables and summary.json hold what was finished", file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError) as error:
        print(message("eval", error), file=sys.stderr)
        return 1
    return 0
