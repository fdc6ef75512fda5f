"""Codes in the order of `wgmma` fragments to bfloat16 registers, and sums in registers to rows of shared memory.

A thread's registers (s, h, j) of a block of 64 x 64 hold the numbers 16 s + 8 j + 2 c + {0, 1} of output 16 w + 8 h + g, for
thread 32 w + 4 g + c; `Fragments` keeps the codes of one thread in 16 contiguous bytes. Two codes become two bfloat16 by bit
operations on one word: those with 7 bits of mantissa count in steps of 1 from 128 = 0x4300 on (constants after Kim et al.
2022, arXiv:2211.10017).
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir

from optx.pallas.late import arith, fragmented, llvm, plgpu, utils, vector

BLOCK = 64


def _const(x):
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, x - (1 << 32) if x >= 1 << 31 else x))


def _and(a, mask):
    return arith.andi(a, _const(mask))


def _right(a, count):
    return arith.shrui(a, _const(count)) if count else a


def _left(a, count):
    return arith.shli(a, _const(count)) if count else a


def _mask_or(a, mask, bits):
    """(a & mask) | bits in one instruction: left to itself, ptxas makes two where both are constants."""
    return utils.inline_ptx(f"lop3.b32 $0, $1, {mask:#x}, $2, 0xEA;", a, bits, result_types=a.type)


def _pair(op, a, b):
    """op on the two bfloat16 of a word."""
    return utils.inline_ptx(f"{op}.rn.bf16x2 $0, $1, $2;", a, b, result_types=a.type)


def _int4(word, h, j, zero):
    """zero: 128 + zero point in both halves, or None for 8."""
    code = _mask_or(_right(word, 8 * j + 4 * h), 0x000F000F, _const(0x43004300))
    return _pair("sub", code, _const(0x43084308) if zero is None else zero)


def _int8(word, h, zero):
    """The signed byte h of both halves: the low 7 bits from 128 on, less 128 or (bit 7 set) 256."""
    code, base = _right(word, 8 * h), _const(0x43004300)
    value = _pair("sub", _mask_or(code, 0x007F007F, base), _mask_or(code, 0x00800080, base))
    return value if zero is None else _pair("sub", value, zero)


def _fp8(word, h):
    """The e4m3 byte h of both halves with the exponent bits of a bfloat16, which is 2^-120 of the number; times 2^120."""
    low = _and(_right(word, 4) if h else _left(word, 4), 0x07F007F0)
    return _pair("mul", _mask_or(word if h else _left(word, 8), 0x80008000, low), _const(0x7B807B80))


def _thread():
    """(thread of the warpgroup, the first of its two outputs in a row of scales)."""
    thread = _and(utils.thread_idx(), 127)
    return thread, arith.addi(_left(_right(thread, 5), 4), _left(_right(_and(thread, 31), 2), 1))


def _load(ref, offset, element, count):
    """`count` numbers from `offset` bytes on in a ref of contiguous memory."""
    address = utils.getelementptr(utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))
    return llvm.load(ir.VectorType.get((count,), element), address, alignment=count * utils.bytewidth(element))


def _two(ref, row, column):
    """Numbers column, column + 1 of row `row` of a ref [rows, 64], in float32."""
    element, f32 = ir.MemRefType(ref.type).element_type, ir.F32Type.get()
    width = utils.bytewidth(element)
    loaded = _load(ref, arith.addi(arith.muli(column, _const(width)), _const(row * BLOCK * width)), element, 2)
    return loaded if element == f32 else arith.extf(ir.VectorType.get((2,), f32), loaded)


def _splats(two):
    """Two float32 -> two words, each a bfloat16 twice."""
    narrow = arith.truncf(ir.VectorType.get((2,), ir.BF16Type.get()), two)
    word = utils.bitcast(narrow, ir.IntegerType.get_signless(32))
    return utils.prmt(word, word, _const(0x1010)), utils.prmt(word, word, _const(0x3232))


def _row_of_scales(block, s, plan):
    """Which of a step's scales numbers 16 s .. 16 s + 15 of a block have."""
    return (block * BLOCK + 16 * s) // plan.group if plan.group < plan.step else 0


