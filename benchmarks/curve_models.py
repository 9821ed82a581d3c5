"""Models and prompts of the publication curve."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

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


def text_args(model):
    return getattr(model, "language_model", model).args


def attention_shape(model):
    """(KV heads, head dim)."""
    args = text_args(model)
    return args.num_key_value_heads, getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads


def prompt_tokens(model, tokenizer, text, count, seed):
    """`count` tokens of the text, or random ones when there is no tokenizer.  ValueError when the text is short."""
    if tokenizer is None:
        return np.random.default_rng(seed).integers(0, text_args(model).vocab_size, count).tolist()
    tokens = tokenizer.encode(text.read_text())
    if len(tokens) < count:
        raise ValueError(f"the longest prompt needs {count} tokens; {text} has {len(tokens)}")
    return tokens[:count]
