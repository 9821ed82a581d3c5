"""Tasks: prompts that do not change, judges that tell right from wrong, and answers that are those of mlx-lm's own generation."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from conftest import MODEL
from mlx_lm.generate import generate_step
from turboquant_mlx.eval import answers, command, parse_mode, tasks
from turboquant_mlx.eval.model import load_model
from turboquant_mlx.eval.options import parse


def made(task, count=12, seed=0):
    return tasks.prompts(
        task, count, seed, filler=lambda n, rng: "some words\n" * (n // 3), lengths=[30, 60], depths=[0, 1]
    )


@pytest.mark.parametrize("task", tasks.COUNTS)
def test_prompts_depend_on_their_seed_alone(task):
    texts = [p.text for p in made(task)]
    assert texts == [p.text for p in made(task)]
    assert texts[:3] == [p.text for p in made(task, 3)]
    if task != "code":
        assert texts != [p.text for p in made(task, seed=1)]
        assert len(set(texts)) == len(texts)


def right(task, prompt):
    """An answer that a careful reader would write."""
    lines = prompt.text.split("\n")
    if task == "copy":
        return "\n".join(lines[2:7])
    if task == "needle":
        return next(line for line in lines if line.startswith("The secret number"))
    if task == "json":
        return 'Certainly: ```json\n{"name": "f", "arguments": {"a": 1}}\n```'
    if task == "code":
        return "    x = [\n        1]\n\n    return x\n\n\ndef other():\n  ("
    return "First 1, then 2.\nAnswer: "


@pytest.mark.parametrize("task", ["copy", "needle", "json", "code"])
def test_judges(task):
    for prompt in made(task):
        good = right(task, prompt)
        passes, value = prompt.judge(good, False)
        assert passes and value == prompt.judge(good, False)[1]
        for bad in ("", "The answer is unknown.", good[:20].replace("9", "1") if task != "code" else "    x = (\n"):
            assert not prompt.judge(bad, False)[0]


def test_arithmetic_is_computed():
    """Each form of question by hand, with the numbers that stand in it."""
    for prompt in made("arithmetic"):
        n = [int(x) for x in re.findall(r"\d+", prompt.text)]
        if prompt.text.startswith("A shop"):
            value = n[0] * n[1] - n[2] + n[3] * n[1]
        elif prompt.text.startswith("A train"):
            value = n[0] - n[1] + n[2] + n[3] * n[1]
        else:
            value = n[0] - n[1] * n[2] + n[3]
        assert prompt.judge(f"We get 7, so\nAnswer: {value}", False) == (True, value)
        assert prompt.judge(f"Answer: {value + 1}", False) == (False, value + 1)
        assert prompt.judge("none", True) == (False, None)


def test_what_belongs_to_a_function():
    assert tasks.function_body("    return 1\nprint(2)", False) == "    return 1"
    assert tasks.function_body("    a = 1\n\n    return (a +", True) == "    a = 1\n"
    prompt = made("code", 1)[0]
    one, other = (prompt.judge(f"    return {x}\n", False) for x in ("1", "( 1 )"))
    assert one == other and one[0]  # the same program, written in another way
    assert prompt.judge("", False)[0] is False


def test_json_in_an_answer():
    assert tasks.first_json('so {"a": [1, {"b": 2}]} and {"c": 3}') == {"a": [1, {"b": 2}]}
    assert tasks.first_json("{a: 1}") is None and tasks.first_json("[1]") is None
    prompt = made("json", 1)[0]
    one, other = (prompt.judge(json.dumps({"name": "f", "arguments": a}), False) for a in ({"x": 1}, {"x": 2}))
    assert one[0] and other[0] and one[1] != other[1]
    assert not prompt.judge('{"name": "f"}', False)[0]


def test_an_answer_is_that_of_mlx_lm():
    model, tokenizer = load_model(MODEL)
    prompt = made("copy", 1)[0]._replace(tokens=8)
    caches = parse_mode("tq3").make_caches(model)
    text, tokens, cut = answers.answer(model, tokenizer, caches, prompt)
    ids = mx.array(answers.token_ids(tokenizer, prompt))
    expected = []
    for token, _ in generate_step(ids, model, max_tokens=8, prompt_cache=parse_mode("tq3").make_caches(model)):
        if token in tokenizer.eos_token_ids:
            break
        expected.append(int(token))
    assert tokens == expected and cut == (len(expected) == 8) and text == tokenizer.decode(expected)
    assert "user" in tokenizer.decode(ids.tolist()) and prompt.text.strip() in tokenizer.decode(ids.tolist())


def test_command(tmp_path, capsys):
    """Twice the same, with an answer through a float16 cache as the measure of the others."""
    tables = []
    for name in "ab":
        out = tmp_path / name
        arguments = [
            "--model",
            str(MODEL),
            "--parts",
            "tasks",
            "--tasks",
            "needle,json",
            "--prompts",
            "2",
            "--out",
            str(out),
        ]
        assert command.main([*arguments, "--lengths", "120", "--modes", "tq2,fp16"]) == 0
        assert "needle     fp16            2 of 2    2 of 2       2 of 2" in capsys.readouterr().out
        tables.append((out / "tasks.tsv").read_bytes())
    assert tables[0] == tables[1]
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())["tasks"]
    assert summary["json"]["fp16"]["same_tokens"] == summary["json"]["fp16"]["asked"] == 2
    assert set(summary["json"]) == {"fp16", "tq2"} and summary["needle"]["tq2"]["asked"] == 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--parts", "tasks", "--tasks", "poems"], "--tasks are copy, .*got 'poems'"),
        (["--parts", "tasks", "--prompts", "0"], "--prompts must be at least 1; got 0"),
        (["--parts", "tasks,divergence"], "needs --text"),
        ([], "needs --text"),
    ],
)
def test_bad_input(arguments, why):
    with pytest.raises(ValueError, match=why):
        parse(["--model", "x", *arguments])


def test_a_text_too_short_for_needles():
    class Tokenizer:
        decode = staticmethod(str)

    with pytest.raises(ValueError, match="--lengths 60 needs 60 tokens of filler; the text has 50"):
        tasks.prompts("needle", 2, 0, filler=tasks.fillers(Tokenizer, np.arange(50)), lengths=[30, 60], depths=[0])
