"""Tiny models of every family for tests, in memory and as the files that a checkpoint of them would be."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from optx import ir, tensor
from optx.cache import Address, Layout, Ragged
from optx.checkpoint.config import Fields
from optx.checkpoint.gguf import write_gguf
from optx.checkpoint.mapping import expand, permute
from optx.engine.pages import PagePool, PageTable
from optx.formats import Int
from optx.models import by_hf_type
from optx.nn import MLA, Attention, Block, CausalLM, Embed, GatedMLP, Mamba2, RMSNorm, Rope
from optx.tokenizer import Tokenizer

VOCAB = 264  # 256 bytes, <s>, </s>, and rows that pad the table
BOS, EOS = 256, 257
D = 32

_COMMON = {
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
CONFIGS = {
    "llama": {**_COMMON, "model_type": "llama", "rope_theta": 10000.0, "tie_word_embeddings": False},
    "qwen3": {**_COMMON, "model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6, "tie_word_embeddings": True},
    "gemma3": {
        **_COMMON,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "head_dim": 8,
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
FAMILIES = tuple(CONFIGS)


def abstract(family: str, dtype: str = "float32", **changes) -> CausalLM:
    """The family's tiny model as `from_hf` builds it, config fields changed by name."""
    config = CONFIGS[family] | changes
    return by_hf_type(config["model_type"], "test").from_hf(Fields(config, "test"), dtype)


def concrete(family: str, seed: int = 0, dtype: str = "float32", **changes) -> CausalLM:
    """The same with random weights."""
    return ir.init_weights(abstract(family, dtype, **changes), seed)


def hybrid(seed: int = 0) -> CausalLM:
    """Every kind of cache in one model: paged, windowed int8 with sinks, shared, latent, state."""
    rope = Rope(theta=10000.0, dim=8)

    def mixer(kind):
        if kind == "latent":
            return MLA(D, heads=2, rank=8, nope_dim=4, value_dim=4, rope=Rope(theta=10000.0, dim=4))
        if kind == "state":
            return Mamba2(D, heads=2, head_dim=8, state_dim=4)
        attention = Attention(D, heads=4, kv_heads=2, head_dim=8, rope=rope, share=0 if kind == "shared" else None)
        if kind == "window":
            attention.cache = attention.cache.replace(window=6, sinks=2, format=Int(width=8))
        return attention

    layers = [
        Block(norm=RMSNorm(D), mixer=mixer(kind), mlp_norm=RMSNorm(D), mlp=GatedMLP(D, 2 * D))
        for kind in ("paged", "state", "window", "latent", "shared")
    ]
    return ir.init_weights(
        CausalLM(embed=Embed(VOCAB, D), layers=layers, norm=RMSNorm(D), head=None, context=128), seed
    )


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    return {path: np.asarray(variable.get_value()) for path, variable in ir.params(model).items()}


def hf_tensors(model: CausalLM, family: str) -> dict[str, np.ndarray]:
    """The model's weights under their names in an HF checkpoint, matrices [out, in]."""
    rows = {row.path: row for row in expand(by_hf_type(CONFIGS[family]["model_type"], "test").ROWS, len(model.layers))}
    found = {}
    for path, value in parameters(model).items():
        found |= rows[path].parts(value, ir.get(model, path.rsplit("/", 1)[0]))
    return {name: np.ascontiguousarray(part) for name, part in found.items()}


def write_hf(folder: Path, config: dict, tensors: dict[str, np.ndarray], *, shards: int = 1) -> Path:
    """An HF directory; more than one shard comes with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = {name: tensors[name] for name in names[i::shards]}
        save_file(mine, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def hf_dir(
    folder: Path, family: str, *, seed: int = 0, add_bos: bool | None = None, **changes
) -> tuple[Path, CausalLM]:
    """An HF directory of the tiny model, and the model. add_bos: of the tokenizer beside it; None: without one."""
    model = concrete(family, seed, **changes)
    write_hf(folder, CONFIGS[family] | changes, hf_tensors(model, family))
    if add_bos is not None:
        tokenizer(add_bos=add_bos).save(folder)
    return folder, model


def tokenizer(add_bos: bool = False) -> Tokenizer:
    """One token a byte, `<s>` and `</s>` after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizer_models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>")])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(backend, bos_id=BOS, eos_ids=[EOS], add_bos=add_bos, special_tokens=special)


