"""Quality of packed caches on a model and a text: `python -m turboquant_mlx eval`."""

from .command import main
from .divergence import compare, summarise
from .modes import Mode, parse_mode

__all__ = ["Mode", "compare", "main", "parse_mode", "summarise"]
