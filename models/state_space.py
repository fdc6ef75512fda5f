"""What the families with Mamba-2 layers have in common."""

import math

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.errors import ConfigError
from optx.nn import Mamba2

CONTEXT = 2**20  # of families whose config names none, having states alone: bounds a request, costs nothing
NAMES = {"mamba": "linear_attention", "attention": "full_attention"}  # transformers 4's to 5's


def mamba2_rows(prefix: str) -> tuple[Row, ...]:
    """Rows of a Mamba-2 mixer; prefix like `model.layers.{i}.mamba.`."""
    rows = []
    for ours, hf in (("in_proj", "in_proj"), ("out", "out_proj")):
        path = "layers/{i}/mixer/" + ours
        rows.append(Row(path=f"{path}/weight", hf=f"{prefix}{hf}.weight"))
        rows.append(Row(path=f"{path}/bias", hf=f"{prefix}{hf}.bias", kind="vector"))
    rows.append(Row(path="layers/{i}/mixer/conv_weight", hf=f"{prefix}conv1d.weight", kind="conv"))
    vectors = {
        "conv_bias": "conv1d.bias",
        "dt_bias": "dt_bias",
        "a_log": "A_log",
        "skip": "D",
        "norm/weight": "norm.weight",
    }
    rows += [Row(path="layers/{i}/mixer/" + p, hf=f"{prefix}{hf}", kind="vector") for p, hf in vectors.items()]
    return tuple(rows)


def mamba2_from_hf(config: Fields, d: int, *, eps: float, dtype: str):
    """A callable that builds the mixer of the `mamba_*` fields."""
    heads, expand = config.size("mamba_n_heads", 128), config.size("mamba_expand", 2)
    given = config.take("mamba_d_head", (int, str), "auto")
    head_dim = d * expand // heads if given == "auto" else config.size("mamba_d_head")
    check_inner(config, d * expand, heads, head_dim)
    groups, state_dim = config.size("mamba_n_groups", 1), config.size("mamba_d_state", 256)
    conv, conv_bias = config.size("mamba_d_conv", 4), config.take("mamba_conv_bias", bool, True)
    bias = config.take("mamba_proj_bias", bool, False)
    limit = dt_limit(config)
    config.take("mamba_chunk_size", int, None)  # of kernels: the result does not depend on it
    return lambda: Mamba2(
        d, heads=heads, head_dim=head_dim, state_dim=state_dim, groups=groups, conv=conv, conv_bias=conv_bias, bias=bias,
        dt_limit=limit, norm_groups=groups, eps=eps, dtype=dtype,
    )  # fmt: skip


def check_inner(config: Fields, inner: int, heads: int, head_dim: int) -> None:
    """Raises ConfigError when the heads do not fill the width that `expand` gives."""
    if heads * head_dim != inner:
        raise ConfigError(f"{config.where}: {heads} heads of {head_dim} do not fill the inner width, {inner}")


def dt_limit(config: Fields) -> tuple[float, float] | None:
    """`time_step_limit`, the least and largest dt; None where it limits nothing. Infinity has several spellings in JSON."""
    values = config.take("time_step_limit", list, [0.0, math.inf])
    values = [value.get("__float__") if isinstance(value, dict) else value for value in values]
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        raise ConfigError(f"{config.where}: 'time_step_limit' is {values!r}; allowed: two numbers") from None
    if not 0 <= low <= high:
        raise ConfigError(f"{config.where}: 'time_step_limit' is {values!r}; allowed: 0 <= least <= largest")
    return None if low == 0 and math.isinf(high) else (low, high)


def layer_kinds(config: Fields, layers: int) -> list[str]:
    """transformers 5's name of each layer's mixer, from `layer_types` or `layers_block_type`; all recurrent by default."""
    for name in ("layer_types", "layers_block_type"):
        kinds = config.names(name, layers, (*NAMES, *NAMES.values()))
        if kinds is not None:
            config.take("layers_block_type", list, None)
            return [NAMES.get(kind, kind) for kind in kinds]
    return ["linear_attention"] * layers
