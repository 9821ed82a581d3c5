"""Pipeline and tensor parallelism by mlx.launch and mlx-lm's own sharding: two ranks of this machine on the ring backend."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import MODEL
from mlx_lm.models import qwen3
from scripts import pipelines, ranks
from serving import serving
from small_models import save_model
from test_cli import ask

SCRIPTS = Path(__file__).resolve().parent / "scripts"
pytestmark = pytest.mark.skipif(
    not mx.distributed.is_available("ring"), reason="this MLX was built without the ring backend"
)


def launched(*command, timeout=240):
    """What mlx.launch of two ranks gave."""
    launch = Path(sys.executable).with_name("mlx.launch")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1] - 1)  # the ranks listen on this port and the next
    command = [str(launch), "-n", "2", "--backend", "ring", "-p", port, "--python", sys.executable, *map(str, command)]
    env = os.environ | {"MLX_RING_VERBOSE": "0"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


@contextlib.contextmanager
def ranks_of_a_server(folder, *arguments):
    """Two ranks of `turboquant_mlx server`, started without mlx.launch, which would end one for the other."""
    ports = []
    for _ in range(3):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports[:2]]))
    command = [sys.executable, "-m", "turboquant_mlx", "server", "--port", str(ports[2]), *map(str, arguments)]
    env = os.environ | {"MLX_HOSTFILE": str(folder / "hosts.json")}
    running = [
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env | {"MLX_RANK": r}
        )
        for r in "01"
    ]
    try:
        yield running, ports[2]
    finally:
        for process in running:
            process.kill()
            process.communicate()


def lines_of(done):
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(line["rank"] for line in lines) == [0, 1], done.stdout + done.stderr
    return lines


def test_two_ranks_give_the_tokens_of_one():
    """Each rank holds the packed cache of its own half of the heads.  Sums over ranks round differently, but these
    models' tokens do not hang on the last bit."""
    want = ranks.answers(None)
    for line in lines_of(launched(SCRIPTS / "ranks.py")):
        assert line["size"] == 2
        for family, found in line["answers"].items():
            assert found["alone"] == want[family]["alone"] == found["together"]
            assert found["heads"] == 2 and want[family]["heads"] == 4
            assert found["bytes"] * 2 == want[family]["bytes"]


def test_pipelines_and_shards_with_calibrations_give_the_tokens_of_one():
    """Every kind of packed cache ties what its rank sends; each rank takes its own slots and heads of a calibration."""
    want = pipelines.answers(None)
    for line in lines_of(launched(SCRIPTS / "pipelines.py", "answers")):
        assert line["found"] == want


def test_a_rank_that_refuses_ends_all():
    for line in lines_of(launched(SCRIPTS / "pipelines.py", "refuse", timeout=60)):
        assert line["found"].startswith("rank 1: [enable] ") and "layer 0: its attention" in line["found"]


def test_a_refused_server_ends_on_every_rank(tmp_path):
    """With the reason, and not by SIGABRT: MLX's threads drop their compiled functions when Python is at its end."""
    odd = save_model(qwen3, tmp_path / "odd", head_dim=80)
    with ranks_of_a_server(tmp_path, "--model", odd) as (running, _):
        for process in running:
            words = process.communicate(timeout=90)[1]
            assert process.returncode == 1 and "layer 0: [encode] head_dim must be" in words.splitlines()[-2]


def test_a_pipelined_server_answers_as_one_process(tmp_path):
    """The bundled model with its calibration, which is taken by itself: each rank has one slot of it."""
    options = ["--model", MODEL, "--pipeline"]
    with ranks_of_a_server(tmp_path, *options) as (_, port):
        found = ask(port, {"prompt": "The capital of", "max_tokens": 8, "temperature": 0.0})
    with serving(MODEL) as server:
        assert found == server.complete("The capital of", 8)
