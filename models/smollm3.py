"""SmolLM3: the Llama block, without positions in chosen layers (every fourth; NoPE, arXiv:2501.18795)."""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.errors import ConfigError
from optx.models.common import LAYER_TYPES, head_rows, rope_from_hf
from optx.nn import Attention, Block, CausalLM, Embed, GatedMLP, Linear, RMSNorm

HF_TYPES = {"smollm3": "SmolLM3ForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = None
IGNORED: tuple[str, ...] = ()

ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", kind="table"),
    *head_rows("model.layers.{i}.", permuted=False),
    Row(path="norm/weight", hf="model.norm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `smollm3` config. Raises ConfigError for what is not handled."""
    d, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", 4)
    head_dim = config.size("head_dim", d // heads)
    ffn, layers = config.size("intermediate_size"), config.layers()
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings")
    eps = config.positive("rms_norm_eps", 1e-6)
    rope = rope_from_hf(config, head_dim, 2e6)
    bias, mlp_bias = config.take("attention_bias", bool, False), config.take("mlp_bias", bool, False)
    tied = config.take("tie_word_embeddings", bool, True)
    rotated = _rotated(config, layers)
    windows = _windows(config, rotated)
    config.expect("hidden_act", "silu")
    for name in ("max_window_layers", "pretraining_tp"):  # left over from the families that it was made from
        config.take(name, int, None)
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, dtype=dtype)

    def block(i):
        mixer = Attention(
            d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope if rotated[i] else None,
            window=windows[i], bias=bias, out_bias=bias, dtype=dtype,
        )  # fmt: skip
        return Block(norm=norm(), mixer=mixer, mlp_norm=norm(), mlp=GatedMLP(d, ffn, bias=mlp_bias, dtype=dtype))

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block(i) for i in range(layers)],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
    )


def _rotated(config: Fields, layers: int) -> list[bool]:
    """Which layers rotate queries and keys: ones of `no_rope_layers` (zeros do not), else all but each n-th."""
    interval = config.size("no_rope_layer_interval", 4)
    flags = config.take("no_rope_layers", list, None)
    if flags is None:
        return [(i + 1) % interval != 0 for i in range(layers)]
    if len(flags) < layers or not all(flag in (0, 1) for flag in flags):
        raise ConfigError(f"{config.where}: 'no_rope_layers' is {flags!r:.80}; allowed: 0 or 1 for {layers} layers")
    return [bool(flag) for flag in flags[:layers]]


def _windows(config: Fields, rotated: list[bool]) -> list[int | None]:
    """Window of each layer: with use_sliding_window, of `layer_types` or else of the layers without positions."""
    on, window = config.take("use_sliding_window", bool, False), config.size("sliding_window", None)
    kinds = config.names("layer_types", len(rotated), LAYER_TYPES)
    if kinds is None:
        kinds = ["sliding_attention" if on and window and not flag else "full_attention" for flag in rotated]
    if "sliding_attention" in kinds and not (on and window):
        raise ConfigError(f"{config.where}: sliding layers but use_sliding_window or sliding_window is not set")
    return [window if kind == "sliding_attention" else None for kind in kinds]
