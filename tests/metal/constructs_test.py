"""The names of the Metal language that the kernels use are those in the table of docs/metal.md.

    constructs_test.py SIGNATURES

SIGNATURES is the program that prints the kernels.  A name is the language's unless the kernels' own text declares it.
"""

import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src/metal/device").glob("*.metal"))
# What 1.5 takes from C++14 as it is.
CPP = set(
    "auto class const constexpr continue else enum false for if inline namespace return sizeof static struct template"
    " true typedef typename using define defined endif ifdef ifndef include pragma once bool float int long unsigned void".split()
)
# What MLX's own text before a kernel defines.
MLX = {"float16_t", "bfloat16_t"}


def with_includes(path, seen):
    """The text of a file after that of those it includes, each once: as embed.cmake makes it, comments removed."""
    if path in seen:
        return ""
    seen.add(path)
    text = re.sub(r"//[^\n]*", "", path.read_text())
    before = ""
    for name in re.findall(r'^#include "(.*)"', text, re.M):
        before += with_includes(ROOT / ("include" if name.startswith("turboquant/") else "src") / name, seen)
    return before + re.sub(r'#pragma once|#include "[^\n]*', "", text)


def text_of_kernels(signatures):
    kernels = json.loads(subprocess.run([signatures], stdout=subprocess.PIPE, check=True, text=True).stdout)
    seen = set()
    text = "".join(with_includes(path, seen) for path in SOURCES) + "".join(kernel["text"] for kernel in kernels)
    text = re.sub(r"#if defined\(__CUDACC__\).*?#else", "#ifdef", text, flags=re.S)  # NVIDIA's half of format.h
    return text


def own_names(text):
    """Names that the text declares: types, functions and variables, constants, macros and their parameters."""
    own = set(re.findall(r"(?:\bstruct|\bclass|\btypename|\benum|\bnamespace|#define) (\w+)", text))
    for parameters in re.findall(r"#define \w+\(([\w, ]*)\)", text):
        own.update(parameters.split(", "))
    for constants in re.findall(r"enum \w+ \{(.*?)\}", text, flags=re.S):
        own.update(re.findall(r"(?:^|,)\s*(\w+)", constants))
    own.update(re.findall(r"TQ_ARRAY2?\((?:typename )?[\w<>:]+, (\w+)", text))
    # After a type: what is declared.  After a comma or in front of an assignment: its neighbours.
    own.update(re.findall(r"[\w>]\*?(?<!return)(?<!else) (\w+)(?=[=;,)({\[>]| [={:[])", text))
    own.update(re.findall(r"(\w+)(?:\[[^\]]*\])* [-+*|^&]?= ", text))
    own.update(re.findall(r"\], (\w+)\[", text))
    return own


def main():
    text = text_of_kernels(sys.argv[1])
    plain = re.sub(r'"[^"\n]*"', "", text)
    used = set(re.findall(r"(?<![\w.])(?<!->)[A-Za-z_]\w*", plain))
    page = (ROOT / "docs/metal.md").read_text()
    table = re.search(r"\| construct \| section \|(.*?)\n\n", page, flags=re.S).group(1)
    documented = set()
    for row in table.splitlines()[2:]:
        for code in re.findall(r"`([^`]*)`", row.split("|")[1]):
            documented.update(re.findall(r"[A-Za-z_]\w*", re.sub(r'"[^"]*"', "", code)))
    missing = sorted(used - own_names(plain) - CPP - MLX - documented)
    unused = sorted(documented - used)
    if missing or unused:
        raise SystemExit(f"docs/metal.md lacks {missing}\nand has without use {unused}")
    print(f"{len(documented)} names of the Metal language, all in docs/metal.md")


if __name__ == "__main__":
    main()
