"""Models, calibrations and prompts of the publication curve."""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from turboquant_mlx.caches import leaves
from turboquant_mlx.caches.slots import kv_slots, own_caches, slot_name
from turboquant_mlx.calibration import Calibration, feedback

# Qwen3.5-9B's text model: 32 layers, every fourth of full attention (16 query and 4 KV heads of 256).
SHAPES = {
    "9b": {
        "model_type": "qwen3_5_text",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 248320,
        "rms_norm_eps": 1e-6,
        "linear_num_value_heads": 32,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 262144,
        "rope_parameters": {"type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    }
}


def build_shape(name):
    """A model of this shape with random 4-bit weights in groups of 64, as the 9B's checkpoint stores them."""
    from mlx_lm.models import qwen3_5

    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict({"model_type": "qwen3_5", "text_config": SHAPES[name]}))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=64, bits=4)
    for _, value in tree_flatten(model.parameters()):  # one at a time: the unquantised weights never stand together
        mx.eval(value)
    model.eval()
    return model


class Slot(NamedTuple):
    """A cache that `enable` would pack, and what the model puts into it."""

    path: tuple  # place in the model's caches
    heads: int  # of keys and values
    key_dim: int
    value_dim: int
    dtype: mx.Dtype


class Subject(NamedTuple):
    """What is measured: a model, its slots, and {slot: Calibration of NumPy arrays} or None.

    NumPy, because MLX counts the bytes of its own arrays: each run makes those that it uses, so they are counted as its
    own and not as a float cache's."""

    model: nn.Module
    slots: list
    calibration: dict | None = None

    @property
    def dtype(self):
        """Of the float caches."""
        return self.slots[0].dtype


def attention_slots(model):
    """The slots that `enable` would pack, as two tokens fill them (their graph is not evaluated).

    ValueError when there is none."""
    caches = own_caches(model)
    found = kv_slots(caches, "curve")
    model(mx.zeros((1, 2), mx.int32), cache=caches)
    # A slot that stays empty is that of a layer which reads another one's.
    return [
        Slot(path, c.keys.shape[1], c.keys.shape[-1], c.values.shape[-1], c.keys.dtype)
        for path, c in leaves(caches)
        if path in found and c.keys is not None
    ]


def as_numpy(calibration):
    """{slot: Calibration} with NumPy arrays in place of MLX's."""
    return {
        slot: Calibration(*(np.array(x) if isinstance(x, mx.array) else x for x in found))
        for slot, found in calibration.items()
    }


def synthetic_calibration(slots, seed):
    """{slot: Calibration} of the right shapes: centres and second moments of random numbers, as good as any for speed."""
    rng, found = np.random.default_rng(seed), {}
    for slot in slots:
        if slot.key_dim != slot.value_dim:
            continue
        shape = (slot.heads, slot.key_dim)
        centres = [mx.array(0.1 * rng.standard_normal(shape).astype(np.float32)) for _ in range(2)]
        mixed = [rng.standard_normal((*shape, slot.key_dim)) for _ in range(2)]
        fed = [feedback.of_metrics(x @ x.swapaxes(1, 2), 0) for x in mixed]
        found[slot_name(slot.path)] = Calibration(*centres, *fed, 0)
    return as_numpy(found)


def prompt_tokens(model, tokenizer, text, count, seed):
    """`count` tokens of the text, or random ones when there is no tokenizer.  ValueError when the text is short."""
    if tokenizer is None:
        vocabulary = getattr(model, "language_model", model).args.vocab_size
        return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()
    tokens = tokenizer.encode(text.read_text())
    if len(tokens) < count:
        raise ValueError(f"[curve] the longest prompt needs {count} tokens; {text} has {len(tokens)}")
    return tokens[:count]
