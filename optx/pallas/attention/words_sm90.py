"""A thread's 32-bit words on Hopper, and numbers from the codes of packed pages in them."""

import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir

from optx.formats.codebook import centroids
from optx.pallas.attention.page_formats import Pages
from optx.pallas.late import arith, llvm, utils, vector

BF16 = jnp.dtype("bfloat16")


PERMUTES = {"low": 0x5410, "high": 0x7632}  # halves of two words


def i32(x: int):
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, x - (1 << 32) if x >= 1 << 31 else x))


def f32(x: float):
    return arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), x))


def add(a, b):
    return arith.addi(a, i32(b) if isinstance(b, int) else b)


def times(a, b: int):
    return a if b == 1 else arith.muli(a, i32(b))


def right(a, count: int):
    return arith.shrui(a, i32(count)) if count else a


def and_(a, mask: int):
    return arith.andi(a, i32(mask))


def or_(a, b):
    return arith.ori(a, i32(b) if isinstance(b, int) else b)


def permute(a, b, selector: int):
    """Bytes of the words a (0 to 3) and b (4 to 7), the lowest nibble of `selector` choosing the lowest byte."""
    i32 = ir.IntegerType.get_signless(32)
    return utils.inline_ptx(f"prmt.b32 $0, $1, $2, 0x{selector:04x};", a, b, result_types=i32)


def picked(a, b, selector):
    """Four of the bytes of the words a (0 to 3) and b (4 to 7), chosen by the lowest nibbles of `selector`."""
    return utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", a, b, selector, result_types=a.type)


def rounded(low, high):
    """Two float32 -> a word of two bfloat16."""
    i32 = ir.IntegerType.get_signless(32)
    return utils.inline_ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", high, low, result_types=i32)


def halves_of_f16(word):
    """A word of two float16 -> two float32."""
    f32 = ir.F32Type.get()
    ptx = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    return list(utils.inline_ptx(ptx, word, result_types=[f32, f32]))


def spread(steps, words):
    """As many of `steps` as there are words, each for as many neighbours."""
    return [steps[i * len(steps) // len(words)] for i in range(len(words))]


def of_pairs(op, a, b):
    return utils.inline_ptx(f"{op}.rn.bf16x2 $0, $1, $2;", a, b, result_types=a.type)


def fma(a, b, c):
    return utils.inline_ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c, result_types=a.type)


def less(a, b):
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def choose(condition, a, b):
    return arith.select(condition, a, b)


def pointer(ref, offset):
    """Pointer `offset` bytes (i32) into a ref of shared or global memory."""
    return utils.getelementptr(utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))


def load(ref, offset, element, count: int = 1):
    """`count` contiguous numbers as a list."""
    vec = ir.VectorType.get((count,), element)
    loaded = llvm.load(vec, pointer(ref, offset), alignment=count * utils.bytewidth(element))
    return [vector.extract(loaded, [], [i]) for i in range(count)]


def store(ref, offset, values, when=None):
    """Stores float32 numbers side by side where `when` holds."""
    to = pointer(ref, offset)
    space = "global" if to.type.address_space in (0, 1) else "shared"
    names = ", ".join(f"${i + 1}" for i in range(len(values)))
    names = f"{{{names}}}" if len(values) > 1 else names
    kind = f"v{len(values)}.f32" if len(values) > 1 else "f32"
    utils.inline_ptx(f"st.{space}.{kind} [$0], {names};", to, *values, predicate=when, has_side_effects=True)


class Codes:
    """Codes of few bits as bfloat16 numbers, two a word, in a thread's registers."""

    def __init__(self, pages: Pages):
        self.code, self.bits = pages.code, pages.bits
        self.plane = (
            2 if pages.bits == 3 else pages.bits
        )  # of a code, in a token's first plane of bits; 3 have one more

    @property
    def shift(self) -> float:
        """Code that is multiplied as 0 where it is not known which one stands for it."""
        return float(2 ** (self.bits - 1))

    @property
    def middle(self):
        """The middle code + 128, twice."""
        return i32(0x43004300 + int(self.shift) * 0x00010001)

    def middles(self, scale, least):
        """What the middle code stands for, as a word: of smaller numbers less is lost in 16 bits."""
        found = [fma(x, f32(self.shift), y) for x, y in zip(scale, least, strict=True)]
        return rounded(found[0], found[-1])

    def number(self, biased, steps):
        """Two codes + 128 -> two numbers; steps: what codes are less, scale, number of the middle code or None."""
        away, scale, middle = steps
        code = of_pairs("sub", biased, away)
        if middle is None:
            return of_pairs("mul", code, scale)
        ptx = "fma.rn.bf16x2 $0, $1, $2, $3;"
        return utils.inline_ptx(ptx, code, scale, middle, result_types=code.type)

    def biased(self, word):
        """Lowest codes of both halves -> two bfloat16: code + 128."""
        ptx = "lop3.b32 $0, $1, $2, $3, 0xEA;"  # (a & b) | c
        mask = 0x00010001 * (2**self.plane - 1)
        return utils.inline_ptx(ptx, word, i32(mask), i32(0x43004300), result_types=word.type)

    def topped(self, biased, high, bit: int):
        """Adds to two codes + 128 their third bits: bit `bit` of each half of a word whose halves are one byte twice."""
        ptx = "lop3.b32 $0, $1, $2, $3, 0xEA;"
        high = right(high, bit - 2 if bit >= 2 else bit + 6)
        return utils.inline_ptx(ptx, high, i32(0x00040004), biased, result_types=biased.type)

    def cut(self, words):
        """Words of a share -> those of the first plane, those of the second."""
        count = len(words) * self.plane // self.bits
        return words[:count], words[count:]

    def pairs(self, words):
        """Words of a share -> by word words of two codes + 128: code i of one half of the word beside code i of the other."""
        words, high = self.cut(words)
        found = [[self.biased(right(word, self.plane * i)) for i in range(16 // self.plane)] for word in words]
        for at, pairs in enumerate(found if high else []):
            byte = high[at // 2]
            byte = permute(byte, byte, 0x3322 if at % 2 else 0x1100)
            found[at] = [self.topped(pair, byte, i) for i, pair in enumerate(pairs)]
        return found

    def neighbours(self, words):
        """Words of a share -> words of codes 2 i and 2 i + 1: + 128, or what the codebook has for them."""
        if self.code == "codebook4":
            return [pair for word in words for pair in self.looked_up(word)]
        return [
            permute(a, b, s)
            for pairs in self.pairs(words)
            for s in PERMUTES.values()
            for a, b in zip(pairs[::2], pairs[1::2], strict=True)
        ]

    def beside(self, one, two):
        """Words of two tokens' shares -> a word of both tokens' codes + 128 for each number."""
        (one, high_one), (two, high_two) = self.cut(one), self.cut(two)
        found = []
        for at in range(4 * len(one)):
            both = permute(one[at // 4], two[at // 4], 0x4400 + 0x1111 * (at % 4))
            codes = [self.biased(right(both, i)) for i in range(0, 8, self.plane)]
            if high_one:
                byte, first = at // 2, at % 2 * 4
                both = permute(high_one[byte // 4], high_two[byte // 4], 0x4400 + 0x1111 * (byte % 4))
                codes = [self.topped(code, both, first + i) for i, code in enumerate(codes)]
            found += codes
        return found

    def looked_up(self, word):
        """Eight codes of the codebook -> four words of two centroids. It is symmetric: codes below 8 are negative, and count
        down from the middle."""
        table = [int(np.asarray(c, BF16).view(np.uint16)) for c in centroids(4)[8:]]
        rows = [[x >> 8 * byte & 0xFF for x in table] for byte in range(2)]
        low, high = ([i32(sum(x << 8 * i for i, x in enumerate(row[at : at + 4]))) for at in (0, 4)] for row in rows)
        below = and_(arith.xori(word, i32(0xFFFFFFFF)), 0x88888888)
        ones = right(below, 3)
        index = and_(arith.xori(word, arith.subi(below, ones)), 0x77777777)
        found = []
        for half in (0, 16):
            at, sign = right(index, half), picked(i32(0x8000), i32(0), right(ones, half))
            both = picked(*low, at), or_(picked(*high, at), sign)
            found += [permute(*both, 0x5140), permute(*both, 0x7362)]
        return found
