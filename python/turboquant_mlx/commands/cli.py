"""mlx-lm's programs with packed caches: python -m turboquant_mlx generate | chat | server | cache-prompt | evaluate |
benchmark, and our own batch | inspect | doctor | calibrate | eval."""

import argparse
import functools
import importlib
import json
import os
import sys
from pathlib import Path

from . import hub, program_options, server, vlm
from .prepare import prepare

PROGRAMS = {
    "generate": "mlx_lm.generate",
    "chat": "mlx_lm.chat",
    "server": "mlx_lm.server",
    "cache-prompt": "mlx_lm.cache_prompt",
    "evaluate": "mlx_lm.evaluate",
    "benchmark": "mlx_lm.benchmark",
}
MODULES = {"doctor": ".commands.doctor", "calibrate": ".calibration.command", "eval": ".eval", "plan": ".commands.plan"}
COMMANDS = (*PROGRAMS, *vlm.PROGRAMS, "batch", "inspect", *MODULES)
USAGE = f"""usage: python -m turboquant_mlx {{{",".join(COMMANDS)}}} [options]

generate, chat, server, cache-prompt, evaluate and benchmark are mlx-lm's programs and take its options, vlm-generate,
vlm-chat and vlm-server are mlx-vlm's; batch answers many prompts at once, inspect shows what each layer's cache holds, doctor
checks this installation, calibrate makes a model's centres and feedback, eval measures quality, plan says what caches take.  All that run a model take the --tq options; `<command> --help` lists them."""


