"""What a saved cache says about itself, so that a wrong, altered or truncated file is refused."""

import hashlib
import json
import zlib

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import _core

CODEBOOK = "lloyd-max-int8-1"  # the levels of include/turboquant/format.h
READABLE = (1, _core.FORMAT_VERSION)  # version 1 had the scalar codes of 2, 3 and 4 bits alone, in the same bytes


def checksum(fields, arrays):
    """CRC-32 of the fields and of the arrays' shapes, dtypes and bytes, in order."""
    kinds = [None if array is None else [array.shape, str(array.dtype)] for array in arrays]
    crc = zlib.crc32(json.dumps([fields, kinds], sort_keys=True).encode())
    for array in arrays:
        if array is not None and array.size:
            crc = zlib.crc32(memoryview(mx.contiguous(array.reshape(-1)).view(mx.uint8)), crc)
    return f"{crc:08x}"


class Identity(str):
    """The last leaf of a packed cache's `state`: JSON with the cache's fields and a checksum.

    mlx-lm evaluates every cache's state after each prefill chunk, but reads the characters of a string leaf only when
    it saves: the checksum, a pass over all codes, is taken when somebody reads them."""

    def __new__(cls, fields, arrays):
        self = super().__new__(cls, "identity")
        self.fields, self.arrays = fields, arrays
        return self

    def __str__(self):
        return json.dumps(self.fields | {"checksum": checksum(self.fields, self.arrays)}, sort_keys=True)

    def __iter__(self):
        return iter(str(self))


def read(identity, arrays, kind):
    """The fields of an identity that came with `arrays`; ValueError says what does not fit."""
    if isinstance(identity, Identity):  # it never left this process
        fields = identity.fields
    else:
        try:
            fields = json.loads(identity)
            saved = fields.pop("checksum")
            version = fields["format"]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"[load] this is not the state of a {kind}: it carries no readable identity") from error
        if version not in READABLE:
            raise ValueError(
                f"[load] the {kind} was saved in format {version}; this build reads {' and '.join(map(str, READABLE))}"
            )
        found = checksum(fields, arrays)
        if found != saved:
            raise ValueError(
                f"[load] the {kind} does not match its checksum (saved {saved}, found {found}): the file was altered "
                "or truncated; make it again"
            )
    for key, want in (("kind", kind), ("codebook", CODEBOOK)):
        if fields[key] != want:
            raise ValueError(f"[load] the {key} of the saved cache is {fields[key]}; expected {want}")
    return fields


def fingerprint(model):
    """A name for a model's weights: a hash of every parameter's path, shape and first row.

    Floats are hashed as float32, so a model cast from bfloat16 to float32 keeps its name; a dequantised copy has
    another."""
    parameters = [(path, x) for path, x in tree_flatten(model.parameters()) if x.size]
    rows = [x[(0,) * max(x.ndim - 1, 0)] for _, x in parameters]
    rows = [row.astype(mx.float32) if mx.issubdtype(row.dtype, mx.floating) else row for row in rows]
    mx.eval(rows)
    digest = hashlib.sha256()
    for (path, x), row in zip(parameters, rows, strict=True):
        digest.update(f"{path}{x.shape}".encode())
        digest.update(memoryview(mx.contiguous(row.reshape(-1)).view(mx.uint8)))
    return digest.hexdigest()[:16]
