"""Small random models with latent attention: latents of 64 numbers beside rotary keys of 32, as each family has them."""

from families import YARN
from mlx_lm.models import (
    deepseek_v3,
    deepseek_v32,
    glm4_moe_lite,
    kimi_linear,
    longcat_flash,
    mistral4,
)
from small_models import build

LATENT = {
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
    "rope_scaling": None,
}
EXPERTS = {
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "topk_group": 1,
    "n_group": 1,
    "first_k_dense_replace": 1,
}


def deepseek(module=deepseek_v3, **changes):
    return build(module, **LATENT | {"n_routed_experts": None, "n_shared_experts": None} | changes)


def kimi(**changes):
    linear = {"num_heads": 4, "head_dim": 32, "kda_layers": [1]}
    return build(
        kimi_linear,
        **LATENT
        | {"linear_attn_config": linear, "num_experts": 2, "moe_intermediate_size": 64, "model_max_length": 1000}
        | changes,
    )


def longcat():
    return build(
        longcat_flash,
        **LATENT,
        attention_method="MLA",
        zero_expert_type="identity",
        ffn_hidden_size=128,
        moe_topk=1,
        expert_ffn_hidden_size=64,
        n_routed_experts=2,
        zero_expert_num=1,
        num_layers=2,
        routed_scaling_factor=1.0,
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        attention_bias=False,
    )


def indexed(**changes):
    """DeepSeek V3.2: an index of 128 numbers chooses the 16 tokens that attention reads."""
    sizes = {"index_n_heads": 2, "index_head_dim": 64, "index_topk": 16, "q_lora_rank": 32}
    return build(deepseek_v32, **LATENT | EXPERTS | sizes | changes)


def mistral():
    return build(mistral4, **LATENT | EXPERTS, rope_parameters=YARN)


FAMILIES = {
    "deepseek_v3": deepseek,
    "glm4_moe_lite": lambda: build(glm4_moe_lite, **LATENT | EXPERTS),
    "kimi_linear": kimi,
    "longcat_flash": longcat,
    "mistral4": mistral,
}
