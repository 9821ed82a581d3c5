"""Clang checks the kernels with Metal's address spaces and with vectors of its own.   address_spaces_test.py SIGNATURES CLANG

The emulator knows neither: there `device`, `constant` and `thread` are nothing.  SIGNATURES is the program that prints
the kernels, with short inputs (`constant`) and long ones (`device`).
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

from constructs_test import FILES, ROOT

FLAGS = "--target=aarch64-linux-gnu -std=c++14 -fsyntax-only -ffreestanding -nostdinc -Wall -Wextra -Werror".split()
# Attributes are Metal's; comparisons of signed and unsigned are as in the emulator; nothing here is defined.
FLAGS += ["-Wno-unknown-attributes", "-Wno-sign-compare", "-Wno-undefined-internal"]


def unqualified(text):
    """Pointers and references without an address space, which Metal refuses."""
    found = []
    for declared in re.findall(r"(?:^|[(,;])\s*((?:[\w:]+(?:<[\w, :]*>)? )*[\w:]+(?:<[\w, :]*>)?[*&] \w+)", text, re.M):
        if not re.search(r"\b(device|constant|thread|threadgroup) ", declared):
            found.append(declared)
    return found


def main():
    signatures, clang = sys.argv[1:]
    kernels = json.loads(subprocess.run([signatures], stdout=subprocess.PIPE, check=True, text=True).stdout)
    text = "".join((ROOT / file).read_text() for file in FILES)
    text = re.sub(r"//[^\n]*|#pragma once|#include [^\n]*", "", text)
    wrong = unqualified(text)
    for i, kernel in enumerate(kernels):
        name = re.search(r"\[\[kernel\]\] void (\w+)\(", kernel["text"]).group(1)
        arguments = ", ".join(str(value).lower() for _, value in kernel["template"])  # true, not True
        instance = f"void* instance() {{ return (void*)&{name}<{arguments}>; }}"
        text += f"namespace kernel_{i} {{\n{kernel['text']}{instance}\n}}\n"
        wrong += unqualified(kernel["text"])
    if wrong:
        raise SystemExit(f"without an address space: {wrong}")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "kernels.cpp"
        file.write_text(text)
        prelude = str(pathlib.Path(__file__).parent / "address_spaces.h")
        if subprocess.run([clang, *FLAGS, "-include", prelude, str(file)]).returncode:
            raise SystemExit("Clang refuses the kernels with Metal's address spaces")
    print(f"{len(kernels)} kernels, all pointers with the address space that is wanted")


if __name__ == "__main__":
    main()
