"""Llama 2 and 3, SmolLM2, Mistral: GQA, SwiGLU, RMSNorm, rotary positions; Mistral may slide all layers."""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.errors import ConfigError
from optx.models.common import GGUF_DECODER, gguf_fields, head_rows, rope_from_hf
from optx.nn import Attention, Block, CausalLM, Embed, GatedMLP, Linear, RMSNorm

HF_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = "llama"
IGNORED = (r".*\.rotary_emb\.inv_freq", r"rope_freqs\.weight")

ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", gguf="token_embd.weight", kind="table"),
    *head_rows("model.layers.{i}.", permuted=True),
    Row(path="norm/weight", hf="model.norm.weight", gguf="output_norm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight", gguf="output.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `llama` or `mistral` config. Raises ConfigError for what is not handled."""
    d, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    head_dim = config.size("head_dim", d // heads)
    ffn, layers = config.size("intermediate_size"), config.layers()
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings")
    eps = config.positive("rms_norm_eps", 1e-6)
    rope = rope_from_hf(config, head_dim)
    window, bias, mlp_bias = _mistral(config) if config.data.get("model_type") == "mistral" else _llama(config)
    tied = config.take("tie_word_embeddings", bool, False)
    config.expect("hidden_act", "silu")
    config.expect("pretraining_tp", 1)
    config.expect("rope_interleaved", False)
    config.expect("is_llama_config", True)
    config.done()
    if d % heads and "head_dim" not in config.data:
        raise ConfigError(f"{config.where}: hidden_size {d} does not divide into {heads} heads and head_dim is missing")

    def norm():
        return RMSNorm(d, eps=eps, dtype=dtype)

    def block():
        mixer = Attention(
            d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, window=window, bias=bias, out_bias=bias,
            dtype=dtype,
        )  # fmt: skip
        return Block(norm=norm(), mixer=mixer, mlp_norm=norm(), mlp=GatedMLP(d, ffn, bias=mlp_bias, dtype=dtype))

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block() for _ in range(layers)],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
    )


def _llama(config: Fields) -> tuple[None, bool, bool]:
    """(window, bias of attention, bias of the mlp)."""
    config.expect("sliding_window", None)
    return None, config.take("attention_bias", bool, False), config.take("mlp_bias", bool, False)


def _mistral(config: Fields) -> tuple[int | None, bool, bool]:
    """The same. A config without the field slides: only null says that it does not."""
    config.expect("attention_bias", False)
    config.expect("mlp_bias", False)
    return config.size("sliding_window", None if "sliding_window" in config.data else 4096), False, False


def gguf_config(meta: Fields, tensors: dict) -> dict:
    """HF-style config of a GGUF header; Llama 3's frequency factors come as a tensor."""
    config = gguf_fields(meta, GGUF_ARCHITECTURE, tensors, GGUF_DECODER)
    factors = tensors.get("rope_freqs.weight")
    if factors is not None:
        if factors.type != "F32" or len(factors.shape) != 1:
            got = f"{factors.type}{list(factors.shape)}"
            raise ConfigError(f"{meta.where}: rope_freqs.weight is {got}; allowed: F32 in a row")
        config["rope_scaling"] = {"rope_type": "factors", "factors": [float(x) for x in factors.read()]}
    return config
