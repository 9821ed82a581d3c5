"""Models of several families with small random weights, and greedy generation on the plain one-request path."""

import json
import shutil

import mlx.core as mx
from conftest import MODEL
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import gemma3_text, gemma3n, gpt_oss, jamba, llama, phi, phi3, qwen2, qwen3, qwen3_5
from mlx_lm.models.cache import make_prompt_cache

VOCAB = 128


def _spread(path, x):
    """Weights that let the context decide the next token: as MLX initialises them, greedy tokens only repeat."""
    for names, factor in (
        (("q_proj", "k_proj"), 4),
        (("v_proj", "o_proj", "qkv_proj"), 8),
        (("embed_tokens",), 0.1),
    ):
        if path.endswith(tuple(f"{name}.weight" for name in names)):
            return x * factor
    return x


def build(module, seed=0, **changes):
    arguments = {
        "model_type": module.__name__.rsplit(".", 1)[-1],
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "max_position_embeddings": 100000,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    } | changes
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(arguments))
    model.update(tree_map_with_path(_spread, model.parameters()))
    mx.eval(model.parameters())
    return model


def save_model(module, directory, seed=0, **changes):
    """A model directory with the bundled tokenizer; `model_type` may be an alias of the module's name."""
    sizes = {"vocab_size": 8192, "hidden_size": 128, "head_dim": 64, "num_hidden_layers": 2, **changes}
    model = build(module, seed=seed, **sizes)
    directory.mkdir()
    for file in MODEL.glob("*"):
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, directory)
    config = {k: v for k, v in vars(model.args).items() if v is not None}
    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    return directory


def small_llama(**changes):
    return build(llama, **changes)


def small_gpt_oss():
    model = build(
        gpt_oss,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=32,
        rope_scaling=None,
        layer_types=["sliding_attention", "full_attention"],
        intermediate_size=64,
    )
    for layer in model.model.layers:
        layer.self_attn.sinks = mx.random.normal((4,))
    return model


def small_hybrid(seed=0, **changes):
    """Qwen3.5 in small: layers of a recurrent state and of attention in turn."""
    config = {
        "model_type": "qwen3_5_text",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "full_attention_interval": 2,
        "tie_word_embeddings": False,
    } | changes
    mx.random.seed(seed)
    model = qwen3_5.Model(qwen3_5.ModelArgs(model_type="qwen3_5", text_config=config))
    model.update(tree_map_with_path(_spread, model.parameters()))
    mx.eval(model.parameters())
    return model


def small_jamba():
    """A recurrent layer, whose states nobody counts, and one of attention."""
    return build(
        jamba,
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_d_conv=4,
        mamba_d_state=8,
        mamba_expand=2,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_dt_rank=8,
        mamba_proj_bias=False,
        mamba_conv_bias=True,
        layers_block_type=["mamba", "attention"],
        hidden_size=256,
    )


def small_gemma3n():
    """Layers 2 and 3 read the caches of layers 0 and 1."""
    config = {
        "model_type": "gemma3n",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "intermediate_size": [256] * 4,
        "num_attention_heads": 4,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "sliding_window": 32,
        "max_position_embeddings": 1000,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 10000.0,
        "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 32,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 16,
    }
    mx.random.seed(7)  # one of few whose greedy tokens vary
    model = gemma3n.Model(gemma3n.ModelArgs(model_type="gemma3n", text_config=config))
    mx.eval(model.parameters())
    return model


FAMILIES = {
    "llama, head_dim 64": small_llama,
    "llama, head_dim 96": lambda: small_llama(head_dim=96),
    "llama, sliding window": lambda: small_llama(
        layer_types=["sliding_attention", "full_attention"], sliding_window=32
    ),
    "qwen2, head_dim 32": lambda: build(qwen2, hidden_size=128),
    "qwen3, head_dim 128": lambda: build(qwen3, head_dim=128),
    "gemma3, head_dim 256": lambda: build(
        gemma3_text, head_dim=256, sliding_window=32, sliding_window_pattern=2, query_pre_attn_scalar=256
    ),
    "phi3, head_dim 64": lambda: build(phi3, hidden_size=256),
    "phi, head_dim 32": lambda: build(phi, num_key_value_heads=4),
    "gemma3n, shared keys and values": small_gemma3n,
    "gpt_oss, sinks": small_gpt_oss,
}


def prompt(length, seed=1):
    mx.random.seed(seed)
    return mx.random.randint(0, VOCAB, (length,)).tolist()


def greedy(model, tokens, count, cache=None, **settings):
    """The next `count` greedy tokens, one request, one token at a time."""
    cache = make_prompt_cache(model) if cache is None else cache
    steps = generate_step(mx.array(tokens), model, max_tokens=count, prompt_cache=cache, **settings)
    return [token for token, _ in steps]


def batched(model, prompts, count):
    """The `count` greedy tokens that each prompt gets when all are read in one batch."""
    batch = BatchGenerator(model, max_tokens=count)
    answers = {uid: [] for uid in batch.insert(prompts)}
    while responses := batch.next_generated():
        for response in responses:
            answers[response.uid].append(response.token)
    return list(answers.values())


# Paths that multiply matrices of other shapes round elsewhere, and a coordinate that lay on a threshold takes the next
# level.  That moves its vector by about 0.6 / 16 of its norm (levels are 0.6 apart, 256 coordinates), a fifth of TQ3's
# own error of 0.19; all codes' errors together move the bundled model's logits by 0.15 (KL 0.011 = 0.15^2 / 2).  So
# only tokens that lead by less than 0.03 may differ between paths.
NEAR_TIE = 0.03


def sure(model, tokens, count, cache=None, tie=NEAR_TIE, **settings):
    """`greedy` up to the first token that leads by less than `tie`."""
    cache = make_prompt_cache(model) if cache is None else cache
    out = []
    for token, logprobs in generate_step(mx.array(tokens), model, max_tokens=count, prompt_cache=cache, **settings):
        second, first = mx.topk(logprobs, 2).tolist()
        if abs(first - second) < tie:
            break
        out.append(token)
    return out
