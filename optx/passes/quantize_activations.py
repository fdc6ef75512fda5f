"""What enters a projection rounded to few bits, token by token, so that 8 bits meet 8 bits in the product."""

import dataclasses
from typing import Literal

from optx import formats
from optx.errors import FormatError, PassError
from optx.ir import replace
from optx.nn.core import Inner, Linear
from optx.nn.moe import GroupedLinear
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register
from optx.tensor import is_qtensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeActivations(PassOptions):
    format: Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4"]
    group: int | None = None  # numbers of a token that share a scale; None: all of them, or the block of a 4-bit float

    def storage(self) -> formats.Format:
        format_ = formats.writable(self.format, group=self.group)
        # Scales are made anew for every token and stored nowhere, so they need not be short.
        return dataclasses.replace(format_, scale_dtype="float32") if isinstance(format_, formats.Int) else format_


@register("quantize_activations", axis=Axis.BITS, stage=Stage.WEIGHTS, options=QuantizeActivations, exact=False)
def quantize_activations(site: Site, linear: Linear | GroupedLinear, opt: QuantizeActivations) -> Linear | Skipped:
    """y = s_x s_w sum(q_x q_w): rows of x are rounded where they enter, each with the scale of its own absmax (dynamic, per
    token), and int8 meets int8, fp8 meets fp8 in the product where the weight has one scale a channel.

    Dettmers et al. 2022, arXiv:2208.07339 (int8, vector-wise); Micikevicius et al. 2022, arXiv:2209.05433 (fp8). Other pairs of
    formats multiply the rounded values. Nothing becomes smaller: products of 8 bits are faster where compute is the bound.
    """
    if isinstance(linear, GroupedLinear):
        return Skipped("experts: grouped_matmul takes activations as they are")
    if isinstance(linear, Inner):
        return Skipped("the part around it contracts the weight itself")
    weight = linear.weight.get_value()
    if not is_qtensor(weight):
        return Skipped("the weight is dense; quantize_weights or a calibrated pass comes first")
    if linear.activations is not None:
        raise PassError(
            f"quantize_activations at {site.path}: its inputs are rounded to {linear.activations} already; give the site one "
            "rule"
        )
    try:
        format_ = opt.storage()
    except FormatError as error:
        raise PassError(f"quantize_activations at {site.path}: {error}") from None
    if reason := format_.check(weight.shape[-2]):
        raise PassError(f"quantize_activations at {site.path}, weight {list(weight.shape)}: {reason}")
    return replace(linear, activations=format_)
