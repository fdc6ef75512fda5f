"""Qwen3 dense: GQA with an RMSNorm on every head's queries and keys, SwiGLU."""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.errors import ConfigError
from optx.models.common import GGUF_DECODER, LAYER_TYPES, gguf_fields, head_rows, rope_from_hf
from optx.nn import Attention, Block, CausalLM, Embed, GatedMLP, Linear, RMSNorm

HF_TYPES = {"qwen3": "Qwen3ForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = "qwen3"
IGNORED: tuple[str, ...] = ()

ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", gguf="token_embd.weight", kind="table"),
    *head_rows("model.layers.{i}.", permuted=False),
    Row(path="norm/weight", hf="model.norm.weight", gguf="output_norm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight", gguf="output.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `qwen3` config. Raises ConfigError for what is not handled."""
    d, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    head_dim = config.size("head_dim", 128)
    ffn, layers = config.size("intermediate_size"), config.layers()
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings")
    eps = config.positive("rms_norm_eps", 1e-6)
    rope = rope_from_hf(config, head_dim)
    bias = config.take("attention_bias", bool, False)
    tied = config.take("tie_word_embeddings", bool, False)
    windows = _windows(config, layers)
    config.expect("hidden_act", "silu")
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, dtype=dtype)

    def head_norm():
        return RMSNorm(head_dim, eps=eps, dtype=dtype, axes=("head",))

    def block(window):
        mixer = Attention(
            d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, norm=head_norm, window=window, bias=bias,
            out_bias=bias, dtype=dtype,
        )  # fmt: skip
        return Block(norm=norm(), mixer=mixer, mlp_norm=norm(), mlp=GatedMLP(d, ffn, dtype=dtype))

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block(window) for window in windows],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
    )


def _windows(config: Fields, layers: int) -> list[int | None]:
    """Window of each layer: with use_sliding_window, `layer_types` or else the layers from max_window_layers on."""
    on = config.take("use_sliding_window", bool, False)
    window = config.size("sliding_window", None)
    first = config.take("max_window_layers", int, layers)
    kinds = config.names("layer_types", layers, LAYER_TYPES)
    if kinds is None:
        kinds = ["sliding_attention" if on and i >= first else "full_attention" for i in range(layers)]
    if "sliding_attention" in kinds and window is None:
        raise ConfigError(f"{config.where}: sliding layers but no sliding_window")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def gguf_config(meta: Fields, tensors: dict) -> dict:
    return gguf_fields(meta, GGUF_ARCHITECTURE, tensors, GGUF_DECODER)
