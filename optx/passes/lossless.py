"""bf16 weights in about 11.3 bits, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp

from optx import tensor
from optx.errors import PassError
from optx.formats import Lossless
from optx.ir import replace
from optx.nn.core import Embed, Linear
from optx.nn.moe import GroupedLinear
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class LosslessOptions(PassOptions):
    spare: int = 0  # percent of a byte a weight that a row has for rare exponents beyond what trained weights need

    def storage(self) -> Lossless:
        return Lossless(spare=self.spare)


@register("lossless", axis=Axis.BITS, stage=Stage.WEIGHTS, options=LosslessOptions, exact=True)
def lossless(
    site: Site, part: Linear | GroupedLinear | Embed, opt: LosslessOptions
) -> Linear | GroupedLinear | Embed | Skipped:
    """The same weights with their exponents in a code of variable length and declared room (formats/lossless.py).

    Every number is read back when it is packed: a weight that does not come back bit for bit is an error. Weights that are
    packed already stay as they are. DFloat11, arXiv:2504.11651, is the same idea with Huffman's code.
    """
    name, axis = ("table", -1) if isinstance(part, Embed) else ("weight", -2)
    weight, format_ = getattr(part, name).get_value(), opt.storage()
    if tensor.is_packed(weight):
        return Skipped(f"packed already, {tensor.canonical(weight).format}: no exponents of bf16 to code")
    if reason := format_.check(weight.shape[axis]):
        return Skipped(reason)
    if weight.dtype not in (jnp.bfloat16, jnp.float32):
        raise PassError(f"lossless at {site.path}: {weight.dtype} weights; load with dtype='bfloat16'")
    packed = tensor.quantize(weight, format_, axis=axis)
    if not isinstance(weight, jax.ShapeDtypeStruct) and not bool(_same(weight, packed)):
        raise PassError(f"lossless at {site.path}: {_why(weight, format_, axis)}")
    return replace(part, **{name: packed})


@jax.jit
def _same(weight: jax.Array, packed: tensor.QTensor) -> jax.Array:
    return jnp.all(_bits(weight) == _bits(packed.dequantize()))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype == jnp.bfloat16 else jnp.uint32)


def _why(weight: jax.Array, format_: Lossless, axis: int) -> str:
    other = float(jnp.mean(_bits(weight) != _bits(weight.astype(jnp.bfloat16).astype(weight.dtype))))
    if other:
        return f"{other:.2%} of the weights are no bf16 numbers; load with dtype='bfloat16', which rounds them first"
    length = weight.shape[axis]
    need = int(jnp.max(format_.needed(weight if axis == -1 else jnp.swapaxes(weight, -1, -2))))
    room = format_.room(length)
    more = next((s for s in range(151) if dataclasses.replace(format_, spare=s).room(length) >= need), 150)
    return (
        f"exponents of a row of {length} need {need} bytes beside its codes, and {format_} has room for {room}; "
        f"set spare: {more}, or keep the site out with 'match'"
    )
