"""Prompt caches on disk, so that a server's restart loses none.

Each prefix is a file of `save_prompt_cache`: packed slots, recurrent states with their checkpoints, and a checksum of each.
Its metadata hold the tokens, the places to which the caches can go back, and an identity: what a model and its settings must
be for the caches to fit.  A thread writes; nobody waits for it.  A file gets its name once it is complete, so that a process
that is killed leaves a temporary file at most, and servers that share a directory see whole files alone.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache

from .. import _core
from .._safetensors import read_header
from ..caches import PackedCache, leaves
from ..caches.checkpoints import checkpointed, nearest_checkpoint
from ..caches.identity import checksum, fingerprint
from . import saving
from .prefixes import held_tokens, shared_length

KEY = "turboquant_prefix"
LEAST = 16  # tokens: what is shorter, or reaches no further, is read faster than loaded
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.(\d+)\.tmp\.safetensors")
_WAIT = 0.3  # seconds after which a prefix is written: a longer one of the same request may take its place
_LOOK = 2.0  # seconds between two looks at what other servers wrote
_DAMAGE = (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Prefix:
    """One file: its tokens, and the places to which its caches can go back; None: any."""

    name: str
    tokens: list[int]
    places: list[int] | None

    def reach(self, tokens: list[int]) -> int:
        """How many of the first tokens of a prompt its caches can be brought to hold."""
        usable = min(shared_length(self.tokens, tokens), len(tokens) - 1)
        if usable == len(self.tokens) or self.places is None:
            return usable
        return max((at for at in self.places if at <= usable), default=0)


def identity_of(models: list[Any]) -> str:
    """A name for what these models' caches are: weights, kinds, widths, calibration, and the versions that wrote them."""
    found = [_core.FORMAT_VERSION, mlx_lm.__version__]
    for model in models:
        parameters: list[Any] = tree_flatten(model.parameters())  # type: ignore[assignment]
        floats = [str(x.dtype) for _, x in parameters if mx.issubdtype(x.dtype, mx.floating)]
        found.append([fingerprint(model), floats[:1]])
        for path, c in leaves(mlx_lm_cache.make_prompt_cache(model)):
            slot = [path, type(c).__name__, *(getattr(c, name, None) for name in ("max_size", "keep", "start"))]
            if isinstance(c, PackedCache):
                coding = c._core.coding
                arrays = [x for s in (coding.keys, coding.values) for x in (s.centre, s.feedback)] + [coding.key_map]
                slot += [c.key_bits, c.value_bits, c.code, c.seed, c.recent, c.sink, checksum({}, arrays)]
            found.append(slot)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32]


def places_of(caches: list[Any], length: int) -> list[int] | None:
    """Where `caches` of `length` tokens can go back to; None: anywhere."""
    slots = checkpointed(caches)
    if not slots:
        return None if all(c.is_trimmable() for _, c in leaves(caches)) else []
    places = sorted({at for c in slots for at in c.checkpoints if at <= length})
    return [at for at in places if nearest_checkpoint(caches, at) == at]


