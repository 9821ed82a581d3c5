"""A GGUF file as a model directory of mlx-lm: dequantised weights, configuration, tokenizer.

llama, qwen2 and gemma3 (text).  Needs the `gguf` package; fetch.py brings it."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LAYER = {  # names of a layer's tensors: GGUF's and Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL, ADDED, UNUSED, NORMAL = 3, 4, 5, 1  # kinds of tokens
QWEN2 = (  # how Qwen2's tokenizer splits a text before it merges
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Source:
    """A GGUF file: its fields and tensors."""

    def __init__(self, path):
        import gguf

        self.gguf, self.reader = gguf, gguf.GGUFReader(str(path))
        self.kind = self.field("general.architecture")
        if self.kind not in ("llama", "qwen2", "gemma3"):
            raise ValueError(f"[convert] {path} must hold llama, qwen2 or gemma3; it holds {self.kind}")

    def field(self, name):
        return self.reader.fields[name].contents() if name in self.reader.fields else None

    def of_model(self, name):
        return self.field(f"{self.kind}.{name}")

    def of_tokenizer(self, name):
        return self.field(f"tokenizer.ggml.{name}")

    def tensors(self):
        """(name, float32 array) of each weight, as Hugging Face's files have them."""
        names = LAYER | (GEMMA if self.kind == "gemma3" else {})
        heads = {"attn_q": self.of_model("attention.head_count"), "attn_k": self.of_model("attention.head_count_kv")}
        for tensor in self.reader.tensors:
            x = self.gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            first, *rest = tensor.name.split(".")
            if first == "blk":
                number, kind, suffix = rest
                name = f"model.layers.{number}.{names[kind]}.{suffix}"
                if self.kind == "llama" and kind in heads:  # llama.cpp interleaves the two halves of RoPE's pairs
                    x = x.reshape(heads[kind], -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
            elif first in OUTER:
                name = f"{OUTER[first]}.{rest[0]}"
            else:
                continue  # frequencies of RoPE, which the configuration has
            if self.kind == "gemma3" and name.endswith("norm.weight"):
                x = x - 1  # llama.cpp stores 1 + w
            yield name, x


def configuration(source, weights):
    """What config.json says."""
    of = source.of_model
    found = {
        "hidden_size": of("embedding_length"),
        "num_hidden_layers": of("block_count"),
        "intermediate_size": of("feed_forward_length"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "rms_norm_eps": round(of("attention.layer_norm_rms_epsilon"), 9),
        "vocab_size": len(weights["model.embed_tokens.weight"]),
        "rope_theta": of("rope.freq_base"),
        "max_position_embeddings": of("context_length"),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": source.of_tokenizer("bos_token_id"),
        "eos_token_id": source.of_tokenizer("eos_token_id"),
    }
    if source.kind == "gemma3":
        size = of("attention.key_length")
        return found | {
            "model_type": "gemma3_text",
            "head_dim": size,
            "query_pre_attn_scalar": size,
            "sliding_window": of("attention.sliding_window"),
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10000.0,
        }
    return found | {"model_type": source.kind}


def _bytes_tokenizer(tokens, kinds, merges, qwen):
    """Byte-level BPE, as GPT-2's."""
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
    made = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    if qwen:
        made.normalizer = normalizers.NFC()
    first = pre_tokenizers.Split(Regex(QWEN2), "isolated") if qwen else pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not qwen)
    made.pre_tokenizer = pre_tokenizers.Sequence([first, split])
    made.decoder = decoders.ByteLevel()
    return made


def _pieces_tokenizer(tokens, kinds, scores):
    """SentencePiece's BPE, Gemma's: it merges in the order of scores."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, i in vocabulary.items():
        for k in range(1, len(token) if kinds[i] in (NORMAL, ADDED) else 0):
            left, right = vocabulary.get(token[:k]), vocabulary.get(token[k:])
            if left is not None and right is not None:
                merges.append((-scores[i], left, right))
    pairs = [(tokens[left], tokens[right]) for _, left, right in sorted(merges)]
    made = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def tokenizer(source):
    """(the tokenizer, what tokenizer_config.json says)."""
    of = source.of_tokenizer
    tokens, kinds = of("tokens"), of("token_type")
    if of("model") == "gpt2":
        made = _bytes_tokenizer(tokens, kinds, of("merges"), of("pre") == "qwen2")
    else:
        made = _pieces_tokenizer(tokens, kinds, of("scores"))
    of_kind = {kind: [token for token, k in zip(tokens, kinds, strict=True) if k == kind] for kind in (CONTROL, ADDED)}
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in of_kind[CONTROL]])
    made.add_tokens([AddedToken(token, normalized=False) for token in of_kind[ADDED]])
    bos, eos, pad = (tokens[of(f"{name}_token_id")] for name in ("bos", "eos", "padding"))
    if of("add_bos_token"):
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, of("bos_token_id"))]
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
    }
    template = source.field("tokenizer.chat_template")
    return made, settings | ({"chat_template": template} if template else {})


def convert(path, folder):
    """Writes the model of the GGUF file `path` into `folder`, weights as float16, and returns the folder."""
    source, folder = Source(path), Path(folder)
    weights = dict(source.tensors())
    if "lm_head.weight" in weights:
        head, embedding = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
        same = head.shape == embedding.shape and np.square(head - embedding).sum() < 0.01 * np.square(head).sum()
        if same:  # one matrix that was quantised twice: the finer copy stands for both
            weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
    made, settings = tokenizer(source)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configuration(source, weights), indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    made.save(str(folder / "tokenizer.json"))
    arrays = {name: mx.array(x.astype(np.float16)) for name, x in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    return folder