def widen(words, scale, zero, *, block: int, plan):
    """Codes of block `block` of a step -> bfloat16[64, 64] as the first operand of `wgmma`.

    words: ref int32[rows, 256]; scale, zero: refs [scales of the step, 64] or None; such scales are multiplied in.
    plan: with `kind` (int4, int8, fp8), `bits`, `group` and `step` (contracted numbers of a scale, of a step).
    """
    refs = [ref for ref in (words, scale, zero) if ref is not None]
    layout = plgpu.ShapeDtypeStruct((BLOCK, BLOCK), jnp.bfloat16, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=layout)
    def run(_, words, *rows):
        scales = rows[0] if scale is not None else None
        zeros = rows[-1] if zero is not None else None
        thread, first = _thread()
        i32, two = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        mine = []
        for part in range(plan.bits // 4):  # 16 bytes a thread
            at = (block * plan.bits // 4 + part) * 2048
            loaded = _load(words, arith.addi(_left(thread, 4), _const(at)), i32, 4)
            mine += [vector.extract(loaded, [], [i]) for i in range(4)]
        registers = np.empty(fragmented.WGMMA_LAYOUT.registers_shape((BLOCK, BLOCK)), dtype=object)
        factors, offsets = {}, {}
        for s in range(4):
            row = _row_of_scales(block, s, plan)
            if scales is not None and row not in factors:
                factors[row] = _splats(_two(scales, row, first))
            if zeros is not None and row not in offsets:
                offsets[row] = _splats(_two(zeros, row, first))
            for h, j in np.ndindex(2, 2):
                offset = offsets[row][h] if zeros is not None else None
                if plan.kind == "int4":
                    value = _int4(mine[s], h, j, offset)
                else:
                    word = mine[2 * s + j]
                    value = _int8(word, h, offset) if plan.kind == "int8" else _fp8(word, h)
                if scales is not None:
                    value = _pair("mul", value, factors[row][h])
                registers[0, 2 * s + j, 0, 0, h, 0, 0, 0, 0] = utils.bitcast(value, two)
        return fragmented.FragmentedArray(_registers=registers, _layout=fragmented.WGMMA_LAYOUT, _is_signed=None)

    return run(*refs)


def store(acc, scale, smem):
    """acc float32[64, rows] (times scale[0, outputs], a ref or None) -> smem bfloat16[rows, 64] of 128-byte swizzled rows."""
    to = plgpu.RefType((plgpu.SwizzleTransform(128),))
    refs = [smem] if scale is None else [smem, scale]
    types = (to, *(plgpu.RefType() for _ in refs[1:]))

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, *types), return_type=())
    def run(_, acc, smem, *scales):
        thread, first = _thread()
        i32, half = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        factors = _two(scales[0], 0, first) if scales else None
        tiles = acc.shape[1] // 8
        # Lane 16 t + 8 h + r stores row r of tile t; 16-byte chunk 2 w + h of the row, where the swizzle puts it.
        lane = _and(thread, 31)
        row, h, tile = _and(lane, 7), _and(_right(lane, 3), 1), _right(lane, 4)
        chunk = arith.xori(arith.addi(_left(_right(thread, 5), 1), h), row)
        at = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(smem)), arith.addi(_left(row, 7), _left(chunk, 4)))
        at = arith.addi(at, _left(tile, 10)) if tiles > 1 else at

        def word(h, tile):
            value = acc.registers[0, tile, 0, 0, h, 0, 0, 0, 0]
            if scales:
                value = arith.mulf(value, vector.broadcast(pair, vector.extract(factors, [], [h])))
            return utils.bitcast(arith.truncf(half, value), i32)

        each = min(tiles, 2)
        for t in range(0, tiles, each):
            words = [word(h, t + n) for n in range(each) for h in range(2)]
            names = ", ".join(f"${1 + i}" for i in range(len(words)))
            ptx = f"stmatrix.sync.aligned.m8n8.x{len(words)}.trans.shared.b16 [$0], {{{names}}};"
            utils.inline_ptx(ptx, arith.addi(at, _const(t * 1024)) if t else at, *words, has_side_effects=True)
        return ()

    run(acc, *refs)


def restored(row):
    """A row of 64 scales in the order of outputs."""
    return row.reshape(4, 8, 2).transpose(0, 2, 1).reshape(BLOCK)


def widen_plainly(words, scale, zero, *, block: int, plan):
    """`widen` by plain operations, for the interpreter."""
    rows = plan.bits // 2
    codes = words[block * rows : (block + 1) * rows]
    if plan.kind == "int4":
        word = codes.reshape(4, 8, 4, 4)  # w g c s; byte j + 2 e, nibble h
        parts = [(word >> (8 * j + 16 * e + 4 * h)) & 15 for h, j, e in np.ndindex(2, 2, 2)]
        value = jnp.stack(parts).reshape(2, 2, 2, 4, 8, 4, 4).transpose(3, 0, 4, 6, 1, 5, 2)  # w h g, s j c e
        value = value.astype(jnp.float32) + (128 if zero is not None else -8)
    else:
        word = codes.reshape(2, 4, 8, 4, 2, 2)  # u w g c v j; byte h + 2 e
        parts = [(word >> (16 * e + 8 * h)) & 255 for h, e in np.ndindex(2, 2)]
        value = jnp.stack(parts).reshape(2, 2, 2, 4, 8, 4, 2, 2).transpose(3, 0, 4, 2, 6, 7, 5, 1)  # w h g, u v j c e
        if plan.kind == "int8":
            value = jnp.where(value >= 128, value - 256, value).astype(jnp.float32)
        else:
            low = value & 127
            normal = lax.bitcast_convert_type((low << 20) + (120 << 23), jnp.float32)
            value = jnp.where(value >= 128, -1.0, 1.0) * jnp.where(low < 8, low.astype(jnp.float32) * 2.0**-9, normal)
    value = value.reshape(BLOCK, 4, 16)
    columns = lambda ref: jnp.stack([restored(ref[_row_of_scales(block, s, plan)]) for s in range(4)], 1)[:, :, None]  # noqa: E731
    value = value if zero is None else value - columns(zero).astype(jnp.float32)
    value = value if scale is None else value * columns(scale).astype(jnp.float32)
    return value.reshape(BLOCK, BLOCK).astype(jnp.bfloat16)
