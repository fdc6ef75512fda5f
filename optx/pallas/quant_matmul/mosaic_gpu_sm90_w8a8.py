"""`quant_matmul` with 8-bit activations on Hopper: int8 x int8 -> int32 and fp8 x fp8 -> float32 on the tensor cores.

Rows of x are rounded first (one read, one write), then one persistent kernel multiplies: a warpgroup copies tiles of x and w
by TMA, two or three compute. Both operands lie with the contracted axis last, as 8-bit `wgmma` wants them.
With one scale a row and a channel the scales are applied once, to the finished sums; with a scale per 128 of the
contracted axis every 128 terms are summed on their own and promoted into float32 sums, as DeepGEMM does
(github.com/deepseek-ai/DeepGEMM; DeepSeek-V3, arXiv:2412.19437, section 3.3).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from optx.errors import LoweringError
from optx.formats import Float8, Format, Int
from optx.pallas.late import dependent, plgpu
from optx.tensor import Arranged, QTensor, is_qtensor, leaf_bytes

DTYPES = ("bfloat16", "float16")  # of x
BLOCKS = 132  # persistent blocks: the SMs of H100 SXM and H200; on a part with fewer some blocks wait their turn
DEPTH = 128  # contracted numbers a step: a row of the widest swizzle; also the group of block scales
SHARED = 232448 - 2048  # bytes of shared memory a block may have, less barriers and alignment
KEEP = 16384  # numbers of a row that 128 threads keep in registers while they look for its largest
MANY = 1 << 22  # numbers of x from which on rounding has a kernel
REGISTERS = {2: (232, 40), 3: (160, 32)}  # by consumers: of each, of the warpgroup that copies
WIDE = 32  # columns of the result that pass through shared memory at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of a work item. Its warpgroups share out the rows or (by_rows False) the columns."""

    rows: int  # of x; 64 a warpgroup and `wgmma`
    cols: int  # outputs
    stages: int  # steps in flight
    by_rows: bool = True
    consumers: int = 2  # warpgroups that compute: 2 or 3
    band: int = 16  # row tiles that pass over the columns together: what they share stays in the L2 cache
    programs: int = BLOCKS  # thread blocks at most; each takes every so many-th item
    interpretable: bool = False  # one view of shared memory instead of two: what the interpreter can run

    @property
    def wg_rows(self) -> int:
        return self.rows // self.consumers if self.by_rows else self.rows

    @property
    def wg_cols(self) -> int:
        return self.cols if self.by_rows else self.cols // self.consumers

    @property
    def width(self) -> int:
        """Columns of a piece of the result."""
        return math.gcd(WIDE, self.wg_cols)


