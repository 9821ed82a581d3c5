"""The command line: mlx-lm's programs with packed caches, our own commands, and what is refused."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import MODEL, ROOT
from mlx_lm.models import gemma3_text, qwen3
from needles import ANSWER, FACT, QUESTION
from small_models import save_model
from turboquant_mlx import _core
from turboquant_mlx.commands import cli

BUNDLED = ["--model", str(MODEL)]


@pytest.fixture
def run(capfd):
    """Runs a command in this process; returns what it printed on stdout and stderr."""

    def run(*arguments):
        cli.main([str(a) for a in arguments])
        return capfd.readouterr()

    return run


@pytest.fixture
def refused(capfd):
    """Runs a command that must fail; returns its words."""

    def refused(*arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main([str(a) for a in arguments])
        assert exit.value.code not in (0, None)
        return capfd.readouterr().err + str(exit.value.code)

    return refused


def test_generate_answers_from_a_packed_cache(run):
    out, err = run("generate", *BUNDLED, "--prompt", f"{FACT} {QUESTION}", "-m", 16, "--tq-bits", 3)
    assert ANSWER in out and "Generation:" in out
    assert "[tq] 6 x ArraysCache (kept), 2 x TurboQuantKVCache K3 V3, centred, feedback of keys and values" in err
    out, err = run(
        "generate", *BUNDLED, "--prompt", f"{FACT} {QUESTION}", "-m", 16, "--tq-key-bits", 4, "--tq-value-bits", 2
    )
    assert ANSWER in out and "TurboQuantKVCache K4 V2" in err
    out, err = run(
        "generate", *BUNDLED, "--prompt", f"{FACT} {QUESTION}", "-m", 16, "--tq-start", 10, "--tq-calibration", "none"
    )
    assert ANSWER in out and "DelayedTurboQuantKVCache K3 V3" in err and "centred" not in err


def test_mlx_lms_programs_are_left_as_they_were(run, patched):
    import importlib

    module = importlib.import_module("mlx_lm.generate")
    before = module.load, module.load_prompt_cache, sys.argv
    run("generate", *BUNDLED, "--prompt", "hello", "-m", 2)
    assert (module.load, module.load_prompt_cache, sys.argv) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "--bogus"], "unrecognized arguments: --bogus"),
        (["generate", "--tq-bit", "3"], "unrecognized arguments: --tq-bit 3"),
        (["generate", "--tq-bits", "5"], "--tq-bits: invalid choice: 5"),
        (["chat", "--tq-start", "-1"], "--tq-start: must be at least 0; got -1"),
        (["generate", "--tq-start", "x"], "--tq-start: must be a number of tokens; got 'x'"),
        (["server", *BUNDLED, "--port", "99999"], "cannot listen on 127.0.0.1:99999: a port is from 0 to 65535"),
        (["server", *BUNDLED, "--port", "-1"], "cannot listen on 127.0.0.1:-1: a port is from 0 to 65535"),
        (["server", "--kv-bits", "4"], "--kv-bits and its companions are mlx-lm's own quantisation; use --tq-bits"),
        (["batch", "--model", "x"], "the following arguments are required: --prompts"),
        (["inspect", "--bogus", "--model", "x"], "unrecognized arguments: --bogus"),
        (["inspect"], "give --model, --prompt-cache-file, or both"),
        (["inspect", "--model", "x", "--prefill-step-size", "0"], "--prefill-step-size: must be at least 1; got 0"),
        (["inspect", "--model", "x", "--max-kv-size", "0"], "--max-kv-size: must be at least 1; got 0"),
        (["batch", "--model", "x", "--max-tokens", "-3"], "--max-tokens/-m: must be at least 1; got -3"),
        (["cache-prompt", "--prompt-cache-file", "/nowhere/a.safetensors"], "cannot write to /nowhere"),
        (["nonsense"], "unknown command 'nonsense'"),
        ([], "give a command"),
        (["doctor", "--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_bad_arguments_are_refused(refused, arguments, message):
    assert message in refused(*arguments)


def test_help_names_our_options_and_mlx_lms(capfd):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    out = capfd.readouterr().out
    assert "--tq-bits" in out and "--max-tokens" in out
    cli.main(["--help"])
    assert "cache-prompt" in capfd.readouterr().out


def test_a_saved_prompt_is_used_and_checked(run, refused, tmp_path):
    file, plain = tmp_path / "tq.safetensors", tmp_path / "plain.safetensors"
    run("cache-prompt", *BUNDLED, "--prompt", FACT, "--prompt-cache-file", file)
    arguments = ["generate", "--prompt-cache-file", file, "--prompt", QUESTION, "-m", 16]
    assert ANSWER in run(*arguments).out
    assert "asked for was a TurboQuantKVCache of 4-bit keys" in refused(*arguments, "--tq-bits", 4)
    assert "was saved with other centres" in refused(*arguments, "--tq-calibration", "none")

    out = run("inspect", "--prompt-cache-file", file).out
    line = next(line for line in out.splitlines() if "TurboQuantKVCache" in line)
    tokens = int(line.split()[4])
    # 98 bytes a vector, and 36 exact copies of 258: as yet the ring holds all
    assert tokens <= 32 and "K3 V3" in line and f"{2 * 2 * (tokens * 98 + 36 * 258):,}" in line

    subprocess.run(
        [sys.executable, "-m", "mlx_lm", "cache_prompt", *BUNDLED, "--prompt", "hi", "--prompt-cache-file", plain],
        check=True,
        capture_output=True,
    )
    arguments[2] = plain
    assert "layer 3 holds a KVCache (not packed); asked for was a TurboQuantKVCache of 3-bit" in refused(*arguments)
    file.write_bytes(file.read_bytes()[:-100])
    arguments[2] = file
    assert "is truncated: it has" in refused(*arguments)


def test_batch_prints_an_answer_for_each_line(run, refused, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{FACT} {QUESTION}\n\nhello\n")
    out, err = run("batch", *BUNDLED, "--prompts", prompts, "--max-tokens", 16)
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["prompt"] for a in answers] == [f"{FACT} {QUESTION}", "hello"]
    assert ANSWER in answers[0]["text"] and "2 x TurboQuantKVCache K3 V3" in err
    prompts.write_text("\n")
    assert "holds no prompt" in refused("batch", *BUNDLED, "--prompts", prompts)
    assert "No such file" in refused("batch", *BUNDLED, "--prompts", tmp_path / "none")
    prompts.write_text("hello\n")
    assert "does not yet support batching" in refused("batch", *BUNDLED, "--prompts", prompts, "--tq-start", 5)


def test_inspect_shows_every_layer(run):
    out, _ = run("inspect", *BUNDLED, "-p", "hello " * 300, "--tq-bits", 4)
    lines = out.splitlines()
    assert lines[0].split() == ["layer", "cache", "bits", "tokens", "bytes", "float16", "ratio", "kernel"]
    assert len(lines) == 10 and lines[9].startswith("peak memory")
    packed = lines[4].split()
    assert (
        packed[1:4] == ["TurboQuantKVCache", "K4", "V4"]
        and int(packed[4]) > 300
        and f"cpu {_core.current_isa()}" in lines[4]
    )
    assert lines[1].split()[1] == "ArraysCache"
    floats = run("inspect", *BUNDLED, "-p", "hello", "--tq-start", 1000).out.splitlines()[4]
    assert floats.split()[1:4] == ["DelayedTurboQuantKVCache", "K32", "V32"] and "mlx (not packed yet)" in floats


def test_models_that_cannot_be_served_are_refused(run, refused, tmp_path):
    window = save_model(gemma3_text, tmp_path / "window", sliding_window=32, sliding_window_pattern=2)
    hello = ["--prompt", "hello", "-m", 4]
    assert "TurboQuantRotatingKVCache K8 V8" in run("generate", "--model", window, *hello).err
    plain = run("generate", "--model", window, *hello, "--tq-recent", 0)
    assert "TurboQuantRotatingKVCache K3 V3" in plain.err
    message = refused("generate", "--model", window, *hello, "--tq-start", 5)
    assert "needs caches that can be packed later, and a RotatingKVCache cannot: layer 0" in message
    odd = save_model(qwen3, tmp_path / "odd", head_dim=80)
    message = refused("generate", "--model", odd, *hello)
    assert "2 of 2 KVCache slots" in message and "layer 1: [encode] head_dim must be a multiple of 32" in message
    err = run("generate", "--model", window, *hello, "--max-kv-size", 16).err
    assert "--max-kv-size has no effect" in err


def test_a_draft_model_changes_no_token(run, tmp_path):
    main, draft = (save_model(qwen3, tmp_path / name, seed=i) for i, name in enumerate(("main", "draft")))
    arguments = ["generate", "--model", main, "--prompt", "hello there", "-m", 20, "--verbose", "F"]
    plain = run(*arguments)
    assert run(*arguments, "--draft-model", draft, "--num-draft-tokens", 4).out == plain.out
    assert "TurboQuantRotatingKVCache" in run(*arguments, "--max-kv-size", 16).err
    hybrid = [
        "generate",
        *BUNDLED,
        "--prompt",
        "hello",
        "-m",
        12,
        "--verbose",
        "F",
    ]  # its recurrent states go back, too
    assert run(*hybrid, "--draft-model", MODEL).out == run(*hybrid).out


def test_wrong_widths_are_named(refused):
    assert "invalid choice: '3.5' (choose from" in refused(
        "generate", *BUNDLED, "--prompt", "hello", "--tq-bits", "3.5"
    )


def test_a_start_and_a_window_exclude_each_other(run, refused, tmp_path):
    """A cache that packs later cannot drop tokens; where mlx-lm ignores the window, there is none."""
    model = save_model(qwen3, tmp_path / "model")
    both = ["--tq-start", 5, "--max-kv-size", 32]
    for command in (["generate", "--prompt", "hello", "-m", 2], ["inspect", "--prompt", "hello"]):
        message = refused(*command, "--model", model, *both)
        assert "--tq-start and --max-kv-size exclude each other" in message and "Traceback" not in message
        assert "--max-kv-size has no effect" in run(*command, *BUNDLED, *both).err
    assert "TurboQuantRotatingKVCache" in run("inspect", "--model", model, "--max-kv-size", 32, "--tq-start", 0).err


def test_chat_keeps_the_conversation_in_packed_caches(run, monkeypatch):
    """Two turns in one cache: the second is about the first."""
    turns = iter([FACT, QUESTION, "q"])
    monkeypatch.setattr("mlx_lm.cli_ui.ChatUI.prompt", lambda self: next(turns))
    out, err = run("chat", *BUNDLED, "--max-tokens", 24)
    assert out.count(ANSWER) == 2 and "2 x TurboQuantKVCache K3 V3" in err


def test_a_named_calibration_is_the_main_models(run, refused, tmp_path):
    """The draft takes what lies beside its own weights, whatever its shape, and says nothing of a file meant for another."""
    from mlx_lm import load
    from turboquant_mlx.calibration import calibrate, save_calibration

    main, twin, smaller = (
        save_model(qwen3, tmp_path / name, seed=seed, head_dim=dim)
        for name, seed, dim in (("main", 0, 64), ("twin", 1, 64), ("smaller", 1, 32))
    )
    found = calibrate(load(str(main))[0], list(range(60)))
    file = save_calibration(found, tmp_path / "named.safetensors", directory=main)
    common = ["generate", "--model", main, "--prompt", "hello", "-m", 4, "--tq-calibration", file]
    for draft in (twin, smaller):
        told = [line for line in run(*common, "--draft-model", draft).err.splitlines() if line.startswith("[tq]")]
        assert [", centred" in line for line in told] == [True, False]
    save_calibration(calibrate(load(str(twin))[0], list(range(60))), twin)
    told = [line for line in run(*common, "--draft-model", twin).err.splitlines() if line.startswith("[tq]")]
    assert [", centred" in line for line in told] == [True, True]
    message = refused("generate", "--model", twin, "--prompt", "hello", "-m", 4, "--tq-calibration", file)
    assert "was made for a model of the same shape with other weights" in message


def test_a_calibration_beside_the_weights_is_not_an_adapters(run, tmp_path):
    from mlx.utils import tree_flatten
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from turboquant_mlx.calibration import calibrate, save_calibration

    main, adapter = save_model(qwen3, tmp_path / "main"), tmp_path / "adapter"
    model = load(str(main))[0]
    save_calibration(calibrate(model, list(range(60))), main)
    settings = {"rank": 2, "scale": 1.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, settings)
    adapter.mkdir()
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {k: v for k, v in weights.items() if "lora" in k})
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    common = ["generate", "--model", main, "--prompt", "hello", "-m", 2]
    assert ", centred" in run(*common).err
    err = run(*common, "--adapter-path", adapter).err
    assert ", centred" not in err and "[tq] not used: [enable] the calibration was made with other weights" in err
    err = run(*common, "--adapter-path", adapter, "--tq-calibration", main / "turboquant_calibration.safetensors").err
    assert ", centred" in err and "[tq] used all the same: [enable] the calibration was made with other weights" in err


def test_drafts_from_the_text(run, refused):
    """--tq-lookup changes no token; windows of --max-kv-size stay windows."""
    text = f"{FACT} " * 3 + QUESTION
    for extra in ((), ("--max-kv-size", 64)):
        plain, looked = (
            run("generate", *BUNDLED, "--prompt", text, "-m", 24, *extra, *more) for more in ((), ("--tq-lookup", 4))
        )
        assert plain.out.split("==========")[1] == looked.out.split("==========")[1] != ""
    assert "exclude each other" in refused("generate", *BUNDLED, "--tq-lookup", 4, "--draft-model", MODEL)
    assert "from 1 to 64; got '0'" in refused("chat", *BUNDLED, "--tq-lookup", 0)


def test_a_server_with_a_draft_model_reuses_prefixes_rightly(tmp_path):
    """The same question twice gets the same answer, that of the server without a draft model."""
    main, draft = (save_model(qwen3, tmp_path / name, seed=i) for i, name in enumerate(("main", "draft")))
    answers = []
    for extra in ((), ("--draft-model", str(draft)), ("--tq-lookup", "4")):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "turboquant_mlx", "server", "--model", str(main), "--port", str(port), *extra]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            for _ in range(2):
                answers.append(ask(port, {"prompt": "hello there", "max_tokens": 12, "temperature": 0.0}))
        finally:
            server.kill()
            server.wait(timeout=30)
    assert answers[0] and answers == answers[:1] * 6


def ask(port, body):
    """The answer of a server that may still be starting."""
    for _ in range(240):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body))
            return json.loads(connection.getresponse().read())["choices"][0]["text"]
        except ConnectionRefusedError:
            time.sleep(0.25)
    raise AssertionError("the server did not start")


def module_run(*arguments, timeout=120, env=None, started_by=()):
    return subprocess.run(
        [*started_by, sys.executable, "-m", "turboquant_mlx", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | (env or {}),
    )


def test_a_taken_port_is_refused_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = module_run("server", *BUNDLED, "--port", port)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        f"turboquant_mlx server: cannot listen on 127.0.0.1:{port}: Address already in use"
    )


# A shell without job control starts programs in the background with SIGINT ignored, and so does a script with a trap.
@pytest.mark.parametrize(
    "started_by", [(), ("sh", "-c", 'trap "" INT HUP TERM; exec "$@"', "sh")], ids=["", "ignoring"]
)
def test_a_server_whose_model_cannot_be_packed_stops(started_by, tmp_path):
    odd = save_model(qwen3, tmp_path / "odd", head_dim=80)
    done = module_run("server", "--model", odd, "--port", 0, timeout=60, started_by=started_by)
    assert (
        done.returncode == 1 and "layer 0: [encode] head_dim must be a multiple of 32" in done.stderr.splitlines()[-2]
    )


def test_mlx_lms_benchmark_runs_packed(run):
    said = run("benchmark", *BUNDLED, "-p", 40, "-g", 4, "-n", 1, "--tq-bits", 4)
    assert "2 x TurboQuantKVCache K4 V4" in said.err and "generation_tps=" in said.out


def test_mlx_lms_evaluate_scores_packed(refused, monkeypatch, tmp_path):
    """lm-eval's part is played here: it asks for the likelihood of an answer, and fails before there is a report."""
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install lm-eval" in refused("evaluate", *BUNDLED, "--tasks", "t")

    def simple_evaluate(model, **_):
        kinds = [type(c).__name__ for c in model._model.make_cache()]
        request = types.SimpleNamespace(args=("The capital of France", " is Paris"))
        raise ValueError(f"{kinds.count('TurboQuantKVCache')} packed, {model.loglikelihood([request])[0][0]}")

    for name, names in {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": type("LM", (), {})},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, module)
    said = refused("evaluate", *BUNDLED, "--tasks", "t", "--output-dir", tmp_path)
    found = re.search(r"2 packed, (-[0-9.]+)", said)
    assert found and -50 < float(found[1]) < -1
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate")


def test_doctor_finds_all_well():
    done = module_run("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout and "FAILED" not in done.stdout
    for name in ("MLX", "nanobind", "CPU kernels", "import name", "device"):
        assert name in done.stdout


def test_doctor_says_when_the_gpu_asked_for_is_not_here():
    for flag, available in (("--metal", mx.metal.is_available()), ("--cuda", mx.cuda.is_available())):
        if not available:
            done = module_run("doctor", flag)
            assert done.returncode != 0 and f"[doctor] {flag}: MLX finds no such GPU here" in done.stderr


@pytest.mark.skipif(sys.platform != "linux" or mx.cuda.is_available(), reason="for Linux and an MLX without CUDA")
def test_doctor_names_an_old_nvidia_driver(tmp_path):
    (tmp_path / "driver.c").write_text("int cuDriverGetVersion(int* v) { *v = 12040; return 0; }")
    subprocess.run(["cc", "-shared", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"], check=True)
    done = module_run("doctor", "--cuda", env={"LD_LIBRARY_PATH": str(tmp_path)})
    assert "the NVIDIA driver here is for CUDA 12.4, mlx[cuda13] needs 13.0 or newer" in done.stderr


@pytest.mark.parametrize("kind, marker", [("metal", "metal"), ("cuda", "gpu")])
def test_doctor_runs_the_table_of_a_checkout(kind, marker, monkeypatch, tmp_path, capsys):
    from turboquant_mlx.commands import doctor

    ran = []

    def ended(command, **_):
        ran.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", ended)
    monkeypatch.chdir(ROOT)
    assert doctor._test_suite(kind) == 3
    assert ran[0][4:6] == ["-m", marker]
    assert [Path(path).name for path in ran[0][6:]] == ["test_table.py", "test_gpu.py"]
    monkeypatch.chdir(tmp_path)
    assert doctor._test_suite(kind) == 0 and len(ran) == 1
    assert "run this in a checkout" in capsys.readouterr().out


def test_the_speed_table_of_doctor():
    from turboquant_mlx.commands import gpu_report

    found = list(gpu_report.rows((64, 96), queries=2, repeats=2))
    assert [row["tokens"] for row in found] == [64, 96]
    output = 16 * 2 * 256 * 2  # bytes: heads, queries, head_dim, float16
    for row in found:
        for kind in ("float16", "tq4", "tq3"):
            milliseconds, extra = row[kind]
            assert milliseconds > 0 and extra >= output
    assert gpu_report.table("two queries", found).count("\n| ") == 3
    text = gpu_report.table("two queries", [*found, {**found[0], "tq3": "failed: ValueError"}], memory=True)
    assert text.count(" MiB |") == 11 and text.count("x), ") == 8 and "| failed: ValueError |" in text
