"""quant_matmul on Blackwell, 16-bit activations: codes are widened to bfloat16 into tensor memory, where the MMA reads them.

A lane of tensor memory is an output, so a thread widens numbers of one output and needs one scale a group; nothing is re-laid
in fragments (`optx.pallas.matmul.gemm_sm100`). Never run on hardware so far.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from optx.errors import LoweringError
from optx.formats import Float4, Float8, Format, Int, fp4
from optx.formats.base import pack_bits, unpack_bits
from optx.pallas.matmul import gemm_sm100 as gemm
from optx.tensor import Arranged, QTensor, leaf_bytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lanes(Arranged):
    """A packed weight [D, F] as the kernel reads it, made by `relayout`.

    codes [F, D], int4, int8, float8_e4m3fn or float4_e2m1fn; scale [groups, F] or None, zero bfloat16[groups, F] or None (of
    signed codes); outer float32[F] or None: what a finished sum is multiplied by.
    """

    codes: jax.Array
    scale: jax.Array | None
    zero: jax.Array | None
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
        return self.size * bits(self.format) // 8 + sum(
            leaf_bytes(part) for part in (self.scale, self.zero, self.outer) if part is not None
        )

    def qtensor(self) -> QTensor:
        """The weight in its canonical packing: the inverse of `relayout`."""
        width, form = bits(self.format), self.format
        data = self.codes
        if isinstance(form, Float4):
            data = pack_bits(lax.bitcast_convert_type(data, jnp.uint4).astype(jnp.uint8), 4)
        elif width == 4:
            data = pack_bits((data.astype(jnp.int8) + 8).astype(jnp.uint8), 4)
        elif isinstance(form, Int) and not form.symmetric:
            data = (data.astype(jnp.int16) + 128).astype(jnp.uint8)
        zero = self.zero
        if zero is not None:
            zero = (zero.astype(jnp.float32).T + 2 ** (width - 1)).astype(jnp.uint8)
        if isinstance(form, Float4):
            scale = join_scale(self.scale.T, self.outer)
        elif self.scale is None:
            scale = self.outer[:, None].astype(form.scale_dtype)
        else:
            scale = self.scale.T
        return QTensor(data=data, scale=scale, zero=zero, format=form, length=self.length, dtype=self.dtype)

    def dequantize(self) -> jax.Array:
        """dtype[D, F]."""
        return self.qtensor().dequantize()


def bits(form: Format) -> int:
    return {Int: getattr(form, "width", None), Float8: 8, Float4: 4}[type(form)]


def fp4_codes(data: jax.Array) -> jax.Array:
    """uint8[rows, D / 2], two codes a byte -> float4_e2m1fn[rows, D]."""
    return lax.bitcast_convert_type(unpack_bits(data, 4).astype(jnp.uint4), jnp.float4_e2m1fn)


def split_scale(form: Float4, scale: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Stored bytes [F, ...] -> scales of blocks in float8_e4m3fn (nvfp4) or float8_e8m0fnu (mxfp4), and of nvfp4 float32[F]."""
    if form.kind == "mx":
        return lax.bitcast_convert_type(scale, jnp.float8_e8m0fnu), None
    blocks, outer = scale[:, : -fp4.OUTER], scale[:, -fp4.OUTER :]
    return lax.bitcast_convert_type(blocks, jnp.float8_e4m3fn), lax.bitcast_convert_type(outer, jnp.float32)


def join_scale(scale: jax.Array, outer: jax.Array | None) -> jax.Array:
    """Inverse of `split_scale`."""
    parts = [lax.bitcast_convert_type(part, jnp.uint8) for part in (scale, outer) if part is not None]
    return jnp.concatenate(parts, axis=-1)


@jax.jit
def relayout(w: QTensor) -> Lanes:
    """The same weight as `Lanes`. w: what `supports` takes."""
    form, width, data, scale, zero, outer = w.format, bits(w.format), w.data, w.scale, None, None
    if isinstance(form, Float4):
        data = fp4_codes(data)
        scale, outer = split_scale(form, scale)
    elif width == 4:
        data = (unpack_bits(data, 4).astype(jnp.int8) - 8).astype(jnp.int4)
    elif isinstance(form, Int) and not form.symmetric:
        data = (data.astype(jnp.int16) - 128).astype(jnp.int8)
    if w.zero is not None:
        zero = (w.zero.astype(jnp.float32) - 2 ** (width - 1)).astype(jnp.bfloat16).T
    if outer is None and zero is None and scale.shape[1] == 1:
        scale, outer = None, scale[:, 0].astype(jnp.float32)
    scale = None if scale is None else scale.T
    return Lanes(codes=data, scale=scale, zero=zero, outer=outer, format=form, dtype=w.dtype)


