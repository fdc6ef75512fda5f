"""Mixtral: GQA, and in every block a router over gated experts, weights normalized over the chosen ones."""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.models.common import expert_rows, head_rows, rope_from_hf
from optx.nn import Attention, Block, CausalLM, Embed, Experts, Linear, MoE, RMSNorm, Router

HF_TYPES = {"mixtral": "MixtralForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = None
IGNORED = (r".*\.rotary_emb\.inv_freq",)

ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", kind="table"),
    *head_rows("model.layers.{i}.", permuted=False),
    *expert_rows("model.layers.{i}.block_sparse_moe.", gate="w1", up="w3", down="w2"),
    Row(path="norm/weight", hf="model.norm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `mixtral` config. Raises ConfigError for what is not handled."""
    d, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", 8)
    head_dim = config.size("head_dim", d // heads)
    ffn, layers = config.size("intermediate_size"), config.layers()
    experts = config.size("num_local_experts", config.size("num_experts", 8))
    top_k = config.size("num_experts_per_tok", 2)
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings")
    eps = config.positive("rms_norm_eps", 1e-5)
    rope = rope_from_hf(config, head_dim, 1e6)
    window = config.size("sliding_window", None)
    tied = config.take("tie_word_embeddings", bool, False)
    config.expect("hidden_act", "silu")
    for name in ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"):  # of training
        config.take(name, (bool, int, float), None)
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, dtype=dtype)

    def block():
        mixer = Attention(
            d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, window=window, dtype=dtype
        )  # fmt: skip
        mlp = MoE(Router(d, experts, top_k=top_k, dtype=dtype), Experts(experts, d, ffn, dtype=dtype))
        return Block(norm=norm(), mixer=mixer, mlp_norm=norm(), mlp=mlp)

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block() for _ in range(layers)],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
    )
