"""gpt-oss: attention sinks, every other layer over a sliding window, experts with biases and a clamped SwiGLU, yarn.

gpt-oss model card, arXiv:2508.10925. Published checkpoints keep the experts in MXFP4.
"""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.models.common import LAYER_TYPES, expect_mxfp4, head_rows, rope_from_hf
from optx.nn import Attention, Block, CausalLM, Embed, Experts, Glu, Linear, MoE, RMSNorm, Router

HF_TYPES = {"gpt_oss": "GptOssForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = None
IGNORED: tuple[str, ...] = ()
MLP = "model.layers.{i}.mlp."
KEPT = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head", "model.norm")


def _experts(name: str, kind: str) -> tuple[Row, ...]:
    path, hf = "layers/{i}/mlp/experts/" + name, f"{MLP}experts.{name}_proj"
    bias = "by_turns" if kind == "by_turns" else "table"
    return (
        Row(path=f"{path}/weight", hf=hf, packed=(f"{hf}_blocks", f"{hf}_scales"), kind=kind),
        Row(path=f"{path}/bias", hf=f"{hf}_bias", kind=bias),
    )


ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", kind="table"),
    *head_rows("model.layers.{i}.", permuted=False),
    Row(path="layers/{i}/mixer/sinks", hf="model.layers.{i}.self_attn.sinks", kind="vector"),
    Row(path="layers/{i}/mlp/router/weight", hf=f"{MLP}router.weight"),
    Row(path="layers/{i}/mlp/router/bias", hf=f"{MLP}router.bias", kind="vector"),
    *_experts("gate_up", "by_turns"),
    *_experts("down", "grouped"),
    Row(path="norm/weight", hf="model.norm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `gpt_oss` config. Raises ConfigError for what is not handled."""
    d, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    head_dim = config.size("head_dim", 64)
    ffn, layers = config.size("intermediate_size"), config.layers()
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings")
    experts, top_k = config.size("num_local_experts"), config.size("num_experts_per_tok")
    window, eps = config.size("sliding_window"), config.positive("rms_norm_eps", 1e-5)
    glu = Glu(limit=config.positive("swiglu_limit", 7.0), slope=config.positive("swiglu_alpha", 1.702), shift=1.0)
    rope = rope_from_hf(config, head_dim, 150000.0)
    bias = config.take("attention_bias", bool, True)
    tied = config.take("tie_word_embeddings", bool, False)
    kinds = config.names("layer_types", layers, LAYER_TYPES)
    kinds = kinds or [LAYER_TYPES[(i + 1) % 2] for i in range(layers)]
    expect_mxfp4(config, KEPT)
    config.expect("experts_per_token", top_k)
    config.expect("hidden_act", "silu")
    for name in ("initial_context_length", "output_router_logits", "router_aux_loss_coef"):
        config.take(name, (int, float), None)  # of training, or said in the rope's fields too
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, dtype=dtype)

    def block(kind):
        mixer = Attention(
            d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, bias=bias, out_bias=bias, sinks=True,
            window=window if kind == "sliding_attention" else None, dtype=dtype,
        )  # fmt: skip
        mlp = MoE(
            Router(d, experts, top_k=top_k, bias=True, dtype=dtype),
            Experts(experts, d, ffn, glu=glu, bias=True, dtype=dtype),
        )
        return Block(norm=norm(), mixer=mixer, mlp_norm=norm(), mlp=mlp)

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block(kind) for kind in kinds],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
    )
