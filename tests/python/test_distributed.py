"""Tensor parallelism by mlx.launch and mlx-lm's own sharding: two ranks of this machine on the ring backend."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from scripts.ranks import answers

SCRIPT = Path(__file__).resolve().parent / "scripts" / "ranks.py"


@pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX was built without the ring backend")
def test_two_ranks_give_the_tokens_of_one():
    """Each rank holds the packed cache of its own half of the heads.  Sums over ranks round differently, but these
    models' tokens do not hang on the last bit."""
    launch = Path(sys.executable).with_name("mlx.launch")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1] - 1)  # the ranks listen on this port and the next
    done = subprocess.run(
        [str(launch), "-n", "2", "--backend", "ring", "-p", port, "--python", sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"MLX_RING_VERBOSE": "0"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(line["rank"] for line in lines) == [0, 1], done.stdout + done.stderr
    want = answers(None)
    for line in lines:
        assert line["size"] == 2
        for family, found in line["answers"].items():
            assert found["alone"] == want[family]["alone"] == found["together"]
            assert found["heads"] == 2 and want[family]["heads"] == 4
            assert found["bytes"] * 2 == want[family]["bytes"]
