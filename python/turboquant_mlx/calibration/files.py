"""A calibration as a value, and as a file beside the weights that it was made from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from .._safetensors import LARGEST_HEADER, read_header
from ..caches.identity import checksum, weight_names
from ..overlay import hosts, sharding
from .policies import Policy

FILE_NAME = "turboquant_calibration.safetensors"
FORMAT = "turboquant calibration 3"
_AGAIN = "make it with python -m turboquant_mlx calibrate"
_READABLE = (FORMAT, "turboquant calibration 2")  # files of 2 hold no maps


class Calibration(NamedTuple):
    """What is known of one slot; None stands for what is not."""

    key_centre: mx.array | None = None  # (H_kv, D) float32
    value_centre: mx.array | None = None
    key_feedback: mx.array | None = None  # (H_kv, D, D) float16
    value_feedback: mx.array | None = None
    seed: int = 0  # of the rotation that feedback was made for
    key_map: mx.array | None = None  # (H_kv, D, D) float32

    @property
    def centres(self) -> Any:
        """(keys, values), as caches take them."""
        return self[:2]

    @property
    def feedback(self) -> Any:
        """(keys, values), as caches take them; None without any."""
        return None if self[2] is None and self[3] is None else self[2:4]

    def without_feedback(self) -> Calibration:
        """The centres alone."""
        return Calibration(*self[:2])


NO_CALIBRATION = Calibration()


class Calibrations(dict):
    """{slot: Calibration}, the names of the weights that they were made with (identity.weight_names), none where that is
    not known, and the bits that were chosen for the slots (choice.py), if any were.

    `missing` has {slot: what could not be made for it, as words}."""

    weights: frozenset = frozenset()
    policy: Policy | None = None

    def __init__(self, *entries):
        super().__init__(*entries)
        self.missing = {}
        first = entries[0] if entries else None
        if isinstance(first, Calibrations):
            self.weights, self.policy, self.missing = first.weights, first.policy, dict(first.missing)


def check_weights(calibration: Any, model: Any) -> None:
    """ValueError when `calibration` says that it was made with other weights than the model's."""
    made_with = getattr(calibration, "weights", None)
    if not made_with or sharding.of(model).group is not None:  # a rank has a part of the weights
        return
    found = set().union(*(weight_names(module) for module in hosts.as_named_in_mlx_lm(model)))
    if not made_with & found:
        raise ValueError(
            f"[enable] the calibration was made with other weights ({sorted(made_with)[0]}; these are "
            f"{sorted(found)[0]}): make it again, or take it all the same as dict(load_calibration(...))"
        )


def as_calibration(found: Any) -> Calibration:
    """A Calibration of one, of a tuple in its order, or of None."""
    try:
        return NO_CALIBRATION if found is None else Calibration(*found)
    except TypeError:
        raise ValueError(f"[enable] calibration must hold a Calibration for each slot; got {found!r}") from None


def directory_hash(directory: str | os.PathLike[str]) -> str:
    """A hash of a model directory's configuration and of its weights' headers (names, shapes, dtypes, sizes)."""
    directory = Path(directory)
    weights = sorted(directory.glob("model*.safetensors"))
    if not weights:
        raise ValueError(f"[calibration] {directory} holds no model*.safetensors, so it cannot be identified")
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in weights:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name} {path.stat().st_size} {length}".encode())
            digest.update(file.read(min(length, 1 << 24)))
    return digest.hexdigest()[:32]


