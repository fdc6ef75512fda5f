"""The packed half of `grouped_matmul` on Hopper: out^T = w x^T, weights widened in registers as the 64-row operand.

Few tokens an expert then cost few columns of the matrix units, and every code is read from memory once and widened once
an item. Weights lie in the fragments of `optx.pallas.quant_matmul`, experts one after another.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fragmented
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from optx.pallas.grouped_matmul.schedule_sm90 import WIDE
from optx.pallas.quant_matmul import mosaic_gpu_sm90_fragments as fragments
from optx.tensor import QTensor

SHARED = 200 << 10  # bytes of tiles in flight, of 227 KB a block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
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


def relayout(w: QTensor) -> Experts:
    """The same weights [E, D, F] as `Experts`; w: what `supports` takes."""
    flat = jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), w)
    return Experts(rows=fragments.relayout(flat), experts=w.shape[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTiles:
    """Sizes of a work item: `rows` tokens by 128 outputs, 64 a warpgroup."""

    rows: int  # tokens of an item: columns of the matrix units
    short: int  # rows that are loaded when an item has no more than these
    blocks: int  # of 64 contracted numbers in a step
    stages: int  # steps in flight
    band: int = 16  # row tiles that pass over the outputs together


def packed_tiles_for(tokens: int, experts: int, d: int, bits: int, group: int) -> PackedTiles:
    """Steps of about 16 KB of codes where D and the group (D for one scale a channel) allow."""
    each = tokens // experts
    rows = 16 if each <= 8 else 32 if each <= 32 else 128
    wanted = {4: 4, 8: 2}[bits] if rows < 128 else 2
    blocks = next(n for n in (4, 2, 1) if n <= wanted and d % (WIDE * n) == 0 and _steps_fit(WIDE * n, group, d))
    stage = blocks * (128 * WIDE * bits // 8 + rows * WIDE * 2 + 1024)
    return PackedTiles(rows=rows, short=rows // 2, blocks=blocks, stages=min(8, SHARED // stage))


def _steps_fit(depth, group, d):
    return group == d or group % depth == 0 or depth % group == 0


# The fragment of a thread in a block of 64 x 64 is registers (s, h, j): numbers 16 s + 8 j + 2 c + {0, 1} of output
# 16 w + 8 h + g, thread 32 w + 4 g + c. A register holds two bfloat16; those of a 16-bit float with 7 bits of mantissa
# count in steps of 1 from 128 = 0x4300 on, so a code becomes a number by an "or" and a subtraction.


def _const(x):
    return arith.constant(ir.IntegerType.get_signless(32), ir.IntegerAttr.get(ir.IntegerType.get_signless(32), x))


def _signed(x):
    return x - (1 << 32) if x >= 1 << 31 else x


def _and(a, mask):
    return arith.andi(a, _const(_signed(mask)))


def _or(a, bits):
    return arith.ori(a, _const(_signed(bits)))


def _right(a, count):
    return arith.shrui(a, _const(count)) if count else a


def _pair(op, a, b):
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [a, b], f"{op}.rn.bf16x2 $0, $1, $2;", "=r,r,r")


def _int4(words, h, j):
    """128 + code, both halves; words: the thread's word of step s."""
    return _or(_and(_right(words, 4 * (2 * j + h)), 0x000F000F), 0x43004300)


def _int8(word, h):
    """The signed byte h of both halves: the low 7 bits from 128 on, less 128 or (bit 7) 256."""
    code = _or(_and(_right(word, 8 * h), 0x00FF00FF), 0x43004300)
    return _pair("sub", _and(code, 0xFF7FFF7F), _and(code, 0xFF80FF80))


def _fp8(word, h):
    """e4m3 byte h of both halves as a bfloat16 with its exponent bits: 2^-120 of the number."""
    top = word if h else arith.shli(word, _const(8))
    return arith.ori(_and(top, 0x80008000), _right(_and(top, 0x7F007F00), 4))


