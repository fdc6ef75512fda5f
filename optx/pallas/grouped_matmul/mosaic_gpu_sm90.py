"""`grouped_matmul` on Hopper: out^T = w x^T, the weights being the 64-row operand, dense or packed.

Few tokens an expert then cost few columns of the matrix units, and a weight is read once for up to 256 tokens. One kernel of
persistent blocks goes through (expert, tokens, outputs): empty experts cost nothing. A producer warpgroup keeps a ring of
stages full; each of the others owns a strip of 64 outputs. Packed weights are widened in registers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from optx.errors import LoweringError
from optx.formats import Float8, Int
from optx.pallas.grouped_matmul import packed_sm90, reference, registers_sm90
from optx.pallas.grouped_matmul.packed_sm90 import Experts, relayout
from optx.pallas.grouped_matmul.ring_sm90 import Copy, Ring, scratch
from optx.pallas.grouped_matmul.schedule_sm90 import BLOCKS, WIDE, Schedule, store_rows, table
from optx.pallas.quant_matmul.mosaic_gpu_sm90_fragments import WORDS
from optx.tensor import QTensor

DTYPES = (jnp.bfloat16, jnp.float16)
SHARED = 224 << 10  # bytes of the 227 KB of a block that tiles may take
# By strips: of a thread that computes, that loads. More in all than a launch gives (65536 / threads, in eights) hangs.
REGISTERS = {2: (240, 24), 3: (160, 32), 4: (112, 32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of a work item: up to widths[-1] tokens by `strips` times 64 outputs."""

    widths: tuple[int, ...]  # columns of the matrix units; an item takes the first that holds its tokens
    strips: int  # of 64 outputs, each a warpgroup's
    blocks: int  # of 64 contracted numbers in a step
    stages: int  # steps in flight
    unroll: int = 1  # steps of one turn of the loop
    part: int = 64  # tokens that leave together
    band: int = 16  # token tiles that pass over the outputs together: x then stays in the L2 cache
    grid: int = BLOCKS  # persistent thread blocks
    registers: bool = True  # False: widened in shared memory and with no inlined operations, for the interpreter

    @property
    def rows(self) -> int:
        return self.widths[-1]


