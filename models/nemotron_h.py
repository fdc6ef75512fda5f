"""Nemotron-H: every layer is one thing: a Mamba-2 mixer, attention without positions, a relu^2 MLP, or experts of those."""

import math

from optx.checkpoint.config import MAX_LAYERS, Fields
from optx.checkpoint.mapping import Row
from optx.errors import ConfigError
from optx.models.state_space import NAMES, dt_limit, mamba2_rows
from optx.nn import (
    MLP,
    Attention,
    Block,
    CausalLM,
    Embed,
    Experts,
    Glu,
    LatentExperts,
    Linear,
    Mamba2,
    MoE,
    Residual,
    RMSNorm,
    Router,
)

HF_TYPES = {"nemotron_h": "NemotronHForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = None
IGNORED: tuple[str, ...] = (r"mtp\..*",)  # layers that predict further tokens, apart from the model

PATTERN = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
OLD_NAMES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "attention_head_dim": "head_dim",
}
UNREAD = (  # of training, generation, kernels and prediction of further tokens
    "chunk_size", "expand", "hidden_dropout", "moe_shared_expert_overlap", "mtp_hybrid_override_pattern",
    "mtp_layers_block_type", "num_logits_to_keep", "num_nextn_predict_layers", "output_router_logits",
    "rescale_prenorm_residual", "time_step_floor", "time_step_max", "time_step_rank", "use_mamba_kernels",
)  # fmt: skip

BLOCK = "backbone.layers.{i}."
MIXER, PATH = f"{BLOCK}mixer.", "layers/{i}/mlp/"


def _linear(path: str, hf: str) -> tuple[Row, Row]:
    return Row(path=f"{path}/weight", hf=f"{hf}.weight"), Row(path=f"{path}/bias", hf=f"{hf}.bias", kind="vector")


def _expert_rows(path: str) -> tuple[Row, ...]:
    return tuple(
        Row(path=f"{path}/{name}/weight", hf=(f"{MIXER}experts.{{e}}.{name}_proj.weight",), kind="experts")
        for name in ("up", "down")
    )


ROWS = (
    Row(path="embed/table", hf="backbone.embeddings.weight", kind="table"),
    *(Row(path=f"layers/{{i}}/{n}/weight", hf=f"{BLOCK}norm.weight", kind="vector") for n in ("norm", "mlp_norm")),
    *mamba2_rows(MIXER),
    *(Row(path=f"layers/{{i}}/mixer/{n}/weight", hf=f"{MIXER}{n}_proj.weight") for n in "qkvo"),
    *(row for n in ("up", "down") for row in _linear(f"{PATH}{n}", f"{MIXER}{n}_proj")),
    *(row for n in ("up", "down") for row in _linear(f"{PATH}shared/{n}", f"{MIXER}shared_experts.{n}_proj")),
    Row(path=f"{PATH}router/weight", hf=f"{MIXER}gate.weight"),
    Row(path=f"{PATH}router/selection_bias", hf=f"{MIXER}gate.e_score_correction_bias", kind="vector"),
    *_expert_rows(f"{PATH}experts"),
    *_expert_rows(f"{PATH}experts/inner"),
    *_linear(f"{PATH}experts/enter", f"{MIXER}fc1_latent_proj"),
    *_linear(f"{PATH}experts/leave", f"{MIXER}fc2_latent_proj"),
    Row(path="norm/weight", hf="backbone.norm_f.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `nemotron_h` config. Raises ConfigError for what is not handled."""
    config = Fields({OLD_NAMES.get(name, name): value for name, value in config.data.items()}, config.where)
    d, vocab, context = config.size("hidden_size"), config.size("vocab_size"), config.size("max_position_embeddings")
    eps = config.positive("layer_norm_epsilon", 1e-5)
    config.expect("tie_word_embeddings", False)  # transformers does not tie them, whatever it says
    stream = "float32" if config.take("residual_in_fp32", bool, False) else None
    kinds = _kinds(config)
    parts = {
        "linear_attention": _mamba(config, d, eps, dtype),
        "full_attention": _attention(config, d, dtype),
        "mlp": _mlp(config, d, dtype),
        "moe": _moe(config, d, dtype),
    }
    config.expect("rms_norm_eps", eps)
    config.expect("mlp_hidden_act", "relu2")
    config.expect("hidden_act", "relu2")
    for name in UNREAD:
        config.take(name, (bool, int, float, str, list), None)
    config.done()
    residual = stream and Residual(dtype=stream)

    def norm():
        return RMSNorm(d, eps=eps, out=stream and dtype, dtype=dtype)

    def block(kind):
        part = parts[kind]()
        if kind in ("mlp", "moe"):
            return Block(mlp_norm=norm(), mlp=part, mlp_residual=residual)
        return Block(norm=norm(), mixer=part, residual=residual)

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block(kind) for kind in kinds],
        norm=norm(),
        head=Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
    )


