"""Weights stored in fewer bits, round to nearest."""

import dataclasses
from typing import Literal

from optx import formats, tensor
from optx.errors import FormatError, PassError
from optx.ir import replace
from optx.nn.core import Linear
from optx.nn.moe import GroupedLinear
from optx.registry import Axis, PassOptions, Site, Stage, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeWeights(PassOptions):
    format: Literal["int8", "int4", "int3", "int2", "fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4"]
    group: int | None = None  # input channels a scale; None: an output channel, or the block of a 4-bit float
    symmetric: bool = True  # False: a zero point a group (integers only)
    requantize: bool = False  # True: weights that are packed already are dequantized and rounded again

    def storage(self) -> formats.Format:
        return formats.writable(self.format, symmetric=self.symmetric, group=self.group)


@register("quantize_weights", axis=Axis.BITS, stage=Stage.WEIGHTS, options=QuantizeWeights, exact=False)
def quantize_weights(site: Site, linear: Linear | GroupedLinear, opt: QuantizeWeights) -> Linear | GroupedLinear:
    """w ~ s (q - z), q in `format`, s and z a group of input channels; activations stay as they are (W4A16, W8A16).

    Scale rule: formats.Int. A decode step reads format.bits a weight instead of 16 or 32. Experts are rounded each by
    itself; embedding tables and routers stay as they are. Rounding a packed file a second time adds its error to the
    first, so it needs `requantize: true`.
    """
    weight = linear.weight.get_value()
    if tensor.is_qtensor(weight):
        if not opt.requantize:
            raise PassError(
                f"quantize_weights at {site.path}: the weight is packed already, {weight.format}{list(weight.shape)}; "
                "load with weights='dense', narrow 'match', or set requantize: true"
            )
        weight = tensor.lift(lambda w: w.dequantize(), weight)
    try:
        return replace(linear, weight=tensor.quantize(weight, opt.storage(), axis=-2))
    except FormatError as error:
        raise PassError(f"quantize_weights at {site.path}, weight {list(weight.shape)}: {error}") from None
