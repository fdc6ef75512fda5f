"""What the families' configs and tensor names have in common."""

import math

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.errors import ConfigError
from optx.nn import Rope

LAYER_TYPES = ("full_attention", "sliding_attention")

# GGUF key after "<arch>." -> HF config field.
GGUF_DECODER = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}


def head_rows(prefix: str, *, permuted: bool, post_norms: bool = False) -> tuple[Row, ...]:
    """Rows of a block of attention and gated MLP. permuted: GGUF keeps q and k in llama.cpp's rope order."""
    attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    rows = [
        Row(path="layers/{i}/norm/weight", hf=f"{prefix}input_layernorm.weight", gguf="blk.{i}.attn_norm.weight", kind="vector"),
    ]  # fmt: skip
    for name, heads in (("q", "heads"), ("k", "kv_heads"), ("v", None), ("o", None)):
        gguf = "blk.{i}.attn_" + ("output" if name == "o" else name)
        order = heads if permuted else None
        path = "layers/{i}/mixer/" + name
        rows.append(Row(path=f"{path}/weight", hf=f"{attn}{name}_proj.weight", gguf=f"{gguf}.weight", gguf_heads=order))
        rows.append(
            Row(path=f"{path}/bias", hf=f"{attn}{name}_proj.bias", gguf=f"{gguf}.bias", kind="vector", gguf_heads=order)
        )
    for name in ("q_norm", "k_norm"):
        path = "layers/{i}/mixer/" + name + "/weight"
        rows.append(Row(path=path, hf=f"{attn}{name}.weight", gguf="blk.{i}.attn_" + name + ".weight", kind="vector"))
    for name in ("gate", "up", "down"):
        path, gguf = "layers/{i}/mlp/" + name, "blk.{i}.ffn_" + name
        rows.append(Row(path=f"{path}/weight", hf=f"{mlp}{name}_proj.weight", gguf=f"{gguf}.weight"))
        rows.append(Row(path=f"{path}/bias", hf=f"{mlp}{name}_proj.bias", gguf=f"{gguf}.bias", kind="vector"))
    mlp_norm = "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm"
    norms = [("mlp_norm", mlp_norm, "ffn_norm")]
    if post_norms:
        norms += [("post_norm", "post_attention_layernorm", "post_attention_norm")]
        norms += [("post_mlp_norm", "post_feedforward_layernorm", "post_ffw_norm")]
    for ours, hf, gguf in norms:
        path, gguf = "layers/{i}/" + ours + "/weight", "blk.{i}." + gguf + ".weight"
        rows.append(Row(path=path, hf=f"{prefix}{hf}.weight", gguf=gguf, kind="vector"))
    return tuple(rows)


def expert_rows(prefix: str, *, router="gate", gate="gate_proj", up="up_proj", down="down_proj") -> tuple[Row, ...]:
    """Rows of a router and of gated experts that files keep one by one; prefix like `model.layers.{i}.mlp.`."""
    path, expert = "layers/{i}/mlp/", prefix + "experts.{e}."
    both = (f"{expert}{gate}.weight", f"{expert}{up}.weight")
    return (
        Row(path=f"{path}router/weight", hf=f"{prefix}{router}.weight"),
        Row(path=f"{path}experts/gate_up/weight", hf=both, kind="experts"),
        Row(path=f"{path}experts/down/weight", hf=(f"{expert}{down}.weight",), kind="experts"),
    )


def rope_from_hf(config: Fields, head_dim: int, default_theta: float = 1e4, *, partial: float | None = None) -> Rope:
    """Rope of `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

    partial: the family's default of `partial_rotary_factor`; None: it turns whole heads only.
    """
    parameters = config.nested("rope_parameters")
    theta = config.positive("rope_theta", None)
    scaling = config.nested("rope_scaling")
    if parameters is not None:
        theta = parameters.positive("rope_theta", theta or default_theta)
        scaling = parameters
    return rope_of(scaling, theta or default_theta, _turned(config, scaling, head_dim, partial), config)


