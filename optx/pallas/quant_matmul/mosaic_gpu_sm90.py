"""quant_matmul on Hopper, 16-bit activations: out^T = w x^T, the weights being the 64-row operand, from registers.

A decode of few rows then costs few columns of the matrix units, and a weight is read and widened once for up to 128 rows.
One producer warpgroup keeps the copy engine busy through a ring of shared memory; the others own strips of 64 outputs.
Codes lie in the order of the fragments (see `Fragments`), so that a thread reads its own with 16-byte loads and widens two
at a time with bit operations (Kim et al. 2022, arXiv:2211.10017, for the constants).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxlib.mlir import ir

from optx import tensor
from optx.errors import LoweringError
from optx.formats import Float4, Float8, Format, Int, fp4
from optx.pallas.late import arith, dependent, fragmented, llvm, overlapping, plgpu, utils, vector
from optx.pallas.quant_matmul import mosaic_gpu_sm90_made as makers
from optx.pallas.quant_matmul.mosaic_gpu_sm90_fragments import BLOCK, WORDS, Fragments, relayout
from optx.tensor import QTensor

SMS = 132  # of H100 SXM and H200; on a part with fewer some blocks wait their turn
SHARED = 227 << 10  # bytes that a block may have
REGISTERS = (232, 40)  # of a consumer and of the producer where two consume; else the assembler gives what there is
PART = 64  # rows of a tile that leave together
BAND = 16  # row tiles that pass over the outputs together: x then stays in the L2 cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of a work item: `rows` rows of x by `strips` times 64 outputs."""

    rows: int  # columns of the matrix units: 8, 16, 32, 64, 128
    strips: int  # of 64 outputs
    blocks: int  # of 64 contracted numbers in a step
    stages: int  # steps in flight
    share: int = 1  # warpgroups of a strip, which take its steps in turn
    split: int = 1  # thread blocks of a cluster, which share out the contracted axis
    grid: int = SMS  # persistent thread blocks
    registers: bool = True  # False: widened by plain operations through shared memory, what the interpreter can run

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.strips * self.share

    @property
    def parts(self) -> int:
        """Partial sums of an output."""
        return self.share * self.split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is specialised on beside shapes."""

    tiles: Tiles
    kind: str  # int4, int8, fp8, mx, nv; bf16: dense [D, F], from shared memory
    bits: int
    group: int  # contracted numbers of one scale; all of them: scaled after the sum
    depth: int  # D
    strips: int  # F / 64, rounded up
    zero: bool = False
    ahead: bool = False  # weights are asked for before the kernel before this one has ended
    made: makers.Normed | makers.Gated | None = None  # what the kernel makes its row of x of; None: it gets x

    @property
    def grouped(self) -> bool:
        return self.group < self.depth

    @property
    def scaled(self) -> bool:
        """Whether an output has a factor of its own."""
        return self.kind == "nv" or not (self.grouped or self.kind == "bf16")

    @property
    def given(self) -> int:
        """Arrays before those of the weight."""
        return 1 if self.made is None else self.made.given

    @property
    def streams(self) -> int:
        """Rows that go out before the product."""
        return 0 if self.made is None else self.made.streams

    @property
    def step(self) -> int:
        return BLOCK * self.tiles.blocks

    @property
    def words(self) -> int:
        """Rows of 256 words that a step of one strip takes."""
        return self.tiles.blocks * self.bits // 2

    @property
    def scales(self) -> int:
        """Scales of an output in a step."""
        return max(1, self.step // self.group)


def plan_for(w: Fragments, tiles: Tiles) -> Plan:
    kind = {Int: f"int{w.bits}", Float8: "fp8", Float4: getattr(w.format, "kind", "")}[type(w.format)]
    d, f = w.shape
    zero, group = w.zero is not None, d // w.groups
    return Plan(tiles=tiles, kind=kind, bits=w.bits, group=group, depth=d, strips=f // BLOCK, zero=zero)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def tiles_for(rows: int, w: Fragments) -> Tiles:
    """Rows of x and the weight (abstract will do) -> sizes, so that the busiest SM has the least to do."""
    choices = [tiles for tiles in (_decode(rows, w) if rows <= 64 else _prefill(rows, w)) if tiles is not None]
    outputs = w.shape[1] // BLOCK

    def work(tiles: Tiles) -> float:
        turns = _ceil(_ceil(outputs, tiles.strips) * _ceil(rows, tiles.rows), tiles.grid // tiles.split)
        if tiles.split > 1 and turns > 1:
            return math.inf  # a cluster sums one item
        return turns * tiles.rows * (tiles.strips + 0.5) / tiles.split  # rows of x are fetched for however few strips

    return min(choices, key=work)


def _decode(rows: int, w: Fragments) -> list[Tiles | None]:
    """Few rows: weights stream, some 170 KB of them on their way to an SM (more gained nothing)."""
    wide = next(n for n in (8, 16, 32, 64) if rows <= n)
    choices = []
    for strips, split in ((3, 1), (2, 1), (1, 1), (1, 2)):
        share = 2 if strips == 1 or (w.bits == 8 and wide <= 16) else 1
        sizes = {"most": 4 if w.bits == 4 and wide <= 32 else 2, "flying": 176 << 10}
        sizes |= {"rows": wide, "strips": strips, "split": split}
        choices.append(_fitted(w, share=share, **sizes) or _fitted(w, **sizes))
    return choices


def _prefill(rows: int, w: Fragments) -> list[Tiles | None]:
    """Many rows: three warpgroups widen in turn while the matrix units work; fewer outputs an SM where F is small."""
    choices = [_fitted(w, most=2, rows=128, strips=3), _fitted(w, most=2, rows=128, strips=1, share=2)]
    return [*choices, _fitted(w, most=1, rows=128, strips=1, share=2, split=2)] if rows <= 128 else choices


def _fitted(w: Fragments, *, most: int, flying: int = SHARED, **sizes) -> Tiles | None:
    """Tiles of at most `most` blocks a step, steps in flight as they fit into `flying` bytes; None where D does not divide."""
    d = w.shape[0]
    group = d // w.groups
    for blocks in (4, 2, 1):
        step = BLOCK * blocks
        tiles = Tiles(blocks=blocks, stages=1, **sizes)
        whole = d % (step * tiles.parts) == 0 and (group % step == 0 or step % group == 0)
        if blocks <= most and whole and (tiles.parts == 1 or d // step >= 4 * tiles.parts):
            empty, one = (shared(plan_for(w, tiles), w, stages) for stages in (0, 1))
            stages = min(12, min(flying, SHARED - empty) // (one - empty)) // tiles.share * tiles.share
            if stages >= 3 or blocks == 1:
                return dataclasses.replace(tiles, stages=stages)
    return None


def shared(plan: Plan, w: Fragments | jax.Array, stages: int) -> int:
    """Bytes of shared memory that the kernel takes."""
    tiles = plan.tiles
    scale = plan.scales * BLOCK * jnp.dtype(w.scale.dtype).itemsize if plan.grouped else 0
    stage = tiles.rows * plan.step * 2 + tiles.strips * (plan.words * WORDS * 4 + scale + plan.zero * plan.scales * 128)
    out = 2 * min(tiles.rows, PART) * BLOCK * 2
    row = 0 if plan.made is None else 2 * plan.made.room(tiles.split) + 4 * plan.made.sums
    return stages * stage + tiles.strips * (out + (tiles.parts - 1) * BLOCK * tiles.rows * 4) + row + 8192


# Codes to bfloat16. A register holds two numbers; those with 7 bits of mantissa count in steps of 1 from 128 = 0x4300 on,
# so a code becomes a number by an "or" and a subtraction.


def _const(x):
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, x - (1 << 32) if x >= 1 << 31 else x))


def _and(a, mask):
    return arith.andi(a, _const(mask))


def _shift(a, count):
    return a if count == 0 else arith.shrui(a, _const(count)) if count > 0 else arith.shli(a, _const(-count))


def _pair(op, a, b):
    return utils.inline_ptx(f"{op}.rn.bf16x2 $0, $1, $2;", a, b, result_types=a.type)


def _int4(word, h, j):
    """128 + code in both halves. Left to itself the assembler makes two instructions of the "and" and the "or"."""
    word = _shift(word, 8 * j + 4 * h)
    return utils.inline_ptx("lop3.b32 $0, $1, 0x000F000F, 0x43004300, 0xEA;", word, result_types=word.type)


def _int8(word, h):
    """The signed byte h of both halves: the low 7 bits from 128 on, less 128 or (bit 7 set) 256."""
    code = utils.prmt(_const(0x43434343), word, _const(0x0705 if h else 0x0604))
    return _pair("sub", _and(code, 0xFF7FFF7F), _and(code, 0xFF80FF80))


def _fp8(word, h):
    """e4m3 byte h of both halves as a bfloat16 with its exponent bits, which is 2^-120 of the number; times 2^120."""
    word = _shift(word, 8 * (h - 1))
    bits = arith.ori(_and(word, 0x80008000), _and(_shift(word, 4), 0x07F007F0))
    return _pair("mul", bits, _const(0x7B807B80))


def _fp4(word, h, j):
    """e2m1 nibbles of both halves as bfloat16 with their exponent bits, 2^-126 of the number; times 2^126."""
    at = 8 * j + 4 * h
    bits = arith.ori(_and(_shift(word, at - 12), 0x80008000), _and(_shift(word, at - 6), 0x01C001C0))
    return _pair("mul", bits, _const(0x7E807E80))


def _thread():
    """(thread of the warpgroup, the first of its two outputs in a row of scales)."""
    thread = _and(utils.thread_idx(), 127)
    return thread, arith.addi(_shift(_shift(thread, 5), -4), _shift(_shift(_and(thread, 31), 2), -1))


def _address(ref, offset):
    """Pointer `offset` bytes (i32) into a ref of contiguous shared or global memory."""
    return utils.getelementptr(utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))


def _load(ref, offset, element, count):
    vec = ir.VectorType.get((count,), element)
    size = count * utils.bytewidth(element)
    return llvm.load(vec, _address(ref, offset), alignment=size)


def _two(ref, row, column):
    """Numbers column, column + 1 of row `row` (static) of a ref [rows, 64] -> two float32."""
    element = ir.MemRefType(ref.type).element_type
    width = utils.bytewidth(element)
    at = arith.addi(arith.muli(column, _const(width)), _const(row * BLOCK * width))
    loaded = _load(ref, at, element, 2)
    f32 = ir.F32Type.get()
    return loaded if element == f32 else arith.extf(ir.VectorType.get((2,), f32), loaded)


def _factors(scale, row, column, kind):
    """The scales of two outputs -> two words, each a bfloat16 twice."""
    if kind not in ("mx", "nv"):
        return _splats(_two(scale, row, column))
    i16, i32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)
    both = llvm.load(i16, _address(scale, arith.addi(column, _const(row * BLOCK))), alignment=2)
    both = arith.extui(i32, both)
    words = [utils.prmt(both, both, _const(selector)) for selector in (0x2020, 0x2121)]  # a byte in both halves
    if kind == "mx":
        return [_shift(word, -7) for word in words]
    return [_pair("mul", _shift(word, -4), _const(0x7B807B80)) for word in words]


def _splats(two):
    """Two float32 -> two words, each a bfloat16 twice."""
    i32 = ir.IntegerType.get_signless(32)
    narrow = arith.truncf(ir.VectorType.get((2,), ir.BF16Type.get()), two)
    word = utils.bitcast(narrow, i32)
    return utils.prmt(word, word, _const(0x1010)), utils.prmt(word, word, _const(0x3232))


def _widen(words, scale, zero, *, block: int, plan: Plan):
    """Codes of block `block` of a step -> bfloat16[64, 64] as the first operand of `wgmma`.

    words: ref int32[rows, 256]; scale, zero: refs [scales of the step, 64], zero or None; scales of groups are multiplied in.
    """
    kind, refs = plan.kind, [r for r in (words, scale if plan.grouped else None, zero) if r is not None]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * len(refs),
        return_type=plgpu.ShapeDtypeStruct((BLOCK, BLOCK), jnp.bfloat16, plgpu.Layout.WGMMA),
    )
    def widen(_, words, *rows):
        rows = list(rows)
        scale = rows.pop(0) if plan.grouped else None
        zero = rows.pop(0) if rows else None
        thread, first = _thread()
        i32, two = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())

        def load(part):  # 16 bytes a thread
            at = arith.addi(_shift(thread, -4), _const((block * plan.bits // 4 + part) * 2048))
            loaded = _load(words, at, i32, 4)
            return [vector.extract(loaded, [], [i]) for i in range(4)]

        mine = load(0) if plan.bits == 4 else load(0) + load(1)
        registers = np.empty(fragmented.WGMMA_LAYOUT.registers_shape((BLOCK, BLOCK)), dtype=object)
        factors, offsets = {}, {}
        for s in range(4):
            which = (block * BLOCK + 16 * s) // plan.group if plan.group < plan.step else 0
            if scale is not None and which not in factors:
                factors[which] = _factors(scale, which, first, kind)
            if zero is not None and which not in offsets:
                offsets[which] = _splats(_two(zero, which, first))
            for h in range(2):
                for j in range(2):
                    if kind == "int4":
                        value = _int4(mine[s], h, j)
                        value = _pair("sub", value, offsets[which][h] if zero is not None else _const(0x43084308))
                    elif kind == "int8":
                        value = _int8(mine[2 * s + j], h)
                        value = _pair("sub", value, offsets[which][h]) if zero is not None else value
                    elif kind == "fp8":
                        value = _fp8(mine[2 * s + j], h)
                    else:
                        value = _fp4(mine[s], h, j)
                    if scale is not None:
                        value = _pair("mul", value, factors[which][h])
                    registers[0, 2 * s + j, 0, 0, h, 0, 0, 0, 0] = utils.bitcast(value, two)
        return fragmented.FragmentedArray(_registers=registers, _layout=fragmented.WGMMA_LAYOUT, _is_signed=None)

    return widen(*refs)


def _store(acc, scale, smem, *, scaled: bool):
    """acc float32[64, rows] (times scale[0, outputs]) -> smem bfloat16[rows, 64], rows of 128 bytes, swizzled."""

    to = plgpu.RefType((plgpu.SwizzleTransform(128),))

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), to), return_type=())
    def store(_, acc, scale, smem):
        thread, first = _thread()
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        pair, half = ir.VectorType.get((2,), f32), ir.VectorType.get((2,), ir.BF16Type.get())
        factors = _two(scale, 0, first) if scaled else None
        lane, warp = _and(thread, 31), _shift(thread, 5)
        row, h, tile = _and(lane, 7), _and(_shift(lane, 3), 1), _shift(lane, 4)
        chunk = arith.xori(arith.addi(_shift(warp, -1), h), row)
        base = llvm.ptrtoint(i32, utils.memref_ptr(smem))
        tiles = acc.shape[1] // 8
        at = arith.addi(base, arith.addi(_shift(row, -7), _shift(chunk, -4)))
        at = arith.addi(at, _shift(tile, -10)) if tiles > 1 else at

        def word(h, tile):
            value = acc.registers[0, tile, 0, 0, h, 0, 0, 0, 0]
            if scaled:
                value = arith.mulf(value, vector.broadcast(pair, vector.extract(factors, [], [h])))
            return utils.bitcast(arith.truncf(half, value), i32)

        each = min(tiles, 2)
        for t in range(0, tiles, each):
            words = [word(h, t + n) for n in range(each) for h in range(2)]
            names = ", ".join(f"${1 + i}" for i in range(len(words)))
            to = arith.addi(at, _const(t * 1024)) if t else at
            ptx = f"stmatrix.sync.aligned.m8n8.x{len(words)}.trans.shared.b16 [$0], {{{names}}};"
            utils.inline_ptx(ptx, to, *words, has_side_effects=True)
        return ()

    store(acc, scale, smem)


def _place(item, rows: int, columns: int):
    """-> (row tile, column tile) of an item: BAND row tiles pass over the columns together."""
    if rows <= BAND:
        return lax.rem(item, rows), lax.div(item, rows)
    band = lax.div(item, BAND * columns)
    here = item - band * (BAND * columns)
    height = jnp.minimum(BAND, rows - band * BAND)
    column = lax.div(here, height)
    return band * BAND + here - column * height, column


def _body(*refs, plan: Plan):
    tiles, refs, made = plan.tiles, list(refs), plan.made
    *refs, row_smem, sums = refs if made else (*refs, None, None)
    given, refs = refs[: plan.given], refs[plan.given :]
    codes, scale = refs[:2] if plan.kind != "bf16" else (refs[0], refs[0])
    zero = refs[2] if plan.zero else None
    outer = refs[2 + plan.zero] if plan.kind == "nv" else scale  # what outputs are multiplied by
    streams = refs[-12 - plan.streams : -12]
    out, x_smem, w_smem, s_smem, z_smem, a_smem, p_smem, out_smem, full, empty, done, free = refs[-12:]
    wg, block = lax.axis_index("wg"), lax.axis_index("block")
    rank = lax.axis_index("part") if tiles.split > 1 else 0
    row_tiles, column_tiles = _ceil(out.shape[0], tiles.rows), _ceil(plan.strips, tiles.strips)
    items, steps = row_tiles * column_tiles, plan.depth // plan.step // tiles.split
    stride = tiles.grid // tiles.split
    mine = lax.div(items - block + (stride - 1), stride)
    consumer, producer = REGISTERS
    trade = tiles.registers and tiles.consumers == 2 and made is None

    def each_item(body):
        def turn(i, _):
            body(i * steps, *_place(block + i * stride, row_tiles, column_tiles))

        lax.fori_loop(0, mine, turn, None)

    @pl.when(wg == tiles.consumers)
    def _():
        if trade:
            plgpu.set_max_registers(producer, action="decrease")

        def produce(first, row, column):
            strips = pl.ds(column * tiles.strips, tiles.strips)

            def load(k, _, weights=True, activations=True):
                slot = lax.rem(first + k, tiles.stages)
                if weights:

                    @pl.when(first + k >= tiles.stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                at = k + rank * steps
                copy = lambda src, dst: plgpu.copy_gmem_to_smem(src, dst.at[slot], full.at[slot])  # noqa: E731
                if activations and made is None:
                    copy(given[0].at[pl.ds(row * tiles.rows, tiles.rows), pl.ds(at * plan.step, plan.step)], x_smem)
                if weights and plan.kind == "bf16":
                    outputs = pl.ds(column * (tiles.strips * BLOCK), tiles.strips * BLOCK)
                    copy(codes.at[pl.ds(at * plan.step, plan.step), outputs], w_smem)
                elif weights:
                    copy(codes.at[strips, pl.ds(at * plan.words, plan.words)], w_smem)
                group = lax.div(at * plan.step, plan.group)
                if weights and plan.grouped:
                    copy(scale.at[strips, pl.ds(group, plan.scales)], s_smem)
                if weights and plan.zero:
                    copy(zero.at[strips, pl.ds(group, plan.scales)], z_smem)
                if activations and made is not None:
                    hand(k, slot)

            if not plan.ahead and made is None:
                lax.fori_loop(0, steps, load, None)
                return
            ahead = jnp.where(first == 0, min(tiles.stages, steps), 0)
            lax.fori_loop(0, ahead, functools.partial(load, activations=False), None)
            pl.when(first == 0)(begin)
            lax.fori_loop(0, ahead, functools.partial(load, weights=False), None)
            lax.fori_loop(ahead, steps, load, None)

        def begin():
            if plan.ahead:
                plgpu.griddepcontrol_wait()
            place = block * tiles.split + rank
            if made is not None and tiles.registers:
                makers.make(made, given, streams, row_smem, sums, place, split=tiles.split)
            elif made is not None:
                *found, row_smem[...] = (value[0] for value in made.plainly(*(ref[...] for ref in given)))

                @pl.when(place == 0)
                def _():
                    for stream, value in zip(streams, found, strict=True):
                        stream[0] = value

        def hand(k, slot):
            start = made.first(rank, steps * plan.step) + k * plan.step
            if tiles.registers:
                makers.hand(row_smem, x_smem.at[slot], start, count=plan.step)
            else:
                x_smem[slot, 0] = row_smem[pl.ds(start, plan.step)]
                plgpu.commit_smem()
            plgpu.barrier_arrive(full.at[slot])

        each_item(produce)

        def drain(step, _):  # every arrival is awaited: barriers end in a known phase
            plgpu.barrier_wait(empty.at[lax.rem(step, tiles.stages)])

        lax.fori_loop(jnp.maximum(mine * steps - tiles.stages, 0), mine * steps, drain, None)

    @pl.when(wg < tiles.consumers)
    def _():
        if trade:
            plgpu.set_max_registers(consumer, action="increase")
        lane, turn = lax.rem(wg, tiles.strips), lax.div(wg, tiles.strips)

        def operand(slot, block):
            """64 outputs by 64 contracted numbers of the step in a slot."""
            if plan.kind == "bf16":
                return w_smem.at[slot, pl.ds(block * BLOCK, BLOCK), pl.ds(lane * BLOCK, BLOCK)].T
            words = w_smem.at[slot, lane]
            scales = s_smem.at[slot, lane] if plan.grouped else None
            zeros = z_smem.at[slot, lane] if plan.zero else None
            if tiles.registers:
                return _widen(words, scales, zeros, block=block, plan=plan)
            plgpu.wgmma_wait(0)
            a_smem[wg] = _widen_plainly(words, scales, zeros, block=block, plan=plan)
            plgpu.commit_smem()
            return a_smem.at[wg]

        def consume(first, row, column):
            def accumulate(acc):
                def multiply(i, _):
                    slot = lax.rem(first + i * tiles.share + turn, tiles.stages)
                    plgpu.barrier_wait(full.at[slot])
                    for b in range(tiles.blocks):
                        plgpu.wgmma(acc, operand(slot, b), x_smem.at[slot, :, pl.ds(b * BLOCK, BLOCK)].T)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[slot])

                lax.fori_loop(0, lax.div(steps - turn + tiles.share - 1, tiles.share), multiply, None)
                return acc[...]

            acc = pl.run_scoped(accumulate, plgpu.ACC((BLOCK, tiles.rows)))
            if tiles.parts == 1:
                store(acc, column, row)
                return
            part = rank * tiles.share + turn

            @pl.when(part > 0)
            def _():
                to = p_smem.at[part - 1, lane]
                if tiles.split > 1:  # of one item at most
                    plgpu.async_store_smem(acc, to, done, cluster_idx=0, cluster_dim="part", optimized=False)
                else:
                    pl.when(first > 0)(lambda: plgpu.barrier_wait(free))
                    to[...] = acc
                    plgpu.barrier_arrive(done)

            @pl.when(part == 0)
            def _():
                plgpu.barrier_wait(done)
                total = acc
                for i in range(tiles.parts - 1):
                    total = total + plgpu.load(p_smem.at[i, lane], layout=plgpu.Layout.WGMMA, optimized=False)
                if tiles.split == 1:
                    plgpu.barrier_arrive(free)
                store(total, column, row)

        def store(acc, column, row):
            strip, size = column * tiles.strips + lane, min(tiles.rows, PART)
            factors = outer.at[jnp.minimum(strip, plan.strips - 1)]
            for i in range(tiles.rows // size):
                slot = out_smem.at[lane, i % 2]
                plgpu.wait_smem_to_gmem(min(tiles.rows // size - 1, 1), wait_read_only=True)
                rows = acc[:, i * size : (i + 1) * size]
                if tiles.registers:
                    _store(rows, factors, slot, scaled=plan.scaled)
                else:
                    rows = rows * _restored(factors[0]).astype(jnp.float32)[:, None] if plan.scaled else rows
                    slot[...] = rows.astype(out.dtype).T
                plgpu.commit_smem()

                @pl.when((strip < plan.strips) | tiles.registers)  # the copy engine clips; the interpreter does not
                def _(slot=slot, i=i):
                    to = pl.ds(row * tiles.rows + i * size, size)
                    plgpu.copy_smem_to_gmem(slot, out.at[to, pl.ds(strip * BLOCK, BLOCK)])

        each_item(consume)
        if tiles.share > 1 and tiles.split == 1:
            pl.when((turn > 0) & (mine > 0))(lambda: plgpu.barrier_wait(free))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _restored(row):
    """A row of 64 scales in the order of outputs."""
    return row.reshape(4, 8, 2).transpose(0, 2, 1).reshape(BLOCK)


def _widen_plainly(words, scale, zero, *, block: int, plan: Plan):
    """`_widen` without registers, for the interpreter."""
    rows = plan.bits // 2
    codes = words[block * rows : (block + 1) * rows]
    thread = codes.reshape(*((4, 8, 4, 4) if plan.bits == 4 else (2, 4, 8, 4, 4)))  # [u] w g c word
    shift = lambda n: thread >> n  # noqa: E731
    if plan.bits == 4:  # word s; byte j + 2 e; nibble h
        parts = [[[shift(8 * j + 16 * e + 4 * h) & 15 for e in range(2)] for j in range(2)] for h in range(2)]
        value = jnp.stack([jnp.stack([jnp.stack(p) for p in q]) for q in parts])  # h j e w g c s
        value = value.transpose(3, 0, 4, 6, 1, 5, 2).reshape(BLOCK, BLOCK)  # w h g, s j c e
        value = value.astype(jnp.float32) + 128 if plan.kind == "int4" else fp4.values(value)
    else:  # word v j; byte h + 2 e
        parts = [[(shift(16 * e + 8 * h) & 255) for e in range(2)] for h in range(2)]
        value = jnp.stack([jnp.stack(p) for p in parts]).reshape(2, 2, 2, 4, 8, 4, 2, 2)  # h e u w g c v j
        value = value.transpose(3, 0, 4, 2, 6, 7, 5, 1).reshape(BLOCK, BLOCK)  # w h g, u v j c e
        if plan.kind == "fp8":
            sign, low = jnp.where(value >= 128, -1.0, 1.0), value & 127
            normal = lax.bitcast_convert_type((low << 20) + (120 << 23), jnp.float32)
            value = sign * jnp.where(low < 8, low.astype(jnp.float32) * 2.0**-9, normal)
        else:
            value = jnp.where(value >= 128, value - 256, value).astype(jnp.float32)
    groups = [(block * BLOCK + 16 * s) // plan.group if plan.group < plan.step else 0 for s in range(4)]
    columns = lambda ref: jnp.stack([_restored(ref[g]) for g in groups], 1)[:, :, None]  # noqa: E731
    value = value.reshape(BLOCK, 4, 16)
    if zero is not None:
        value = value - columns(zero).astype(jnp.float32)
    elif plan.kind == "int4":
        value = value - 136
    if plan.grouped:
        factors = columns(scale)
        if plan.kind == "mx":
            factors = fp4.mx_factor(factors)
        elif plan.kind == "nv":
            factors = lax.bitcast_convert_type(factors, jnp.float8_e4m3fn)
        value = value * factors.astype(jnp.float32)
    return value.reshape(BLOCK, BLOCK).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames=("rows", "plan"))
def _call(x, *w, rows: int, plan: Plan):
    """x [rows or more, D] (or what a row of it is made of), the parts of the weight -> [rows that go out, [rows, F]]."""
    tiles, made = plan.tiles, plan.made
    swizzle = plgpu.SwizzleTransform(128)
    tiled = (plgpu.TilingTransform((8, BLOCK)), swizzle)
    part = min(tiles.rows, PART)
    narrow = min(tiles.rows, 32)
    partial = (plgpu.TilingTransform((8, narrow)), plgpu.SwizzleTransform(4 * narrow))
    cluster = {"cluster": (tiles.split,), "cluster_names": ("part",)} if tiles.split > 1 else {}
    made_types = ()
    if made is not None:
        made_types = (plgpu.SMEM((made.room(tiles.split),), x.dtype), plgpu.SMEM((made.sums,), jnp.float32))
    kernel = dependent(
        functools.partial(_body, plan=plan),
        waits=plan.ahead,
        out_type=(
            *(jax.ShapeDtypeStruct((1, plan.depth), x.dtype) for _ in range(plan.streams)),
            jax.ShapeDtypeStruct((rows, plan.strips * BLOCK), x.dtype),
        ),
        grid=(tiles.grid // tiles.split,),
        grid_names=("block",),
        **cluster,
        num_threads=tiles.consumers + 1,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((tiles.stages, tiles.rows, plan.step), x.dtype, transforms=tiled),
            plgpu.SMEM((tiles.stages, plan.step, tiles.strips * BLOCK), x.dtype, transforms=tiled)
            if plan.kind == "bf16"
            else plgpu.SMEM((tiles.stages, tiles.strips, plan.words, WORDS), jnp.int32),
            plgpu.SMEM(
                (tiles.stages if plan.grouped else 1, tiles.strips, plan.scales, BLOCK),
                w[plan.given].dtype if plan.grouped else x.dtype,
            ),
            plgpu.SMEM((tiles.stages if plan.zero else 1, tiles.strips, plan.scales, BLOCK), jnp.bfloat16),
            plgpu.SMEM((tiles.consumers, 8 if tiles.registers else BLOCK, BLOCK), x.dtype, transforms=tiled),
            plgpu.SMEM(
                (tiles.parts - 1, tiles.strips, BLOCK, tiles.rows) if tiles.parts > 1 else (1, 1, 8, narrow),
                jnp.float32,
                transforms=partial,
            ),
            plgpu.SMEM((tiles.strips, 2, part, BLOCK), x.dtype, transforms=(swizzle,)),
            plgpu.Barrier(num_arrivals=2 + plan.grouped + plan.zero, num_barriers=tiles.stages),
            plgpu.Barrier(num_arrivals=tiles.strips, num_barriers=tiles.stages),
            # one for all strips: jax 0.11.2 adds the offset of a barrier in an array twice when it is another block's
            plgpu.Barrier(num_arrivals=max(tiles.parts - 1, 1) * tiles.strips),
            plgpu.Barrier(num_arrivals=tiles.strips),
            *made_types,
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=tiles.registers
        ),
        kernel_name="quant_matmul" if made is None else f"quant_matmul_{made.name}",
    )
    return kernel(x, *w)


def quant_matmul(
    x: jax.Array, w: QTensor | Fragments, activations: Format | None = None, *, tiles: Tiles | None = None
):
    """bfloat16 x [..., D], w [D, F] -> [..., F]. A `QTensor` is re-laid on the way; lower a model with `relayout`.

    Raises: LoweringError for what `supports` declines.
    """
    reason = _declines(w, x.dtype)
    if reason:
        raise LoweringError(f"quant_matmul: {reason}")
    if x.shape[-1] != w.shape[0]:
        raise LoweringError(f"quant_matmul: x {list(x.shape)} meets w {list(w.shape)}; allowed: x [..., {w.shape[0]}]")
    if activations is not None:
        codes = lax.optimization_barrier(
            tensor.quantize(x, activations, axis=-1)
        )  # XLA drops a conversion to fp8 and back
        x = codes.dequantize()
    ahead = isinstance(w, Fragments) and overlapping()
    w = w if isinstance(w, Fragments) else relayout(w)
    d, f = w.shape
    if x.size == 0:
        return jnp.zeros((*x.shape[:-1], f), x.dtype)
    tiles = tiles or tiles_for(x.size // d, w)
    plan = dataclasses.replace(plan_for(w, tiles), ahead=ahead)
    return _rows(x, *w.parts, plan=plan)


def dense_matmul(x: jax.Array, w: jax.Array, *, tiles: Tiles | None = None):
    """bfloat16 x [..., D] @ w [D, F] -> [..., F] for few rows (up to 64), D and F in multiples of 64."""
    d, f = w.shape
    rows = x.size // d
    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16 or d % BLOCK or f % BLOCK or not 0 < rows <= 256:
        raise LoweringError(
            f"dense_matmul: x {x.dtype}{list(x.shape)}, w {w.dtype}{list(w.shape)}; allowed: bfloat16, 1 to 256 rows, "
            f"D and F in multiples of {BLOCK}"
        )
    return _rows(x, w, plan=dataclasses.replace(_dense_plan(rows, w, tiles), ahead=overlapping()))


def _dense_plan(rows: int, w: jax.Array, tiles: Tiles | None) -> Plan:
    d, f = w.shape
    tiles = tiles or _dense(rows, d // BLOCK, f // BLOCK)
    return Plan(tiles=tiles, kind="bf16", bits=16, group=d, depth=d, strips=f // BLOCK)


def made_matmul(made: makers.Normed | makers.Gated, given, w, *, tiles: Tiles | None = None) -> list[jax.Array]:
    """The row that is made of `given`, arrays of one row, times w [D, F] -> [rows that go out [1, D], product [1, F]].

    For what `quant_matmul` and `dense_matmul` take, and D up to `makers.WIDEST`.
    """
    ahead = overlapping() and not isinstance(w, QTensor)
    w = relayout(w) if isinstance(w, QTensor) else w
    packed = isinstance(w, Fragments)
    plan = plan_for(w, tiles or tiles_for(1, w)) if packed else _dense_plan(1, w, tiles)
    plan = dataclasses.replace(plan, made=made, ahead=ahead)
    empty, one = (shared(plan, w, stages) for stages in (0, 1))
    stages = min(plan.tiles.stages, (SHARED - empty) // (one - empty) // plan.tiles.share * plan.tiles.share)
    plan = dataclasses.replace(plan, tiles=dataclasses.replace(plan.tiles, stages=stages))
    return _call(*given, *(w.parts if packed else (w,)), rows=1, plan=plan)


def _dense(rows: int, steps: int, outputs: int) -> Tiles:
    """Sizes for a weight of `steps` by `outputs` blocks, so that the busiest SM has the least to do. A sum over thread blocks
    costs about half of what it saves."""
    wide = next(n for n in (8, 16, 32, 64, 128, 256) if rows <= n)
    choices = []
    for strips, share, split, blocks in ((3, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 2)):
        turns = _ceil(_ceil(outputs, strips), SMS // split)
        empty = 8192 + strips * (2 * min(wide, PART) * BLOCK * 2 + (share * split - 1) * BLOCK * wide * 4)
        stages = (SHARED - empty) // ((wide + strips * BLOCK) * BLOCK * 2 * blocks) // share * share
        whole = steps % (blocks * share * split) == 0 and steps // blocks >= 4 * share * split
        if (split == 1 or turns == 1) and stages >= 3 and (whole or strips > 1):
            tiles = Tiles(rows=wide, strips=strips, blocks=blocks, stages=min(stages, 24), share=share, split=split)
            choices.append((turns * (strips + 0.5) * (1.5 / split if split > 1 else 1), len(choices), tiles))
    return min(choices)[2]


def _rows(x, *w, plan: Plan):
    *lead, d = x.shape
    rows = math.prod(lead)
    whole = 8 if plan.tiles.registers else plan.tiles.rows
    x = x.reshape(rows, d)
    if rows > 8 or not plan.tiles.registers:  # the copy engine clips rows, but past 8 it takes them by eights
        x = jnp.pad(x, ((0, -rows % whole), (0, 0)))
    return _call(x, *w, rows=rows, plan=plan)[0].reshape(*lead, plan.strips * BLOCK)


def supports(args, target) -> str | None:
    """args: weight (QTensor or Fragments, abstract will do); dtype of x and activations (a format) if they are known."""
    if (target.platform, target.arch) != ("gpu", "sm90"):
        return f"is for gpu sm90, not {target.platform} {target.arch}"
    if args.get("activations") is not None:
        return f"activations in {args['activations']}; allowed: as they are"
    return _declines(args["weight"], args.get("dtype") or jnp.bfloat16)


def _declines(w, dtype) -> str | None:
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"x is {jnp.dtype(dtype)}; allowed: bfloat16"
    if isinstance(w, Fragments):
        return None
    if not isinstance(w, QTensor):
        return f"w is {type(w).__name__}; allowed: QTensor, Fragments"
    f = w.format
    taken = (
        (isinstance(f, Int) and f.width in (4, 8))
        or (isinstance(f, Float8) and f.kind == "e4m3")
        or isinstance(f, Float4)
    )
    if not taken:
        return f"w is {f}; allowed: int4, int8, fp8_e4m3, mxfp4, nvfp4"
    if w.ndim != 2 or w.axis != -2:
        return f"w {list(w.shape)} is packed along axis {w.axis}; allowed: a matrix [D, F] packed along D"
    if any(size % BLOCK for size in w.shape):
        return f"w is {list(w.shape)}; allowed: D and F in multiples of {BLOCK}"
    group = getattr(f, "group", None) or w.length
    if group != w.length and BLOCK % group and group % BLOCK:
        return f"w has groups of {group}; allowed: 16, 32, or a multiple of {BLOCK}"
    if group < 16:
        return f"w has groups of {group}; allowed: 16, 32, or a multiple of {BLOCK}"
    return None
