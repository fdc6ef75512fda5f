"""Mamba-2: state-space layers alone, no attention and no MLP (Dao and Gu 2024, arXiv:2405.21060)."""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.models.state_space import CONTEXT, check_inner, dt_limit, mamba2_rows
from optx.nn import Block, CausalLM, Embed, Linear, Mamba2, Residual, RMSNorm

HF_TYPES = {"mamba2": "Mamba2ForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = None
IGNORED: tuple[str, ...] = ()

ROWS = (
    Row(path="embed/table", hf="backbone.embeddings.weight", kind="table"),
    Row(path="layers/{i}/norm/weight", hf="backbone.layers.{i}.norm.weight", kind="vector"),
    *mamba2_rows("backbone.layers.{i}.mixer."),
    Row(path="norm/weight", hf="backbone.norm_f.weight", kind="vector"),
    Row(path="output/weight", hf="lm_head.weight"),
)


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `mamba2` config. Raises ConfigError for what is not handled."""
    d, vocab, layers = config.size("hidden_size"), config.size("vocab_size"), config.layers()
    heads, head_dim = config.size("num_heads", 128), config.size("head_dim", 64)
    state_dim, groups = config.size("state_size", 128), config.size("n_groups", 8)
    conv, conv_bias = config.size("conv_kernel", 4), config.take("use_conv_bias", bool, True)
    bias = config.take("use_bias", bool, False)
    eps = config.positive("layer_norm_epsilon", 1e-5)
    limit = dt_limit(config)
    stream = "float32" if config.take("residual_in_fp32", bool, True) else None
    tied = config.take("tie_word_embeddings", bool, False)
    check_inner(config, d * config.size("expand", 2), heads, head_dim)
    config.expect("hidden_act", "silu")
    config.expect("rms_norm", True)
    # Of training and kernels; norm_before_gate is not read by transformers, which norms after the gate.
    for name in ("chunk_size", "norm_before_gate", "rescale_prenorm_residual"):
        config.take(name, (bool, int), None)
    for name in ("time_step_rank", "time_step_min", "time_step_max", "time_step_floor"):  # of initialization
        config.take(name, (float, int, str), None)
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, out=stream and dtype, dtype=dtype)

    def block():
        mixer = Mamba2(
            d, heads=heads, head_dim=head_dim, state_dim=state_dim, groups=groups, conv=conv, conv_bias=conv_bias,
            bias=bias, dt_limit=limit, norm_groups=groups, eps=eps, dtype=dtype,
        )  # fmt: skip
        return Block(norm=norm(), mixer=mixer, residual=stream and Residual(dtype=stream))

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block() for _ in range(layers)],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=CONTEXT,
    )