def plan_for(rows: int, w: Lanes, tiles: gemm.Tiles | None = None) -> gemm.Plan:
    """w: abstract will do."""
    d, f = w.shape
    depth = 128 if d % 128 == 0 else 64
    plan = gemm.Plan(
        tiles=tiles or gemm.Tiles(rows=16, depth=depth, stages=2),
        depth=d,
        outputs=f,
        rows=rows,
        kind="packed",
        group=0 if w.scale is None else d // w.scale.shape[0],
        zero=w.zero is not None,
        factors=int(w.outer is not None),
    )
    if tiles is None:
        scale_dtype = jnp.bfloat16 if w.scale is None else w.scale.dtype
        tiles = gemm.tiles_for(plan, depth, jnp.bfloat16, w.codes.dtype, scale_dtype)
    return dataclasses.replace(plan, tiles=tiles)


def quant_matmul(
    x: jax.Array, w: QTensor | Lanes, activations: Format | None = None, *, tiles: gemm.Tiles | None = None
) -> jax.Array:
    """bfloat16 x [..., D], w [D, F] -> [..., F]. A `QTensor` is re-laid on the way; lower a model with `relayout`.

    Raises: LoweringError for what `supports` declines.
    """
    reason = _declines(w, x.dtype, activations)
    if reason:
        raise LoweringError(f"quant_matmul: {reason}")
    d, f = w.shape
    if x.shape[-1] != d:
        raise LoweringError(f"quant_matmul: x {list(x.shape)} meets w {list(w.shape)}; allowed: x [..., {d}]")
    if x.size == 0:
        return jnp.zeros((*x.shape[:-1], f), x.dtype)
    w = w if isinstance(w, Lanes) else relayout(w)
    flat = x.reshape(-1, d)
    more = [part for part in (w.scale, w.zero, w.outer) if part is not None]
    y = gemm.product(flat, w.codes, *more, plan=plan_for(len(flat), w, tiles), dtype=x.dtype)
    return y.reshape(*x.shape[:-1], f)


def supports(args, target) -> str | None:
    """args: weight (QTensor or Lanes, abstract will do); dtype of x and activations (a format) if they are known."""
    return _declines(args["weight"], args.get("dtype") or jnp.bfloat16, args.get("activations"))


def _declines(w, dtype, activations) -> str | None:
    if activations is not None:
        return f"activations in {activations}; allowed: as they are"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"x is {jnp.dtype(dtype)}; allowed: bfloat16"
    if isinstance(w, Lanes):
        return None
    if not isinstance(w, QTensor):
        return f"w is {type(w).__name__}; allowed: QTensor, Lanes"
    form = w.format
    integer = isinstance(form, Int) and form.width in (4, 8)
    if not (integer or isinstance(form, Float4) or (isinstance(form, Float8) and form.kind == "e4m3")):
        return f"w is {form}; allowed: int4, int8, fp8_e4m3, mxfp4, nvfp4"
    return shape_reason(w, 64) or _group_reason(w)


def shape_reason(w: QTensor, depth: int) -> str | None:
    """Why the kernels do not take a weight of this shape; depth: what D is to be a multiple of."""
    if w.ndim != 2 or w.axis != -2:
        return f"w {list(w.shape)} is packed along axis {w.axis}; allowed: a matrix [D, F] packed along D"
    if w.shape[0] % depth or w.shape[1] % gemm.OUTPUTS:
        return f"w is {list(w.shape)}; allowed: D in multiples of {depth}, F of {gemm.OUTPUTS}"
    return None


def _group_reason(w: QTensor) -> str | None:
    group, depth = w.format.group or w.length, 128 if w.length % 128 == 0 else 64
    if group < 16 or (group % depth and depth % group):
        return f"w has groups of {group}; allowed: 16, 32, 64 or a multiple of {depth}"
    return None
