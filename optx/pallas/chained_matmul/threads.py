"""What a consumer thread of `chained_matmul` does on Hopper, in one thread's numbers.

A thread block works at an item: 64 outputs by a share of the contracted numbers, in steps that lie in shared memory. Its warps
are 4 by `groups`: warp w of group j takes outputs 16 w to 16 w + 15 and the j-th share of a step, by `mma.m16n8k16`. One token
fills one of the 8 columns of that instruction; here all eight hold it, so that x is read from a plain row in shared memory
and every lane 4 g + c ends with outputs g and g + 8. The row is kept in the order in which lanes take it: of 64 numbers the
pair 8 s + 4 j + c (s: which 16 of them, j: which half) lies at pair 8 c + 2 s + j.
"""

import dataclasses

from optx.pallas.add_norm import mosaic_gpu_sm90 as add_norm
from optx.pallas.gated_act import mosaic_gpu_sm90 as gated_act

GROUP, WARP = 128, 32
BLOCK = 64  # outputs of an item, and contracted numbers of a block of codes
CHUNK = 8  # numbers of a thread's load
ATOM = {4: 4, 8: 2, 16: 1}  # 16s of contracted numbers that a thread's load of codes of so many bits holds
GIVEN, NORMED, GATED = "given", "normed", "gated"  # what the row of a product is made of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """One product of a chain."""

    made: str
    kind: str  # bf16, int4, int8, fp8
    depth: int  # D
    strips: int  # F / 64
    group: int  # contracted numbers of one scale; D: one an output, applied to its sum
    scale: str  # dtype of scales
    parts: int  # thread blocks that share out the contracted axis

    @property
    def bits(self) -> int:
        return {"bf16": 16, "int4": 4}.get(self.kind, 8)

    @property
    def grouped(self) -> bool:
        return self.group < self.depth

    @property
    def scaled(self) -> bool:
        """Whether a sum has a factor."""
        return self.kind != "bf16" and not self.grouped

    @property
    def width(self) -> int:
        return self.strips * BLOCK

    @property
    def share(self) -> int:
        """Contracted numbers of an item."""
        return self.depth // self.parts

    @property
    def stored(self) -> str:
        """dtype of its sums: of parts, which whoever reads them adds up, or of the results."""
        return "float32" if self.parts > 1 else "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm(add_norm.Plan):
    """Of one token by all threads that multiply, however few it has work for."""

    @property
    def threads(self) -> int:
        return self.most


# --- The row ----------------------------------------------------------------------------------------------------------


