"""Converted models in the form of DeepSeek-V3, which every reader of its checkpoints runs as MLA.

That form has a norm on the latent, and a converted latent has none. One number more in it, the constant ANCHOR from the bias of
its projection, is what the norm then measures: norm([c, A]) = c g / sqrt((|c|^2 + A^2) / (R + 1)) = c up to |c|^2 / 2 A^2 with
the gain g = A / sqrt(R + 1). Experts, groups and drafts of the family stay empty: all layers are dense.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from optx import ir
from optx.checkpoint.export_hf import plain, write_hf
from optx.checkpoint.source import FamilyOf, Source, build, from_module
from optx.errors import CheckpointError
from optx.nn.grouped_mla import GroupedMLA
from optx.nn.mla import MLA

ANCHOR = 2.0**14
PARTS = ("q", "kv_a", "kv_b", "o")
KEPT = (
    "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads",
    "rms_norm_eps", "tie_word_embeddings", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
DENSE = {
    "n_routed_experts": 1, "num_experts_per_tok": 1, "n_shared_experts": 0, "moe_intermediate_size": 1, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0,
}  # fmt: skip


def write_deepseek(source: Source, folder: Path, family_of: FamilyOf, *, overwrite: bool = False) -> Path:
    """A model whose every layer is `mla` with one rotated key (rope: pca) as a dense `deepseek_v3` checkpoint. Holds the model in
    memory. Raises CheckpointError for what the form cannot hold."""
    where = f"{source.origin.name}: cannot be written in DeepSeek's form"
    mixers = {i: layer.mixer for i, layer in enumerate(source.tree.layers)}
    for i, mixer in mixers.items():
        if reason := _unfit(mixer, mixers[0]):
            raise CheckpointError(f"{where}: layers/{i}/mixer: {reason}")
    origin = dataclasses.replace(source.origin, kind="hf", config=_config(source, mixers[0]))
    expected, _ = build(origin, family_of, where)
    tree = plain(source.load())
    for i, layer in enumerate(tree.layers):
        layer.mixer = as_deepseek(layer.mixer, expected.layers[i].mixer, f"{where}: layers/{i}/mixer")
    made = from_module(tree, source.origin.name, source.tokenizer)
    return write_hf(dataclasses.replace(made, origin=origin), folder, family_of, overwrite=overwrite)


def _unfit(mixer, first) -> str | None:
    if not isinstance(mixer, GroupedMLA):
        return f"{type(mixer).__name__}, which is not converted; compile with the pass mla, rope: pca, on all layers"
    reasons = {
        f"{mixer.slices} rotated keys a token, one is possible; take rope: pca": mixer.slices != 1,
        "scales of logits under a norm of keys": mixer.key_norm is not None,
        "a bias of queries": mixer.q.bias is not None,
        "a gate": mixer.gate is not None,
        "logits of sinks": mixer.sinks is not None,
        f"a soft cap of {mixer.softcap}": mixer.softcap is not None,
        f"a window of {mixer.cache.window}": mixer.cache.window is not None,
    }
    sizes = [(each.rank, each.rope_dim) for each in (mixer, first)] if isinstance(first, GroupedMLA) else [1, 1]
    reasons["a rank or a rotated key unlike that of layers/0"] = sizes[0] != sizes[1]
    return next((reason for reason, holds in reasons.items() if holds), None)


def _config(source: Source, mixer: GroupedMLA) -> dict:
    config = {key: source.origin.config[key] for key in KEPT if key in source.origin.config}
    return config | DENSE | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": mixer.heads,
        "first_k_dense_replace": len(source.tree.layers),
        "attention_bias": True,
        "q_lora_rank": None,
        "kv_lora_rank": mixer.rank + 1,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "head_dim": mixer.rope_dim,
        "rope_interleave": False,
    }  # fmt: skip


def as_deepseek(mixer: GroupedMLA, expected: MLA, where: str) -> MLA:
    """The layer with the weights of `mixer` in the form of `expected`. Raises CheckpointError for frequencies that its rotary
    embedding does not have."""
    mine, its = np.asarray(mixer.rope.frequencies.get_value())[0], expected.rope.frequencies()
    if not np.allclose(mine, its, rtol=1e-5) or mixer.rope.factor != expected.rope.attention_factor:
        raise CheckpointError(f"{where}: rotates by {mine}, {expected.rope} by {its}")
    weights = {name: np.asarray(jax.device_get(getattr(mixer, name).weight.get_value()), np.float64) for name in PARTS}
    dtype, rank = mixer.kv_a.weight.get_value().dtype, mixer.rank
    rounded = lambda x: float(np.asarray(x, dtype))  # noqa: E731
    anchor, gain = rounded(ANCHOR), rounded(ANCHOR / np.sqrt(rank + 1))
    passed = gain / np.sqrt(anchor**2 / (rank + 1) + expected.kv_norm.eps)
    low = np.zeros(weights["kv_a"].shape[1]) if mixer.kv_a.bias is None else np.asarray(mixer.kv_a.bias.get_value())
    up = weights["kv_b"].reshape(rank, mixer.kv_heads, -1).repeat(mixer.heads // mixer.kv_heads, axis=1) / passed
    out = np.zeros(weights["o"].shape[1]) if mixer.o.bias is None else np.asarray(mixer.o.bias.get_value())
    new = {
        "q": {"weight": weights["q"] * mixer.scale / expected.scale},
        "kv_a": {"weight": np.insert(weights["kv_a"], rank, 0, axis=1), "bias": np.insert(low, rank, anchor)},
        "kv_norm": {"weight": np.full(rank + 1, gain)},
        "kv_b": {"weight": np.concatenate([up.reshape(rank, -1), np.zeros((1, up[0].size))])},
        "o": {"weight": weights["o"], "bias": out},
    }
    parts = {
        name: ir.replace(getattr(expected, name), **{key: jnp.asarray(x, dtype) for key, x in values.items()})
        for name, values in new.items()
    }
    return ir.replace(expected, **parts)
