"""Modules that have moved can still be imported by the names they had up to version 0.1."""

import importlib
import importlib.abc
import importlib.util
import sys

_ROOT = __name__.partition(".")[0]
MOVED = {
    "arguments": "caches.arguments",
    "batch": "caches",
    "cache": "caches",
    "cli": "commands.cli",
    "convert": "caches.convert",
    "doctor": "commands.doctor",
    "feedback": "calibration.feedback",
    "gated_delta": "overlay.gated_delta",
    "gpu_report": "commands.gpu_report",
    "identity": "caches.identity",
    "other_slots": "overlay.other_slots",
    "patch": "overlay.patch",
    "report": "commands.report",
    "requests": "overlay.requests",
    "rotating": "caches",
    "saving": "overlay.saving",
    "slots": "enable",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for an old name with the module of the new one, the same object."""

    def find_spec(self, name, path=None, target=None):
        root, _, old = name.partition(".")
        return importlib.util.spec_from_loader(name, self) if root == _ROOT and old in MOVED else None

    def create_module(self, spec):
        module = importlib.import_module(f"{_ROOT}.{MOVED[spec.name.partition('.')[2]]}")
        self._own = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = self._own  # the import system has put the old name's there


def install():
    """Idempotent."""
    if not any(
        type(finder).__name__ == _Finder.__name__ and type(finder).__module__ == __name__ for finder in sys.meta_path
    ):
        sys.meta_path.append(_Finder())