def tiles_for(m: int, f: int, blocks: bool) -> Tiles:
    """The sizes whose items take the fewest turns of the chip's blocks, weighed by the time of an item.

    blocks: scales per 128 of the contracted axis (two sets of sums: half of the columns).
    """
    if m <= 64:  # streams weights: an item costs its weights, x comes from the L2 cache
        cols = min(range(16, 257, 16), key=lambda c: (_turns(-(-f // c)) * (c + m // 4 + 8), -c))
        return _fill(Tiles(rows=64, cols=cols, stages=0, by_rows=False), blocks)

    def tiles(rows, cols):
        return Tiles(rows=rows, cols=cols, stages=0, consumers=rows // 64)

    def cost(t):  # what the shared memory brings and the L2 cache sends for a step
        return _turns(-(-m // t.rows) * -(-f // t.cols)) * (t.cols + t.rows - 32)

    narrow = [tiles(128, c) for c in (128, 96, 64, 32)]
    wide = [tiles(192, 128)] if blocks else [tiles(128, 256), tiles(128, 192)]
    return _fill(min(wide + narrow, key=cost), blocks)


def _turns(items: int) -> int:
    return -(-items // BLOCKS)


def _fill(tiles: Tiles, blocks: bool) -> Tiles:
    """tiles with as many stages as shared memory holds."""
    return dataclasses.replace(tiles, stages=min(24, (SHARED - _fixed(tiles)) // _stage(tiles, blocks)))


def _fixed(tiles):
    return tiles.consumers * 2 * tiles.wg_rows * tiles.width * 2 + 2 * 4 * (tiles.rows + _padded(tiles.cols))


def _stage(tiles, blocks):
    return (tiles.rows + tiles.cols) * DEPTH + (4 * (tiles.rows + _padded(tiles.cols)) if blocks else 0)


def _padded(n: int) -> int:
    """Scales of a slot: copies and slots are multiples of 128 bytes."""
    return -(-n // 32) * 32


# --- The weight as the kernel reads it -----------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Panels(Arranged):
    """An 8-bit weight [D, F] in panels of 128 contracted numbers. Made by `relayout`.

    data [D / 128, F, 128]: what one copy brings lies side by side in memory, not 128 bytes here and there;
    scale float32[D / group or 1, F rounded up to 4].
    """

    data: jax.Array
    scale: jax.Array
    format: Format = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})  # D
    dtype: jnp.dtype = dataclasses.field(default=jnp.dtype("bfloat16"), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.data.shape[1]

    @property
    def ndim(self) -> int:
        return 2

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return leaf_bytes(self.data) + leaf_bytes(self.scale)

    def qtensor(self) -> QTensor:
        """The weight in its canonical packing: the inverse of `relayout`."""
        d, f = self.shape
        data = jnp.transpose(self.data, (1, 0, 2)).reshape(f, d)
        scale = self.scale[:, :f].T.astype(self.format.scale_dtype)
        return QTensor(data=data, scale=scale, format=self.format, length=d, dtype=self.dtype)

    def dequantize(self) -> jax.Array:
        """dtype[D, F]."""
        return self.qtensor().dequantize()


@jax.jit
def relayout(w: QTensor) -> Panels:
    """The same weight as `Panels`. w: what `supports` takes."""
    f, d = w.data.shape
    data = jnp.transpose(w.data.reshape(f, d // DEPTH, DEPTH), (1, 0, 2))
    return Panels(data=data, scale=_beside(w.scale), format=w.format, length=d, dtype=w.dtype)


def _beside(scale):
    """[N, groups] -> float32[groups, N rounded up to 4]: rows of a copy are multiples of 16 bytes."""
    return jnp.pad(scale.astype(jnp.float32).T, ((0, 0), (0, -scale.shape[0] % 4)))


# --- What is taken ---------------------------------------------------------------------------------------------------


def supports(args: Mapping[str, Any], target: Any) -> str | None:
    """None, or why this kernel does not take the call site. Facts read: weight, activations, dtype (of x, if known)."""
    if getattr(target, "platform", None) != "gpu" or getattr(target, "arch", None) != "sm90":
        return "needs a Hopper GPU (sm90)"
    if args.get("dtype", "bfloat16") not in DTYPES:
        return f"x {args['dtype']}; takes {' and '.join(DTYPES)}"
    reason = _refusal(args["weight"], args.get("activations"))
    return None if reason is None else f"{reason[0]} {reason[1]}; takes {reason[2]}"


def _refusal(w, activations) -> tuple[str, str, str] | None:
    """(argument, got, allowed) of the first thing that does not fit."""
    formats = "int8 by int8 or fp8 by fp8, symmetric, a scale a channel or per 128"
    if activations is None:
        return "activations", "as they are (16 bits)", formats
    if not isinstance(w, Panels) and not (is_qtensor(w) and w.ndim == 2 and w.axis == -2):
        return "w", _text(w), "a QTensor [D, F] packed along D"
    for name, format_ in (("activations", activations), ("w", w.format)):
        eight = isinstance(format_, Float8) or (isinstance(format_, Int) and format_.width == 8 and format_.symmetric)
        if not eight or format_.group not in (None, DEPTH, w.length):
            return name, f"in {format_}", formats
    if isinstance(activations, Int) != isinstance(w.format, Int):
        return "activations", f"in {activations} by w in {w.format}", formats
    if w.length % DEPTH:
        return "w", f"of D = {w.length}", f"multiples of {DEPTH}"
    return None


def _text(w):
    return f"{getattr(w, 'dtype', '?')}{list(w.shape)}" + (f" in {w.format}" if is_qtensor(w) else "")


def _check(x, w, activations):
    def refuse(argument, got, allowed):
        raise LoweringError(f"quant_matmul (mosaic_gpu/sm90 w8a8): {argument} {got}; allowed: {allowed}")

    reason = _refusal(w, activations)
    if reason is not None:
        refuse(*reason)
    if x.ndim < 1 or x.dtype.name not in DTYPES or x.shape[-1] != w.length:
        refuse("x", f"{x.dtype}{list(x.shape)}", f"{' or '.join(DTYPES)} [..., {w.length}]")
    if x.size == 0:
        refuse("x", f"{x.dtype}{list(x.shape)}", "at least one row")


# --- Entry -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a compiled kernel is made for, shapes apart."""

    tiles: Tiles
    blocks: bool  # scales per 128 of the contracted axis
    out: jnp.dtype


def quant_matmul(
    x: jax.Array, w: QTensor | Panels, activations: Format | None = None, *, tiles: Tiles | None = None
) -> jax.Array:
    """x [..., D] rounded to `activations`, times w QTensor [D, F] -> [..., F] in x's dtype.

    y = s_x s_w sum(q_x q_w); with groups of 128, the sum over groups g of s_x[g] s_w[g] sum_g(q_x q_w), in float32.
    Tensor cores of Hopper keep 14 bits of an fp8 sum's mantissa (DeepSeek-V3, section 3.3.2).
    Raises: LoweringError for arguments outside this, naming the argument.
    """
    _check(x, w, activations)
    w = relayout(w) if is_qtensor(w) else w
    rows, f = math.prod(x.shape[:-1]), w.shape[1]
    blocks = any(format_.group == DEPTH < w.length for format_ in (activations, w.format))
    plan = _Plan(tiles=tiles or tiles_for(rows, f, blocks), blocks=blocks, out=x.dtype)
    y = _call(x.reshape(rows, -1), w.data, w.scale, activations=activations, plan=plan)
    return y.reshape(*x.shape[:-1], f)


@functools.partial(jax.jit, static_argnames=("activations", "plan"))
def _call(x, w, w_scale, *, activations, plan):
    return multiply(*round_rows(x, activations), w, w_scale, plan=plan)


@functools.partial(jax.jit, static_argnames="plan")
def multiply(q, s, w, w_scale, *, plan):
    """q [M, D] with scales s [M, 1 or D / 128] times the parts of `Panels` [D, F] -> [M, F]."""
    f = w.shape[1]
    s = _beside(s)
    if plan.blocks:
        s, w_scale = (jnp.broadcast_to(scale, (w.shape[0], scale.shape[1])) for scale in (s, w_scale))
    return _kernel(*q.shape, f, q.dtype, w.dtype, plan)(q, s, w, w_scale)[:, :f]


# --- The multiplying kernel ------------------------------------------------------------------------------------------


def _kernel(m, d, f, q_dtype, w_dtype, plan):
    tiles, blocks = plan.tiles, plan.blocks
    shape = (-(-m // tiles.rows), -(-f // tiles.cols))
    items = shape[0] * shape[1]
    programs = min(tiles.programs, items)
    steps, stages = d // DEPTH, tiles.stages
    sums = jnp.int32 if q_dtype == jnp.int8 else jnp.float32
    rows_layout, columns_layout = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    width, pieces = tiles.width, tiles.wg_cols // tiles.width
    product = (tiles.wg_rows, tiles.wg_cols)

    def after(slot):
        """The slot of the next step; a remainder by a number that is no power of two would hold up every step."""
        return jnp.where(slot == stages - 1, 0, slot + 1)

    def body(q, s, w, w_scale, out, q_smem, w_smem, s_smem, c_smem, out_smem, full, empty, s_full, s_empty):
        views = (lambda ref: (ref, ref)) if tiles.interpretable else lambda ref: ref
        (q_rows, q_tiles), (w_rows, w_tiles) = views(q_smem), views(w_smem)
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        mine = lax.div(items - block + (programs - 1), jnp.int32(programs))

        def place(turn):
            """-> first row, first column of the block's item."""
            row, col = plgpu.planar_snake(block + turn * programs, shape, 0, tiles.band)
            return row * tiles.rows, col * tiles.cols

        def produce(turn, slot):
            row, col = place(turn)
            rows, cols, scales = pl.ds(row, tiles.rows), pl.ds(col, tiles.cols), pl.ds(col, _padded(tiles.cols))
            copy = plgpu.copy_gmem_to_smem
            if not blocks:
                two = lax.rem(turn, 2)
                pl.when(turn >= 2)(lambda: plgpu.barrier_wait(s_empty.at[two]))
                copy(s.at[0, rows], s_smem.at[two], s_full.at[two])
                copy(w_scale.at[0, scales], c_smem.at[two], s_full.at[two])

            def load(k, slot):
                pl.when(turn * steps + k >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                copy(w.at[k, cols], w_rows.at[slot], full.at[slot])
                copy(q.at[rows, pl.ds(k * DEPTH, DEPTH)], q_rows.at[slot], full.at[slot])
                if blocks:
                    copy(s.at[k, rows], s_smem.at[slot], full.at[slot])
                    copy(w_scale.at[k, scales], c_smem.at[slot], full.at[slot])
                return after(slot)

            return lax.fori_loop(0, steps, load, slot)

        rows_at = wg * tiles.wg_rows if tiles.by_rows else 0
        cols_at = 0 if tiles.by_rows else wg * tiles.wg_cols
        my_rows, my_cols = pl.ds(rows_at, tiles.wg_rows), pl.ds(cols_at, tiles.wg_cols)

        def row_scales(slot):
            scales = plgpu.load(s_smem.at[slot, my_rows], layout=rows_layout, optimized=False)
            return lax.broadcast_in_dim(scales, (tiles.wg_rows, width), [0])

        def column_scales(slot, piece):
            at = pl.ds(cols_at + piece * width, width)
            scales = plgpu.load(c_smem.at[slot, at], layout=columns_layout, optimized=False)
            return lax.broadcast_in_dim(scales, (tiles.wg_rows, width), [1])

        def wgmma(acc, slot):
            plgpu.wgmma(acc, q_tiles.at[slot, my_rows], w_tiles.at[slot, my_cols].T)

        def cut(acc):
            return [acc[:, i * width : (i + 1) * width].astype(jnp.float32) for i in range(pieces)]

        def whole(turn, slot):
            """Sums over all of D: scales come last."""

            def accumulate(acc):
                def step(_, slots):
                    before, slot = slots
                    plgpu.barrier_wait(full.at[slot])
                    wgmma(acc, slot)
                    plgpu.wgmma_wait(1)
                    plgpu.barrier_arrive(empty.at[before])  # the step before is through
                    return slot, after(slot)

                wgmma(acc, slot)
                last, slot_ = lax.fori_loop(1, steps, step, (slot, after(slot)))
                return acc[...], last, slot_

            plgpu.barrier_wait(full.at[slot])  # nothing between zeroed sums and their first use: the zeros cost nothing
            acc, last, slot = pl.run_scoped(accumulate, plgpu.ACC(product, sums))
            plgpu.barrier_arrive(empty.at[last])
            two = lax.rem(turn, 2)
            plgpu.barrier_wait(s_full.at[two])
            by_row = row_scales(two)
            total = [part * by_row * column_scales(two, i) for i, part in enumerate(cut(acc))]
            plgpu.barrier_arrive(s_empty.at[two])
            return total, slot

        def promoted(_, slot):
            """Sums of 128 terms, scaled and added up in float32."""

            def step(_, carry):
                slot, *total = carry
                plgpu.barrier_wait(full.at[slot])

                def part(acc):
                    wgmma(acc, slot)
                    by_row = row_scales(slot)  # while the tensor cores work
                    return cut(acc[...]), by_row

                parts, by_row = pl.run_scoped(part, plgpu.ACC(product, sums))
                parts = [part * column_scales(slot, i) for i, part in enumerate(parts)]
                plgpu.barrier_arrive(empty.at[slot])
                total = [sum_ + part * by_row for sum_, part in zip(total, parts, strict=True)]
                return after(slot), *total

            zeros = plgpu.layout_cast(jnp.zeros((tiles.wg_rows, width), jnp.float32), plgpu.Layout.WGMMA)
            slot, *total = lax.fori_loop(0, steps, step, (slot, *[zeros] * pieces))
            return total, slot

        def consume(turn, slot):
            row, col = place(turn)
            total, slot = (promoted if blocks else whole)(turn, slot)
            first = lax.rem(turn, 2) if pieces % 2 else 0  # buffers take turns through all items
            for i, piece in enumerate(total):
                buffer = out_smem.at[wg, (first + i) % 2]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                buffer[...] = piece.astype(out.dtype)
                plgpu.commit_smem()
                to = out.at[pl.ds(row + rows_at, tiles.wg_rows), pl.ds(col + cols_at + i * width, width)]
                plgpu.copy_smem_to_gmem(buffer, to)
            return slot

        @pl.when(wg < tiles.consumers)
        def _():
            plgpu.set_max_registers(REGISTERS[tiles.consumers][0], action="increase")
            lax.fori_loop(0, mine, consume, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == tiles.consumers)
        def _():
            plgpu.set_max_registers(REGISTERS[tiles.consumers][1], action="decrease")
            lax.fori_loop(0, mine, produce, jnp.int32(0))
            total = mine * steps  # every arrival is awaited: barriers end in a known phase
            drain = lambda step, _: plgpu.barrier_wait(empty.at[lax.rem(step, stages)])  # noqa: E731
            lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)
            if not blocks:
                drain = lambda turn, _: plgpu.barrier_wait(s_empty.at[lax.rem(turn, 2)])  # noqa: E731
                lax.fori_loop(jnp.maximum(mine - 2, 0), mine, drain, None)

    def ring(rows, dtype):
        """Steps in flight, as rows and as tiles of 8 rows of the same bytes: tensor cores read tiles, and only copies to
        rows may end inside one."""
        swizzle = plgpu.SwizzleTransform(128)
        tiled = (plgpu.TilingTransform((8, DEPTH)), swizzle)
        smem = functools.partial(plgpu.SMEM, (stages, rows, DEPTH), dtype)
        if tiles.interpretable:
            return smem(transforms=tiled)
        return plgpu.RefUnion(smem(transforms=(swizzle,)), smem(transforms=tiled))

    swizzle = width * plan.out.itemsize
    slots = stages if blocks else 2
    return dependent(
        body,
        # Not as narrow as a piece: a copy of whole rows is taken for one run of memory, and one past the last column
        # then lands in the next row.
        out_type=jax.ShapeDtypeStruct((m, max(16, -(-f // 8) * 8)), plan.out),
        grid=(programs,),
        grid_names=("block",),
        num_threads=tiles.consumers + 1,
        thread_name="wg",
        scratch_types=(
            ring(tiles.rows, q_dtype),
            ring(tiles.cols, w_dtype),
            plgpu.SMEM((slots, tiles.rows), jnp.float32),
            plgpu.SMEM((slots, _padded(tiles.cols)), jnp.float32),
            plgpu.SMEM(
                (tiles.consumers, 2, tiles.wg_rows, width),
                plan.out,
                transforms=(plgpu.SwizzleTransform(swizzle),) if swizzle >= 32 else (),
            ),
            plgpu.Barrier(num_arrivals=4 if blocks else 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=tiles.consumers, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_arrivals=tiles.consumers, num_barriers=2),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="quant_matmul_w8a8",
    )


# --- Rounding x ------------------------------------------------------------------------------------------------------


def round_rows(x: jax.Array, format_: Format) -> tuple[jax.Array, jax.Array]:
    """x [M, D] -> codes [M, D] and scales [M, 1 or D / 128].

    XLA reads x once for groups, but twice for a scale a row: many rows have a kernel. The scale rule is the format's
    (`optx.formats`); the kernel multiplies by its reciprocal, so a code may differ from `format_.encode` where x / s lies
    within a float32 rounding of the middle between two codes.
    """
    if format_.group in (None, x.shape[1]) and x.size >= MANY:
        return _round_rows(x, format_=format_)
    codes = format_.encode(x)
    return codes.data, codes.scale


def _scale_of(absmax, format_):
    """float32 scale that the format stores for numbers up to absmax."""
    info = jnp.finfo(format_.scale_dtype)
    span, levels = (2 * absmax, 255.0) if isinstance(format_, Int) else (absmax, float(jnp.finfo(format_.dtype).max))
    tiny = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
    scale = jnp.where(span > 0, jnp.minimum(jnp.maximum(span / levels, tiny), float(info.max)), 1.0)
    scale = jnp.where(span < jnp.inf, scale, jnp.nan)  # an infinity or a NaN in the row
    return scale.astype(format_.scale_dtype).astype(jnp.float32)


def _codes(x, inverse, format_):
    """round(x * inverse) in the format's 8 bits."""
    x = x.astype(jnp.float32) * inverse
    if isinstance(format_, Float8):
        top = float(jnp.finfo(format_.dtype).max)
        return jnp.minimum(jnp.maximum(x, -top), top).astype(format_.dtype)
    x = jnp.minimum(jnp.maximum(x, -128.0), 127.0) + 1.5 * 2**23  # floats there lie 1 apart: rounds to nearest even
    return lax.bitcast_convert_type(x, jnp.int32).astype(jnp.int8)


@functools.partial(jax.jit, static_argnames="format_")
def _round_rows(x, *, format_):
    """One scale a row; a warpgroup a row, which it reads once if it is no longer than KEEP."""
    m, d = x.shape
    vector = math.gcd(8, d // 128)
    chunk = max(n for n in range(128 * vector, min(d, 8192) + 1, 128 * vector) if d % n == 0)
    chunks, keep = d // chunk, d <= KEEP
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=vector)

    def body(x_ref, q_ref, s_ref):
        row = lax.axis_index("row")
        read = lambda i: plgpu.load(x_ref.at[row, pl.ds(i * chunk, chunk)], layout=layout, optimized=False)  # noqa: E731
        kept = [read(i) for i in range(chunks)] if keep else None
        largest = jnp.float32(0)
        for i in range(chunks):
            part = kept[i] if keep else read(i)
            largest = jnp.maximum(largest, jnp.max(jnp.abs(part.astype(jnp.float32))))
        scale = _scale_of(largest, format_)
        s_ref[row] = scale
        inverse = 1 / scale
        for i in range(chunks):
            part = kept[i] if keep else read(i)
            q_ref[row, pl.ds(i * chunk, chunk)] = _codes(part, inverse, format_)

    dtype = format_.dtype if isinstance(format_, Float8) else jnp.int8
    codes, scale = dependent(
        body,
        out_type=(jax.ShapeDtypeStruct((m, d), dtype), jax.ShapeDtypeStruct((m,), jnp.float32)),
        grid=(m,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="round_rows",
    )(x)
    return codes, scale[:, None]
