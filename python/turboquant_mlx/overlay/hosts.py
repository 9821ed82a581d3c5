"""Which program a model belongs to, mlx-lm or mlx-vlm, and what `enable` does otherwise for the latter (vlm.py).

mlx-vlm is not needed: as long as nobody has imported it, no model is its."""

import contextlib
import sys

from .._versions import MLX_VLM as MLX_VLM  # the version that all of this was tried with


def _vlm():
    """The module that knows mlx-vlm; None while mlx-vlm is not loaded."""
    if "mlx_vlm" not in sys.modules:
        return None
    from . import vlm

    return vlm


def language_model(model):
    """The part of a model that makes its caches and reads them: an mlx-vlm model's language_model, else the model."""
    vlm = _vlm()
    return vlm.language_model(model) if vlm else model


def of_mlx_vlm(model):
    """Whether mlx-vlm runs this model."""
    vlm = _vlm()
    return vlm is not None and vlm.owns(model)


def as_named_in_mlx_lm(model):
    """Modules that hold the model's weights under the names that mlx-lm may give them: multimodal models of mlx-lm keep
    the prefix `language_model`, others have none."""
    return _vlm().named_both_ways(model) if of_mlx_vlm(model) else [model]


def apply_patch(model):
    """Makes the attention of mlx-vlm read packed caches, if the model is its."""
    if of_mlx_vlm(model):
        _vlm().apply_patch()


def attention(model):
    """The name of the function that the model's attention has to go through."""
    return f"{'mlx_vlm' if of_mlx_vlm(model) else 'mlx_lm'}.models.base.scaled_dot_product_attention"


def enable_chunked_recurrence():
    """gated_delta.enable_chunked_recurrence() of mlx-vlm, where that is loaded."""
    if vlm := _vlm():
        vlm.enable_chunked_recurrence()


def disable_chunked_recurrence():
    """Undoes it."""
    if vlm := _vlm():
        vlm.disable_chunked_recurrence()


def undisturbed(model):
    """Context: what a call of the model leaves in it beside caches is as before."""
    return _vlm().positions_kept(model) if of_mlx_vlm(model) else contextlib.nullcontext()
