"""Model families: one file each, `from_hf` and the weight-name rows beside it.

A family module has HF_TYPES (model_type -> transformers class, the first stands for its GGUF files), GGUF_ARCHITECTURE,
ROWS, IGNORED, `from_hf(config, dtype)` and `gguf_config(meta, tensors)`. GGUF_ARCHITECTURE is None where GGUF files are not
read.
"""

from types import ModuleType

from optx.errors import ConfigError, did_you_mean
from optx.models import (
    bamba,
    deepseek_v3,
    deepseek_v32,
    gemma3,
    gpt_oss,
    granitemoehybrid,
    jamba,
    llama,
    mamba2,
    minimax,
    mixtral,
    nemotron_h,
    qwen2,
    qwen3,
    qwen3_moe,
    qwen3_next,
    smollm3,
)

FAMILIES: tuple[ModuleType, ...] = (
    llama,
    qwen3,
    gemma3,
    gpt_oss,
    qwen2,
    smollm3,
    mixtral,
    qwen3_moe,
    qwen3_next,
    jamba,
    minimax,
    mamba2,
    bamba,
    granitemoehybrid,
    deepseek_v3,
    deepseek_v32,
    nemotron_h,
)


def by_hf_type(model_type: object, where: str) -> ModuleType:
    """The family of an HF `model_type`. Raises ConfigError naming the nearest."""
    table = {name: family for family in FAMILIES for name in family.HF_TYPES}
    if not isinstance(model_type, str) or model_type not in table:
        raise ConfigError(f"{where}: model_type {model_type!r} is not supported{did_you_mean(str(model_type), table)}")
    return table[model_type]


def by_gguf_architecture(name: object, where: str) -> ModuleType:
    """The family of a GGUF `general.architecture`. Raises ConfigError naming the nearest."""
    table = {family.GGUF_ARCHITECTURE: family for family in FAMILIES if family.GGUF_ARCHITECTURE}
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"{where}: architecture {name!r} is not supported{did_you_mean(str(name), table)}")
    return table[name]
