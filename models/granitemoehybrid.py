"""Granite 4: Mamba-2 layers with a few layers of attention, experts beside an MLP that every token takes, or the MLP alone.

Embeddings, what joins the stream, attention and logits are scaled by constants of the config (muP).
"""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.models.common import head_rows, rope_from_hf
from optx.models.state_space import layer_kinds, mamba2_from_hf, mamba2_rows
from optx.nn import Attention, Block, CausalLM, Embed, Experts, JoinedGatedMLP, Linear, MoE, Residual, RMSNorm, Router

HF_TYPES = {"granitemoehybrid": "GraniteMoeHybridForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = None
IGNORED: tuple[str, ...] = ()

BLOCK, MLP = "model.layers.{i}.", "layers/{i}/mlp/"
EXPERTS, SHARED = f"{BLOCK}block_sparse_moe.", f"{BLOCK}shared_mlp."
ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", kind="table"),
    *(row for row in head_rows(BLOCK, permuted=False) if "/mlp/" not in row.path),
    *mamba2_rows(f"{BLOCK}mamba."),
    Row(path=f"{MLP}router/weight", hf=f"{EXPERTS}router.layer.weight"),
    Row(path=f"{MLP}experts/gate_up/weight", hf=f"{EXPERTS}input_linear.weight", kind="stacked"),
    Row(path=f"{MLP}experts/down/weight", hf=f"{EXPERTS}output_linear.weight", kind="stacked"),
    Row(path=f"{MLP}shared/gate_up/weight", hf=f"{SHARED}input_linear.weight"),
    Row(path=f"{MLP}shared/down/weight", hf=f"{SHARED}output_linear.weight"),
    Row(path=f"{MLP}gate_up/weight", hf=f"{SHARED}input_linear.weight"),  # where there are no experts
    Row(path=f"{MLP}down/weight", hf=f"{SHARED}output_linear.weight"),
    Row(path="norm/weight", hf="model.norm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `granitemoehybrid` config. Raises ConfigError for what is not handled."""
    d, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    head_dim = config.size("head_dim", d // heads)
    layers = config.layers()
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings", 2048)
    eps = config.positive("rms_norm_eps", 1e-6)
    rope = rope_from_hf(config, head_dim)
    config.expect("position_embedding_type", "rope", "nope")
    rope = rope if config.take("position_embedding_type", str, "nope") == "rope" else None
    scale = config.positive("attention_multiplier", 1.0)
    residual = Residual(added=config.positive("residual_multiplier", 1.0))
    embed_scale, logits_scale = config.positive("embedding_multiplier", 1.0), config.positive("logits_scaling", 1.0)
    bias = config.take("attention_bias", bool, False)
    tied = config.take("tie_word_embeddings", bool, False)
    kinds = layer_kinds(config, layers)
    mlp = _mlp(config, d, dtype)
    mamba = mamba2_from_hf(config, d, eps=eps, dtype=dtype)
    config.expect("hidden_act", "silu")
    config.expect("normalization_function", "rmsnorm")
    for name in ("output_router_logits", "router_aux_loss_coef", "init_method"):  # of training
        config.take(name, (bool, int, float, str), None)
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, dtype=dtype)

    def attention():
        return Attention(
            d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, scale=scale, bias=bias, out_bias=bias,
            dtype=dtype,
        )  # fmt: skip

    def block(kind):
        mixer = attention() if kind == "full_attention" else mamba()
        return Block(
            norm=norm(), mixer=mixer, mlp_norm=norm(), mlp=mlp(), residual=residual, mlp_residual=residual
        )  # fmt: skip

    return CausalLM(
        embed=Embed(vocab, d, scale=embed_scale, dtype=dtype),
        layers=[block(kind) for kind in kinds],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
        logit_scale=1 / logits_scale,
    )


def _mlp(config: Fields, d: int, dtype: str):
    """A callable that builds a block's experts and shared MLP, or the MLP alone with `num_local_experts` 0."""
    experts, top_k = config.take("num_local_experts", int, 8), config.size("num_experts_per_tok", 2)
    ffn, shared_ffn = config.size("intermediate_size"), config.size("shared_intermediate_size", 1024)

    def mlp():
        shared = JoinedGatedMLP(d, shared_ffn, dtype=dtype)
        if not experts:
            return shared
        return MoE(Router(d, experts, top_k=top_k, dtype=dtype), Experts(experts, d, ffn, dtype=dtype), shared=shared)

    return mlp