def _splat(value):
    """A 16- or 32-bit float -> bfloat16 in both halves of a word."""
    f32, i16, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)
    if value.type != ir.BF16Type.get():
        value = value if value.type == f32 else arith.extf(f32, value)
        value = arith.truncf(ir.BF16Type.get(), value)
    bits = arith.extui(i32, arith.bitcast(i16, value))
    return arith.ori(bits, arith.shli(bits, _const(16)))


def _thread():
    """(thread of the warpgroup, index of its two outputs in a row of scales)."""
    thread = arith.andi(utils.thread_idx(), _const(127))
    warp, g = _right(thread, 5), _right(_and(thread, 31), 2)
    return thread, arith.addi(arith.shli(warp, _const(4)), arith.shli(g, _const(1)))


def _at(ref, *indices):
    index = ir.IndexType.get()
    cast = lambda i: arith.constant(index, i) if isinstance(i, int) else arith.index_cast(index, i)  # noqa: E731
    return memref.load(ref, [cast(i) for i in indices])


def _widen(words, scale, zero, *, block: int, kind: str, grouped: bool, per_scale: int, group: int):
    """Codes of block `block` of a step -> bfloat16[64, 64] as the first operand of `wgmma`.

    words: ref int32[rows, 256]; scale, zero: refs [scales of the step, 64]; grouped: scales are multiplied in here.
    """
    rows = 2 if kind == "int4" else 4

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((64, 64), jnp.bfloat16, plgpu.Layout.WGMMA),
    )
    def widen(_, words, scale, zero):
        thread, pair = _thread()
        index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
        four = ir.VectorType.get((4,), i32)
        two = ir.VectorType.get((2,), ir.BF16Type.get())
        row = arith.index_cast(index, _right(thread, 6))
        column = arith.index_cast(index, arith.shli(_and(thread, 63), _const(2)))

        def load(first):
            at = arith.addi(row, arith.constant(index, first))
            loaded = vector.load(four, words, [at, column])
            return [vector.extract(loaded, [], [i]) for i in range(4)]

        mine = load(block * rows) if kind == "int4" else load(block * rows) + load(block * rows + 2)
        registers = np.empty(fragmented.WGMMA_LAYOUT.registers_shape((64, 64)), dtype=object)
        factors, offsets = {}, {}
        for s in range(4):
            which = 0 if group >= WIDE * per_scale else (block * WIDE + 16 * s) // group
            for h in range(2):
                key = (which, h)
                if grouped and key not in factors:
                    factors[key] = _splat(_at(scale, which, arith.addi(pair, _const(h))))
                if zero is not None and has_zero and key not in offsets:
                    offsets[key] = _splat(_at(zero, which, arith.addi(pair, _const(h))))
                for j in range(2):
                    if kind == "int4":
                        value = _int4(mine[s], h, j)
                        value = _pair("sub", value, offsets[key] if has_zero else _const(0x43084308))
                    elif kind == "int8":
                        value = _int8(mine[2 * s + j], h)
                        value = _pair("sub", value, offsets[key]) if has_zero else value
                    else:
                        value = _pair("mul", _fp8(mine[2 * s + j], h), _const(0x7B807B80))
                    if grouped:
                        value = _pair("mul", value, factors[key])
                    registers[0, 2 * s + j, 0, 0, h, 0, 0, 0, 0] = utils.bitcast(value, two)
        return fragmented.FragmentedArray(_registers=registers, _layout=fragmented.WGMMA_LAYOUT, _is_signed=None)

    has_zero = zero is not None
    return widen(words, scale, scale if zero is None else zero)


def _scale_outputs(acc, scale):
    """acc float32[64, N] times scale[0, outputs]."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, plgpu.Layout.WGMMA),
    )
    def multiply(_, acc, scale):
        _, pair = _thread()
        f32 = ir.F32Type.get()
        factors = []
        for h in range(2):
            value = _at(scale, arith.addi(pair, _const(h)))
            value = value if value.type == f32 else arith.extf(f32, value)
            factors.append(vector.broadcast(ir.VectorType.get((2,), f32), value))
        registers = np.empty_like(acc.registers)
        for at, register in np.ndenumerate(acc.registers):
            registers[at] = arith.mulf(register, factors[at[4]])
        return fragmented.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=None)

    return multiply(acc, scale)
