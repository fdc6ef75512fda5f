"""Bamba: Mamba-2 layers with a few layers of attention, whose rope turns half a head; a gated MLP in every block."""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.errors import ConfigError
from optx.models.common import head_rows, rope_from_hf
from optx.models.state_space import mamba2_from_hf, mamba2_rows
from optx.nn import Attention, Block, CausalLM, Embed, GatedMLP, Linear, RMSNorm

HF_TYPES = {"bamba": "BambaForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = None
IGNORED: tuple[str, ...] = ()
TURNED = 0.5  # share of a head that the rope turns

BLOCK = "model.layers.{i}."
MLP = [(f"{name}/{part}", f"{name}_proj.{part}") for name in ("gate", "up", "down") for part in ("weight", "bias")]
ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", kind="table"),
    *(row for row in head_rows(BLOCK, permuted=False) if "/mlp" not in row.path),
    *mamba2_rows(f"{BLOCK}mamba."),
    Row(path="layers/{i}/mlp_norm/weight", hf=f"{BLOCK}pre_ff_layernorm.weight", kind="vector"),
    *(
        Row(path="layers/{i}/mlp/" + path, hf=f"{BLOCK}feed_forward.{hf}", kind="vector" if "bias" in hf else "linear")
        for path, hf in MLP
    ),
    Row(path="norm/weight", hf="model.final_layernorm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `bamba` config. Raises ConfigError for what is not handled."""
    d, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    head_dim = d // heads
    ffn, layers = config.size("intermediate_size"), config.layers()
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings")
    eps = config.positive("rms_norm_eps", 1e-5)
    rope = rope_from_hf(config, head_dim, partial=TURNED)
    config.expect("attn_rotary_emb", rope.dim)
    bias, mlp_bias = config.take("attention_bias", bool, False), config.take("mlp_bias", bool, False)
    tied = config.take("tie_word_embeddings", bool, False)
    attending = _attending(config, layers)
    mamba = mamba2_from_hf(config, d, eps=eps, dtype=dtype)
    config.expect("hidden_act", "silu")
    for name in ("num_logits_to_keep", "use_mamba_kernels", "z_loss_coefficient"):  # of generation, kernels, training
        config.take(name, (bool, int, float), None)
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, dtype=dtype)

    def attention():
        return Attention(
            d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, bias=bias, out_bias=bias, dtype=dtype
        )  # fmt: skip

    def block(i):
        mixer = attention() if i in attending else mamba()
        return Block(norm=norm(), mixer=mixer, mlp_norm=norm(), mlp=GatedMLP(d, ffn, bias=mlp_bias, dtype=dtype))

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block(i) for i in range(layers)],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
    )


def _attending(config: Fields, layers: int) -> list[int]:
    """Layers with attention."""
    indices = config.take("attn_layer_indices", list, [])
    wrong = [i for i in indices if not isinstance(i, int) or not 0 <= i < layers]
    if wrong:
        raise ConfigError(f"{config.where}: 'attn_layer_indices' holds {wrong[0]!r}; there are {layers} layers")
    return indices
