"""TurboQuant for MLX: KV caches of 3-bit and 4-bit codes, with attention that reads the codes.

    from turboquant_mlx import enable
    enable(model, bits=3)                   # model.make_cache() now gives packed caches

or slot by slot, as in the model card this package reimplements:

    from turboquant_mlx import TurboQuantKVCache, apply_patch

The algorithm is TurboQuant's MSE quantizer (arXiv 2504.19874, section 3): see docs/algorithm.md.
"""

import sys
from pathlib import Path

from . import _checks

try:
    _checks.before_loading()
except ImportError:
    if not _checks.only_doctor():
        raise
    sys.exit(_checks.report())

from . import _build_info  # noqa: E402
from . import _core as _core  # noqa: E402

_kernels = Path(_core.__file__).parent / "kernels"
if _kernels.is_dir():
    _core.set_kernel_directory(str(_kernels))

from . import _old_paths  # noqa: E402
from .caches import (  # noqa: E402
    BatchTurboQuantKVCache,
    BatchTurboQuantLatentKVCache,
    BatchTurboQuantRotatingKVCache,
    CheckpointedArraysCache,
    DelayedTurboQuantKVCache,
    TurboQuantKVCache,
    TurboQuantLatentKVCache,
    TurboQuantRotatingKVCache,
    to_turboquant,
)
from .caches.checkpoints import rewind_and_read, trim_prompt_cache  # noqa: E402
from .enable import disable, enable  # noqa: E402
from .ops import attention, decode, encode  # noqa: E402
from .overlay.lookup import PromptLookup  # noqa: E402
from .overlay.patch import apply_patch, remove_patch  # noqa: E402
from .overlay.saving import load_prompt_cache, save_prompt_cache  # noqa: E402

_old_paths.install()

__all__ = [
    "BatchTurboQuantKVCache",
    "BatchTurboQuantLatentKVCache",
    "BatchTurboQuantRotatingKVCache",
    "CheckpointedArraysCache",
    "DelayedTurboQuantKVCache",
    "PromptLookup",
    "TurboQuantKVCache",
    "TurboQuantLatentKVCache",
    "TurboQuantRotatingKVCache",
    "apply_patch",
    "attention",
    "decode",
    "disable",
    "enable",
    "encode",
    "load_prompt_cache",
    "remove_patch",
    "rewind_and_read",
    "save_prompt_cache",
    "to_turboquant",
    "trim_prompt_cache",
]
__version__ = _build_info.VERSION
