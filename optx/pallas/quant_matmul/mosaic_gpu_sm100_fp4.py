"""`quant_matmul` of 4-bit floats by 4-bit floats on Blackwell: NVFP4 by NVFP4 and MXFP4 by MXFP4, scales of blocks in the MMA.

Rows of x are rounded by XLA to the weight's format; codes and scales of blocks go to the tensor cores as they are
(tcgen05.mma kind::mxf4nvf4, PTX ISA 9.1, section 9.7.17.10.7). The float32 scales of rows of nvfp4 (arXiv:2509.25149) meet the
finished sums. Never run on hardware so far.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from optx import tensor
from optx.errors import LoweringError
from optx.formats import Float4, Format
from optx.formats.base import pack_bits
from optx.pallas.matmul import gemm_sm100 as gemm
from optx.pallas.quant_matmul.mosaic_gpu_sm100 import fp4_codes, join_scale, shape_reason, split_scale
from optx.tensor import Arranged, QTensor, leaf_bytes

DEPTH = 256  # contracted numbers of a step: a row of the widest swizzle


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks(Arranged):
    """A weight [D, F] as the kernel reads it, made by `relayout`.

    codes float4_e2m1fn[F, D]; scale float8_e4m3fn (nvfp4) or float8_e8m0fnu (mxfp4), as `gemm_sm100.scale_blocks` has it;
    outer float32[F], or None (mxfp4).
    """

    codes: jax.Array
    scale: jax.Array
    outer: jax.Array | None
    format: Format = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(default=jnp.dtype("bfloat16"), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[1], self.codes.shape[0]

    @property
    def length(self) -> int:
        return self.codes.shape[1]

    @property
    def ndim(self) -> int:
        return 2

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size // 2 + leaf_bytes(self.scale) + (0 if self.outer is None else leaf_bytes(self.outer))

    def qtensor(self) -> QTensor:
        """The weight in its canonical packing: the inverse of `relayout`."""
        whole, fours = self.scale.shape[:2]
        scale = self.scale.reshape(whole, fours, 32, 4, 4)
        scale = scale.transpose(0, 3, 2, 1, 4).reshape(whole * 128, fours * 4)
        scale = join_scale(scale, self.outer)
        data = pack_bits(lax.bitcast_convert_type(self.codes, jnp.uint4).astype(jnp.uint8), 4)
        return QTensor(data=data, scale=scale, format=self.format, length=self.length, dtype=self.dtype)

    def dequantize(self) -> jax.Array:
        """dtype[D, F]."""
        return self.qtensor().dequantize()


def _parts(q: QTensor) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(codes [rows, D], scales of blocks in the order of the MMA, float32 scales of rows or None)."""
    scale, outer = split_scale(q.format, q.scale)
    return fp4_codes(q.data), gemm.scale_blocks(scale), outer


@jax.jit
def relayout(w: QTensor) -> Blocks:
    """The same weight as `Blocks`. w: what `supports` takes."""
    codes, scale, outer = _parts(w)
    return Blocks(codes=codes, scale=scale, outer=outer, format=w.format, dtype=w.dtype)


def plan_for(rows: int, w: Blocks, tiles: gemm.Tiles | None = None) -> gemm.Plan:
    d, f = w.shape
    plan = gemm.Plan(
        tiles=tiles or gemm.Tiles(rows=16, depth=DEPTH, stages=2),
        depth=d,
        outputs=f,
        rows=rows,
        kind="blocks",
        group=w.format.group,
        factors=2 if w.outer is not None else 0,
    )
    return plan if tiles else dataclasses.replace(plan, tiles=gemm.tiles_for(plan, DEPTH, w.codes.dtype, w.codes.dtype))


def quant_matmul(
    x: jax.Array, w: QTensor | Blocks, activations: Format | None = None, *, tiles: gemm.Tiles | None = None
) -> jax.Array:
    """x [..., D] rounded to `activations`, times w [D, F] -> [..., F] in x's dtype.

    Raises: LoweringError for what `supports` declines.
    """
    reason = _declines(w, activations)
    if reason:
        raise LoweringError(f"quant_matmul: {reason}")
    d, f = w.shape
    if x.shape[-1] != d:
        raise LoweringError(f"quant_matmul: x {list(x.shape)} meets w {list(w.shape)}; allowed: x [..., {d}]")
    if x.size == 0:
        return jnp.zeros((*x.shape[:-1], f), x.dtype)
    w = w if isinstance(w, Blocks) else relayout(w)
    codes, scale, outer = _parts(tensor.quantize(x.reshape(-1, d), activations, axis=-1))
    more = (w.scale, scale, *(() if outer is None else (w.outer, outer)))
    y = gemm.product(codes, w.codes, *more, plan=plan_for(len(codes), w, tiles), dtype=x.dtype)
    return y.reshape(*x.shape[:-1], f)


def supports(args, target) -> str | None:
    """args: weight (QTensor or Blocks, abstract will do), activations (a format)."""
    return _declines(args["weight"], args.get("activations"))


def _declines(w, activations) -> str | None:
    if not isinstance(activations, Float4):
        return f"activations {'as they are' if activations is None else f'in {activations}'}; allowed: mxfp4, nvfp4"
    if not isinstance(w, Blocks | QTensor):
        return f"w is {type(w).__name__}; allowed: QTensor, Blocks"
    if w.format != activations:
        return f"activations in {activations} by w in {w.format}; allowed: both mxfp4, or both nvfp4"
    return None if isinstance(w, Blocks) else shape_reason(w, DEPTH)
