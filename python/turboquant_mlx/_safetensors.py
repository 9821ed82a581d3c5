"""Whether a file is what a safetensors file must be, before anything that it says is believed.

MLX's reader takes the header at its word: sizes that no file of this length holds are found only when arrays are read,
after memory was taken for them."""

import json
import os
from pathlib import Path

SIZES = {"BOOL": 1, "I8": 1, "U8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
SIZES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
LARGEST_HEADER = 100_000_000  # bytes, as in the format's own reader


def _no_twins(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _whole(number):
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def read_header(operation: str, file_name: str | os.PathLike) -> dict:
    """The header of a complete safetensors file: {name: {dtype, shape, data_offsets}}, and
    the metadata, {} where there are none, as "__metadata__".

    Raises:
        ValueError: the file is truncated, too long, or describes tensors that do not fill it exactly.
    """
    size = Path(file_name).stat().st_size

    def refuse(why):
        return ValueError(f"[{operation}] {file_name} is no complete safetensors file: {why}")

    with open(file_name, "rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise refuse(f"it has {size} bytes")
        length = int.from_bytes(head, "little")
        if length > LARGEST_HEADER or length > size - 8:
            raise refuse(f"it has {size} bytes and a header of {length}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise refuse(error) from error
    if not isinstance(header, dict):
        raise refuse("its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null where there are none
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise refuse("its metadata are no strings")
    spans = sorted(_span(name, tensor, refuse) for name, tensor in header.items())
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise refuse(f"{name!r} begins at byte {begin}, where {end} is the first free one")
        end = stop
    end += 8 + length
    if size < end:
        raise ValueError(f"[{operation}] {file_name} is truncated: it has {size} of {end} bytes")
    if size > end:
        raise ValueError(f"[{operation}] {file_name} was altered: it has {size} bytes and describes {end}")
    return header | {"__metadata__": metadata}


def _span(name, tensor, refuse):
    """(first byte, end, name) of a tensor whose description agrees with itself."""
    if not isinstance(tensor, dict) or tensor.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"{name!r} is described by {str(tensor)[:100]}")
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise refuse(f"{name!r} has the dtype {str(dtype)[:100]}")
    if not isinstance(shape, list) or not all(_whole(n) and n < 2**31 for n in shape) or len(shape) > 32:
        raise refuse(f"{name!r} has the shape {str(shape)[:100]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise refuse(f"{name!r} lies at {str(offsets)[:100]}")
    bytes_ = SIZES[dtype]
    for n in shape:
        bytes_ *= n
    if offsets[1] - offsets[0] != bytes_:
        raise refuse(f"{name!r} takes {offsets[1] - offsets[0]} bytes, and {dtype} of shape {shape} takes {bytes_}")
    return offsets[0], offsets[1], name
