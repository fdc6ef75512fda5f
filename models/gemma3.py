"""Gemma 3, text: five sliding layers to one global with a rope base each, qk-norm, (1 + w) norms before and after."""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.models.common import GGUF_DECODER, LAYER_TYPES, gguf_fields, head_rows, rope_of
from optx.nn import Attention, Block, CausalLM, Embed, GatedMLP, Linear, RMSNorm, Rope

HF_TYPES = {"gemma3_text": "Gemma3ForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = "gemma3"
IGNORED: tuple[str, ...] = ()
PATTERN = 6  # every sixth layer is global, where neither layer_types nor sliding_window_pattern says otherwise
LOCAL_THETA = 1e4

ROWS = (
    Row(path="embed/table", hf="model.embed_tokens.weight", gguf="token_embd.weight", kind="table"),
    *head_rows("model.layers.{i}.", permuted=False, post_norms=True),
    Row(path="norm/weight", hf="model.norm.weight", gguf="output_norm.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight", gguf="output.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `gemma3_text` config. Raises ConfigError for what is not handled."""
    d, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads, head_dim = config.size("num_key_value_heads"), config.size("head_dim", 256)
    ffn, layers = config.size("intermediate_size"), config.layers()
    vocab, context = config.size("vocab_size"), config.size("max_position_embeddings")
    eps = config.positive("rms_norm_eps", 1e-6)
    window = config.size("sliding_window")
    scale = config.positive("query_pre_attn_scalar", 256.0) ** -0.5
    logit_softcap = config.positive("final_logit_softcapping", None)
    bias = config.take("attention_bias", bool, False)
    tied = config.take("tie_word_embeddings", bool, True)
    kinds = layer_kinds(config, layers)
    ropes = _ropes(config, head_dim)
    config.expect("attn_logit_softcapping", None)  # a field that transformers does not apply
    config.expect("use_bidirectional_attention", False)
    config.expect("hidden_activation", "gelu_pytorch_tanh")
    config.expect("hidden_act", "gelu_pytorch_tanh")
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, offset=1.0, dtype=dtype)

    def head_norm():
        return RMSNorm(head_dim, eps=eps, offset=1.0, dtype=dtype, axes=("head",))

    def block(kind):
        mixer = Attention(
            d, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=ropes[kind], scale=scale,
            window=window if kind == "sliding_attention" else None, norm=head_norm, bias=bias, out_bias=bias,
            dtype=dtype,
        )  # fmt: skip
        mlp = GatedMLP(d, ffn, activation="gelu_tanh", dtype=dtype)
        return Block(norm=norm(), mixer=mixer, post_norm=norm(), mlp_norm=norm(), mlp=mlp, post_mlp_norm=norm())

    return CausalLM(
        embed=Embed(vocab, d, scale=d**0.5, dtype=dtype),
        layers=[block(kind) for kind in kinds],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
        logit_softcap=logit_softcap,
    )


def layer_kinds(config: Fields, layers: int) -> list[str]:
    """`sliding_attention` or `full_attention` for each layer."""
    pattern = config.size("_sliding_window_pattern", None) or config.size("sliding_window_pattern", PATTERN)
    config.take("sliding_window_pattern", int, None)
    kinds = config.names("layer_types", layers, LAYER_TYPES)
    if kinds is None:
        return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    return kinds


def _ropes(config: Fields, head_dim: int) -> dict[str, Rope]:
    """Global and local rope, from transformers 4 fields or transformers 5's `rope_parameters` by layer type."""
    parameters = config.nested("rope_parameters")
    theta = config.positive("rope_theta", 1e6)
    local = config.positive("rope_local_base_freq", LOCAL_THETA)
    scaling = config.nested("rope_scaling")
    if parameters is None:
        return {
            "full_attention": rope_of(scaling, theta, head_dim, config),
            "sliding_attention": Rope(theta=local, dim=head_dim),
        }
    ropes = {}
    for kind, default in (("full_attention", theta), ("sliding_attention", local)):
        mine = parameters.nested(kind)
        base = mine.positive("rope_theta", default) if mine else default
        ropes[kind] = rope_of(mine, base, head_dim, config)
    parameters.done()
    return ropes


def gguf_config(meta: Fields, tensors: dict) -> dict:
    """HF-style config of a GGUF header. Local rope base and layer pattern are not in it: the family's defaults."""
    table = GGUF_DECODER | {
        "attention.sliding_window": "sliding_window",
        "rope.scaling.type": "scaling_type",
        "rope.scaling.factor": "scaling_factor",
        "rope.local.freq_base": "rope_local_base_freq",
        "rope.freq_base_swa": "rope_local_base_freq",
        "final_logit_softcapping": "final_logit_softcapping",
    }
    config = gguf_fields(meta, GGUF_ARCHITECTURE, tensors, table)
    kind, factor = config.pop("scaling_type", None), config.pop("scaling_factor", None)
    if kind not in (None, "none"):
        config["rope_scaling"] = {"rope_type": kind, "factor": factor}
    config["query_pre_attn_scalar"] = config.get("head_dim", 256)  # transformers' default is 256 for any head
    if config.get("num_hidden_layers") == 62:  # the 27B model scales by the width of a head in the stream
        config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
    return config
