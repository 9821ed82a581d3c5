"""The command line as a program of its own."""

import atexit
import os
import sys

from .. import _checks
from .cli import main


def run():
    """main(); a server ends without the interpreter's own end.

    MLX keeps compiled functions for each thread, and a thread that has ended asks for the interpreter to drop them.  If
    that is at its end by then, the process is aborted (SIGABRT): a program of MLX alone does it too (docs/limits.md),
    and in a server one thread computes all answers."""
    if _checks.replaced_files():  # perhaps __init__.py, so that its own checks did not run
        sys.exit(f"turboquant_mlx: {next(_checks.problems())}")
    serving = sys.argv[1:2] in (["server"], ["vlm-server"])
    try:
        main()
    except SystemExit as end:
        if not serving:
            raise
        _leave(end.code)
    if serving:
        _leave(0)


def _leave(code):
    """What sys.exit(code) prints and runs, and then the end of the process."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            code = code or 1
    os._exit(code or 0)
