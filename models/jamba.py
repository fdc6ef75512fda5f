"""Jamba: seven layers of selective state spaces (Mamba-1, dt, B, C normed) to one of attention, MoE every other layer.

No positions but those that the recurrence knows (Lieber et al. 2024, arXiv:2403.19887; 1.5: arXiv:2408.12570).
"""

import math

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.errors import ConfigError
from optx.models.common import expert_rows, head_rows
from optx.nn import Attention, Block, CausalLM, Embed, Experts, GatedMLP, Linear, Mamba1, MoE, RMSNorm, Router

HF_TYPES = {"jamba": "JambaForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = None
IGNORED: tuple[str, ...] = ()

_LAYER = "model.layers.{i}."
_MIXER = "layers/{i}/mixer/"
_OWN = {  # path in the mixer: (name after `mamba.`, kind)
    "in_proj/weight": ("in_proj.weight", "linear"),
    "in_proj/bias": ("in_proj.bias", "vector"),
    "conv_weight": ("conv1d.weight", "conv"),
    "conv_bias": ("conv1d.bias", "vector"),
    "select/weight": ("x_proj.weight", "linear"),
    "dt_norm/weight": ("dt_layernorm.weight", "vector"),
    "b_norm/weight": ("b_layernorm.weight", "vector"),
    "c_norm/weight": ("c_layernorm.weight", "vector"),
    "dt/weight": ("dt_proj.weight", "linear"),
    "dt_bias": ("dt_proj.bias", "vector"),
    "a_log": ("A_log", "table"),
    "skip": ("D", "vector"),
    "out/weight": ("out_proj.weight", "linear"),
    "out/bias": ("out_proj.bias", "vector"),
}
ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", kind="table"),
    *head_rows(_LAYER, permuted=False),
    *(Row(path=_MIXER + path, hf=f"{_LAYER}mamba.{name}", kind=kind) for path, (name, kind) in _OWN.items()),
    Row(path="layers/{i}/mlp_norm/weight", hf=_LAYER + "pre_ff_layernorm.weight", kind="vector"),
    *(
        Row(path="layers/{i}/mlp/" + name + "/weight", hf=f"{_LAYER}feed_forward.{name}_proj.weight")
        for name in ("gate", "up", "down")
    ),
    *expert_rows(_LAYER + "feed_forward.", router="router"),
    Row(path="norm/weight", hf="model.final_layernorm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `jamba` config. Raises ConfigError for what is not handled."""
    d, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", 8)
    head_dim = config.size("head_dim", d // heads)
    ffn, layers = config.size("intermediate_size"), config.layers()
    experts = config.size("num_experts", config.size("num_local_experts", 16))
    top_k = config.size("num_experts_per_tok", 2)
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings", 262_144)
    eps = config.positive("rms_norm_eps", 1e-6)
    tied = config.take("tie_word_embeddings", bool, False)
    attends, routes = _periodic(config, "attn", layers, 8, 4), _periodic(config, "expert", layers, 2, 1)
    mamba = _mamba(config, d)
    config.expect("hidden_act", "silu")
    config.expect("sliding_window", None)
    config.take("layer_types", list, None)  # says once more what period and offset say
    config.take("layers_block_type", list, None)
    for name in ("use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep"):  # how, not what
        config.take(name, (bool, int), None)
    for name in ("output_router_logits", "router_aux_loss_coef"):  # of training
        config.take(name, (bool, int, float), None)
    config.done()

    def norm(size=d):
        return RMSNorm(size, eps=eps, dtype=dtype)

    def inner_norm(size):
        return RMSNorm(size, eps=eps, dtype=dtype, axes=(None,))

    def block(i):
        if attends[i]:
            mixer = Attention(d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=None, dtype=dtype)
        else:
            mixer = Mamba1(d, norm=inner_norm, dtype=dtype, **mamba)
        if routes[i] and experts > 1:
            router = Router(d, experts, top_k=top_k, normalized=False, dtype=dtype)
            mlp = MoE(router, Experts(experts, d, ffn, dtype=dtype))
        else:
            mlp = GatedMLP(d, ffn, dtype=dtype)
        return Block(norm=norm(), mixer=mixer, mlp_norm=norm(), mlp=mlp)

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block(i) for i in range(layers)],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
    )


def _periodic(config: Fields, name: str, layers: int, period: int, offset: int) -> list[bool]:
    """Which layers are `offset` in every `period`."""
    period = config.size(f"{name}_layer_period", period)
    offset = config.take(f"{name}_layer_offset", int, offset)
    if not 0 <= offset < period:
        raise ConfigError(f"{config.where}: '{name}_layer_offset' is {offset}; allowed: 0 to {period - 1}")
    return [i % period == offset for i in range(layers)]


def _mamba(config: Fields, d: int) -> dict:
    """Sizes of the recurrent mixer."""
    rank = config.take("mamba_dt_rank", (int, str), "auto")
    if rank != "auto":
        rank = config.size("mamba_dt_rank")
    return {
        "inner": config.size("mamba_expand", 2) * d,
        "state_dim": config.size("mamba_d_state", 16),
        "rank": math.ceil(d / 16) if rank == "auto" else rank,
        "conv": config.size("mamba_d_conv", 4),
        "conv_bias": config.take("mamba_conv_bias", bool, True),
        "bias": config.take("mamba_proj_bias", bool, False),
    }