def sums_of(m, product: Product, ref, first):
    """8 results of a product from number `first` on, rounded, as four words."""
    if product.parts == 1:
        return m.load_early(ref, m.wide(first * 2), CHUNK // 2)
    total = None
    for part in range(product.parts):
        at = m.wide(first * 4) + 4 * part * product.width
        found = [m.float(word) for half in (0, 16) for word in m.load_early(ref, at + half, 4)]
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    return add_norm._packed(m, total, "bfloat16")


def put(m, row, chunk, words, has):
    """Four words of the row's chunk where lanes look for them."""
    base = (chunk >> 3) * (2 * BLOCK) + (chunk & 7) * 4
    for c, word in enumerate(words):
        m.put(row, m.wide(base + 32 * c), word, has)


def _within(m, chunk, has, first, count):
    """(chunk of the row, whether it is there) of one of all chunks."""
    inside = (chunk >= first) & (chunk < first + count)
    has = inside if has is None else inside & has
    return m.where(has, chunk - first, 0), has


def _rounds(m, whole: int, threads: int):
    """(chunk, whether the thread has it; None: all do)."""
    for start in range(0, whole, threads):
        chunk = m.thread() + start
        has = None if start + threads <= whole else chunk < whole
        yield (chunk if has is None else m.where(has, chunk, 0)), has


def give(m, product: Product, threads: int, given, row, part):
    """The part of a row [1, D] of global memory."""
    count = product.share // CHUNK
    for chunk, has in _rounds(m, count, threads):
        put(m, row, chunk, m.load_early(given, m.wide((part * count + chunk) * (2 * CHUNK)), CHUNK // 2), has)


def gate(m, product: Product, threads: int, before: Product, activation: str, both, row, part):
    """act(gate) * up, side by side in the results of the product before."""
    count = product.share // CHUNK
    plan = gated_act.Plan(tokens=1, width=product.depth, joined=True, dtype="bfloat16", activation=activation)
    for chunk, has in _rounds(m, count, threads):
        first = (part * count + chunk) * CHUNK
        halves = [sums_of(m, before, both, first + start) for start in (0, product.depth)]
        words = [
            gated_act._word(m, plan, *(m.unpack(word, "bfloat16") for word in pair))
            for pair in zip(*halves, strict=True)
        ]
        put(m, row, chunk, words, has)


def norm(m, plan: Norm, product: Product, before: Product, x, kept, y, weight, out, row, sums, part, wait):
    """norm(x + y), y the results of the product before; their sum is `kept` in shared memory and goes `out`, if anywhere, by
    the first block. x: global memory, or shared where a norm before has kept it. wait: called before y is read."""
    chunks = add_norm._chunks(m, plan)
    places = [m.wide(chunk * (2 * CHUNK)) for chunk, _ in chunks]
    weights = [add_norm._weights(m, plan, weight, chunk) for chunk, _ in chunks]
    read = m.load if x is kept else m.load_early
    stream = [read(x, at, CHUNK // 2) for at in places]
    wait()
    first, count = part * (product.share // CHUNK), product.share // CHUNK
    words = []
    for (chunk, has), at, found in zip(chunks, places, stream, strict=True):
        total = add_norm._added(m, plan, found, sums_of(m, before, y, chunk * CHUNK))
        m.store_words(kept, at, total, has)
        if out is not None:
            mine = m.block() < 1
            m.store_words(out, at, total, mine if has is None else mine & has)
        words.append(add_norm._or_zeros(m, has, total))
    numbers = [[n for word in found for n in m.unpack(word, "bfloat16")] for found in words]
    squares = [add_norm._tree([n * n for n in found]) for found in numbers]
    factor = m.rsqrt(add_norm._across_block(m, plan, squares, sums) * (1 / plan.width) + plan.eps)
    for (chunk, has), found, scale in zip(chunks, numbers, weights, strict=True):
        normed = [n * factor * (w + plan.offset) for n, w in zip(found, scale, strict=True)]
        mine, inside = _within(m, chunk, has, first, count)
        put(m, row, mine, add_norm._packed(m, normed, "bfloat16"), inside)


# --- Sums -------------------------------------------------------------------------------------------------------------


def multiply(m, product: Product, groups: int, blocks: int, weights, scales, row, start, totals):
    """totals + the product of a step: two float32 a thread, of outputs 16 w + g and 16 w + g + 8.

    weights: a step of an item, `blocks` 64s of contracted numbers; scales: of it, [scales, 64], or None; start: where its
    numbers begin in the row."""
    lane, warp = m.thread() & (WARP - 1), (m.thread() >> 5) & 3
    group = m.thread() >> 7
    units = 4 * blocks // groups  # 16s of contracted numbers of a group
    atom = ATOM[product.bits]
    span = min(units, product.group // 16) if product.grouped else units  # of one scale
    first = group * units  # unit of the step
    pairs = m.wide(
        (start >> 5) * 64 + (lane & 3) * 32
    )  # bytes of the lane's pairs in the row, 64 numbers being 128 bytes
    for begin in range(0, units, span):
        sums = [[m.zero()] * 4 for _ in range(2)]
        for at in range(begin, begin + span, atom):
            unit = first + at
            x = m.wide((unit >> 2) * 128 + (unit & 3) * 8) + pairs
            found = [word for half in range(0, 2 * atom, 4) for word in m.load(row, x + 4 * half, min(4, 2 * atom))]
            for i, fragment in enumerate(_fragments(m, product, weights, unit, warp, lane)):
                sums[i % 2] = m.mma(sums[i % 2], fragment, found[2 * i : 2 * i + 2])
        both = [a + b for a, b in zip(*sums, strict=True)] if atom > 1 else sums[0]
        both = [both[0], both[2]]
        if product.grouped:
            which = (first + begin) // (product.group // 16)
            factors = _factors(m, product, scales, which * BLOCK + warp * 16 + (lane >> 2) * 2)
            both = [x * factor for x, factor in zip(both, factors, strict=True)]
        totals = [a + b for a, b in zip(totals, both, strict=True)]
    return totals


def _factors(m, product: Product, ref, index):
    """Two scales side by side."""
    if product.scale == "float32":
        return [m.float(word) for word in m.load(ref, m.wide(index * 4), 2)]
    return m.unpack(m.load(ref, m.wide(index * 2), 1)[0], product.scale)


def _fragments(m, product: Product, ref, unit, warp, lane):
    """Those of one load: four words of bfloat16 pairs each, a tile of 16 outputs by 16 numbers."""
    if product.bits == 16:  # rows of 64 outputs, 128 bytes whose 16-byte parts are swizzled
        row = unit * 16 + ((lane >> 4) << 3) + (lane & 7)
        part = (warp * 2 + ((lane >> 3) & 1)) ^ (lane & 7)
        return [m.matrices(ref, m.wide(row * 128 + part * 16))]
    if product.bits == 4:
        words = m.load(ref, m.wide((unit >> 2) * 2048 + warp * 512 + lane * 16), 4)
        return [[_int4(m, word, h, j) for j in range(2) for h in range(2)] for word in words]
    words = m.load(ref, m.wide((unit >> 1) * 2048 + warp * 512 + lane * 16), 4)
    widen = _int8 if product.kind == "int8" else _fp8
    return [[widen(m, words[2 * v + j], h) for j in range(2) for h in range(2)] for v in range(2)]


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


# Codes to bfloat16, as in `quant_matmul`.


def _int4(m, word, h: int, j: int):
    at = 8 * j + 4 * h
    return m.subtract_pair(m.insert(word >> at if at else word, 0x000F000F, 0x43004300), 0x43084308)


def _int8(m, word, h: int):
    code = m.bytes(0x43434343, word, 0x0705 if h else 0x0604)
    return m.subtract_pair(code & _signed(0xFF7FFF7F), code & _signed(0xFF80FF80))


def _fp8(m, word, h: int):
    word = word if h else word << 8
    return m.multiply_pair((word & _signed(0x80008000)) | ((word >> 4) & 0x07F007F0), 0x7B807B80)


# --- Results ----------------------------------------------------------------------------------------------------------


def share(m, totals, shared, turn: int, groups: int):
    """The thread's sums for the others. shared: float32[2, groups, 64]; turn: which of the two, in turn."""
    lane, warp = m.thread() & (WARP - 1), (m.thread() >> 5) & 3
    place = turn * groups + (m.thread() >> 7)
    at = (place * BLOCK + warp * 16 + (lane >> 2) * 2) * 4
    m.store_words(shared, m.wide(at), [m.bits(x) for x in totals], (lane & 3) < 1)


def collect(m, product: Product, groups: int, shared, turn, scale, out, strip, part):
    """Behind a barrier, by one warp: results of an item, two outputs a lane."""
    lane = m.thread() & (WARP - 1)
    place = (lane >> 3) * 16 + ((lane << 1) & 7) * 2 + ((lane >> 2) & 1)  # of output 2 lane; the next lies 2 further
    totals = []
    for i in range(2):
        at = [m.wide(((turn * groups + group) * BLOCK + place + 2 * i) * 4) for group in range(groups)]
        totals.append(add_norm._tree([m.float(m.load(shared, where, 1)[0]) for where in at]))
        if product.scaled:
            totals[i] = totals[i] * _factor(m, product, scale, strip * BLOCK + place + 2 * i)
    column = strip * BLOCK + lane * 2
    if product.parts == 1:
        m.store(out, m.wide(column * 2), m.pack(totals, "bfloat16"), 4)
    else:
        m.store_words(out, m.wide(part * product.width + column) * 4, [m.bits(x) for x in totals])


def _factor(m, product: Product, ref, index):
    if product.scale == "float32":
        return m.float(m.load(ref, m.wide(index * 4), 1)[0])
    pair = m.unpack(m.load(ref, m.wide((index >> 1) * 4), 1)[0], product.scale)
    return m.where((index & 1) < 1, pair[0], pair[1])


def total(m, product: Product, blocks: int, found, out):
    """Results of the last product from its parts, two outputs a thread."""
    pairs = product.width // 2
    each = -(-pairs // blocks)
    pair = m.block() * each + m.thread()
    has = (m.thread() < each) & (pair < pairs)
    pair = m.where(has, pair, 0)
    sums = [0.0, 0.0]
    for part in range(product.parts):
        words = m.load_early(found, m.wide(pair) * 8 + 4 * part * product.width, 2)
        sums = [m.float(word) + x for word, x in zip(words, sums, strict=True)]
    m.store(out, m.wide(pair) * 4, m.pack(sums, "bfloat16"), 4, has)
