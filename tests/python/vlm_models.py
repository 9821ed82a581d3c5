"""Small random models of mlx-vlm, and their answers on its plain one-request path."""

import mlx.core as mx
from conftest import MODEL
from mlx.utils import tree_map_with_path
from mlx_lm.utils import dequantize_model
from mlx_vlm import load
from mlx_vlm.generate.ar import BatchGenerator, generate_step
from mlx_vlm.models import gemma3_text, gpt_oss, qwen3_5, qwen3_vl
from small_models import NEAR_TIE, VOCAB, _spread

IMAGE, START, END = VOCAB - 3, VOCAB - 2, VOCAB - 1  # tokens of the models with a vision tower
GRID = (1, 4, 4)  # patches of the image, in time, height and width
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "out_hidden_size": 128,
    "num_heads": 2,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
}
IDS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}


def _build(module, config, seed=0):
    mx.random.seed(seed)
    model = module.Model(module.ModelConfig.from_dict(config))
    model.update(tree_map_with_path(_spread, model.parameters()))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def small_qwen35(vision=True):
    """A linear layer, then one of attention, twice."""
    text = TEXT | {
        "model_type": "qwen3_5_text",
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_hidden_layers": 4,
        "full_attention_interval": 2,
        "rope_parameters": {
            "type": "default",
            "mrope_section": [3, 3, 2],
            "rope_theta": 10000,
            "partial_rotary_factor": 0.25,
        },
    }
    config = {"model_type": "qwen3_5", "text_config": text, "vision_config": VISION | {"model_type": "qwen3_5"}}
    config |= IDS | {"vocab_size": VOCAB}
    config["text_config"] = qwen3_5.TextConfig.from_dict(text)
    config["vision_config"] = qwen3_5.VisionConfig.from_dict(config["vision_config"])
    model = _build(qwen3_5, config)
    if not vision:  # as mlx-vlm loads a checkpoint that has none
        model.vision_tower = None
    return model


def small_qwen3_vl():
    text = TEXT | {
        "model_type": "qwen3_vl_text",
        "num_hidden_layers": 2,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "default", "mrope_section": [12, 10, 10]},
    }
    config = {"model_type": "qwen3_vl", "text_config": text, "vision_config": VISION, "vocab_size": VOCAB}
    return _build(qwen3_vl, config | IDS)


def small_gemma3():
    """A sliding layer, then a global one."""
    config = TEXT | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "sliding_window": 32,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 64,
    }
    return _build(gemma3_text, config)


def small_gpt_oss():
    """A sliding layer, then a global one, both with sinks."""
    config = TEXT | {
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    model = _build(gpt_oss, config)
    for layer in model.layers:
        layer.self_attn.sinks = mx.random.normal((4,))
    return model


FAMILIES = {
    "qwen3_5, text": lambda: small_qwen35(vision=False),
    "qwen3_5, image": small_qwen35,
    "qwen3_vl, image": small_qwen3_vl,
    "gemma3, windows": small_gemma3,
    "gpt_oss, sinks": small_gpt_oss,
}


def picture(model):
    """(pixel values, keywords) of one image for a model with a vision tower; (None, {}) for others."""
    if getattr(model, "vision_tower", None) is None:
        return None, {}
    t, h, w = GRID
    pixels = mx.random.normal((t * h * w, 3 * 2 * 14 * 14), key=mx.random.key(3))
    return pixels, {"image_grid_thw": mx.array([GRID])}


def prompt(model, length, seed=1):
    """Random tokens; of a model with a vision tower, with the place of an image near the beginning."""
    tokens = mx.random.randint(0, IMAGE, (length,), key=mx.random.key(seed)).tolist()
    if getattr(model, "vision_tower", None) is not None:
        tokens[3:9] = [START, *[IMAGE] * 4, END]
    return tokens


def steps(model, tokens, count, caches=None, **settings):
    """[(token, log-probabilities)] of `count` greedy steps after the prompt, as mlx-vlm's generate takes them."""
    pixels, extra = picture(model)
    with mx.stream(mx.cpu):
        found = generate_step(
            mx.array([tokens]),
            model,
            pixels,
            mx.ones((1, len(tokens)), mx.int32),
            max_tokens=count,
            prompt_cache=caches,
            temperature=0.0,
            **extra,
            **settings,
        )
        out = []
        for token, logprobs in found:
            mx.eval(logprobs)
            out.append((int(token), logprobs))
            if len(out) == count:
                break
    return out


def greedy(model, tokens, count, **settings):
    """The next `count` greedy tokens."""
    return [token for token, _ in steps(model, tokens, count, **settings)]


def sure(model, tokens, count, **settings):
    """`greedy` up to the first token that leads by less than NEAR_TIE (small_models.py)."""
    out = []
    for token, logprobs in steps(model, tokens, count, **settings):
        second, first = mx.topk(logprobs.reshape(-1), 2).tolist()
        if abs(first - second) < NEAR_TIE:
            break
        out.append(token)
    return out


class _NeverStops:
    """What BatchGenerator wants of a tokenizer."""

    class stopping_criteria:
        add_eos_token_ids = staticmethod(lambda ids: None)

        def __call__(self, token):
            return False

    stopping_criteria = stopping_criteria()


def batch(model, prompts, count, **settings):
    """The next `count` greedy tokens of each prompt, all as one batch: the server's way."""
    pixels, extra = picture(model)
    rows = []
    for tokens in prompts:
        ids = mx.array([tokens])
        found = model.get_input_embeddings(ids, pixels, mask=mx.ones(ids.shape, mx.int32), **extra)
        rows.append({name: value for name, value in found.to_dict().items() if value is not None})
    generator = BatchGenerator(model.language_model, _NeverStops, prefill_batch_size=len(prompts), **settings)
    uids = generator.insert(prompts, count, prompt_kwargs=rows)
    out = {uid: [] for uid in uids}
    while generator.has_work:
        for response in generator.next()[1]:
            out[response.uid].append(int(response.token))
    generator.close()
    return [out[uid] for uid in uids]


def bundled_vlm():
    """(model, processor): the bundled model as mlx-vlm loads it, with float32 weights."""
    model, processor = load(str(MODEL))
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model, processor