class PrefixStore:
    """The prefixes in a directory, at most `most_bytes` of them, the least recently used first out.

    Raises OSError when the directory cannot be made or written to.
    """

    def __init__(self, directory: str | os.PathLike[str], most_bytes: int) -> None:
        self.directory, self.most_bytes = Path(directory), most_bytes
        self.directory.mkdir(parents=True, exist_ok=True)
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise OSError(f"cannot write to {self.directory}")
        self._models: list[Any] = []
        self._identity = ""
        self._found: dict[str, Prefix] = {}
        self._known: set[str] = set()  # names that were looked at
        self._warned: set[str] = set()
        self._lock = threading.Condition()
        self._jobs: list[tuple[float, str, list[int], list[Any]]] = []
        self._busy = self._closed = False
        self._looked = 0.0
        self._thread = threading.Thread(target=self._work, name="prefixes", daemon=True)
        self._thread.start()

    def use(self, models: list[Any]) -> None:
        """From now on, the prefixes of these models: one, and its draft model if there is one."""
        identity = identity_of(models)
        with self._lock:
            self._models, self._identity = models, identity
            self._found, self._known = {}, set()
        self.look()

    def look(self) -> None:
        """Takes note of the files that came and went."""
        names = set()
        for file in os.scandir(self.directory):
            if partial := _PARTIAL.fullmatch(file.name):
                _remove_orphan(file, int(partial[1]))
            elif _NAME.fullmatch(file.name):
                names.add(file.name)
        for name in names - self._known:
            try:
                prefix = self._described(name)
            except FileNotFoundError:
                continue
            except (*_DAMAGE, OSError) as error:
                self._warn(name, error)
                prefix = None
            with self._lock:
                self._known.add(name)
                if prefix is not None:
                    self._found[name] = prefix
        with self._lock:
            self._known &= names
            self._found = {name: prefix for name, prefix in self._found.items() if name in names}
        self._looked = time.monotonic()

    def _described(self, name):
        """The Prefix of a file by its header; ValueError when the file is damaged or of other models."""
        path = self.directory / name
        header = read_header("load_prompt_cache", path)
        fields = json.loads(header["__metadata__"][f"0.{KEY}"])
        if fields["identity"] != self._identity:
            raise ValueError("it belongs to another model or to other settings")
        return Prefix(name, fields["tokens"], fields["places"])

    def _warn(self, name, error):
        if name not in self._warned:
            self._warned.add(name)
            print(f"[tq] {self.directory / name} is not used: {error}", file=sys.stderr)

    def find(self, tokens: list[int], beyond: int) -> Prefix | None:
        """The prefix that reaches furthest into `tokens`, if that is LEAST tokens further than `beyond`."""
        with self._lock:
            reached = [(prefix.reach(tokens), name) for name, prefix in self._found.items()]
            best, name = max(reached, default=(0, ""))
            return self._found[name] if best >= beyond + LEAST else None

    def load(self, prefix: Prefix) -> list[Any] | None:
        """The caches of a prefix; None when the file is gone or damaged, which is said once."""
        path = self.directory / prefix.name
        try:
            caches, metadata = saving.load_prompt_cache(path, return_metadata=True)
            if json.loads(metadata[KEY])["tokens"] != prefix.tokens:
                raise ValueError("its tokens are others than those that it began with")
            rest = caches
            for model in self._models:
                own = len(mlx_lm_cache.make_prompt_cache(model))
                saving.check_fits(rest[:own], model, prefix.name)
                rest = rest[own:]
            if rest:
                raise ValueError(f"it has {len(rest)} more slots than the model")
            os.utime(path)
            return caches
        except FileNotFoundError:
            pass
        except (*_DAMAGE, OSError) as error:
            self._warn(prefix.name, error)
        with self._lock:
            self._found.pop(prefix.name, None)
        return None

    def put(self, tokens: list[int], caches: list[Any]) -> None:
        """Has the caches of `tokens` written before long."""
        if len(tokens) < LEAST:
            return
        mx.async_eval([c.state for c in caches])
        kept = [copy.deepcopy(c) for c in caches]
        with self._lock:
            self._jobs = [
                job for job in self._jobs if not (job[1] == self._identity and _covers(tokens, kept, job[2]))
            ][-15:]
            self._jobs.append((time.monotonic() + _WAIT, self._identity, tokens, kept))
            self._lock.notify_all()

    def flush(self, timeout: float = 60.0) -> bool:
        """Waits until all is written, at most `timeout` seconds, and says whether it was."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._jobs and not self._busy, timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Writes what waits, and ends the thread."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._thread.join(timeout)

    def _work(self):
        with contextlib.suppress(OSError, AttributeError):  # the tokens' threads go first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while True:
            with self._lock:
                while not self._jobs or (not self._closed and self._jobs[0][0] > time.monotonic()):
                    if self._closed and not self._jobs:
                        return
                    due = self._jobs[0][0] - time.monotonic() if self._jobs else _LOOK
                    self._lock.wait(max(due, 0.01))
                    if not self._jobs:
                        break
                job, self._busy = self._jobs.pop(0) if self._jobs else None, True
            try:
                if job is not None:
                    self._write(*job[1:])
                    del job
                if self._identity and time.monotonic() - self._looked > _LOOK:
                    self.look()
            except Exception as error:  # a full disk, say: the server goes on without
                self._warn(".", f"writing failed: {error}")
            finally:
                with self._lock:
                    self._busy = False
                    self._lock.notify_all()

    def _write(self, identity, tokens, caches):
        name = hashlib.sha256(json.dumps([identity, tokens]).encode()).hexdigest()[:32] + ".safetensors"
        path = self.directory / name
        if path.exists():
            os.utime(path)
            return
        if (taken := sum(c.nbytes for c in caches)) > self.most_bytes:
            self._warn("(a new prefix)", f"it takes {taken:,} bytes, more than the {self.most_bytes:,} of all prefixes")
            return
        places = places_of(caches, len(tokens))
        fields = {"identity": identity, "tokens": tokens, "places": places}
        partial = self.directory / f".{name.removesuffix('.safetensors')}.{os.getpid()}.tmp.safetensors"
        try:
            saving.save_prompt_cache(str(partial), caches, {KEY: json.dumps(fields)})
            read_header("save_prompt_cache", partial)  # of a full disk MLX says nothing
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        prefix = Prefix(name, tokens, places)
        with self._lock:
            covered = []
            if identity == self._identity:
                reached = [(prefix.reach([*old.tokens, -1]), old) for old in self._found.values()]
                covered = [old for reach, old in reached if reach == len(old.tokens)]
                self._found = {old.name: old for _, old in reached if old not in covered} | {name: prefix}
                self._known.add(name)
        for old in covered:
            (self.directory / old.name).unlink(missing_ok=True)
        self._make_room()

    def _make_room(self):
        files = []
        for file in os.scandir(self.directory):
            if _NAME.fullmatch(file.name):
                with contextlib.suppress(FileNotFoundError):
                    found = file.stat()
                    files.append((found.st_mtime, found.st_size, file.name))
        total = sum(size for _, size, _ in files)
        for _, size, name in sorted(files):
            if total <= self.most_bytes:
                return
            (self.directory / name).unlink(missing_ok=True)
            total -= size
            with self._lock:
                self._found.pop(name, None)


def _covers(tokens, caches, others):
    """Whether caches of `tokens` can go back to what `others`, tokens too, had."""
    if shared_length(tokens, others) != len(others):
        return False
    return len(others) == len(tokens) or nearest_checkpoint(caches, len(others)) == len(others)


def _remove_orphan(file, pid):
    """Removes the temporary file of a process that is gone."""
    with contextlib.suppress(OSError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            os.unlink(file.path)


def stored(base: type, store: PrefixStore) -> type:
    """mlx-lm's LRUPromptCache, which looks into `store` for what it does not hold, and has written what it gets."""

    class StoredPromptCache(base):
        def fetch_nearest_cache(self, model, tokens):
            caches, rest = super().fetch_nearest_cache(model, tokens)
            while found := store.find(tokens, len(tokens) - len(rest) if caches else 0):
                loaded = store.load(found)
                if loaded is not None:
                    super().insert_cache(model, found.tokens, loaded)
                    return super().fetch_nearest_cache(model, tokens)
            return caches, rest

        def insert_cache(self, model, tokens, prompt_cache, *, cache_type="assistant"):
            tokens = held_tokens(tokens, prompt_cache)
            super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)
            if tokens and held_tokens(tokens, prompt_cache) == tokens:
                store.put(tokens, prompt_cache)

    return StoredPromptCache
