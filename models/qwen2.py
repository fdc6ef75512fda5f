"""Qwen2 and Qwen2.5: GQA with biases on queries, keys and values, SwiGLU; upper layers may slide."""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.models.common import GGUF_DECODER, gguf_fields, head_rows, rope_from_hf, upper_windows
from optx.nn import Attention, Block, CausalLM, Embed, GatedMLP, Linear, RMSNorm

HF_TYPES = {"qwen2": "Qwen2ForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = "qwen2"
IGNORED = (r".*\.rotary_emb\.inv_freq",)

ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", gguf="token_embd.weight", kind="table"),
    *head_rows("model.layers.{i}.", permuted=False),
    Row(path="norm/weight", hf="model.norm.weight", gguf="output_norm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight", gguf="output.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `qwen2` config. Raises ConfigError for what is not handled."""
    d, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    head_dim = config.size("head_dim", d // heads)
    ffn, layers = config.size("intermediate_size"), config.layers()
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings")
    eps = config.positive("rms_norm_eps", 1e-6)
    rope = rope_from_hf(config, head_dim)
    tied = config.take("tie_word_embeddings", bool, False)
    windows = upper_windows(config, layers)
    config.expect("hidden_act", "silu")
    config.expect("use_mrope", False)
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, dtype=dtype)

    def block(window):
        mixer = Attention(
            d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, window=window, bias=True, dtype=dtype
        )  # fmt: skip
        return Block(norm=norm(), mixer=mixer, mlp_norm=norm(), mlp=GatedMLP(d, ffn, dtype=dtype))

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block(window) for window in windows],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
    )


def gguf_config(meta: Fields, tensors: dict) -> dict:
    return gguf_fields(meta, GGUF_ARCHITECTURE, tensors, GGUF_DECODER)
