"""The packed half of `grouped_matmul` on Hopper: out^T = w x^T, weights widened in registers as the 64-row operand.

Few tokens an expert then cost few columns of the matrix units, and every code is read from memory once and widened once
an item. Weights lie in the fragments of `quant_matmul`, experts one after another.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from optx.formats import Float8, Int
from optx.pallas.grouped_matmul import registers_sm90 as registers
from optx.pallas.grouped_matmul.schedule_sm90 import BLOCKS, WIDE, Schedule, store_rows, table, table_bytes
from optx.pallas.late import dependent, plgpu
from optx.pallas.quant_matmul import mosaic_gpu_sm90_fragments as fragments
from optx.tensor import Arranged, QTensor

SHARED = 224 << 10  # bytes of the 227 KB of a block that tiles may take
PART = 64  # rows of an item that leave together
# By strips: of a thread that computes, that loads. More in all than a launch gives (65536 / threads, in eights) hangs.
REGISTERS = {2: (232, 40), 3: (160, 32)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts(Arranged):
    """Packed weights [E, D, F] in the order of `wgmma` fragments. Made by `relayout`, never exported."""

    rows: fragments.Fragments  # of the weight [D, E * F]
    experts: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        d, f = self.rows.shape
        return self.experts, d, f // self.experts

    @property
    def ndim(self) -> int:
        return 3

    @property
    def size(self) -> int:
        return self.rows.size

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    @property
    def dtype(self):
        return self.rows.dtype

    @property
    def format(self):
        return self.rows.format

    def qtensor(self) -> QTensor:
        """The inverse of `relayout`."""
        return jax.tree.map(lambda part: part.reshape(self.experts, -1, part.shape[-1]), self.rows.qtensor())


def relayout(w: QTensor) -> Experts:
    """The same weights [E, D, F] as `Experts`; w: what `supports` takes."""
    flat = jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), w)
    return Experts(rows=fragments.relayout(flat), experts=w.shape[0])


def declines(format_, d: int) -> str | None:
    """Why weights of this format with D contracted numbers are not taken, or None."""
    integer, float8 = isinstance(format_, Int), isinstance(format_, Float8)
    if not (integer and format_.width in (4, 8)) and not (float8 and format_.kind == "e4m3"):
        return f"weights of {format_}; allowed: int8, int4, fp8_e4m3"
    group = format_.group or d
    if group != d and group not in (32, 64, 128):
        return f"weights of {format_}; allowed groups: 32, 64, 128, one of all D"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTiles:
    """Sizes of a work item: `rows` tokens by 64 outputs a strip, each strip a warpgroup's."""

    rows: int  # tokens of an item, at most: columns of the matrix units
    widths: tuple[int, ...]  # an item takes the first of these that holds its tokens; the last is `rows`
    strips: int  # of 64 outputs
    blocks: int  # of 64 contracted numbers in a step
    stages: int  # steps in flight
    unroll: int = 1  # steps of one turn of the loop
    band: int = 16  # row tiles that pass over the outputs together: x then stays in the L2 cache
    grid: int = BLOCKS  # persistent thread blocks
    registers: bool = True  # False: through shared memory and without aliased refs, what the interpreter can run


