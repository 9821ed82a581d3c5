"""MLX's own signature of every kernel against the one that the emulator compiles.   signature_test.py SIGNATURES

MLX writes a kernel's text without a Metal device when a graph is exported; SIGNATURES is the program that prints ours.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile

import mlx.core as mx

DTYPES = {
    "float": mx.float32,
    "float16_t": mx.float16,
    "bfloat16_t": mx.bfloat16,
    "uint32_t": mx.uint32,
    "int32_t": mx.int32,
    "bool": mx.bool_,
}


@contextlib.contextmanager
def captured_stdout(path):
    """Sends what C++ prints to a file."""
    sys.stdout.flush()
    saved = os.dup(1)
    with open(path, "w") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)


def text_of_mlx(kernel, folder):
    inputs = [mx.zeros([1] * (ndim - 1) + [size], DTYPES[type]) for _, type, ndim, size in kernel["inputs"]]
    template = [
        (name, DTYPES.get(value, value) if isinstance(value, str) else value) for name, value in kernel["template"]
    ]

    def graph(*arrays):
        run = mx.fast.metal_kernel(
            name=kernel["name"],
            input_names=[name for name, *_ in kernel["inputs"]],
            output_names=[name for name, _ in kernel["outputs"]],
            source=kernel["source"],
            ensure_row_contiguous=False,
        )
        return run(
            inputs=list(arrays),
            template=template,
            grid=(128, 1, 1),
            threadgroup=(128, 1, 1),
            output_shapes=[(1,)] * len(kernel["outputs"]),
            output_dtypes=[DTYPES[type] for _, type in kernel["outputs"]],
            verbose=True,
        )

    printed = os.path.join(folder, "printed")
    with captured_stdout(printed):
        mx.export_function(os.path.join(folder, "graph.mlxfn"), graph, *inputs)
    with open(printed) as file:
        return file.read()


def main():
    kernels = json.loads(subprocess.run([sys.argv[1]], stdout=subprocess.PIPE, check=True, text=True).stdout)
    with tempfile.TemporaryDirectory() as folder:
        for kernel in kernels:
            theirs = text_of_mlx(kernel, folder)
            if kernel["text"] not in theirs:
                raise SystemExit(f"{kernel['name']}\nours:\n{kernel['text']}\nMLX's:\n{theirs}")
    print(f"{len(kernels)} signatures equal MLX {mx.__version__}'s")


if __name__ == "__main__":
    main()
