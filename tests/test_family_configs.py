"""Configs as transformers 4 and 5 write them build one model; what a family does not have is an error that names it."""

import json
from pathlib import Path

import pytest

import optx
from optx import ir
from optx.errors import ConfigError

GOLDENS = Path(__file__).parent / "goldens"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# A golden whose config transformers 5 wrote: fields as transformers 4 writes them; ... takes one out.
OLDER = {
    "llama": {"rope_parameters": ..., "rope_theta": 100.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "mistral": {"rope_parameters": ..., "rope_theta": 10000.0, "head_dim": 24},
    "qwen2": {"rope_parameters": ..., "rope_theta": 10000.0, "layer_types": ..., "use_mrope": False},
    "smollm3": {"rope_parameters": ..., "rope_theta": 10000.0, "layer_types": ..., "pretraining_tp": 2},
    "mixtral": {"rope_parameters": ..., "rope_theta": 1e6, "torch_dtype": "bfloat16", "dtype": ...},
    "qwen3_moe": {"rope_parameters": ..., "rope_theta": 10000.0, "num_local_experts": ..., "num_experts": 8},
    "qwen3_moe_unnormalized": {"rope_parameters": ..., "num_local_experts": ..., "num_experts": 6},
    "gemma3": {
        "rope_parameters": ..., "rope_theta": 1e6, "rope_local_base_freq": 1e4, "layer_types": ...,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 6,
        "cache_implementation": "hybrid",
    },
    "gemma3_softcap": {"rope_parameters": ...},
}  # fmt: skip


def load(folder, name, changes):
    config = json.loads((GOLDENS / name / "config.json").read_text()) | changes
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return optx.load_config(path)


@pytest.mark.parametrize("name", OLDER)
def test_both_styles(name, tmp_path):
    assert ir.describe(load(tmp_path, name, OLDER[name]).tree) == ir.describe(load(tmp_path, name, {}).tree)


def windows(source):
    return [layer.mixer.cache.window for layer in source.tree.layers]


def test_defaults_are_those_of_transformers(tmp_path):
    assert windows(load(tmp_path, "mistral", {"sliding_window": ...})) == [4096] * 3
    assert windows(load(tmp_path, "mistral", {"sliding_window": None})) == [None] * 3
    assert windows(load(tmp_path, "qwen2", {"layer_types": ..., "max_window_layers": ...})) == [None] * 3
    tree = load(tmp_path, "smollm3", {"no_rope_layers": ..., "layer_types": ...}).tree
    assert [layer.mixer.rope is None for layer in tree.layers] == [False, False, False, True]
    scale = load(tmp_path, "gemma3", {"query_pre_attn_scalar": ...}).tree.layers[0].mixer.scale
    assert scale == 256**-0.5


@pytest.mark.parametrize(
    "name, changes, told",
    [
        ("llama", {"sliding_window": 8}, "'sliding_window' is 8"),
        ("mistral", {"attention_bias": True}, "'attention_bias' is True; supported: False"),
        ("qwen2", {"sliding_window": None}, "sliding layers but no sliding_window"),
        ("qwen2", {"use_mrope": True}, "'use_mrope' is True"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "'no_rope_layers' is [1, 0]; allowed: 0 or 1 for 4 layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 0]}, "'no_rope_layers' is [1, 0, 2, 0]"),
        ("smollm3", {"use_sliding_window": False}, "sliding layers but use_sliding_window"),
        ("mixtral", {"num_experts_per_tok": 6}, "6 of 5 experts"),
        ("mixtral", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; supported: 'silu'"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, "'mlp_only_layers' holds 3; allowed: layers 0 to 2"),
        ("qwen3_moe", {"mlp_only_layers": ["x"]}, "'mlp_only_layers' holds 'x'"),
        ("qwen3_moe_unnormalized", {"max_window_layers": 2}, "max_window_layers 2; supported: a window on all layers"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0; supported: None"),
    ],
)
def test_what_a_family_does_not_have(name, changes, told, tmp_path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, name, changes)
    assert told in str(error.value)
