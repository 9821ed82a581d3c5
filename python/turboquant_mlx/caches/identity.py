"""What a saved cache says about itself, so that a wrong, altered or truncated file is refused."""

import hashlib
import json
import weakref
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
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
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
        if fields.get(key) != want:
            raise ValueError(f"[load] the {key} of the saved cache is {fields.get(key)}; expected {want}")
    return fields


def fingerprint(model):
    """A name for a model's weights: a hash of every parameter's path, shape and first row.

    Floats are hashed as float32, so a model cast from bfloat16 to float32 keeps its name; a dequantised copy has
    another."""
    return _name([(path, x.shape, _first_row(x)) for path, x in tree_flatten(model.parameters()) if x.size])


def weight_names(model):
    """The names under which a model's weights are known: its fingerprint, and those of its dequantised copies.

    Dequantising rounds to the type of the scales, which may have been a narrower one before somebody cast the model."""
    found = {fingerprint(model)}
    modules = {path: module for path, module in model.named_modules() if {"weight", "scales"} <= module.keys()}
    dtypes = {module["scales"].dtype for module in modules.values()}
    for dtype in dtypes and {*dtypes, *((mx.bfloat16, mx.float16) if mx.float32 in dtypes else ())}:
        rows = []
        for path, x in tree_flatten(model.parameters()):
            owner, _, name = path.rpartition(".")
            if owner not in modules or name not in ("weight", "scales", "biases"):
                rows.append((path, x.shape, _first_row(x)))
            elif name == "weight":
                rows.append((path, *_dequantised(modules[owner], dtype)))
        found.add(_name([row for row in rows if row[2].size]))
    return found


def _first_row(x):
    return x[(0,) * max(x.ndim - 1, 0)] if x.size else x


def _dequantised(module, dtype):
    """Shape and first row of a quantised layer's weight, as floats of this dtype."""
    parts = [_first_row(module[name])[None] if name in module else None for name in ("weight", "scales", "biases")]
    if mx.issubdtype(parts[1].dtype, mx.floating):
        parts[1:] = [x if x is None else x.astype(dtype) for x in parts[1:]]
    form = {"group_size": module.group_size, "bits": module.bits, "mode": getattr(module, "mode", "affine")}
    row = mx.dequantize(*parts, **form)[0]
    return (*module.weight.shape[:-1], row.shape[-1]), row


def _name(parameters):
    """Of (path, shape, first row) of each parameter."""
    rows = [row.astype(mx.float32) if mx.issubdtype(row.dtype, mx.floating) else row for _, _, row in parameters]
    mx.eval(rows)
    digest = hashlib.sha256()
    for (path, shape, _), row in zip(parameters, rows, strict=True):
        digest.update(f"{path}{tuple(shape)}".encode())
        digest.update(memoryview(mx.contiguous(row.reshape(-1)).view(mx.uint8)))
    return digest.hexdigest()[:16]


class Names:
    """The fingerprint of a model's weights as they are now.

    Asked at every prompt, it hashes again only when a parameter is another array than before: what adapters,
    load_weights, quantize and set_dtype do.  Where that is not enough, since somebody may write into an array, ask for
    `fresh`."""

    def __init__(self, model):
        self._model, self._seen, self.latest = weakref.ref(model), [], ""

    def current(self, fresh=False):
        """The name now; the latest known when the model is gone."""
        model = self._model()
        if model is None:
            return self.latest
        found = tree_flatten(model.parameters())
        known = len(found) == len(self._seen) and all(
            path == was and ref() is x for (path, x), (was, ref) in zip(found, self._seen, strict=True)
        )
        if fresh or not known:
            self.latest = fingerprint(model)
            self._seen = [(path, weakref.ref(x)) for path, x in found]
        return self.latest
