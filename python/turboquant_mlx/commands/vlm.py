"""mlx-vlm's programs with packed caches: python -m turboquant_mlx vlm-generate | vlm-chat | vlm-server."""

import argparse
import functools
import importlib
import os
import sys

PROGRAMS = {"vlm-generate": "mlx_vlm.generate", "vlm-chat": "mlx_vlm.chat", "vlm-server": "mlx_vlm.server"}
_OWN = "mlx-vlm's own quantisation; use --tq-bits, --tq-key-bits and --tq-value-bits"
REFUSED = {  # options of mlx-vlm that packed caches exclude: why
    "--kv-bits": _OWN,
    "--kv-key-bits": _OWN,
    "--kv-value-bits": _OWN,
    "--kv-quant-scheme": _OWN,
    "--kv-key-scheme": _OWN,
    "--kv-value-scheme": _OWN,
    "--kv-group-size": _OWN,
    "--quantized-kv-start": _OWN,
    "--reload": "it starts the server in a process of its own, which would not know packed caches",
    "--draft-model": "a draft model of mlx-vlm cuts the history to check its drafts, which packed caches do not allow",
}
_VARIABLES = {  # the same, as mlx-vlm's server reads them from the environment
    "KV_BITS": "--kv-bits",
    "KV_KEY_BITS": "--kv-key-bits",
    "KV_VALUE_BITS": "--kv-value-bits",
    "MLX_VLM_DRAFT_MODEL": "--draft-model",
}


def _seen(command, rest, fail):
    """Those of mlx-vlm's options that concern us; fails on those that packed caches exclude."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--max-kv-size", type=int)
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8080)
    for flag in REFUSED:
        parser.add_argument(flag, **({"action": "store_true", "default": None} if flag == "--reload" else {}))
    seen, _ = parser.parse_known_args(rest)
    for flag, why in REFUSED.items():
        if getattr(seen, flag[2:].replace("-", "_")) is not None:
            fail(command, f"{flag}: {why}")
    if command == "vlm-server":
        for name, flag in _VARIABLES.items():
            if os.environ.get(name) not in (None, "", "0"):
                fail(command, f"the environment variable {name} stands for {flag}: {REFUSED[flag]}")
    return seen


def _load_prepared(args, seen):
    """mlx-vlm's load(), whose models come with packed caches."""
    from mlx_vlm import utils

    from .prepare import prepare

    original = utils.load

    @functools.wraps(original)
    def load(where, *positional, **named):
        model, processor = original(where, *positional, **named)
        return prepare(model, args, where, seen.max_kv_size, main=seen.model in (None, where)), processor

    return original, load


def run(command, argv, options, fail):
    """mlx-vlm's own main().

    Args:
        command: a key of PROGRAMS.
        argv: its options and ours.
        options: the parser of ours (cli.tq_options).
        fail: fail(command, reason) ends the program.
    """
    options.prog = f"python -m turboquant_mlx {command}"
    args, rest = options.parse_known_args(argv)
    helping = bool({"-h", "--help"} & set(rest))
    if helping:
        print(options.format_help().split("\n\n", 1)[1])
    seen = _seen(command, rest, fail)
    if args.tq_start:
        fail(
            command,
            "--tq-start is for mlx-lm's programs: mlx-vlm batches every cache, and one that packs later cannot be",
        )
    from ..overlay import hosts, patch

    try:
        module = importlib.import_module(PROGRAMS[command])
    except ImportError as error:
        fail(command, f"mlx-vlm cannot be imported ({error}): pip install mlx-vlm=={hosts.MLX_VLM}")
    if command == "vlm-server" and not helping:
        _check_server(command, seen, fail)
        from ..overlay import vlm_server

        vlm_server.install()
    original, ours = _load_prepared(args, seen)
    patch._rebind("load", original, ours)
    before, sys.argv = sys.argv, [f"python -m turboquant_mlx {command}", *rest]
    try:
        module.main()
    except (ValueError, OSError) as error:
        fail(command, error)
    finally:
        sys.argv = before
        patch._rebind("load", ours, original)


def _check_server(command, seen, fail):
    """Refuses a taken port before a model is loaded."""
    from . import hub
    from .server import check_port

    hub.make_cache_folder()
    try:
        check_port(seen.host, seen.port)
    except OSError as error:
        fail(command, f"cannot listen on {seen.host}:{seen.port}: {error.strerror or error}")