def packed_tiles_for(tokens: int, experts: int, d: int, bits: int, group: int) -> PackedTiles:
    """Few tokens an expert: steps of 16 KB of codes where D and the group allow; many: the widest product."""
    each = tokens // experts
    widths = (8, 16) if each <= 8 else (16, 32, 64) if each <= 48 else (64, 128, 256)
    rows, strips = widths[-1], 3 if each <= 8 else 2  # a third warpgroup hides more of the widening
    most = 1 if rows == 256 else 2  # two fragments take turns: more in one turn and ptxas serializes their products
    fits = lambda n: d % (WIDE * n) == 0 and (group == d or group % (WIDE * n) == 0 or WIDE * n % group == 0)  # noqa: E731
    blocks = next(n for n in (2, 1) if n <= most and fits(n))
    stage = blocks * (strips * WIDE * WIDE * bits // 8 + rows * WIDE * 2 + strips * 512)
    stages = min(16, (SHARED - strips * 2 * min(rows, PART) * WIDE * 2 - table_bytes(experts)) // stage)
    unroll = 2 if blocks == 1 and d % (2 * WIDE) == 0 else 1
    return PackedTiles(rows=rows, widths=widths, strips=strips, blocks=blocks, stages=stages, unroll=unroll)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is specialised on beside shapes. Widening reads all but `tiles` and `experts`."""

    tiles: PackedTiles
    kind: str  # int4, int8, fp8
    group: int  # contracted numbers of one scale; all of them: scaled after the sum
    depth: int  # D
    experts: int

    @property
    def bits(self) -> int:
        return 4 if self.kind == "int4" else 8

    @property
    def grouped(self) -> bool:
        return self.group < self.depth

    @property
    def step(self) -> int:
        return WIDE * self.tiles.blocks

    @property
    def words(self) -> int:
        """Rows of 256 words that a step of one strip takes."""
        return self.tiles.blocks * self.bits // 2

    @property
    def scales(self) -> int:
        """Scales of an output in a step."""
        return max(1, self.step // self.group)


def _body(*refs, plan: Plan, has_zero: bool):
    tiles, refs = plan.tiles, list(refs)
    sizes, x, codes, scale = refs[:4]
    zero = refs[4] if has_zero else None
    out, entries, x_smem, w_smem, s_smem, z_smem, a_smem, out_smem, full, empty = refs[4 + has_zero :]
    x_rows, x_tiles = x_smem if tiles.registers else (x_smem, x_smem)
    tokens, experts, stages = x.shape[0], plan.experts, tiles.stages
    strips = codes.shape[0] // experts  # of an expert
    columns = -(-strips // tiles.strips)
    wg = lax.axis_index("wg")
    schedule = Schedule(
        sizes, entries, tokens=tokens, experts=experts, tiles=tiles, columns=columns, interpreted=not tiles.registers
    )

    def produce(step, steps, place, after):
        expert, row, rows, column = place
        # Past the last strip of an expert lie those of the next one, past the last expert zeros: both are never stored.
        strip = pl.ds(expert * strips + column * tiles.strips, tiles.strips)

        def load(k, _):
            slot = lax.rem(step + k, stages)

            @pl.when(step + k >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            copy = lambda src, dst: plgpu.copy_gmem_to_smem(src, dst.at[slot], full.at[slot])  # noqa: E731
            copy(codes.at[strip, pl.ds(k * plan.words, plan.words)], w_smem)
            group = lax.div(k * plan.step, plan.group)
            if plan.grouped:
                copy(scale.at[strip, pl.ds(group, plan.scales)], s_smem)
            if has_zero:
                copy(zero.at[strip, pl.ds(group, plan.scales)], z_smem)
            for low, width in zip((0, *tiles.widths), tiles.widths):

                @pl.when((rows > low) & (rows <= width))
                def _(width=width):
                    for b in range(tiles.blocks):
                        plgpu.copy_gmem_to_smem(
                            x.at[pl.ds(row, width), pl.ds(k * plan.step + b * WIDE, WIDE)],
                            x_rows.at[slot, b, pl.ds(0, width)],
                            full.at[slot],
                        )

        lax.fori_loop(0, steps, load, None)
        return after()

    def consume(step, steps, place, after):
        expert, row, rows, column = place
        mine = column * tiles.strips + wg
        strip = jnp.minimum(expert * strips + mine, experts * strips - 1)
        factors = scale.at[strip]

        def product(width):
            def accumulate(acc):
                def turn(i, _):
                    for u in range(tiles.unroll):
                        at = step + i * tiles.unroll + u
                        slot = lax.rem(at, stages)
                        plgpu.barrier_wait(full.at[slot])
                        for b in range(tiles.blocks):
                            multiply(acc, slot, b, width)
                            overlap = tiles.blocks * tiles.unroll > 1  # a fragment's registers are free two blocks on
                            plgpu.wgmma_wait(1 if overlap and tiles.registers else 0)
                            if b == 0:

                                @pl.when(at > step)  # the step before is through
                                def _(at=at):
                                    plgpu.barrier_arrive(empty.at[lax.rem(at - 1, stages)])

                lax.fori_loop(0, steps // tiles.unroll, turn, None)
                return acc[...]

            acc = pl.run_scoped(accumulate, plgpu.ACC((WIDE, width)))
            plgpu.barrier_arrive(empty.at[lax.rem(step + steps - 1, stages)])
            part = min(width, PART)
            for i in range(width // part):
                store_part(i, part, acc[:, i * part : (i + 1) * part], scaled=not plan.grouped)

        def no_product():  # rows that no expert has
            part = min(tiles.rows, PART)
            zeros = pl.run_scoped(lambda acc: acc[...], plgpu.ACC((WIDE, part)))
            for i in range(tiles.rows // part):
                store_part(i, part, zeros, scaled=False)

        def multiply(acc, slot, b, width):
            words = w_smem.at[slot, wg]
            scales = s_smem.at[slot, wg] if plan.grouped else None
            zeros = z_smem.at[slot, wg] if has_zero else None
            tokens = x_tiles.at[slot, b, pl.ds(0, width)].T
            if tiles.registers:
                a = registers.widen(words, scales, zeros, block=b, plan=plan)
            else:
                a_smem[wg] = registers.widen_plainly(words, scales, zeros, block=b, plan=plan)
                plgpu.commit_smem()
                a = a_smem.at[wg]
            plgpu.wgmma(acc, a, tokens)

        def store_part(i, part, acc, *, scaled):
            @pl.when((mine < strips) & (rows > i * part))
            def _():
                slot = out_smem.at[wg, i % 2, pl.ds(0, part)]
                plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)  # the slot's own store before
                if tiles.registers:
                    registers.store(acc, factors if scaled else None, slot)
                else:
                    factor = registers.restored(factors[0]).astype(jnp.float32)[:, None] if scaled else 1
                    slot[...] = (acc * factor).astype(out.dtype).T
                plgpu.commit_smem()
                store_rows(slot, out, row + i * part, jnp.minimum(rows - i * part, part), mine * WIDE)

        for low, width in zip((0, *tiles.widths), tiles.widths):
            pl.when((rows > low) & (rows <= width) & (steps > 0))(functools.partial(product, width))
        pl.when(steps == 0)(no_product)
        return after()

    consumer, producer = REGISTERS[tiles.strips]

    @pl.when(wg < tiles.strips)
    def _():
        schedule.run(consume, plan.depth // plan.step, consumer, "increase")
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(wg == tiles.strips)
    def _():
        total = schedule.run(produce, plan.depth // plan.step, producer, "decrease")

        def drain(step, _):  # every arrival is awaited: barriers end in a known phase
            plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)


@functools.partial(jax.jit, static_argnames="tiles")
def packed(x, w: Experts, sizes, *, tiles: PackedTiles):
    """x bfloat16[T, D], w, int32[E] -> [T, F]."""
    experts, d, f = w.shape
    w = w.rows
    kind = "fp8" if isinstance(w.format, Float8) else f"int{w.format.width}"
    plan = Plan(tiles=tiles, kind=kind, group=d // w.groups, depth=d, experts=experts)
    swizzle = plgpu.SwizzleTransform(128)
    tiled = (plgpu.TilingTransform((8, WIDE)), swizzle)
    has_zero = w.zero is not None
    shape = (tiles.stages, tiles.blocks, tiles.rows, WIDE)
    x_smem = plgpu.SMEM(shape, x.dtype, transforms=tiled)
    if (
        tiles.registers
    ):  # the same bytes as rows, which copies take at any offset of x, and as the tiles of matrix units
        x_smem = plgpu.RefUnion(plgpu.SMEM(shape, x.dtype, transforms=(swizzle,)), x_smem)
    kernel = dependent(
        functools.partial(_body, plan=plan, has_zero=has_zero),
        out_type=jax.ShapeDtypeStruct((x.shape[0], f), x.dtype),
        grid=(tiles.grid,),
        grid_names=("sm",),
        num_threads=tiles.strips + 1,
        thread_name="wg",
        scratch_types=(
            table(experts),
            x_smem,
            plgpu.SMEM((tiles.stages, tiles.strips, plan.words, fragments.WORDS), jnp.int32),
            plgpu.SMEM((tiles.stages if plan.grouped else 1, tiles.strips, plan.scales, WIDE), w.scale.dtype),
            plgpu.SMEM((tiles.stages if has_zero else 1, tiles.strips, plan.scales, WIDE), jnp.bfloat16),
            plgpu.SMEM((tiles.strips, 8 if tiles.registers else WIDE, WIDE), x.dtype, transforms=tiled),
            plgpu.SMEM((tiles.strips, 2, min(tiles.rows, PART), WIDE), x.dtype, transforms=(swizzle,)),
            plgpu.Barrier(num_arrivals=1 + tiles.blocks + plan.grouped + has_zero, num_barriers=tiles.stages),
            plgpu.Barrier(num_arrivals=tiles.strips, num_barriers=tiles.stages),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=tiles.registers
        ),
        kernel_name="grouped_matmul_packed",
    )
    return kernel(sizes, x, w.data, w.scale, *([w.zero] if has_zero else []))
