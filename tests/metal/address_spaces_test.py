"""Clang checks every .metal file by itself, and the kernels, with Metal's address spaces and vectors of its own.

    address_spaces_test.py SIGNATURES CLANG

The emulator knows neither: there `device`, `constant` and `thread` are nothing.  SIGNATURES is the program that prints
the kernels, with short inputs (`constant`) and long ones (`device`).
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

from constructs_test import SOURCES, with_includes

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


def without_system_headers(text):
    return re.sub(r"#include <[^\n]*", "", text)


def main():
    signatures, clang = sys.argv[1:]
    kernels = json.loads(subprocess.run([signatures], stdout=subprocess.PIPE, check=True, text=True).stdout)
    prelude = str(pathlib.Path(__file__).parent / "address_spaces.h")
    seen = set()
    text = without_system_headers("".join(with_includes(path, seen) for path in SOURCES))
    wrong = unqualified(text)
    for i, kernel in enumerate(kernels):
        name = re.search(r"\[\[kernel\]\] void (\w+)\(", kernel["text"]).group(1)
        arguments = ", ".join(str(value).lower() for _, value in kernel["template"])  # true, not True
        instance = f"void* instance() {{ return (void*)&{name}<{arguments}>; }}"
        text += f"namespace kernel_{i} {{\n{kernel['text']}{instance}\n}}\n"
        wrong += unqualified(kernel["text"])
    if wrong:
        raise SystemExit(f"without an address space: {wrong}")
    texts = {path.name: without_system_headers(with_includes(path, set())) for path in SOURCES}
    texts["the kernels"] = text
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "kernels.cpp"
        for name, its_text in texts.items():
            file.write_text(its_text)
            if subprocess.run([clang, *FLAGS, "-include", prelude, str(file)]).returncode:
                raise SystemExit(f"Clang refuses {name} with Metal's address spaces")
    print(f"{len(kernels)} kernels, all pointers with the address space that is wanted")


if __name__ == "__main__":
    main()