def _turned(config: Fields, scaling: Fields | None, head_dim: int, partial: float | None) -> int:
    """How many numbers of a head turn, by `partial_rotary_factor` beside the rope's fields or among them."""
    places = (config,) if scaling is None else (config, scaling)
    if partial is None:
        for fields in places:
            fields.expect("partial_rotary_factor", 1.0)
        return head_dim
    for fields in places:
        partial = fields.positive("partial_rotary_factor", partial)
    if partial > 1:
        raise ConfigError(f"{config.where}: 'partial_rotary_factor' is {partial}; allowed: above 0, up to 1")
    return int(head_dim * partial)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1: how much yarn sharpens attention (arXiv:2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn(scaling: Fields, theta: float, dim: int, config: Fields) -> Rope:
    context = config.size("max_position_embeddings")
    original = scaling.size("original_max_position_embeddings", context)
    factor = scaling.positive("factor", context / original)
    mscale, all_dim = scaling.take("mscale", float, 0.0), scaling.take("mscale_all_dim", float, 0.0)
    share = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if mscale and all_dim else yarn_mscale(factor)
    return Rope(
        theta=theta,
        dim=dim,
        scaling="yarn",
        factor=factor,
        original=original,
        beta_fast=scaling.positive("beta_fast", 32.0),
        beta_slow=scaling.positive("beta_slow", 1.0),
        truncate=scaling.take("truncate", bool, True),
        attention_factor=scaling.positive("attention_factor", share),
    )


def rope_of(scaling: Fields | None, theta: float, head_dim: int, config: Fields) -> Rope:
    """Rope of one `rope_scaling` mapping (None: plain) that turns `head_dim` numbers of a head.

    Raises: ConfigError for a type that is not supported.
    """
    if scaling is None:
        return Rope(theta=theta, dim=head_dim)
    kind = scaling.take("rope_type", str, None) or scaling.take("type", str, "default")
    scaling.take("type", str, None)
    if kind == "default":
        rope = Rope(theta=theta, dim=head_dim)
    elif kind == "linear":
        rope = Rope(theta=theta, dim=head_dim, scaling="linear", factor=scaling.positive("factor"))
    elif kind == "llama3":
        rope = Rope(
            theta=theta,
            dim=head_dim,
            scaling="llama3",
            factor=scaling.positive("factor"),
            low_freq=scaling.positive("low_freq_factor"),
            high_freq=scaling.positive("high_freq_factor"),
            original=scaling.size("original_max_position_embeddings"),
        )
    elif kind == "yarn":
        rope = _yarn(scaling, theta, head_dim, config)
    elif kind == "factors":
        factors = tuple(scaling.take("factors", list))
        if len(factors) != head_dim // 2:
            raise ConfigError(f"{scaling.where}: {len(factors)} frequency factors for a head of {head_dim}")
        rope = Rope(theta=theta, dim=head_dim, scaling="factors", factors=factors)
    else:
        raise ConfigError(f"{scaling.where}: rope_type {kind!r}; supported: default, linear, llama3, yarn")
    scaling.done()
    return rope


def upper_windows(config: Fields, layers: int) -> list[int | None]:
    """Window of each layer: with use_sliding_window, `layer_types` or else the layers from max_window_layers on."""
    on = config.take("use_sliding_window", bool, False)
    window = config.size("sliding_window", None)
    first = config.take("max_window_layers", int, 28)
    kinds = config.names("layer_types", layers, LAYER_TYPES)
    if kinds is None:
        kinds = ["sliding_attention" if on and i >= first else "full_attention" for i in range(layers)]
    if "sliding_attention" in kinds and window is None:
        raise ConfigError(f"{config.where}: sliding layers but no sliding_window")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def expect_mxfp4(config: Fields, kept: tuple[str, ...]) -> None:
    """Refuses a `quantization_config` other than MXFP4 that leaves modules of `kept` dense, and no others."""
    details = config.nested("quantization_config")
    if details is None:
        return
    if (method := details.take("quant_method", str)) != "mxfp4":
        raise ConfigError(f"{details.where}: 'quant_method' is {method!r}; supported: 'mxfp4'")
    others = [name for name in details.take("modules_to_not_convert", list, []) if name not in kept]
    if others:
        raise ConfigError(
            f"{details.where}: 'modules_to_not_convert' names {others[0]!r}; supported: {', '.join(kept)}"
        )
    details.expect("dequantize", False)
    details.done()


def gguf_fields(meta: Fields, architecture: str, tensors: dict, table: dict[str, str]) -> dict:
    """The `<arch>.*` keys of a GGUF header as HF config fields by `table`; strict about the rest.

    Raises: ConfigError naming keys of the architecture that are not in the table.
    """
    prefix = f"{architecture}."
    config: dict = {}
    for key, value in meta.data.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        if name in table:
            config[table[name]] = value
        elif name in ("attention.value_length", "rope.dimension_count"):
            header = Fields(meta.data, meta.where)
            per_head = header.size(f"{prefix}embedding_length") // header.size(f"{prefix}attention.head_count")
            want = header.size(f"{prefix}attention.key_length", per_head)
            if value != want:
                raise ConfigError(f"{meta.where}: {key} is {value}; supported: the head size, {want}")
        else:
            raise ConfigError(
                f"{meta.where}: {key} = {value!r} is not handled; known: {', '.join(prefix + k for k in table)}"
            )
    embedding = tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2:
        config["vocab_size"] = embedding.shape[0]  # the header's count may leave out padding
    config["tie_word_embeddings"] = "output.weight" not in tensors
    return config
