"""out^T = w x^T on Blackwell (sm_100a): the one product behind the rows `matmul` and `quant_matmul` of that architecture.

128 outputs are the rows of a tcgen05 MMA and rows of x its columns, so that a decode of few rows costs few columns. Both lie
in shared memory with the contracted axis last, which every operand type takes; packed weights are widened by warpgroups of
their own and lie in tensor memory. One warp copies, one issues the products, one warpgroup takes finished tiles out:

    copy --full--> (widen --widened-->) MMA --done--> store; back: MMA --empty--> copy, --spent--> widen; store --taken--> MMA

Thread blocks are persistent: block b takes items b, b + grid, ... (`place`). A contracted axis may be shared out over `split`
items, whose float32 sums XLA adds. Of many rows two blocks make one item: each holds 128 of its 256 outputs and half of its rows,
and one MMA of the first block reads both halves (cta_group::2), so that shared memory is filled and read for half the rows.
Never run on hardware so far. Sources: PTX ISA 9.1, section 9.7.17 (tcgen05).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from optx.pallas.late import plgpu

SMS = 148  # of a B200
SHARED = 227 << 10  # bytes that a block may have
COLUMNS = 512  # of tensor memory: 128 lanes of 32 bits each
OUTPUTS = 128  # rows of the MMA
CHUNK = 16  # rows of x that leave together
WIDENED = 4  # widened steps in tensor memory
PAIRED = 256  # columns of an MMA of two blocks, 128 rows of x in each
RANK = "rank"  # of a block in its pair
BANDS = 16  # tiles of rows that meet all weights before the next ones do: they stay in the L2 cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of a work item: 128 outputs by `rows` rows of x; of a pair 256 outputs."""

    rows: int  # columns of the MMA: a multiple of 16, at most 256
    depth: int  # contracted numbers of a step
    stages: int  # steps on their way or being multiplied
    split: int = 1  # items that share out the contracted axis of a tile
    grid: int = SMS  # persistent thread blocks
    pair: bool = False  # two thread blocks make an item; grid counts pairs
    clip: bool = True  # False: rows are padded to whole tiles, as the interpreter does not clip copies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is specialised on beside dtypes."""

    tiles: Tiles
    depth: int  # D
    outputs: int  # F, a multiple of 128
    rows: int  # of x
    kind: str = "plain"  # dense [D, F]; plain: operands of one type, w [F, D]; packed: w is widened; blocks: scaled fp4
    group: int = 0  # contracted numbers of one scale; packed: 0 where scales come after the sum
    zero: bool = False  # packed: codes have a zero point a group
    factors: int = 0  # 1: outputs have a factor after the sum; 2: rows too
    grouped: bool = (
        False  # dense: w is [E, D, F], each tile of rows has an expert; how many tiles there are is known on the device
    )

    @property
    def steps(self) -> int:
        """Of an item."""
        return self.depth // (self.tiles.depth * self.tiles.split)

    @property
    def span(self) -> int:
        """Outputs of an item."""
        return OUTPUTS * (1 + self.tiles.pair)

    @property
    def columns(self) -> int:
        return self.outputs // self.span

    @property
    def held(self) -> int:
        """Rows of an item's x in the shared memory of a block."""
        return self.tiles.rows // (1 + self.tiles.pair)

    @property
    def bands(self) -> int:
        """Tiles of rows."""
        return -(-self.rows // self.tiles.rows)

    @property
    def items(self) -> int:
        return self.columns * self.bands * self.tiles.split

    @property
    def groups(self) -> int:
        """Scales of an output in a step."""
        return max(1, self.tiles.depth // self.group) if self.group else 0

    @property
    def wideners(self) -> int:
        """Warpgroups that widen codes."""
        return 2 if self.kind == "packed" else 0

    @property
    def tensor_columns(self) -> int:
        """Columns of tensor memory that the kernel asks for."""
        widened = WIDENED * self.tiles.depth // 2 if self.kind == "packed" else 0
        scales = (1 + -(-self.tiles.rows // 128)) * self.groups if self.kind == "blocks" else 0
        return 2 * self.tiles.rows + widened + scales


def place(item, plan: Plan, bands=None):
    """Work item -> (tile of outputs, tile of rows, part of the contracted axis). Those of the same weights are neighbours, of at
    most BANDS tiles of rows; bands: tiles of rows, if some are left out."""
    part, tile = lax.rem(item, plan.tiles.split), lax.div(item, plan.tiles.split)
    if bands is not None or plan.bands <= BANDS:
        bands = plan.bands if bands is None else bands
        return lax.div(tile, bands), lax.rem(tile, bands), part
    first = lax.div(tile, BANDS * plan.columns) * BANDS
    tile, here = tile - first * plan.columns, lax.min(plan.bands - first, BANDS)
    return lax.div(tile, here), first + lax.rem(tile, here), part


def start(part, k, plan: Plan):
    """First contracted number of step k of a part."""
    return (part * plan.steps + k) * plan.tiles.depth


def widen(codes, scale, zero):
    """codes [outputs, numbers], scale and zero [outputs] or None -> bfloat16 (codes - zero) scale."""
    wide = codes.astype(jnp.float32) if codes.dtype == jnp.float8_e4m3fn else codes
    wide = wide.astype(jnp.bfloat16)
    spread = lambda x: lax.broadcast_in_dim(x.astype(jnp.float32).astype(jnp.bfloat16), wide.shape, (0,))  # noqa: E731
    wide = wide if zero is None else wide - spread(zero)
    return wide if scale is None else wide * spread(scale)


def scale_blocks(scale: jax.Array) -> jax.Array:
    """Scales of blocks [rows, D / block], a byte each -> [rows / 128, D / block / 4, 32, 16], the order in which the MMA reads
    them: of four rows 32 apart the scales of four neighbouring blocks. Rows are padded to whole 128."""
    rows, blocks = scale.shape
    whole = -(-rows // 128)
    scale = jnp.pad(scale, ((0, whole * 128 - rows), (0, 0)))
    return scale.reshape(whole, 4, 32, blocks // 4, 4).transpose(0, 3, 2, 1, 4).reshape(whole, blocks // 4, 32, 16)


def _body(x, w, *refs, plan: Plan):
    tiles, packed, blocks = plan.tiles, plan.kind == "packed", plan.kind == "blocks"
    refs = list(refs)
    take = lambda there: refs.pop(0) if there else None  # noqa: E731
    experts = take(plan.grouped)  # how many tiles of rows there are, and the expert of each
    scale, zero = take(plan.group > 0), take(plan.zero)
    x_scale, outer, x_outer = take(blocks), take(plan.factors > 0), take(plan.factors > 1)
    out, x_smem, w_smem, out_smem, acc, full, empty, done, taken = (refs.pop(0) for _ in range(9))
    s_smem, xs_smem, z_smem = take(plan.group > 0), take(blocks), take(plan.zero)
    wide, widened, spent = (take(packed) for _ in range(3))
    s_tmem, xs_tmem = take(blocks), take(blocks)

    wg, block = lax.axis_index("wg"), lax.axis_index("block")
    rank = lax.axis_index(RANK) if tiles.pair else 0
    first = pl.when(rank == 0) if tiles.pair else lambda run: run()  # the block that issues the products of both
    bands = experts[0] if plan.grouped else None
    items = plan.columns * tiles.split * (plan.bands if bands is None else bands)
    mine = lax.div(lax.max(items - block, 0) + tiles.grid - 1, tiles.grid)
    steps, total = plan.steps, mine * plan.steps

    def each_item(visit):
        lax.fori_loop(0, mine, lambda i, _: visit(i, *place(block + i * tiles.grid, plan, bands)), None)

    def each_step(i, visit):
        lax.fori_loop(0, steps, lambda k, _: visit(k, i * steps + k), None)

    def drain(barrier, size, count):
        """Awaits the last arrivals, so that barriers end in a known phase."""
        last = lambda n, _: plgpu.barrier_wait(barrier.at[lax.rem(n, size)])  # noqa: E731
        lax.fori_loop(jnp.maximum(count - size, 0), count, last, None)

    def fetch(i, column, band, part):
        outputs, rows = pl.ds(column * plan.span, plan.span), pl.ds(band * tiles.rows, tiles.rows)

        def copy(src, dst, slot, axis=0):
            """axis: along which each of a pair takes its half."""
            half = {"collective_axes": RANK, "leader_tracked": plgpu.CopyPartition.PARTITIONED(axis)}
            plgpu.copy_gmem_to_smem(src, dst.at[slot], full.at[slot], **half if tiles.pair else {})

        def step(k, n):
            slot = lax.rem(n, tiles.stages)
            pl.when(n >= tiles.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
            at = start(part, k, plan)
            numbers = pl.ds(at, tiles.depth)
            copy(x.at[rows, numbers], x_smem, slot)
            weights = w.at[experts[1 + band]] if plan.grouped else w
            if plan.kind == "dense":
                copy(weights.at[numbers, outputs], w_smem, slot, axis=1)
            else:
                copy(weights.at[outputs, numbers], w_smem, slot)
            if blocks:
                fours = pl.ds(lax.div(at, 4 * plan.group), plan.groups // 4)
                wide = -(-tiles.rows // 128)
                copy(scale.at[pl.ds(column, 1), fours], s_smem, slot)
                copy(x_scale.at[pl.ds(lax.div(band * tiles.rows, 128), wide), fours], xs_smem, slot)
            elif plan.group:
                groups = pl.ds(lax.div(at, plan.group), plan.groups)
                copy(scale.at[groups, outputs], s_smem, slot)
                if plan.zero:
                    copy(zero.at[groups, outputs], z_smem, slot)

        each_step(i, step)

    together = {"collective_axis": RANK} if tiles.pair else {}

    def multiply(i, column, band, part):
        half = lax.rem(i, 2)
        pl.when(i >= 2)(lambda: plgpu.barrier_wait(taken.at[half]))
        sums = acc.at[:, pl.ds(half * tiles.rows, tiles.rows)]

        def step(k, n):
            slot, tile = lax.rem(n, tiles.stages), lax.rem(n, WIDENED)
            plgpu.barrier_wait(full.at[slot])
            scales = {}
            if packed:
                plgpu.barrier_wait(widened.at[tile])
                left = wide.at[:, pl.ds(tile * tiles.depth, tiles.depth)]
            else:
                left = w_smem.at[slot].T if plan.kind == "dense" else w_smem.at[slot]
            if blocks:
                plgpu.async_copy_scales_to_tmem(s_smem.at[slot], s_tmem)
                plgpu.async_copy_scales_to_tmem(xs_smem.at[slot], xs_tmem)
                scales = {"a_scale": s_tmem, "b_scale": xs_tmem}
            plgpu.tcgen05_mma(sums, left, x_smem.at[slot].T, empty.at[slot], accumulate=k > 0, **scales, **together)
            if packed:
                plgpu.tcgen05_commit_arrive(spent.at[tile])

        @first
        def _():
            each_step(i, step)
            plgpu.tcgen05_commit_arrive(done.at[half], **together)

    by_row = plgpu.Layout.TCGEN05_TMEM_NATIVE.reduce(1)

    def store(i, column, band, part):
        half = lax.rem(i, 2)
        plgpu.barrier_wait(done.at[half])
        outputs, chunk = pl.ds(column * plan.span + rank * OUTPUTS, OUTPUTS), min(tiles.rows, CHUNK)
        factor = plgpu.load(outer.at[outputs], layout=by_row, optimized=False) if plan.factors else None
        for c in range(tiles.rows // chunk):
            sums = acc.at[:, pl.ds(half * tiles.rows + c * chunk, chunk)]
            tile = plgpu.async_load_tmem(sums, layout=plgpu.Layout.TCGEN05_TMEM_NATIVE).astype(jnp.float32)
            rows = pl.ds(band * tiles.rows + c * chunk, chunk)
            if plan.factors:
                tile = tile * lax.broadcast_in_dim(factor, tile.shape, (0,))
            if plan.factors > 1:
                layout = plgpu.Layout.TCGEN05_TMEM_NATIVE.reduce(0)
                of_row = plgpu.load(x_outer.at[rows], layout=layout, optimized=False)
                tile = tile * lax.broadcast_in_dim(of_row, tile.shape, (1,))
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            to = out_smem.at[lax.rem(i * (tiles.rows // chunk) + c, 2)]
            to.T[...] = plgpu.layout_cast(tile.astype(out.dtype), plgpu.Layout.TCGEN05_TMEM_NATIVE(1))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(to, out.at[part, rows, outputs])
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(taken.at[half])

    def widening(lane, i, column, band, part):
        def step(k, n):
            @pl.when(lax.rem(n, plan.wideners) == lane)
            def _():
                slot, tile = lax.rem(n, tiles.stages), lax.rem(n, WIDENED)
                plgpu.barrier_wait(full.at[slot])
                pl.when(n >= WIDENED)(lambda: plgpu.barrier_wait(spent.at[tile]))
                size = min(plan.group or tiles.depth, tiles.depth)
                eights, pairs = plgpu.Layout.TCGEN05_TMEM_NATIVE(8), plgpu.Layout.TCGEN05_TMEM_NATIVE
                step_codes = plgpu.load(w_smem.at[slot], layout=eights, optimized=False)
                for g in range(tiles.depth // size):
                    codes = plgpu.layout_cast(step_codes[:, g * size : (g + 1) * size], pairs)
                    factor = lambda ref, g=g: plgpu.load(ref.at[slot, g], layout=by_row, optimized=False)  # noqa: E731
                    value = widen(codes, factor(s_smem) if plan.group else None, factor(z_smem) if plan.zero else None)
                    plgpu.async_store_tmem(wide.at[:, pl.ds(tile * tiles.depth + g * size, size)], value)
                plgpu.commit_tmem()
                plgpu.commit_smem()  # codes are read before the copy engine writes the next there
                plgpu.barrier_arrive(widened.at[tile])

        each_step(i, step)

    @pl.when(wg == 0)
    def _():
        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                each_item(fetch)
                drain(empty, tiles.stages, total)

            @pl.when(warp == 1)
            def _():
                each_item(multiply)
                drain(taken, 2, mine)

    @pl.when(wg == 1)
    def _():
        each_item(store)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    for lane in range(plan.wideners):

        @pl.when(wg == 2 + lane)
        def _(lane=lane):
            each_item(functools.partial(widening, lane))
            last = lambda n, _: pl.when(lax.rem(n, plan.wideners) == lane)(  # noqa: E731
                lambda: plgpu.barrier_wait(spent.at[lax.rem(n, WIDENED)])
            )
            lax.fori_loop(jnp.maximum(total - WIDENED, 0), total, last, None)


def row_bytes(dtype, depth: int) -> int:
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return depth * info(dtype).bits // 8


def _operand(dtype, depth: int) -> tuple:
    """Transforms of shared memory [..., depth] that the copy engine fills and the MMA reads."""
    swizzle, bits = min(row_bytes(dtype, depth), 128), row_bytes(dtype, 8)
    return (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))


def stage_bytes(plan: Plan, x_dtype, w_dtype, scale_dtype=jnp.uint8) -> int:
    """Shared memory of one step."""
    tiles = plan.tiles
    scales = plan.groups * OUTPUTS * jnp.dtype(scale_dtype).itemsize
    scales += plan.groups * OUTPUTS * 2 * plan.zero
    scales += plan.groups * 128 * -(-tiles.rows // 128) * (plan.kind == "blocks")
    return plan.held * row_bytes(x_dtype, tiles.depth) + OUTPUTS * row_bytes(w_dtype, tiles.depth) + scales


def out_bytes(tiles: Tiles, itemsize: int) -> int:
    return 2 * min(tiles.rows, CHUNK) * OUTPUTS * itemsize


def tiles_for(plan: Plan, depth: int, x_dtype, w_dtype, scale_dtype=jnp.uint8, most: int = 128) -> Tiles:
    """Sizes by rule, so that the busiest SM has the least to do. depth: numbers of a step; most: columns of the MMA."""
    rows = next((n for n in (16, 32, 64, 128) if plan.rows <= n), most)
    pair = rows == PAIRED and plan.kind in ("dense", "plain") and not plan.grouped and plan.outputs % (2 * OUTPUTS) == 0
    grid = SMS // (1 + pair)

    def sized(split: int) -> Plan:
        tiles = Tiles(rows=rows, depth=depth, stages=1, split=split, pair=pair, grid=grid)
        return dataclasses.replace(plan, tiles=tiles)

    def work(split: int) -> float:
        sized_ = sized(split)
        turns = -(-sized_.items // grid)
        summed = plan.rows * plan.outputs * (8 * split + 2)  # bytes: parts are written and read, their sum is written
        # 4: a tile taken out; 8: the launch of the sum over parts; 2 MB pass in the time of a step.
        return turns * (sized_.steps + 4) + (8 + summed / 2e6 if split > 1 else 0)

    whole = plan.depth // depth
    choices = [split for split in (1, 2, 4, 8) if whole % split == 0 and (split == 1 or whole // split >= 4)]
    best = sized(min(choices, key=work))
    split = best.tiles.split
    left = SHARED - 4096 - out_bytes(best.tiles, 4 if split > 1 else 2)
    stages = min(12, left // stage_bytes(best, x_dtype, w_dtype, scale_dtype))
    each = max(plan.wideners, 1)  # a slot has one widener for good
    return dataclasses.replace(best.tiles, stages=stages // each * each)


@functools.partial(jax.jit, static_argnames=("plan", "dtype"))
def product(x, w, *more, plan: Plan, dtype) -> jax.Array:
    """x [rows, D], w -> [rows, F] in dtype.

    w: [D, F] where dense ([E, D, F] grouped, then int32[1 + tiles of rows] comes first of more: how many there are, the
    expert of each), else [F, D]. more, those that the plan has, in this order: scale (packed: bfloat16 [D / group, F];
    blocks: as `scale_blocks` has it), zero bfloat16 [D / group, F], x_scale (`scale_blocks`), outer float32 [F], x_outer
    float32 [rows].
    """
    tiles = plan.tiles
    packed, blocks = plan.kind == "packed", plan.kind == "blocks"
    whole = 1 if tiles.clip and plan.rows <= 8 else 8 if tiles.clip else tiles.rows
    padded = plan.rows + -plan.rows % whole  # the copy engine clips rows, but past 8 it takes them by eights
    x = jnp.pad(x, ((0, padded - plan.rows), (0, 0)))
    if plan.factors > 1:
        *more, x_outer = more
        more = (*more, jnp.pad(x_outer, (0, plan.bands * tiles.rows - plan.rows)))
    partial = jnp.float32 if tiles.split > 1 else dtype
    held = plan.rows if tiles.clip else padded
    chunk = min(tiles.rows, CHUNK)
    stages = tiles.stages
    w_box = (stages, tiles.depth, OUTPUTS) if plan.kind == "dense" else (stages, OUTPUTS, tiles.depth)
    integers = jnp.issubdtype(x.dtype, jnp.integer)
    tensor = lambda n, **kw: plgpu.Barrier(num_arrivals=1, num_barriers=n, orders_tensor_core=True, **kw)  # noqa: E731
    copies = 2 + (plan.group > 0) + plan.zero + blocks
    scratch = [
        plgpu.SMEM((stages, plan.held, tiles.depth), x.dtype, transforms=_operand(x.dtype, tiles.depth)),
        plgpu.SMEM(w_box, w.dtype, transforms=_operand(w.dtype, 64 if plan.kind == "dense" else tiles.depth)),
        plgpu.SMEM((2, chunk, OUTPUTS), partial),
        plgpu.TMEM((OUTPUTS, 2 * tiles.rows), jnp.int32 if integers else jnp.float32, collective=tiles.pair),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        *(tensor(n) for n in (stages, 2)),
        plgpu.ClusterBarrier(collective_axes=(RANK,), num_barriers=2, orders_tensor_core=True)
        if tiles.pair
        else tensor(2),
    ]
    if blocks:
        wide = -(-tiles.rows // 128)
        scales = lambda n: plgpu.SMEM((stages, n, plan.groups // 4, 32, 16), more[0].dtype)  # noqa: E731
        inside = lambda n: plgpu.TMEM(  # noqa: E731
            (128 * n, plan.groups), more[0].dtype, layout=plgpu.TMEMLayout.SCALES_LAYOUT
        )
        scratch += [scales(1), scales(wide), inside(1), inside(wide)]
    elif packed:
        groups = lambda part: plgpu.SMEM((stages, plan.groups, OUTPUTS), part.dtype)  # noqa: E731
        scratch += [groups(part) for part in more[: (plan.group > 0) + plan.zero]]
        scratch += [
            plgpu.TMEM((OUTPUTS, WIDENED * tiles.depth), jnp.bfloat16, packed=True),
            tensor(WIDENED),
            tensor(WIDENED),
        ]
    kernel = plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=jax.ShapeDtypeStruct((tiles.split, held, plan.outputs), partial),
        grid=(tiles.grid,),
        grid_names=("block",),
        **{"cluster": (2,), "cluster_names": (RANK,)} if tiles.pair else {},
        num_threads=2 + plan.wideners,
        thread_name="wg",
        scratch_types=tuple(scratch),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="gemm_sm100",
    )
    out = kernel(x, w, *more)
    out = out[0] if tiles.split == 1 else jnp.sum(out, axis=0).astype(dtype)
    return out[: plan.rows]


def plan_dense(rows: int, w, tiles: Tiles | None = None) -> Plan:
    """w: [D, F], abstract will do."""
    first = tiles or Tiles(rows=16, depth=64, stages=2)
    plan = Plan(tiles=first, depth=w.shape[0], outputs=w.shape[1], rows=rows, kind="dense")
    return plan if tiles else dataclasses.replace(plan, tiles=tiles_for(plan, 64, w.dtype, w.dtype, most=256))


def dense(x: jax.Array, w: jax.Array, *, tiles: Tiles | None = None) -> jax.Array:
    """bfloat16 x [rows, D] @ w [D, F] -> bfloat16 [rows, F]; D in multiples of 64, F of 128."""
    return product(x, w, plan=plan_dense(len(x), w, tiles), dtype=jnp.dtype(jnp.bfloat16))
