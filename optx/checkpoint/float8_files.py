"""HF checkpoints in fp8 with a scale a block, as DeepSeek-V3's: `NAME.weight` in e4m3 beside `NAME.weight_scale_inv`.

A weight is code times scale (the name speaks of what the quantizer divided by), blocks of 128 x 128 in the order of the file's
matrix [out, in]; what has no scales is stored as it is. `quantization_config` says quant_method "fp8" and `weight_block_size`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optx.checkpoint.mapping import Apart, Raw
from optx.errors import CheckpointError
from optx.formats import Float8Block, Parts

SCALE = "_scale_inv"  # behind the name of a weight
METHOD = "fp8"
HANDLED = frozenset(
    {"quant_method", "weight_block_size", "fmt", "activation_scheme", "modules_to_not_convert", "scale_fmt"}
)


def blocks_of(config: dict[str, Any], where: str) -> tuple[dict[str, Any], Float8Block | None]:
    """The config without such a `quantization_config`, and the format that it speaks of; any other stays, and None.

    Activations stay as they are, whatever `activation_scheme` says. Raises CheckpointError for blocks that are not square,
    another fp8 than e4m3, and fields that are not known.
    """
    details = config.get("quantization_config")
    if not isinstance(details, dict) or details.get("quant_method") != METHOD:
        return config, None
    at = f"{where}: quantization_config"
    if unknown := sorted(set(details) - HANDLED):
        raise CheckpointError(f"{at}: {', '.join(unknown)}: not known of an fp8 checkpoint; allowed: {sorted(HANDLED)}")
    size, fmt = details.get("weight_block_size"), details.get("fmt", "e4m3")
    square = isinstance(size, Sequence) and len(size) == 2 and size[0] == size[1] and isinstance(size[0], int)
    if not square or size[0] < 1:
        raise CheckpointError(f"{at}: 'weight_block_size' is {size!r}; supported: a square block, as [128, 128]")
    if fmt != "e4m3":
        raise CheckpointError(f"{at}: 'fmt' is {fmt!r}; supported: e4m3")
    return {name: value for name, value in config.items() if name != "quantization_config"}, Float8Block(group=size[0])


def joined(raws: Mapping[str, Raw], format_: Float8Block) -> dict[str, Raw]:
    """Tensors with each weight and its scales as one, which reads as what they stand for.

    Raises: CheckpointError for scales without a weight or of a wrong shape, and for fp8 without scales.
    """
    out = {}
    for name, raw in raws.items():
        scale = raws.get(name + SCALE)
        if name.endswith(SCALE):
            if name.removesuffix(SCALE) not in raws:
                raise CheckpointError(
                    f"{raw.where}: {raw.text}: scales without their weight {name.removesuffix(SCALE)}"
                )
            continue
        if scale is None:
            if raw.dtype.startswith("float8"):
                raise CheckpointError(f"{raw.where}: {raw.text}: fp8 without its scales {name}{SCALE}")
            out[name] = raw
            continue
        _check(raw, scale, format_)
        read = _reader(raw, scale, format_)
        out[name] = dataclasses.replace(raw, dtype="bfloat16", read=read, apart=Apart(raw, scale, format_))
    return out


def _check(raw: Raw, scale: Raw, format_: Float8Block) -> None:
    if len(raw.shape) != 2 or raw.dtype != "float8_e4m3fn":
        raise CheckpointError(f"{raw.where}: {raw.text}: has scales {scale.text}; needs a matrix in float8_e4m3fn")
    need = tuple(-(-n // format_.group) for n in raw.shape)
    if scale.shape != need or scale.dtype != "float32":
        raise CheckpointError(f"{scale.where}: {scale.text}: scales of {raw.text} need float32{list(need)}")


def _reader(raw: Raw, scale: Raw, format_: Float8Block):
    def read() -> np.ndarray:
        return np.asarray(_dense(jnp.asarray(raw.read()), jnp.asarray(scale.read()), format_))

    return read


def _decode(data, scale, format_):
    return format_.decode(Parts(data=data, scale=scale), data.shape[-1], jnp.float32)


_dense = jax.jit(_decode, static_argnums=2)
