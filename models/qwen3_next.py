"""Qwen3-Next: three gated DeltaNet layers to one of gated attention, many small experts beside a gated shared one, (1 + w)
norms, rope on a part of each head."""

import numpy as np

from optx.checkpoint.config import Fields
from optx.checkpoint.kinds import Kind, Parts
from optx.checkpoint.mapping import Row
from optx.models.common import expert_rows, head_rows, rope_from_hf
from optx.models.qwen3_moe import sparse_layers
from optx.nn import Attention, Block, CausalLM, Embed, Experts, GatedDelta, GatedMLP, Linear, MoE, RMSNorm, Router
from optx.nn.delta import HeadLinear

HF_TYPES = {"qwen3_next": "Qwen3NextForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = None
# Published checkpoints bring a layer that predicts the token after the next (for speculation): the model is whole without it.
IGNORED = (r"mtp\..*",)
LAYER_TYPES = ("linear_attention", "full_attention")


def _join(parts: Parts, module: HeadLinear) -> np.ndarray:
    """[groups * sum(sizes), D], all of a head together -> [D, all heads of the first thing | of the second | ...]."""
    heads = parts[0].reshape(module.groups, sum(module.sizes), -1)
    things = np.split(heads, np.cumsum(module.sizes)[:-1], axis=1)
    return np.concatenate([thing.reshape(-1, heads.shape[-1]) for thing in things]).T


def _split(array: np.ndarray, module: HeadLinear, names: int) -> list[np.ndarray]:
    things = np.split(array.T, np.cumsum(module.sizes)[:-1] * module.groups)
    heads = [thing.reshape(module.groups, -1, array.shape[0]) for thing in things]
    return [np.concatenate(heads, axis=1).reshape(-1, array.shape[0])]


BY_HEAD = Kind(_join, _split)
_LINEAR, _MIXER, _MLP = "model.layers.{i}.linear_attn.", "layers/{i}/mixer/", "model.layers.{i}.mlp."

ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", kind="table"),
    *head_rows("model.layers.{i}.", permuted=False),
    Row(path=f"{_MIXER}qkvz/weight", hf=f"{_LINEAR}in_proj_qkvz.weight", kind=BY_HEAD),
    Row(path=f"{_MIXER}ba/weight", hf=f"{_LINEAR}in_proj_ba.weight", kind=BY_HEAD),
    Row(path=f"{_MIXER}conv_weight", hf=f"{_LINEAR}conv1d.weight", kind="conv"),
    Row(path=f"{_MIXER}dt_bias", hf=f"{_LINEAR}dt_bias", kind="vector"),
    Row(path=f"{_MIXER}a_log", hf=f"{_LINEAR}A_log", kind="vector"),
    Row(path=f"{_MIXER}norm/weight", hf=f"{_LINEAR}norm.weight", kind="vector"),
    Row(path=f"{_MIXER}out/weight", hf=f"{_LINEAR}out_proj.weight"),
    *expert_rows(_MLP),
    *(
        Row(path="layers/{i}/mlp/shared/" + name + "/weight", hf=f"{_MLP}shared_expert.{name}_proj.weight")
        for name in ("gate", "up", "down")
    ),
    Row(path="layers/{i}/mlp/shared_gate/weight", hf=f"{_MLP}shared_expert_gate.weight"),
    Row(path="norm/weight", hf="model.norm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `qwen3_next` config. Raises ConfigError for what is not handled."""
    d, layers = config.size("hidden_size", 2048), config.layers()
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings", 32768)
    eps = config.positive("rms_norm_eps", 1e-6)
    tied = config.take("tie_word_embeddings", bool, False)
    kinds = _kinds(config, layers)
    mixers = {"full_attention": _attention(config, d, eps, dtype), "linear_attention": _delta(config, d, eps, dtype)}
    mlps = _mlps(config, d, layers, dtype)
    config.expect("hidden_act", "silu")
    config.expect("use_sliding_window", False)
    for name in ("output_router_logits", "router_aux_loss_coef"):  # of training
        config.take(name, (bool, int, float), None)
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, offset=1.0, dtype=dtype)

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[
            Block(norm=norm(), mixer=mixers[kind](), mlp_norm=norm(), mlp=mlp())
            for kind, mlp in zip(kinds, mlps, strict=True)
        ],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
    )


def _kinds(config: Fields, layers: int) -> list[str]:
    """`layer_types`, or else attention in each `full_attention_interval`-th layer."""
    interval = config.size("full_attention_interval", 4)
    found = config.names("layer_types", layers, LAYER_TYPES)
    return found or [LAYER_TYPES[(i + 1) % interval == 0] for i in range(layers)]


def _attention(config: Fields, d: int, eps: float, dtype: str):
    """Builds a layer of gated attention."""
    heads, head_dim = config.size("num_attention_heads"), config.size("head_dim", 256)
    kv_heads = config.size("num_key_value_heads", 2)
    rope = rope_from_hf(config, head_dim, partial=0.25)
    bias = config.take("attention_bias", bool, False)

    def norm():
        return RMSNorm(head_dim, eps=eps, offset=1.0, dtype=dtype, axes=("head",))

    return lambda: Attention(
        d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, norm=norm, gated=True, bias=bias,
        out_bias=bias, dtype=dtype,
    )  # fmt: skip


def _delta(config: Fields, d: int, eps: float, dtype: str):
    """Builds a gated DeltaNet layer, whose norm is the only one without the 1."""
    heads, key_heads = config.size("linear_num_value_heads", 32), config.size("linear_num_key_heads", 16)
    head_dim, key_dim = config.size("linear_value_head_dim", 128), config.size("linear_key_head_dim", 128)
    conv = config.size("linear_conv_kernel_dim", 4)
    return lambda: GatedDelta(
        d, heads=heads, key_heads=key_heads, head_dim=head_dim, key_dim=key_dim, conv=conv, eps=eps, dtype=dtype
    )


def _mlps(config: Fields, d: int, layers: int, dtype: str) -> list:
    """What builds the MLP of each layer: experts, or one MLP where `sparse_layers` says so."""
    ffn = config.size("intermediate_size", 5632)
    experts, top_k = config.size("num_experts", 512), config.size("num_experts_per_tok", 10)
    expert_ffn, shared_ffn = (
        config.size(f"{name}_intermediate_size", 512) for name in ("moe", "shared_expert")
    )  # fmt: skip
    normalized = config.take("norm_topk_prob", bool, True)

    def dense():
        return GatedMLP(d, ffn, dtype=dtype)

    def sparse():
        return MoE(
            Router(d, experts, top_k=top_k, normalized=normalized, dtype=dtype),
            Experts(experts, d, expert_ffn, dtype=dtype),
            shared=GatedMLP(d, shared_ffn, dtype=dtype),
            shared_gate=Linear(d, 1, dtype=dtype, axes=("embed", None)),
        )

    return [sparse if on else dense for on in sparse_layers(config, layers)]