def content(directory: str | os.PathLike[str]) -> str:
    """A hash of parts of every tensor in a model directory's weights: what tells one fine-tune from another."""
    digest = hashlib.sha256()
    for path in sorted(Path(directory).glob("model*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                if length > LARGEST_HEADER:
                    raise ValueError(f"its header takes {length} bytes")
                tensors = json.loads(file.read(length))
                spans = sorted(x["data_offsets"] for name, x in tensors.items() if name != "__metadata__")
                if not all(0 <= start <= end <= path.stat().st_size for start, end in spans):
                    raise ValueError("its tensors lie outside of it")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"[calibration] {path} is no safetensors file") from error
            for start, end in spans:
                for at in (start, (start + end) // 2):
                    file.seek(8 + length + at)
                    digest.update(file.read(min(end - at, 512)))
    return digest.hexdigest()[:32]


def calibration_path(where):
    """The file that `where`, a model directory or a file, stands for."""
    where = Path(where)
    return where / FILE_NAME if where.is_dir() else where


def save_calibration(calibration: Mapping[int, Any], where: Any, *, directory: Any = None, source: str = "") -> Path:
    """Writes `calibration` to a file, or to turboquant_calibration.safetensors in a model directory.

    Args:
        calibration: as from `calibrate`, for models whose slots are a flat list.
        where: a directory or a file name.
        directory: the model directory it belongs to, `where` by default; the file keeps its hash.
        source (str): what it was made from, as a reader will see it.

    Returns:
        The path written.
    """
    path = calibration_path(where)
    directory = directory or path.parent
    write_calibration(calibration, path, model=directory_hash(directory), content=content(directory), source=source)
    return path


def write_calibration(calibration, path, **metadata):
    """Writes `calibration` to a file with these entries (str) beside its own, at once or not at all."""
    path = Path(path)
    entries = {slot: as_calibration(found) for slot, found in calibration.items()}
    tensors = {
        f"{slot}.{name}": x
        for slot, found in entries.items()
        for name, x in zip(Calibration._fields, found, strict=True)
        if isinstance(x, mx.array)
    }
    seeds = sorted({found.seed for found in entries.values()})
    if len(seeds) > 1:
        raise ValueError(f"[save_calibration] all slots must be calibrated for one seed; got {seeds}")
    if names := getattr(calibration, "weights", None):
        metadata["weights"] = " ".join(sorted(names))
    if (policy := getattr(calibration, "policy", None)) is not None:
        metadata["policy"] = policy.to_json()
    metadata |= {"format": FORMAT, "seed": str(seeds[0] if seeds else 0)}
    metadata["checksum"] = _sum(tensors, metadata)
    # Under another name first: the file is whole or not there, and what a link of this name points to stays as it is.
    part = path.with_name(f".{os.getpid()}.{path.name}.safetensors")  # MLX adds the ending where it is missing
    try:
        mx.save_safetensors(str(part), tensors, metadata)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _sum(tensors, metadata):
    """The checksum of all that a file holds beside it."""
    names = sorted(tensors)
    others = {key: value for key, value in metadata.items() if key != "checksum"}
    return checksum([names, others], [tensors[name] for name in names])


def read_calibration(path):
    """(what `write_calibration` wrote, its entries); ValueError when the file holds something else."""
    read_header("load_calibration", path)
    tensors, metadata = mx.load(str(path), return_metadata=True)
    if metadata.get("format") not in _READABLE:
        found = metadata.get("format")
        raise ValueError(f"[load_calibration] {path} must hold {FORMAT!r}; it holds {found!r}: {_AGAIN}")
    mx.eval(list(tensors.values()))  # a thread that loads lazily may end before another one reads
    try:
        result = _slots(tensors, int(metadata.get("seed", "")))
    except ValueError as error:
        raise ValueError(f"[load_calibration] {path} {error}: {_AGAIN}") from error
    result.weights = frozenset(metadata.get("weights", "").split())
    result.policy = Policy.from_json(metadata["policy"]) if "policy" in metadata else None
    if metadata.get("checksum", found := _sum(tensors, metadata)) != found:  # files of earlier versions have none
        raise ValueError(f"[load_calibration] {path} does not match its checksum, it was altered: {_AGAIN}")
    return result, metadata


def load_calibration(where: Any, *, directory: Any = None) -> Calibrations:
    """Reads what `save_calibration` wrote.

    Args:
        where: a model directory or a file.
        directory: the model directory to check against, the file's own by default; False checks nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or belongs to another model.
    """
    path = calibration_path(where)
    if not path.is_file():
        raise FileNotFoundError(f"[load_calibration] there is no {path}; {_AGAIN}")
    found, metadata = read_calibration(path)
    if directory is not False:
        expected = directory_hash(directory or path.parent)
        if metadata.get("model") != expected:
            raise ValueError(
                f"[load_calibration] {path} was made for the model {metadata.get('model')}, this one is {expected}"
            )
        if metadata.get("content") and metadata["content"] != content(directory or path.parent):
            raise ValueError(
                f"[load_calibration] {path} was made for a model of the same shape with other weights: {_AGAIN}"
            )
    return found


_DTYPES = {"feedback": mx.float16, "map": mx.float32}  # of centres any float


def _slots(tensors: dict[str, mx.array], seed: int) -> Calibrations:
    """The calibrations that named arrays make; ValueError says what is wrong with one."""
    found: dict[int, dict] = {}
    for name, x in tensors.items():
        number, _, field = name.rpartition(".")
        if field not in Calibration._fields or field == "seed" or not number.isdecimal() or len(number) > 6:
            raise ValueError(f"holds {name!r}, which is no part of a calibration")
        part = field.partition("_")[2]
        rank = 2 if part == "centre" else 3
        if x.ndim != rank or x.size == 0 or (rank == 3 and x.shape[-1] != x.shape[-2]):
            raise ValueError(f"holds {name!r} of shape {tuple(x.shape)}")
        if x.dtype != _DTYPES.get(part, x.dtype) or not mx.issubdtype(x.dtype, mx.floating):
            raise ValueError(f"holds {name!r} of dtype {x.dtype}")
        if not mx.all(mx.isfinite(x)).item():
            raise ValueError(f"holds numbers that are not finite in {name!r}")
        found.setdefault(int(number), {"seed": seed})[field] = x
    if not 0 <= seed < 2**64:
        raise ValueError(f"names the seed {seed}")
    for slot, fields in found.items():
        for side in ("key", "value"):
            sizes = sorted({(x.shape[0], x.shape[-1]) for name, x in fields.items() if name.startswith(side)})
            if len(sizes) > 1:
                raise ValueError(f"holds arrays of several (heads, head_dim) for the {side}s of slot {slot}: {sizes}")
    return Calibrations((slot, Calibration(**found[slot])) for slot in sorted(found))


def load_beside(where: Any) -> Calibrations:
    """load_calibration() of a directory or a file, checked against the weights beside it if there are any."""
    weights = calibration_path(where).parent.glob("model*.safetensors")
    return load_calibration(where, directory=None if any(weights) else False)
