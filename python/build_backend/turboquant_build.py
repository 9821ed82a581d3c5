"""scikit-build-core's build backend, which also asks for MLX and for the nanobind of MLX's ABI: those of the environment
that pip installs into, as far as it can be seen from an isolated build, else the newest ones."""

import importlib.util
import sysconfig
from pathlib import Path

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

_file = Path(__file__).parents[1] / "turboquant_mlx" / "_versions.py"
_spec = importlib.util.spec_from_file_location("_versions", _file)
_versions = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_versions)


def _needed():
    return _versions.build_requirements([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])


def get_requires_for_build_wheel(config_settings=None):
    return [*_build.get_requires_for_build_wheel(config_settings), *_needed()]


def get_requires_for_build_editable(config_settings=None):
    return [*_build.get_requires_for_build_editable(config_settings), *_needed()]
