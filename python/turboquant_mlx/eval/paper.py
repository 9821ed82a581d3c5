"""The codec's distortion beside the figures TurboQuant publishes (arXiv 2504.19874, theorems 1 to 3).

    python -m turboquant_mlx.eval.paper        # the table of docs/quality.md

For unit vectors x and y the paper bounds the mean squared error |x - x^|^2 and the inner-product error <y, x - x^>^2.
Its inner-product variant spends one of b bits on a sketch of the residual (QJL); this package spends all on codes.
"""

import mlx.core as mx
import numpy as np

from ..ops import decode, encode

# What the paper states for 2, 3 and 4 bits; the inner-product figures are to be divided by the dimension.
PAPER_MSE = {2: 0.117, 3: 0.03, 4: 0.009}
PAPER_INNER_PRODUCT = {2: 0.56, 3: 0.18, 4: 0.047}


def upper_bound(bits):
    """Theorem 1: no input does worse in expectation over the rotation, for large dimensions."""
    return np.sqrt(3) * np.pi / 2 * 4.0**-bits


def lower_bound(bits):
    """Theorem 3: no quantizer of b bits a coordinate does better on every input."""
    return 4.0**-bits


def unit_vectors(kind, count, dim, seed):
    """Float32 (count, dim) of length 1: `sphere` is uniform; `sparse` has 16 Gaussian coordinates and zeros elsewhere;
    `equal` has three of the same size, which one Hadamard transform turns into a lattice of four values."""
    rng = np.random.default_rng(seed)
    if kind == "sphere":
        x = rng.normal(size=(count, dim))
    else:
        x = np.zeros((count, dim))
        for row in x:
            if kind == "sparse":
                row[rng.choice(dim, 16, replace=False)] = rng.normal(size=16)
            else:
                row[rng.choice(dim, 3, replace=False)] = rng.choice([-1.0, 1.0], 3)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def distortion(bits, dim, kind="sphere", count=4096, seed=0):
    """Measured figures, a dict of floats:

    mse: of the stored scale, which keeps a vector's length; mse_least: of the scale of least error on the same codes;
    inner_product: mean of <y, x - x^>^2 times dim, over y uniform on the sphere and independent of x; slope: mean of
    <x, x^>, what is left of a vector's product with itself (1 would be unbiased)."""
    x = unit_vectors(kind, count, dim, seed)
    y = unit_vectors("sphere", count, dim, seed + 1).astype(np.float64)
    x_hat = np.array(decode(*encode(mx.array(x), bits, code="scalar"), bits, code="scalar"), np.float64)
    kept, square = (x * x_hat).sum(1), (x_hat * x_hat).sum(1)
    return {
        "mse": float(np.square(x - x_hat).sum(1).mean()),
        "mse_least": float((1 - kept**2 / square).mean()),
        "inner_product": float(dim * np.square((y * (x - x_hat)).sum(1)).mean()),
        "slope": float(kept.mean()),
    }


def markdown():
    """The table, measured now."""
    lines = [
        "| bits | D | MSE, least error | MSE as stored | of sparse x | of 3 equal | paper | bound above | 4^-b "
        "| inner product x D | paper's x D | slope |",
        "| ---: " * 12 + "|",
    ]
    for bits in (2, 3, 4):
        for dim in (64, 128, 256):
            a, b, c = (distortion(bits, dim, kind) for kind in ("sphere", "sparse", "equal"))
            lines.append(
                f"| {bits} | {dim} | {a['mse_least']:.5f} | {a['mse']:.5f} | {b['mse']:.5f} | {c['mse']:.5f} "
                f"| {PAPER_MSE[bits]} | {upper_bound(bits):.4f} | {lower_bound(bits):.5f} | {a['inner_product']:.4f} | "
                f"{PAPER_INNER_PRODUCT[bits]} | {a['slope']:.4f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