def tiles_for(tokens: int, experts: int, d: int, bits: int, group: int) -> Tiles:
    """bits of a weight, numbers of a scale. Few tokens an expert: narrow products, deep rings; many: the widest product."""
    each = tokens / experts
    widths = (8, 16) if each <= 8 else (16, 32, 64) if each <= 48 else (32, 128, 192, 256)
    rows, strips = widths[-1], 2
    most = 2 if bits < 16 and rows < 256 else 1  # two fragments take turns: with more ptxas serializes their products
    fits = lambda n: d % (WIDE * n) == 0 and (group == d or group % (WIDE * n) == 0 or WIDE * n % group == 0)  # noqa: E731
    blocks = next(n for n in (2, 1) if n <= most and fits(n))
    part = min(rows, 64 if rows < 256 else 32)
    stage = blocks * (strips * WIDE * WIDE * bits // 8 + rows * WIDE * 2 + (strips * 512 if bits < 16 else 0))
    stages = min(16, (SHARED - strips * 2 * part * WIDE * 2 - 8 * (experts + 2)) // stage)
    unroll = 2 if bits < 16 and blocks == 1 and d % (2 * WIDE) == 0 else 1
    return Tiles(widths=widths, strips=strips, blocks=blocks, stages=stages, unroll=unroll, part=part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is specialised on beside shapes."""

    tiles: Tiles
    kind: str  # dense, int8, int4, fp8
    group: int  # contracted numbers of one scale; all of them: scaled after the sum
    experts: int
    d: int
    f: int
    has_zero: bool = False

    @property
    def bits(self) -> int:
        return {"dense": 16, "int4": 4}.get(self.kind, 8)

    @property
    def grouped(self) -> bool:
        return self.group < self.d

    @property
    def scaled(self) -> bool:
        """Whether sums are multiplied by a scale."""
        return self.kind != "dense" and not self.grouped

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

    @property
    def overlap(self) -> int:
        """Products in flight while the next one is made ready: a fragment's registers are free two blocks on."""
        return int(self.tiles.registers and (self.kind == "dense" or self.tiles.blocks * self.tiles.unroll > 1))


def _body(sizes, x, *refs, plan: Plan):
    tiles, dense, refs = plan.tiles, plan.kind == "dense", list(refs)
    w, scale, zero = refs.pop(0), None if dense else refs.pop(0), refs.pop(0) if plan.has_zero else None
    out, entries, x_smem, w_smem, s_smem, z_smem, a_smem, out_smem, marks = refs
    x_rows, x_tiles = x_smem if tiles.registers else (x_smem, x_smem)
    strips = plan.f // WIDE  # of an expert
    wg = lax.axis_index("wg")
    ring = Ring(marks, stages=tiles.stages, readers=tiles.strips)
    schedule = Schedule(
        sizes,
        entries,
        tokens=x.shape[0],
        experts=plan.experts,
        tiles=tiles,
        columns=-(-strips // tiles.strips),
        interpreted=not tiles.registers,
    )
    by_width = lambda rows: [(w, (rows > low) & (rows <= w)) for low, w in zip((0, *tiles.widths), tiles.widths)]  # noqa: E731

    def weights(slot, k, expert, column):
        """Copies of step k. Past the outputs of an expert lie those of the next one, or zeros: never stored."""
        if dense:
            starts, sizes = (expert, k * plan.step, column * tiles.strips * WIDE), (0, plan.step, tiles.strips * WIDE)
            return [Copy(source=w, starts=starts, sizes=sizes, to=w_smem.at[slot], tiling=(8, WIDE), swizzle=128)]
        strip, group = expert * strips + column * tiles.strips, lax.div(k * plan.step, plan.group)
        starts, sizes = (strip, k * plan.words, 0), (tiles.strips, plan.words, WORDS)
        copies = [Copy(source=w, starts=starts, sizes=sizes, to=w_smem.at[slot])]
        starts, sizes = (strip, group, 0), (tiles.strips, plan.scales, WIDE)
        if plan.grouped:
            copies.append(Copy(source=scale, starts=starts, sizes=sizes, to=s_smem.at[slot]))
        if plan.has_zero:
            copies.append(Copy(source=zero, starts=starts, sizes=sizes, to=z_smem.at[slot]))
        return copies

    def produce(step, steps, place, after):
        expert, row, rows, column = place

        def load(k, _):
            slot = ring.stage(step + k)
            ring.wait_free(step + k)
            copies = weights(slot, k, expert, column)
            for width, fits in by_width(rows):

                @pl.when(fits)
                def _(width=width):
                    tokens = [
                        Copy(
                            source=x,
                            starts=(row, k * plan.step + b * WIDE),
                            sizes=(width, WIDE),
                            to=x_rows.at[slot, b, pl.ds(0, width)],
                            swizzle=128,
                        )
                        for b in range(tiles.blocks)
                    ]
                    ring.load(step + k, [*copies, *tokens])

        lax.fori_loop(0, steps, load, None)
        return after()

    def operand(slot, b):
        """Outputs of this warpgroup by numbers of block b, for the matrix units."""
        if dense:
            return w_smem.at[slot, pl.ds(b * WIDE, WIDE), pl.ds(wg * WIDE, WIDE)].T
        words = w_smem.at[slot, wg]
        scales = s_smem.at[slot, wg] if plan.grouped else None
        zeros = z_smem.at[slot, wg] if plan.has_zero else None
        if tiles.registers:
            return registers_sm90.widen(words, scales, zeros, block=b, plan=plan)
        a_smem[wg] = registers_sm90.widen_plainly(words, scales, zeros, block=b, plan=plan)
        plgpu.commit_smem()
        return a_smem.at[wg]

    def consume(step, steps, place, after):
        expert, row, rows, column = place
        strip = column * tiles.strips + wg

        def product(width):
            def accumulate(acc):
                def turn(i, _):
                    for u in range(tiles.unroll):
                        at = step + i * tiles.unroll + u
                        ring.wait_loaded(at)
                        for b in range(tiles.blocks):
                            slot = ring.stage(at)
                            plgpu.wgmma(acc, operand(slot, b), x_tiles.at[slot, b, pl.ds(0, width)].T)
                            plgpu.wgmma_wait(plan.overlap)
                            if b == 0:

                                @pl.when(at > step)  # the step before is through
                                def _(at=at):
                                    ring.free(at - 1)

                lax.fori_loop(0, steps // tiles.unroll, turn, None)
                return acc[...]

            acc = pl.run_scoped(accumulate, plgpu.ACC((WIDE, width)))
            ring.free(step + steps - 1)
            part = min(width, tiles.part)
            for i in range(width // part):
                store(i, part, acc[:, i * part : (i + 1) * part], scaled=plan.scaled)

        def no_product():  # rows that no expert has
            zeros = pl.run_scoped(lambda acc: acc[...], plgpu.ACC((WIDE, tiles.part)))
            for i in range(tiles.rows // tiles.part):
                store(i, tiles.part, zeros, scaled=False)

        def store(i, part, acc, *, scaled):
            @pl.when((strip < strips) & (rows > i * part))
            def _():
                slot = out_smem.at[wg, i % 2, pl.ds(0, part)]
                factors = scale.at[expert * strips + strip] if scaled else None
                plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)  # the slot's own store before
                if tiles.registers:
                    registers_sm90.store(acc, factors, slot)
                else:
                    factor = registers_sm90.restored(factors[0]).astype(jnp.float32)[:, None] if scaled else 1
                    slot[...] = (acc * factor).astype(out.dtype).T
                plgpu.commit_smem()
                if part == tiles.part:
                    to = out.at[pl.ds(row + i * part, part), pl.ds(strip * WIDE, WIDE)]
                    pl.when(rows >= (i + 1) * part)(lambda: plgpu.copy_smem_to_gmem(slot, to))

        for width, fits in by_width(rows):
            pl.when(fits & (steps > 0))(functools.partial(product, width))
        pl.when(steps == 0)(no_product)
        left = lax.rem(rows, tiles.part)  # in the slot that was written last

        @pl.when((strip < strips) & (left > 0))
        def _():
            slot = out_smem.at[wg, lax.rem(lax.div(rows, tiles.part), 2)]
            store_rows(slot, out, row + rows - left, left, strip * WIDE)

        return after()

    consumer, producer = REGISTERS[tiles.strips]

    @pl.when(wg < tiles.strips)
    def _():
        schedule.run(consume, plan.d // plan.step, consumer, "increase")
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(wg == tiles.strips)
    def _():
        ring.drain(schedule.run(produce, plan.d // plan.step, producer, "decrease"))


@functools.partial(jax.jit, static_argnames="plan")
def _call(x, w, sizes, *, plan: Plan):
    """w: the dense weight, or (codes, scale) or (codes, scale, zero) of `Experts`."""
    tiles, dense = plan.tiles, plan.kind == "dense"
    swizzle = plgpu.SwizzleTransform(128)
    tiled = (plgpu.TilingTransform((8, WIDE)), swizzle)
    shape = (tiles.stages, tiles.blocks, tiles.rows, WIDE)
    x_smem = plgpu.SMEM(shape, x.dtype, transforms=tiled)
    if (
        tiles.registers
    ):  # the same bytes as rows, which copies take at any offset of x, and as the tiles of matrix units
        x_smem = plgpu.RefUnion(plgpu.SMEM(shape, x.dtype, transforms=(swizzle,)), x_smem)
    w_smem = plgpu.SMEM((tiles.stages, tiles.strips, plan.words, WORDS), jnp.int32)
    if dense:
        w_smem = plgpu.SMEM((tiles.stages, plan.step, tiles.strips * WIDE), x.dtype, transforms=tiled)
    scales = lambda used, dtype: plgpu.SMEM((tiles.stages if used else 1, tiles.strips, plan.scales, WIDE), dtype)  # noqa: E731
    plain = not dense and not tiles.registers
    kernel = plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=jax.ShapeDtypeStruct((x.shape[0], plan.f), x.dtype),
        grid=(tiles.grid,),
        grid_names=("sm",),
        num_threads=tiles.strips + 1,
        thread_name="wg",
        scratch_types=(
            table(plan.experts),
            x_smem,
            w_smem,
            scales(plan.grouped, jnp.float16 if dense else w[1].dtype),
            scales(plan.has_zero, jnp.bfloat16),
            plgpu.SMEM((tiles.strips, WIDE if plain else 8, WIDE), x.dtype, transforms=tiled),
            plgpu.SMEM((tiles.strips, 2, tiles.part, WIDE), x.dtype, transforms=(swizzle,)),
            scratch(
                tiles.stages,
                readers=tiles.strips,
                copies=1 + tiles.blocks + plan.grouped + plan.has_zero,
                interpreted=not tiles.registers,
            ),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=tiles.registers
        ),
        kernel_name="grouped_matmul",
    )
    return kernel(sizes, x, *((w,) if dense else w))


def supports(args, target) -> str | None:
    """args: weight ([E, D, F], dense or QTensor, may be abstract), dtype of x (bfloat16 when left out)."""
    if (target.platform, target.arch) != ("gpu", "sm90"):
        return f"is for gpu/sm90, not {target.platform}/{target.arch}"
    return _declines(args["weight"], jnp.dtype(args.get("dtype", jnp.bfloat16)))


def _declines(w, dtype) -> str | None:
    _, d, f = w.shape
    if dtype not in DTYPES:
        return f"x of {dtype.name}; allowed: bfloat16, float16"
    if packed(w):
        if dtype != jnp.bfloat16:
            return f"x of {dtype.name} with packed w; allowed: bfloat16"
        if reason := packed_sm90.declines(w.format, d):
            return reason
    elif w.dtype != dtype:
        return f"x of {dtype.name} with w of {w.dtype.name}; allowed: one type"
    if d % WIDE or f % WIDE or not d or not f:
        return f"D {d}, F {f}; allowed: multiples of {WIDE}"
    return None


def packed(w) -> bool:
    return isinstance(w, QTensor | Experts)


def tiles_of(x, w) -> Tiles:
    """The cut of a call; x, w may be abstract."""
    experts, d, _ = w.shape
    if not packed(w):
        return tiles_for(x.shape[0], experts, d, 16, d)
    bits = w.format.width if isinstance(w.format, Int) else 8
    return tiles_for(x.shape[0], experts, d, bits, w.format.group or d)


def grouped_matmul(x, w, group_sizes, *, tiles: Tiles | None = None):
    """`reference.grouped_matmul` on Hopper; w dense, `Experts`, or a QTensor, which is re-laid on the way (slow).

    Raises: OptxError where shapes do not fit, LoweringError for what the kernel does not take.
    """
    reference.check(x, w, group_sizes)
    reason = _declines(w, x.dtype)
    if reason:
        raise LoweringError(f"grouped_matmul: {reason}")
    experts, d, f = w.shape
    if not x.shape[0] or not experts:
        return jnp.zeros((x.shape[0], f), x.dtype)
    facts = {"tiles": tiles or tiles_of(x, w), "experts": experts, "d": d, "f": f}
    sizes = group_sizes.astype(jnp.int32)
    if not packed(w):
        return _call(x, w, sizes, plan=Plan(kind="dense", group=d, **facts))
    rows = (w if isinstance(w, Experts) else relayout(w)).rows
    kind = "fp8" if isinstance(w.format, Float8) else f"int{w.format.width}"
    parts = (rows.data, rows.scale) if rows.zero is None else (rows.data, rows.scale, rows.zero)
    plan = Plan(kind=kind, group=w.format.group or d, has_zero=rows.zero is not None, **facts)
    return _call(x, parts, sizes, plan=plan)