def q8_0(rows: np.ndarray) -> np.ndarray:
    """GGML's Q8_0 of float32[..., D]: by block of 32 a float16 scale d = absmax / 127 and int8 round(w / d)."""
    blocks = rows.reshape(*rows.shape[:-1], -1, 32)
    d = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16)
    q = np.round(blocks / np.maximum(d.astype(np.float32), 1e-12)).clip(-127, 127).astype(np.int8)
    return np.concatenate([d.view(np.uint8), q.view(np.uint8)], axis=-1).reshape(*rows.shape[:-1], -1)


def q4_0(rows: np.ndarray) -> np.ndarray:
    """GGML's Q4_0 of float32[..., D]: w = d (q - 8), weights 0..15 of a block in low nibbles, 16..31 in high ones."""
    blocks = rows.reshape(*rows.shape[:-1], -1, 32)
    d = (np.abs(blocks).max(-1, keepdims=True) / 7).astype(np.float16)
    q = np.round(blocks / np.maximum(d.astype(np.float32), 1e-12) + 8).clip(0, 15).astype(np.uint8)
    packed = q[..., :16] | (q[..., 16:] << 4)
    return np.concatenate([d.view(np.uint8), packed], axis=-1).reshape(*rows.shape[:-1], -1)


BLOCK_WRITERS = {"Q8_0": q8_0, "Q4_0": q4_0}


def write_llama_gguf(path: Path, model: CausalLM, encode=None, metadata: dict | None = None, **changes) -> Path:
    """A llama GGUF of the model, q and k in llama.cpp's order. encode(rows) -> (block type, bytes) for matrices."""
    config = CONFIGS["llama"] | changes
    family = by_hf_type("llama", "test")
    rows = {row.path: row for row in expand(family.ROWS, len(model.layers))}
    heads = {"heads": config["num_attention_heads"], "kv_heads": config["num_key_value_heads"], None: None}
    tensors = {}
    for name, value in parameters(model).items():
        row = rows[name]
        value = np.asarray(value.T if row.kind == "linear" else value, np.float32)
        if row.gguf_heads:
            value = permute(value, heads[row.gguf_heads])
        value = np.ascontiguousarray(value)
        tensors[row.gguf] = encode(value) if encode and row.kind != "vector" else value
    header = {
        "general.architecture": "llama",
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.rope.freq_base": config["rope_theta"],
        **gguf_vocabulary(config["vocab_size"]),
    }
    write_gguf(path, header | (metadata or {}), tensors)
    return path


def gguf_vocabulary(size: int) -> dict[str, object]:
    """The tokenizer of `tokenizer()` as GGUF metadata, padded to `size`."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    tokens += [f"<pad{i}>" for i in range(size - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3] + [5] * (size - 258),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": False,
    }


def relative(got, want) -> float:
    """|got - want| / |want| in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(x) for x in np.random.default_rng(seed).integers(0, 256, length)]


def forward(model: CausalLM, tokens) -> np.ndarray:
    """float32[T, V]: logits of one sequence, uncompiled and without caches."""
    return np.asarray(model(jnp.asarray([tokens], jnp.int32)))[0]


