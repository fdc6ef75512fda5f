"""Weights in two bits on a trellis, fitted to the inputs that calibration text shows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from optx import tensor
from optx.errors import PassError
from optx.formats import Parts, Trellis
from optx.formats.base import pack_bits
from optx.formats.trellis import STEP, walk
from optx.ir import replace
from optx.nn.core import Linear
from optx.nn.moe import GroupedLinear
from optx.passes.gptq import factor
from optx.passes.quantize_weights import weight_of
from optx.registry import Axis, PassOptions, Seen, Site, Stage, register
from optx.tensor import QTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrellisOptions(PassOptions):
    memory: int = 12  # bits of the trellis' state, even, 8 to 16; two more: about 4x the time, and less error
    damp: float = 0.01  # share of the Gram matrix's mean diagonal that is added to the diagonal
    requantize: bool = False  # True: weights that are packed already are dequantized and rounded again

    @property
    def needs(self):
        return frozenset({"gram"})

    def storage(self) -> Trellis:
        return Trellis(memory=self.memory)


@register("trellis", axis=Axis.BITS, stage=Stage.WEIGHTS, options=TrellisOptions, exact=False)
def trellis(site: Site, linear: Linear | GroupedLinear, opt: TrellisOptions) -> Linear | GroupedLinear:
    """min |X (W' - W)|^2 over W' = Q (scale v(states)): 2 bits a weight and a scale an output channel (formats/trellis.py).

    W and the Gram matrix of the inputs are turned by Q; rows are walked along the trellis a block of channels at a time, each
    block's error made good by the channels that follow, then each row's scale is that of least output error. QTIP, Tseng et al.
    2024, arXiv:2406.11235. Reading a weight turns it back: 2 (n_1 + .. + n_k) flops for D = n_1 .. n_k, 146 for D = 576.
    """
    weight, format_ = weight_of(site, linear, opt), opt.storage()
    if reason := format_.check(weight.shape[-2]):
        raise PassError(f"trellis at {site.path}, weight {list(weight.shape)}: {reason}")
    if isinstance(weight, jax.ShapeDtypeStruct):
        return replace(linear, weight=tensor.quantize(weight, format_))
    if not isinstance(site.seen, Seen):
        raise PassError(f"trellis at {site.path}: no statistics of its inputs; compile with calibration text")
    if not bool(jnp.all(jnp.isfinite(weight))):
        raise PassError(
            f"trellis at {site.path}: the weight holds NaN or infinities, which a trellis has no values for"
        )
    rows, gram = jnp.swapaxes(weight, -1, -2), site.seen.gram
    one = functools.partial(solve, format=format_, damp=opt.damp)
    parts, worst = one(rows, gram) if rows.ndim == 2 else jax.lax.map(lambda each: one(*each), (rows, gram))
    if not bool(jnp.all(jnp.isfinite(worst))):
        raise PassError(
            f"trellis at {site.path}: the Gram matrix of {int(jnp.sum(site.seen.tokens)):,} tokens, with damp {opt.damp:g} on "
            "its diagonal, has no Cholesky factor; give more calibration text or a larger damp"
        )
    packed = QTensor(data=parts.data, scale=parts.scale, format=format_, length=weight.shape[-2], dtype=weight.dtype)
    return replace(linear, weight=packed)


@functools.partial(jax.jit, static_argnames=("format", "damp"))
def solve(rows: jax.Array, gram: jax.Array, *, format: Trellis, damp: float) -> tuple[Parts, jax.Array]:
    """rows float[F, D], gram float32[D, D] -> (Parts, sum of the factor's diagonal)."""
    turn = format.rotation(rows.shape[-1])
    w, gram = turn(rows.astype(jnp.float32)), turn(turn(gram).T).T
    gram = (gram + gram.T) / 2
    upper = factor(gram, damp)
    scale = format.scale(w)
    codes, values = walk(w / scale, upper, format.memory)
    damped = gram + damp * jnp.mean(jnp.diagonal(gram)) * jnp.eye(gram.shape[0])
    scale = format.refit(w, values, jnp.matmul(values, damped, precision="highest"), scale)
    return Parts(data=pack_bits(codes, STEP), scale=scale), jnp.sum(jnp.diagonal(upper))
