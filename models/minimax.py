"""MiniMax-Text-01 and M1: seven layers of lightning attention to one of softmax attention, MoE, weighted residuals.

Blocks are post-norm: what a part adds to is its own normed input (`postnorm` in published configs, always so in
transformers' names). Published configs and transformers' name their fields differently; both are read.
"""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.errors import ConfigError
from optx.models.common import expert_rows, head_rows, rope_from_hf
from optx.nn import Attention, Block, CausalLM, Embed, Experts, Linear, LinearAttention, MoE, RMSNorm, Router
from optx.nn.decoder import Residual

HF_TYPES = {  # model_type -> transformers class
    "minimax": "MiniMaxForCausalLM",
    "minimax_text_01": "MiniMaxText01ForCausalLM",
    "minimax_m1": "MiniMaxM1ForCausalLM",
}
GGUF_ARCHITECTURE = None
IGNORED = (  # follow from the config
    r".*\.rotary_emb\.inv_freq",
    r".*\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)",
)
LAYER_TYPES = ("linear_attention", "full_attention")

_LAYER = "model.layers.{i}."
_MIXER = "layers/{i}/mixer/"
ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", kind="table"),
    *head_rows(_LAYER, permuted=False),
    Row(path=_MIXER + "qkv/weight", hf=_LAYER + "self_attn.qkv_proj.weight"),
    Row(path=_MIXER + "gate/weight", hf=_LAYER + "self_attn.output_gate.weight"),
    Row(path=_MIXER + "norm/weight", hf=_LAYER + "self_attn.norm.weight", kind="vector"),
    Row(path=_MIXER + "out/weight", hf=_LAYER + "self_attn.out_proj.weight"),
    *expert_rows(_LAYER + "block_sparse_moe.", gate="w1", up="w3", down="w2"),
    Row(path="norm/weight", hf="model.norm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a config of any of HF_TYPES. Raises ConfigError for what is not handled."""
    d, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", 8)
    head_dim = config.size("head_dim", d // heads)
    ffn, layers = config.size("intermediate_size"), config.layers()
    experts, top_k = config.size("num_local_experts", 8), config.size("num_experts_per_tok", 2)
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings")
    eps = config.positive("rms_norm_eps", 1e-5)
    rope = rope_from_hf(config, config.size("rotary_dim", head_dim, most=head_dim), 1e6)
    window = config.size("sliding_window", None)
    tied = config.take("tie_word_embeddings", bool, False)
    kinds = _kinds(config, layers)
    published = config.data.get("model_type") != "minimax"
    normed = config.take("postnorm", bool, not published)
    residuals = {kind: _residual(config, kind, normed) for kind in ("linear", "full", "mlp")}
    config.expect("hidden_act", "silu")
    config.expect("shared_intermediate_size", 0, [0])
    config.take("shared_moe_mode", str, None)  # how a shared expert would join, of which there is none
    config.take("block_size", int, None)  # of the kernel
    for name in ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"):  # of training
        config.take(name, (bool, int, float), None)
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, dtype=dtype)

    def block(i, kind):
        if kind == "linear_attention":
            rate = 1 - i / (layers - 1 + 1e-5) + 1e-5
            mixer = LinearAttention(d, heads=heads, head_dim=head_dim, rate=rate, dtype=dtype)
        else:
            mixer = Attention(
                d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, window=window, dtype=dtype
            )
        mlp = MoE(Router(d, experts, top_k=top_k, dtype=dtype), Experts(experts, d, ffn, dtype=dtype))
        residual = residuals[kind.removesuffix("_attention")]
        return Block(
            norm=norm(), mixer=mixer, mlp_norm=norm(), mlp=mlp, residual=residual, mlp_residual=residuals["mlp"]
        )

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block(i, kind) for i, kind in enumerate(kinds)],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
    )


def _kinds(config: Fields, layers: int) -> list[str]:
    """`linear_attention` or `full_attention` for each layer; `attn_type_list` says so with 0 and 1."""
    kinds = config.names("layer_types", layers, LAYER_TYPES)
    codes = config.take("attn_type_list", list, None)
    if codes is not None:
        if len(codes) != layers or any(code not in (0, 1) for code in codes):
            raise ConfigError(
                f"{config.where}: 'attn_type_list' is {codes!r:.80}; allowed: a 0 or 1 for each of {layers} layers"
            )
        kinds = kinds or [LAYER_TYPES[code] for code in codes]
    return kinds or [LAYER_TYPES[(i + 1) % 2] for i in range(layers)]


def _residual(config: Fields, kind: str, normed: bool) -> Residual:
    """The weights of a part's input (alpha) and of what it adds (beta)."""
    ours, published = (f"{kind}_attn", f"{kind}_attention") if kind != "mlp" else (kind, kind)
    alpha, beta = (
        config.positive(f"{ours}_{name}_factor", config.positive(f"layernorm_{published}_{name}", 1.0))
        for name in ("alpha", "beta")
    )
    return Residual(kept=alpha, added=beta, normed=normed)
