"""The Hugging Face cache folder, which servers list."""

from pathlib import Path


def make_cache_folder() -> None:
    """Makes the folder where there is none: without it huggingface_hub's scan raises, and GET /v1/models of mlx-lm's and
    mlx-vlm's servers answers nothing.  A folder that cannot be made is left to them."""
    from huggingface_hub import constants

    try:
        Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    except OSError:
        pass