def _kinds(config: Fields) -> list[str]:
    """What each layer is: names of transformers 5, or a letter each."""
    given = config.take("layers_block_type", list, None) or config.take("layer_types", list, None)
    pattern = config.take("hybrid_override_pattern", str, None)
    kinds = [PATTERN.get(letter, letter) for letter in pattern or ""] if given is None else given
    kinds = [NAMES.get(kind, kind) for kind in kinds]
    wrong = [kind for kind in kinds if kind not in PATTERN.values()]
    if wrong or not 0 < len(kinds) <= MAX_LAYERS:
        raise ConfigError(
            f"{config.where}: layers {wrong[:1] or len(kinds)!r} in 'layers_block_type' or 'hybrid_override_pattern'; "
            f"allowed: 1 to {MAX_LAYERS} of {', '.join(f'{letter} ({name})' for letter, name in PATTERN.items())}"
        )
    config.expect("num_hidden_layers", len(kinds))
    return kinds


def _mamba(config: Fields, d: int, eps: float, dtype: str):
    heads, head_dim = config.size("mamba_num_heads", 128), config.size("mamba_head_dim", 64)
    state_dim, groups = config.size("ssm_state_size", 128), config.size("n_groups", 8)
    conv, conv_bias = config.size("conv_kernel", 4), config.take("use_conv_bias", bool, True)
    bias = config.take("use_bias", bool, False)
    if dt_limit(config) is not None:
        raise ConfigError(
            f"{config.where}: 'time_step_limit' limits dt, which transformers does not read; leave it out"
        )
    least = config.take("time_step_min", float, 1e-3)  # transformers bounds dt by it, and from below alone
    config.expect("mamba_proj_bias", False, bias)
    config.expect("mamba_hidden_act", "silu")
    config.expect("mamba_ssm_cache_dtype", "float32")
    return lambda: Mamba2(
        d, heads=heads, head_dim=head_dim, state_dim=state_dim, groups=groups, conv=conv, conv_bias=conv_bias, bias=bias,
        dt_limit=(least, math.inf), norm_groups=groups, eps=eps, dtype=dtype,
    )  # fmt: skip


def _attention(config: Fields, d: int, dtype: str):
    heads, head_dim = config.size("num_attention_heads", 32), config.size("head_dim", 128)
    kv_heads = config.size("num_key_value_heads", 8)
    config.expect("attention_bias", False)
    config.expect("sliding_window")
    return lambda: Attention(d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=None, dtype=dtype)


def _mlp(config: Fields, d: int, dtype: str):
    ffn, bias = config.size("intermediate_size", 21504), config.take("mlp_bias", bool, False)
    return lambda: MLP(d, ffn, activation="relu2", bias=bias, dtype=dtype)


def _moe(config: Fields, d: int, dtype: str):
    count, top_k = config.take("n_routed_experts", int, 8), config.size("num_experts_per_tok", 2)
    ffn, shared_ffn = (
        config.size("moe_intermediate_size", 7688),
        config.size("moe_shared_expert_intermediate_size", 7688),
    )
    latent, bias = config.size("moe_latent_size", None), config.take("mlp_bias", bool, False)
    groups, kept = config.size("n_group", 1), config.size("topk_group", 1)
    scale, normalized = config.positive("routed_scaling_factor", 1.0), config.take("norm_topk_prob", bool, True)
    config.expect("n_shared_experts", 1)

    def moe():
        router = Router(
            d, count, top_k=top_k, score="sigmoid", normalized=normalized, scale=scale, selection_bias=True, groups=groups,
            kept=kept,
        )  # fmt: skip
        experts = Experts(count, latent or d, ffn, glu=Glu(activation="relu2"), gated=False, dtype=dtype)
        experts = experts if latent is None else LatentExperts(d, latent, experts, bias=bias, dtype=dtype)
        return MoE(router, experts, shared=MLP(d, shared_ffn, activation="relu2", bias=bias, dtype=dtype))

    return moe