def tq_options():
    """The options that every command with a model takes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("TurboQuant caches")
    widths = {"type": int, "choices": (2, 3, 4, 8)}
    group.add_argument(
        "--tq-bits",
        type=_bits,
        choices=(2, 3, 4, 8, "auto"),
        default=3,
        help="bits of keys and values (default: 3); auto: what `calibrate --budget` chose for each layer",
    )
    group.add_argument("--tq-key-bits", **widths, help="bits of keys (default: --tq-bits)")
    group.add_argument("--tq-value-bits", **widths, help="bits of values (default: --tq-bits)")
    group.add_argument("--tq-code", choices=("scalar", "trellis"), help="codes of 2 and 3 bits (default: trellis)")
    for name, tokens, default in (("recent", "newest", 128), ("sink", "first", 4)):
        group.add_argument(
            f"--tq-{name}",
            type=_tokens(0),
            metavar="N",
            help=f"let queries read the {tokens} N tokens of a sequence exactly (default: {default}; 0: none)",
        )
    group.add_argument(
        "--tq-start",
        type=_tokens(0),
        metavar="N",
        help="hold up to N tokens as plain floats, then pack (the server then answers one request at a time; not "
        "together with --max-kv-size)",
    )
    group.add_argument(
        "--tq-calibration",
        metavar="FILE",
        default="auto",
        help="what `calibrate` wrote, centres and feedback; auto: the file beside the weights, else made now, in seconds, "
        "for all but small models; none: neither",
    )
    group.add_argument("--tq-no-calibrate", action="store_true", help="make no calibration where there is none")
    group.add_argument(
        "--tq-checkpoints",
        type=_checkpoints,
        metavar="auto|none|N",
        help="let recurrent states go back: auto keeps copies within the bytes of the packed caches, N at most so many "
        "(default: auto in a server, else none)",
    )
    group.add_argument("--tq-strict", action="store_true", help="refuse a model with a KV cache that cannot be packed")
    group.add_argument("--tq-seed", type=int, default=0, help="of the rotation's signs (default: 0)")
    group.add_argument(
        "--tq-dtype",
        choices=("auto", "stored", "float32"),
        default="auto",
        help="of the weights; auto: float32 on a CPU, where MLX's half-precision products are slow, else as stored",
    )
    return parser


def _bits(text):
    """Reads --tq-bits."""
    return int(text) if text.isdecimal() else text  # argparse names the choices


def _tokens(least):
    """Reads a number of tokens from an option."""

    def read(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number of tokens; got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}; got {value}")
        return value

    return read


def _checkpoints(text):
    """Reads --tq-checkpoints: what `enable` takes."""
    return {"auto": "auto", "none": False}[text] if text in ("auto", "none") else _tokens(1)(text)


def _fail(command, error):
    sys.exit(f"turboquant_mlx {command}: {error}")


def _peek(command, rest):
    """Those of mlx-lm's options that concern us."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--max-kv-size", type=int)
    parser.add_argument("--model")
    parser.add_argument("--draft-model")
    parser.add_argument("--prompt-cache-file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    for flag in ("--kv-bits", "--kv-group-size", "--quantized-kv-start"):
        parser.add_argument(flag)
    seen, _ = parser.parse_known_args(rest)
    if seen.kv_bits is not None or seen.kv_group_size is not None or seen.quantized_kv_start is not None:
        _fail(
            command,
            "--kv-bits and its companions are mlx-lm's own quantisation; use --tq-bits and --tq-start",
        )
    return seen


def _run_program(command, argv):
    """mlx-lm's own main(), whose models come prepared and whose saved caches are checked."""
    options = tq_options()
    options.prog = f"python -m turboquant_mlx {command}"
    more = program_options.options(command)
    args, rest = options.parse_known_args(argv)
    args, rest = more.parse_known_args(rest, args)
    if {"-h", "--help"} & set(rest):
        print(*(parser.format_help().split("\n\n", 1)[1] for parser in (options, more) if parser._actions), sep="\n")
    seen = _peek(command, rest)
    try:
        program_options.check(args, seen)
    except ValueError as error:
        _fail(command, error)
    if command == "server" and args.tq_checkpoints is None:
        args.tq_checkpoints = "auto"
    if command == "cache-prompt" and seen.prompt_cache_file:  # before the work, which may take long
        folder = Path(seen.prompt_cache_file).parent
        if not os.access(folder, os.W_OK):
            _fail(command, f"cannot write to {folder}")
    try:
        module = importlib.import_module(PROGRAMS[command])
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        _fail(command, "mlx-lm evaluates with lm-eval, which is not installed: pip install lm-eval")
    from ..overlay import saving
    from ..overlay.patch import apply_patch

    apply_patch()  # before the module's names are noted below, so that they are put back as the patch left them

    loaded = []

    def checked_cache(file_name, return_metadata=False):
        caches, metadata = saving.load_prompt_cache(file_name, return_metadata=True)
        loaded.append((file_name, caches))
        return (caches, metadata) if return_metadata else caches

    def prepared(original):
        @functools.wraps(original)
        def load(where, *positional, **named):
            model, *others = original(where, *positional, **named)
            draft = where == seen.draft_model and not named  # mlx-lm gives a main model's load() keywords
            main = not draft and (command != "server" or seen.model in (None, where))
            model = prepare(model, args, where, seen.max_kv_size, main, others[0] if others else None)
            if not draft:
                for file_name, caches in loaded:
                    saving.check_fits(caches, model, file_name)
                loaded.clear()
            return (model, *others)

        return load

    replaced = {
        name: getattr(module, name) for name in ("load", "sharded_load", "load_prompt_cache") if hasattr(module, name)
    }
    for name, original in replaced.items():
        setattr(module, name, checked_cache if name == "load_prompt_cache" else prepared(original))
    if command == "server":
        hub.make_cache_folder()
    serving = command == "server" and not {"-h", "--help"} & set(rest)
    try:
        failed = server.watched(module, seen, replaced) if serving else []
    except OSError as error:
        _fail("server", error)
    closing = []
    if not {"-h", "--help"} & set(rest):
        try:
            closing = program_options.install(module, command, args, replaced)
        except OSError as error:
            _fail(command, error)
    argv, sys.argv = sys.argv, [f"python -m turboquant_mlx {command}", *rest]
    try:
        module.main()
    except (ValueError, OSError) as error:
        _fail(command, error)
    finally:
        for close in closing:
            close()
        sys.argv = argv
        for name, original in replaced.items():
            setattr(module, name, original)
    if failed:
        _fail(command, failed[0])


def _parser(command, description):
    parser = argparse.ArgumentParser(
        prog=f"python -m turboquant_mlx {command}",
        description=description,
        parents=[tq_options()],
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=command == "batch", help="a local model directory or Hugging Face repo")
    parser.add_argument("--max-tokens", "-m", type=_tokens(1), default=100)
    parser.add_argument("--max-kv-size", type=_tokens(1), help="tokens a cache holds at most")
    parser.add_argument("--prefill-step-size", type=_tokens(1), default=2048)
    parser.add_argument("--ignore-chat-template", action="store_true")
    return parser


def _encode(tokenizer, text, args):
    if tokenizer.has_chat_template and not args.ignore_chat_template:
        return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    return tokenizer.encode(text)


def batch(argv):
    """Answers many prompts as one batch."""
    parser = _parser("batch", "Answers the prompts of a file as one batch; prints one JSON object a prompt.")
    parser.add_argument("--prompts", required=True, help="a file with one prompt a line; - reads stdin")
    parser.add_argument("--temp", type=float, default=0.0)
    args = parser.parse_args(argv)
    from mlx_lm import batch_generate, load
    from mlx_lm.sample_utils import make_sampler

    lines = (sys.stdin.read() if args.prompts == "-" else Path(args.prompts).read_text()).splitlines()
    texts = [line for line in lines if line.strip()]
    if not texts:
        parser.error(f"{args.prompts} holds no prompt")
    model, tokenizer = load(args.model)
    model = prepare(model, args, args.model, args.max_kv_size, tokenizer=tokenizer)
    response = batch_generate(
        model,
        tokenizer,
        [_encode(tokenizer, text, args) for text in texts],
        max_tokens=args.max_tokens,
        max_kv_size=args.max_kv_size,
        prefill_step_size=args.prefill_step_size,
        sampler=make_sampler(args.temp),
    )
    for text, answer in zip(texts, response.texts, strict=True):
        print(json.dumps({"prompt": text, "text": answer}, ensure_ascii=False))
    stats = response.stats
    print(
        f"[tq] prompt {stats.prompt_tokens} tokens, {stats.prompt_tps:.1f} tokens/s; generation "
        f"{stats.generation_tokens} tokens, {stats.generation_tps:.1f} tokens/s",
        file=sys.stderr,
    )


def inspect(argv):
    """Shows what each layer's cache holds after a prompt, or in a saved file."""
    parser = _parser("inspect", "Shows what each layer's cache holds after a prompt, or in a saved cache.")
    parser.add_argument("--prompt", "-p", default="hello")
    parser.add_argument("--prompt-file", help="a file to take the prompt from")
    parser.add_argument("--prompt-cache-file", help="a saved cache; without --model it is shown as it is")
    args = parser.parse_args(argv)
    if not args.model and not args.prompt_cache_file:
        parser.error("give --model, --prompt-cache-file, or both")
    from ..overlay.saving import load_prompt_cache
    from .report import table

    if not args.model:
        print(table(load_prompt_cache(args.prompt_cache_file)))
        return
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    model, tokenizer = load(args.model)
    model = prepare(model, args, args.model, args.max_kv_size, tokenizer=tokenizer)
    if args.prompt_cache_file:
        cache = load_prompt_cache(args.prompt_cache_file, model)
    else:
        cache = make_prompt_cache(model, args.max_kv_size)
    text = Path(args.prompt_file).read_text() if args.prompt_file else args.prompt
    prompt = mx.array(_encode(tokenizer, text, args))
    step = args.prefill_step_size
    for _ in generate_step(prompt, model, max_tokens=1, prompt_cache=cache, prefill_step_size=step):
        pass
    print(table(cache))
    print(f"peak memory {mx.get_peak_memory() / 2**20:.1f} MiB")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else (None, [])
    if command in ("-h", "--help"):
        print(USAGE)
    elif command not in COMMANDS:
        sys.exit(f"{USAGE}\n\nturboquant_mlx: " + (f"unknown command {command!r}" if command else "give a command"))
    elif command in PROGRAMS:
        _run_program(command, rest)
    elif command in vlm.PROGRAMS:
        vlm.run(command, rest, tq_options(), _fail)
    elif command in MODULES:
        sys.exit(importlib.import_module(MODULES[command], __package__.partition(".")[0]).main(rest))
    else:
        try:
            {"batch": batch, "inspect": inspect}[command](rest)
        except (ValueError, OSError) as error:
            _fail(command, error)
