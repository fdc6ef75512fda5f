"""Qwen3 with experts: attention of Qwen3, and a router over gated experts in all blocks or in chosen ones."""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.errors import ConfigError
from optx.models.common import expert_rows, head_rows, rope_from_hf
from optx.nn import Attention, Block, CausalLM, Embed, Experts, GatedMLP, Linear, MoE, RMSNorm, Router

HF_TYPES = {"qwen3_moe": "Qwen3MoeForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = None
IGNORED: tuple[str, ...] = ()

ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", kind="table"),
    *head_rows("model.layers.{i}.", permuted=False),
    *expert_rows("model.layers.{i}.mlp."),
    Row(path="norm/weight", hf="model.norm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `qwen3_moe` config. Raises ConfigError for what is not handled."""
    d, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", 4)
    head_dim = config.size("head_dim", d // heads)
    ffn, layers = config.size("intermediate_size", 6144), config.layers()
    expert_ffn = config.size("moe_intermediate_size")
    experts = config.size("num_experts", config.size("num_local_experts", 128))
    top_k, normalized = config.size("num_experts_per_tok", 8), config.take("norm_topk_prob", bool, False)
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings")
    eps = config.positive("rms_norm_eps", 1e-6)
    rope = rope_from_hf(config, head_dim)
    bias = config.take("attention_bias", bool, False)
    tied = config.take("tie_word_embeddings", bool, False)
    sparse = sparse_layers(config, layers)
    window = _window(config)
    config.expect("hidden_act", "silu")
    for name in ("output_router_logits", "router_aux_loss_coef"):  # of training
        config.take(name, (bool, int, float), None)
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, dtype=dtype)

    def head_norm():
        return RMSNorm(head_dim, eps=eps, dtype=dtype, axes=("head",))

    def mlp(i):
        if not sparse[i]:
            return GatedMLP(d, ffn, dtype=dtype)
        router = Router(d, experts, top_k=top_k, normalized=normalized, dtype=dtype)
        return MoE(router, Experts(experts, d, expert_ffn, dtype=dtype))

    def block(i):
        mixer = Attention(
            d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, norm=head_norm, window=window, bias=bias,
            out_bias=bias, dtype=dtype,
        )  # fmt: skip
        return Block(norm=norm(), mixer=mixer, mlp_norm=norm(), mlp=mlp(i))

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block(i) for i in range(layers)],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
    )


def sparse_layers(config: Fields, layers: int) -> list[bool]:
    """Which layers have experts: each `decoder_sparse_step`-th, but those of `mlp_only_layers`."""
    step, dense = config.size("decoder_sparse_step", 1), config.take("mlp_only_layers", list, [])
    wrong = [i for i in dense if not isinstance(i, int) or not 0 <= i < layers]
    if wrong:
        raise ConfigError(f"{config.where}: 'mlp_only_layers' holds {wrong[0]!r}; allowed: layers 0 to {layers - 1}")
    return [(i + 1) % step == 0 and i not in dense for i in range(layers)]


def _window(config: Fields) -> int | None:
    """With use_sliding_window all layers slide; published configs have it off."""
    on, window = config.take("use_sliding_window", bool, False), config.size("sliding_window", None)
    first = config.take("max_window_layers", int, 0)
    if on and (window is None or first):
        raise ConfigError(
            f"{config.where}: sliding_window {window}, max_window_layers {first}; supported: a window on all layers"
        )
    return window if on else None
