"""A tiny Hugging Face checkpoint, made in a moment: two Llama layers with random weights and a byte-level tokenizer."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 20
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


def checkpoint(folder: Path, *, seed: int = 0, dtype: str = "float32", **changes) -> Path:
    """Writes the checkpoint into `folder` and returns it. changes: config fields; None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = tokenizer()
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    config = CONFIG | {"vocab_size": backend.get_vocab_size()} | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    arrays = {name: draw(rng, shape).astype(dtype) for name, shape in shapes(config).items()}
    save_file(arrays, folder / "model.safetensors")
    return folder


def draw(rng, shape) -> np.ndarray:
    """Matrices as wide as their inputs ask, norms near 1."""
    x = rng.standard_normal(shape, dtype=np.float32)
    return 1 + 0.1 * x if len(shape) == 1 else x * shape[-1] ** -0.5


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """HF names and shapes of a Llama, matrices [out, in]."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h = d // config["num_attention_heads"]
    heads, kv = h * config["num_attention_heads"], h * config["num_key_value_heads"]
    out = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (v, d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        out |= {f"{layer}.{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
        attention = {"q": (heads, d), "k": (kv, d), "v": (kv, d), "o": (d, heads)}
        out |= {f"{layer}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        mlp = {"gate": (f, d), "up": (f, d), "down": (d, f)}
        out |= {f"{layer}.mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
    return out


def tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE over all bytes with a few merges."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend
