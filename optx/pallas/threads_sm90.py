"""The instructions of a GPU's thread, for kernels that are written in one thread's numbers.

Such a kernel is a function of a machine: `Threads` emits what a Hopper thread does; a machine of arrays runs all threads of a
launch at once on a CPU.
"""

from jaxlib.mlir import ir

from optx.pallas.late import arith, gpu, llvm, utils, vector


class Number:
    """A thread's integer, float32 or truth value, with Python's operators; integers are taken as unsigned by //, % and >>."""

    def __init__(self, value):
        self.value = value

    @property
    def floating(self) -> bool:
        return isinstance(self.value.type, ir.F32Type)

    def like(self, x):
        """x, a Python number or another of these, as a value of this one's type."""
        if isinstance(x, Number):
            return x.value
        kind = self.value.type
        if self.floating:
            return arith.constant(kind, ir.FloatAttr.get(kind, float(x)))
        return arith.constant(kind, ir.IntegerAttr.get(kind, x))

    def _with(self, x, integer, floating=None):
        return Number((floating if self.floating else integer)(self.value, self.like(x)))

    def __add__(self, x):
        return self._with(x, arith.addi, arith.addf)

    def __sub__(self, x):
        return self._with(x, arith.subi, arith.subf)

    def __mul__(self, x):
        return self._with(x, arith.muli, arith.mulf)

    def __truediv__(self, x):
        return self._with(x, None, arith.divf)

    def __floordiv__(self, x):
        return self._with(x, arith.divui)

    def __mod__(self, x):
        return self._with(x, arith.remui)

    def __and__(self, x):
        return self._with(x, arith.andi)

    def __or__(self, x):
        return self._with(x, arith.ori)

    def __xor__(self, x):
        return self._with(x, arith.xori)

    def __lshift__(self, x):
        return self._with(x, arith.shli)

    def __rshift__(self, x):
        return self._with(x, arith.shrui)

    def _compared(self, x, integer, floating):
        return Number(
            (arith.cmpf if self.floating else arith.cmpi)(
                floating if self.floating else integer, self.value, self.like(x)
            )
        )

    def __lt__(self, x):
        return self._compared(x, arith.CmpIPredicate.slt, arith.CmpFPredicate.OLT)

    def __gt__(self, x):
        return self._compared(x, arith.CmpIPredicate.sgt, arith.CmpFPredicate.OGT)

    def __ge__(self, x):
        return self._compared(x, arith.CmpIPredicate.sge, arith.CmpFPredicate.OGE)


def across(m, x, op, lanes: int = 32):
    """Reduction of x over each `lanes` neighbouring lanes of a warp, the same in all of them."""
    for distance in (d for d in (16, 8, 4, 2, 1) if d < lanes):
        x = op(x, m.shuffle(x, distance))
    return x


class Threads:
    """Instructions of the thread that runs them. Words are 32 bits; a pair's first number lies in the low half."""

    def __init__(self, block):
        self._block = Number(block)
        self._thread = Number(utils.thread_idx())

    def block(self):
        return self._block

    def thread(self):
        return self._thread

    def when(self, condition):
        return utils.when(condition.value)

    def wide(self, x):
        """As a 64-bit integer: bytes into a ref."""
        return Number(arith.extui(ir.IntegerType.get_signless(64), x.value))

    def where(self, condition, a, b):
        return Number(arith.select(condition.value, a.value, a.like(b)))

    def _pointer(self, ref, offset):
        return utils.getelementptr(utils.memref_ptr(ref), [offset.value], ir.IntegerType.get_signless(8))

    def load(self, ref, offset, count: int):
        """`count` words side by side, at a multiple of their size."""
        i32 = ir.IntegerType.get_signless(32)
        loaded = llvm.load(ir.VectorType.get((count,), i32), self._pointer(ref, offset), alignment=4 * count)
        return [Number(vector.extract(loaded, [], [i])) for i in range(count)]

    def load_early(self, ref, offset, count: int):
        """`load` from global memory, in the order of the program: of other loads the assembler puts off some, to spare registers,
        until it has waited for the first."""
        ptx = f"ld.relaxed.gpu.global.v{count}.b32 {{{', '.join(f'${i}' for i in range(count))}}}, [${count}];"
        kinds = [ir.IntegerType.get_signless(32)] * count
        found = utils.inline_ptx(ptx, self._pointer(ref, offset), result_types=kinds, has_side_effects=True)
        return [Number(word) for word in found]

    def fetch(self, ref, offset, to, place, when=None):
        """16 bytes of global memory into shared memory, which the same thread may read when it has `fetched`."""
        ptx, pointer = "cp.async.cg.shared.global [$0], [$1], 16;", self._pointer(ref, offset)
        utils.inline_ptx(ptx, self._shared(to, place), pointer, predicate=when and when.value, has_side_effects=True)

    def fetched(self):
        utils.inline_ptx("cp.async.wait_all;", has_side_effects=True)

    def store(self, ref, offset, word, size: int, when=None):
        """The lowest `size` bytes of a word."""
        ptx = f"st.global.b{8 * size} [$0], $1;"
        value, kind = word.value, ir.IntegerType.get_signless(16)
        value = arith.trunci(kind, value) if size < 4 else value
        utils.inline_ptx(ptx, self._pointer(ref, offset), value, predicate=when and when.value, has_side_effects=True)

    def _shared(self, ref, offset):
        return llvm.ptrtoint(ir.IntegerType.get_signless(32), self._pointer(ref, offset))

    def store_words(self, ref, offset, words, when=None):
        """Two or four words side by side, at a multiple of their size, in global or shared memory."""
        count, shared = len(words), utils.is_smem_ref(ref)
        pointer = self._shared(ref, offset) if shared else self._pointer(ref, offset)
        space = "shared" if shared else "global"
        ptx = f"st.{space}.v{count}.b32 [$0], {{{', '.join(f'${i + 1}' for i in range(count))}}};"
        values = [word.value for word in words]
        utils.inline_ptx(ptx, pointer, *values, predicate=when and when.value, has_side_effects=True)

    def put(self, ref, offset, word, when=None):
        """A word into shared memory."""
        ptx, to = "st.shared.b32 [$0], $1;", self._shared(ref, offset)
        utils.inline_ptx(ptx, to, word.value, predicate=when and when.value, has_side_effects=True)

    def share(self, ref, index, x, when):
        """x into number `index` of the block's float32 scratch."""
        with self.when(when):
            llvm.store(x.value, self._pointer(ref, self.wide(index * 4)))

    def shared(self, ref, start: int):
        """Four numbers of the block's scratch from `start`, a multiple of 4, the same for all threads."""
        f32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(64)
        at = Number(arith.constant(i64, ir.IntegerAttr.get(i64, 4 * start)))
        loaded = llvm.load(ir.VectorType.get((4,), f32), self._pointer(ref, at), alignment=16)
        return [Number(vector.extract(loaded, [], [i])) for i in range(4)]

    def barrier(self):
        """All threads of the block have come here, and see what was shared before."""
        gpu.barrier()

    def exp2(self, x):
        return self._ptx("ex2.approx.f32 $0, $1;", x)

    def reciprocal(self, x):
        return self._ptx("rcp.approx.f32 $0, $1;", x)

    def _ptx(self, ptx: str, *args, result=None, **kwargs):
        return Number(
            utils.inline_ptx(ptx, *(x.value for x in args), result_types=result or args[0].value.type, **kwargs)
        )

    def shuffle(self, x, distance: int):
        """x of the lane whose number differs in the bit `distance`."""
        return Number(utils.shfl_bfly(x.value, distance))

    def minimum(self, a, b):
        """The smaller; NaN where either is."""
        return self._ptx("min.NaN.f32 $0, $1, $2;", a, Number(a.like(b)))

    def maximum(self, a, b):
        return self._ptx("max.NaN.f32 $0, $1, $2;", a, Number(a.like(b)))

    def abs(self, x):
        return self._ptx("abs.f32 $0, $1;", x)

    def rsqrt(self, x):
        return self._ptx("rsqrt.approx.f32 $0, $1;", x)

    def round(self, x):
        """To the nearest whole number, halves to even."""
        return self._ptx("cvt.rni.f32.f32 $0, $1;", x)

    def int(self, x):
        """A whole number as an integer; NaN as 0."""
        return self._ptx("cvt.rzi.s32.f32 $0, $1;", x, result=ir.IntegerType.get_signless(32))

    # Pairs of 16-bit numbers in a word, and products of a warp.

    def insert(self, word, mask: int, bits: int):
        """(word & mask) | bits. Left to itself the assembler makes two instructions of it."""
        return self._ptx(f"lop3.b32 $0, $1, {mask:#x}, {bits:#x}, 0xEA;", word)

    def subtract_pair(self, a, b):
        """bfloat16 a - b of both halves; so is `multiply_pair`."""
        return self._ptx("sub.rn.bf16x2 $0, $1, $2;", a, Number(a.like(b)))

    def multiply_pair(self, a, b):
        return self._ptx("mul.rn.bf16x2 $0, $1, $2;", a, Number(a.like(b)))

    def bytes(self, a: int, word, selector: int):
        """Four bytes, each named by a digit of the selector: 0 to 3 of a, 4 to 7 of the word."""
        return Number(utils.prmt(word.like(a), word.value, word.like(selector)))

    def matrices(self, ref, offset):
        """Four tiles of 8 x 8 16-bit numbers in shared memory, lane 8 i + r holding where row r of tile i begins
        -> four words: of each tile rows 2c, 2c + 1 of column g, for lane 4 g + c."""
        i32 = ir.IntegerType.get_signless(32)
        ptx = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
        found = utils.inline_ptx(ptx, self._shared(ref, offset), result_types=[i32] * 4, has_side_effects=True)
        return [Number(word) for word in found]

    def mma(self, total, a, b):
        """total + a b, of a bfloat16[16, 16], b bfloat16[16, 8] in fragments of `mma.m16n8k16`: float32[16, 8], four a lane."""
        ptx = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
        ptx += "{$10, $11, $12, $13};"
        args = [x.value for x in (*a, *b, *total)]
        found = utils.inline_ptx(ptx, *args, result_types=[ir.F32Type.get()] * 4, convergent=True)
        return [Number(x) for x in found]

    def zero(self):
        f32 = ir.F32Type.get()
        return Number(arith.constant(f32, ir.FloatAttr.get(f32, 0.0)))

    def float(self, word):
        return Number(utils.bitcast(word.value, ir.F32Type.get()))

    def bits(self, x):
        return Number(utils.bitcast(x.value, ir.IntegerType.get_signless(32)))

    def pack(self, pair, dtype: str):
        """Two float32 rounded to `dtype`, in a word."""
        low, high = pair
        kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
        return self._ptx(f"cvt.rn.{kind}x2.f32 $0, $1, $2;", high, low, result=ir.IntegerType.get_signless(32))

    def unpack(self, word, dtype: str):
        if dtype == "bfloat16":
            return [self.float(word << 16), self.float(word & -65536)]
        f32 = ir.F32Type.get()
        ptx = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
        return [Number(x) for x in utils.inline_ptx(ptx, word.value, result_types=[f32, f32])]

    def e4m3(self, pair):
        """Two float32 rounded to e4m3, at most 448, in the low half of a word."""
        low, high = pair
        ptx = "{ .reg .b16 x; cvt.rn.satfinite.e4m3x2.f32 x, $1, $2; cvt.u32.u16 $0, x; }"
        return self._ptx(ptx, high, low, result=ir.IntegerType.get_signless(32))