def incremental(model: CausalLM, tokens, sizes=(1,), page_size: int = 4) -> np.ndarray:
    """float32[T, V]: logits of one sequence fed over caches in chunks of `sizes` tokens, the last size repeated."""
    plan = model.cache_plan()
    tables = []
    for spec in plan.groups:
        width = PageTable.width_for(spec, len(tokens), max(sizes), page_size)
        tables.append(PageTable(spec, PagePool(width), rows=1, width=width, page_size=page_size))
    layouts = [Layout(pages=table.pool.pages, page_size=page_size, slots=1) for table in tables]
    caches = plan.init(layouts or [Layout(pages=1, page_size=page_size, slots=1)])
    graph, state = nnx.split(model)

    @jax.jit
    def step(state, tokens, start, caches, address):
        count = tokens.shape[0]
        ragged = Ragged.dense(1, count)
        ragged = dataclasses.replace(ragged, positions=start + ragged.positions)
        lm = nnx.merge(graph, state)
        hidden, caches, _ = lm.backbone(tokens, ragged, caches, address)
        return lm.head(hidden), caches

    out, at = [], 0
    sizes = list(sizes)
    while at < len(tokens):
        size = min(sizes.pop(0) if len(sizes) > 1 else sizes[0], len(tokens) - at)
        writes = tuple(jnp.asarray(table.append(0, size)) for table in tables)
        address = Address(
            tables=tuple(jnp.asarray(table.table[None]) for table in tables),
            lengths=tuple(jnp.asarray(table.lengths[None]) for table in tables),
            writes=writes,
            slots=jnp.zeros(1, jnp.int32),
        )
        chunk = jnp.asarray(tokens[at : at + size], jnp.int32)
        logits, caches = step(state, chunk, jnp.int32(at), caches, address)
        out.append(np.asarray(logits))
        at += size
    return np.concatenate(out)


def oracle(model: CausalLM, tokens, masks=None) -> np.ndarray:
    """float64[T, V]: logits in plain numpy, from the models' published equations. masks: bool[T, T] a layer; None: the
    layer's own window and sinks."""
    position = np.arange(len(tokens))
    distance = position[:, None] - position[None]

    def weight(linear):
        return np.asarray(tensor.dense(linear.weight.get_value()), np.float64)

    def project(linear, x):
        return x @ weight(linear) + (0 if linear.bias is None else np.asarray(linear.bias.get_value(), np.float64))

    def norm(part, x):
        if part is None:
            return x
        scale = part.offset + np.asarray(part.weight.get_value(), np.float64)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + part.eps) * scale

    def rotate(rope, x):
        half = rope.dim // 2
        angle = position[:, None, None] / rope.theta ** (np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def attend(attn, x, mask):
        def heads(linear, count):
            return project(linear, x).reshape(len(x), count, attn.head_dim)

        q = rotate(attn.rope, norm(attn.q_norm, heads(attn.q, attn.heads)))
        k = rotate(attn.rope, norm(attn.k_norm, heads(attn.k, attn.kv_heads)))
        v = heads(attn.v, attn.kv_heads)
        repeat = attn.heads // attn.kv_heads
        logits = np.einsum("qnh,snh->nqs", q, np.repeat(k, repeat, 1)) * attn.scale
        weights = np.exp(np.where(mask, logits - logits.max(-1, keepdims=True), -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("nqs,snh->qnh", weights, np.repeat(v, repeat, 1))
        return project(attn.o, out.reshape(len(x), -1))

    def activate(name, x):
        return (
            x / (1 + np.exp(-x))
            if name == "silu"
            else x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
        )

    x = np.asarray(model.embed.table.get_value(), np.float64)[list(tokens)] * model.embed.scale
    for i, layer in enumerate(model.layers):
        spec = layer.mixer.cache
        near = distance < (spec.window or len(tokens))
        mask = (distance >= 0) & (near | (position < spec.sinks)) if masks is None else masks[i]
        x = x + norm(layer.post_norm, attend(layer.mixer, norm(layer.norm, x), mask))
        y = norm(layer.mlp_norm, x)
        y = project(
            layer.mlp.down, activate(layer.mlp.activation, project(layer.mlp.gate, y)) * project(layer.mlp.up, y)
        )
        x = x + norm(layer.post_mlp_norm, y)
    x = norm(model.norm, x)
    return (
        x @ np.asarray(model.embed.table.get_value(), np.float64).T
        if model.output is None
        else project(model.output, x)
    )
