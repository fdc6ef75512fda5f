"""Weights stored in fewer bits, round to nearest."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from optx import formats, tensor
from optx.errors import FormatError, PassError
from optx.formats.search import best_grid
from optx.ir import replace
from optx.nn.core import Linear
from optx.nn.moe import GroupedLinear
from optx.registry import Axis, PassOptions, Seen, Site, Stage, register

Scales = Literal["absmax", "mse", "activation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeWeights(PassOptions):
    format: Literal["int8", "int4", "int3", "int2", "fp8_e4m3", "fp8_e5m2", "fp8_block", "mxfp4", "nvfp4"]
    group: int | None = None  # input channels a scale; None: an output channel, or the block of the format
    symmetric: bool = True  # False: a zero point a group (integers only)
    scales: Scales = "absmax"  # mse: of least error; activation: of least error weighted by the inputs' mean square
    requantize: bool = False  # True: weights that are packed already are dequantized and rounded again

    @property
    def needs(self):
        return frozenset({"square"}) if self.scales == "activation" else frozenset()

    def storage(self) -> formats.Format:
        return formats.writable(self.format, symmetric=self.symmetric, group=self.group)


@register("quantize_weights", axis=Axis.BITS, stage=Stage.WEIGHTS, options=QuantizeWeights, exact=False)
def quantize_weights(site: Site, linear: Linear | GroupedLinear, opt: QuantizeWeights) -> Linear | GroupedLinear:
    """w ~ s (q - z), q in `format`, s and z a group of input channels; activations stay as they are (W4A16, W8A16).

    Scale rule: formats.Int, or a search by error (formats.search). A decode step reads format.bits a weight instead of 16 or
    32. Experts are rounded each by itself; embedding tables and routers stay as they are. Rounding a packed file a second time
    adds its error to the first, so it needs `requantize: true`.
    """
    weight = weight_of(site, linear, opt)
    try:
        if opt.scales == "absmax" or isinstance(weight, jax.ShapeDtypeStruct):
            return replace(linear, weight=tensor.quantize(weight, opt.storage(), axis=-2))
        if opt.needs and not isinstance(site.seen, Seen):
            raise PassError(
                f"quantize_weights at {site.path}: no statistics of its inputs; compile with calibration text"
            )
        return replace(linear, weight=_searched(weight, opt, site.seen))
    except FormatError as error:
        raise PassError(f"quantize_weights at {site.path}, weight {list(weight.shape)}: {error}") from None


def weight_of(site: Site, linear: Linear | GroupedLinear, opt: QuantizeWeights):
    """The dense weight of a site. Raises PassError for one that is packed where the options do not say `requantize`."""
    weight = linear.weight.get_value()
    try:
        format_ = opt.storage()
    except FormatError as error:
        raise PassError(f"quantize_weights at {site.path}, weight {list(weight.shape)}: {error}") from None
    if format_.block_rows > 1 and (opt.needs or opt.scales != "absmax"):
        raise PassError(
            f"{site.path}: {opt.format} has a scale for several output channels, which can only be that of their largest "
            "number: use quantize_weights with scales: absmax"
        )
    if tensor.is_qtensor(weight):
        if not opt.requantize:
            raise PassError(
                f"quantize_weights at {site.path}: the weight is packed already, {weight.format}{list(weight.shape)}; "
                "load with weights='dense', narrow 'match', or set requantize: true"
            )
        weight = tensor.lift(lambda w: w.dequantize(), weight)
    return weight


def grid_of(format: formats.Format, rows: jax.Array, scales: Scales, square: jax.Array | None = None):
    """Scales and zero points of rows [..., F, D] by the rule; square: float[..., D], mean square of the inputs."""
    if scales == "absmax":
        return format.grid(rows)
    return best_grid(format, rows, None if scales == "mse" else square[..., None, :])


def _searched(weight: jax.Array, opt: QuantizeWeights, seen: Seen | None) -> tensor.QTensor:
    format_, rows = opt.storage(), jnp.swapaxes(weight, -1, -2)
    if reason := format_.check(rows.shape[-1]):
        raise FormatError(reason)
    scale, zero = grid_of(format_, rows, opt.scales, seen.square if seen else None)
    codes = format_.code(rows.astype(jnp.float32), *format_.steps(scale, zero, rows.shape[-1]))
    parts = format_.assemble(codes, scale, zero)
    return tensor.QTensor(
        data=parts.data, scale=parts.scale, zero=parts.zero, format=format_, length=rows.shape[-1], dtype=weight.dtype
    )
