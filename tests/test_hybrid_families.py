"""Configs of models that alternate recurrent layers and attention: what goldens of transformers do not reach."""

import pytest

from optx.checkpoint.config import Fields
from optx.errors import ConfigError
from optx.models import by_hf_type

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 16,
    "max_position_embeddings": 32,
}
PUBLISHED = {  # names of the published checkpoints, not of transformers
    "model_type": "minimax_text_01",
    "attn_type_list": [0, 1, 0, 1],
    "postnorm": True,
    "rotary_dim": 4,
    "layernorm_full_attention_alpha": 3.5,
    "layernorm_linear_attention_beta": 0.75,
    "layernorm_mlp_alpha": 2.5,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
}
JAMBA = {"model_type": "jamba"}


def build(config, **changes):
    config = COMMON | config | changes
    return by_hf_type(config["model_type"], "test").from_hf(Fields(config, "test"), "float32")


def test_published_names_mean_those_of_transformers():
    kinds = ["linear_attention", "full_attention"] * 2
    ours = {"full_attn_alpha_factor": 3.5, "linear_attn_beta_factor": 0.75, "mlp_alpha_factor": 2.5}
    theirs = build({"model_type": "minimax", "layer_types": kinds, "rotary_dim": 4, **ours})
    for mine, its in zip(build(PUBLISHED).layers, theirs.layers, strict=True):
        assert type(mine.mixer) is type(its.mixer)
        assert (mine.residual, mine.mlp_residual) == (its.residual, its.mlp_residual)
        assert mine.residual.normed


def test_part_of_a_head_turns():
    assert build(PUBLISHED).layers[1].mixer.rope.dim == 4
    assert build(PUBLISHED, rotary_dim=None).layers[1].mixer.rope.dim == 8


def test_without_postnorm_the_stream_is_not_normed():
    assert not build(PUBLISHED, postnorm=False).layers[0].residual.normed


def test_rank_of_dt():
    assert build(JAMBA).layers[0].mixer.rank == 2
    assert build(JAMBA, mamba_dt_rank=3).layers[0].mixer.rank == 3


@pytest.mark.parametrize(
    "config, changes, message",
    [
        (PUBLISHED, {"attn_type_list": [0, 1]}, "'attn_type_list'.*a 0 or 1 for each of 4 layers"),
        (PUBLISHED, {"attn_type_list": [0, 1, 2, 0]}, "'attn_type_list'"),
        (PUBLISHED, {"shared_intermediate_size": 8}, "'shared_intermediate_size' is 8"),
        (PUBLISHED, {"rotary_dim": 12}, "'rotary_dim' is 12; allowed: 1 to 8"),
        (JAMBA, {"attn_layer_offset": 8}, "'attn_layer_offset' is 8; allowed: 0 to 7"),
        (JAMBA, {"mamba_dt_rank": "most"}, "'mamba_dt_rank' is 'most'"),
        (JAMBA, {"sliding_window": 8}, "'sliding_window' is 8"),
    ],
)
def test_what_is_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        build(config, **changes)
