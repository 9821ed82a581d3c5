"""The example: it answers from packed caches, and says in one line what is wrong with its arguments or files."""

import importlib.util
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import MODEL, ROOT
from turboquant_mlx import TurboQuantRotatingKVCache

SCRIPT = ROOT / "examples" / "run_qwen35_tq3.py"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("run_qwen35_tq3", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(example, *arguments):
    """What the example says before it exits."""
    with pytest.raises(SystemExit) as stopped:
        example.main([str(a) for a in arguments])
    message = stopped.value.code
    assert isinstance(message, str) and message.startswith("[run] ") and "\n" not in message
    return message


def test_finds_the_planted_fact():
    done = run("--max-tokens", "24")
    assert done.returncode == 0, done.stderr
    assert "70342" in done.stdout.split("prompt")[0] and "TurboQuantKVCache K3 V3" in done.stdout


def test_plants_the_fact_in_the_middle_of_its_own_page(example):
    text = example.planted_prompt()
    assert text.endswith(example.QUESTION) and text.count(example.FACT) == 1
    assert 0.4 < text.index(example.FACT) / len(text) < 0.6
    assert set(text.split("\n\n")) == {*example.PAGE.read_text().strip().split("\n\n"), example.FACT, example.QUESTION}


def test_a_refusal_is_one_line_without_a_traceback():
    done = run("--max-tokens", "0")
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr == "[run] --max-tokens must be at least 1 and less than 2^63; got 0\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max-tokens", "-3"], "--max-tokens must be at least 1 .*; got -3"),
        (["--seed", "-1"], "--seed must be at least 0 .*; got -1"),
        (["--temp", "-0.5"], "--temp must be at least 0 .*; got -0.5"),
        (["--temp", "nan"], "--temp must be at least 0 .*; got nan"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--prompt-file", "no/such/file"], "--prompt-file no/such/file cannot be read: .*No such file"),
        (["--model", "no/such/model"], "there is none at no/such/model"),
    ],
)
def test_wrong_arguments_are_refused(example, arguments, message):
    assert re.search(message, refusal(example, *arguments))


def test_two_prompts_exclude_each_other(example, capsys):
    with pytest.raises(SystemExit) as stopped:
        example.main(["--prompt", "", "--prompt-file", "x"])
    assert stopped.value.code == 2 and "not allowed with argument --prompt" in capsys.readouterr().err


def test_a_prompt_and_a_prompt_file_are_taken_as_they_are(example, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Where is Zürich?\n", encoding="utf-8")
    assert example.prompt_text(example.parse(["--prompt-file", str(file)])) == "Where is Zürich?\n"
    assert example.prompt_text(example.parse(["--prompt", "Who?"])) == "Who?"
    assert example.prompt_text(example.parse([])) == example.planted_prompt()
    file.write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in refusal(example, "--prompt-file", file)


def test_an_incomplete_model_is_refused(example, tmp_path):
    def message():
        return refusal(example, "--model", tmp_path)

    assert "holds no config.json" in message()
    shutil.copy(MODEL / "config.json", tmp_path)
    assert "holds no tokenizer.json" in message()
    (tmp_path / "tokenizer.json").write_text(POINTER)
    assert "holds no *.safetensors weights" in message()
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(2000))
    second = tmp_path / "model-00002-of-00002.safetensors"
    second.write_text(POINTER)
    assert "tokenizer.json is a Git LFS pointer" in message()
    shutil.copy(MODEL / "tokenizer.json", tmp_path)
    assert f"{second.name} is a Git LFS pointer" in message()
    second.write_bytes(bytes(2000))
    assert "cannot be loaded" in message()


def test_windows_count_as_packed(example, capsys):
    caches = [TurboQuantRotatingKVCache(16) for _ in range(2)]
    for cache in caches:
        x = mx.random.normal((1, 2, 10, 64))
        cache.update_and_fetch(x, x)
    speeds = SimpleNamespace(prompt_tokens=9, prompt_tps=1.0, generation_tokens=1, generation_tps=1.0)
    example.report(caches, speeds)
    out = capsys.readouterr().out
    assert out.count("TurboQuantRotatingKVCache K3 V3") == 2 and "kept" not in out
    assert "attention caches, 10 tokens" in out


def test_the_chat_template_takes_lists_of_parts(bundled):
    """As OpenAI's clients and mlx-vlm send them."""
    template = bundled[1].apply_chat_template
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One two"}]
    parts = [
        {"role": "system", "content": ["Be ", {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]},
    ]
    want = template(plain, add_generation_prompt=True, tokenize=False)
    assert (
        want == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne two<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template(parts, add_generation_prompt=True, tokenize=False) == want
    with pytest.raises(Exception, match="reads text alone; got a part of type image"):
        template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
