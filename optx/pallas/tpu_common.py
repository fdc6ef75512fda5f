"""What the matmul rows of TPU share: a Pallas Mosaic kernel that multiplies tiles of tokens by blocks of packed weights.

A grid step is (block of outputs, visit); a visit is a tile of tokens and the matrix that it meets, so a plain matmul is a
list of tiles and a grouped one a list of (tile, expert), in scalar memory (megablox: Gale et al. 2022, arXiv:2211.15841).
A weight [D, F] is read as it is stored, [F, D packed]. Two bytes-to-numbers schemes, because a weight is converted once
and used by as many rows as there are tokens:

- few tokens: codes go to the matrix unit as they are, tile of 128 lanes by tile; scales multiply the products
- many tokens: a block is dequantized once into VMEM and meets all its tiles from there

Numbers that share a byte (int4: even and odd index) are not interleaved: the activations are split the same way. Zero
points leave through the sums of the activations, z s sum(x), never through the codes (but in a dequantized block).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optx.formats import Float8, Format, Int
from optx.tensor import QTensor

ARCHS = ("v5e", "v6e", "v7x")
LANES = 128
CHUNK = 512  # numbers of the contraction a dot where scales allow
FEW = 256  # rows of activations up to which scales multiply products
BLOCK_BYTES = 2 << 20  # of packed weights a step
TILE_BYTES = 4 << 20  # of activations, and of dequantized weights
LONGEST = 96 << 10  # bytes of a row of activations
VMEM = 48 << 20


def arch_reason(target: Any) -> str | None:
    """Why the target is none that these rows are built for, or None."""
    if target.platform == "tpu" and target.arch in ARCHS:
        return None
    return f"built for tpu {', '.join(ARCHS)}; the target is {target.platform}/{target.arch}"


def weight_reason(format_: Format, length: int) -> str | None:
    """Why weights in this format, `length` numbers along the contraction, are not taken, or None."""
    if not (isinstance(format_, Float8) or (isinstance(format_, Int) and format_.width in (2, 4, 8))):
        return f"weights in {format_}; allowed: int8, int4, int2, fp8_e4m3, fp8_e5m2"
    parts = _parts(format_)
    if length % (parts * LANES):
        return f"{length} numbers of {format_} to sum over; allowed: multiples of {parts * LANES}"
    lanes = (format_.group or length) // parts
    if (format_.group or 0) % parts or not lanes or (LANES % lanes and lanes % LANES):
        return f"groups of {format_.group} in {format_}; allowed: {parts} times a power of two, or a channel"
    return None


def _parts(format_: Format) -> int:
    """Numbers that share a byte."""
    return 8 // format_.width if isinstance(format_, Int) else 1


def float16(bits):
    """float16 as its bits, uint16 -> float32: the vector unit has no float16. Subnormals by their value."""
    bits = bits.astype(jnp.int32)
    sign = jnp.where(bits >= 0x8000, -1.0, 1.0)
    size = bits & 0x7FFF
    normal = jax.lax.bitcast_convert_type((size << 13) + (112 << 23), jnp.float32)
    normal = jnp.where(size >= 0x7C00, jnp.where(size > 0x7C00, jnp.nan, jnp.inf), normal)
    return sign * jnp.where(size < 0x400, size.astype(jnp.float32) * 2.0**-24, normal)


def float16_bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.float16 else x


def number(x):
    """What lies in memory -> float32."""
    if x.dtype == jnp.uint16:
        return float16(x)
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(jnp.int32)
    return x.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a call is cut: tokens a tile, outputs a block, and whether a block is dequantized before it is used."""

    tokens: int
    outputs: int
    dequantize: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is static in a call, shapes apart."""

    format: Format | None  # None: dense [E, D, F]
    length: int  # D
    tiles: Tiles
    ragged: bool  # visits cover a part of their tile's rows
    native: bool = False  # activations come as codes of the weights' kind
    interpret: Any = False

    @property
    def parts(self) -> int:
        return 1 if self.format is None else _parts(self.format)

    @property
    def width(self) -> int:
        """Entries of a row of data."""
        return self.length // self.parts

    @property
    def groups(self) -> int:
        return 1 if self.format is None else self.format.grouped(self.length)

    @property
    def lanes(self) -> int:
        """Entries of data that share a scale."""
        return self.width // self.groups

    @property
    def shared(self) -> int:
        """Groups within 128 lanes of data."""
        return max(LANES // self.lanes, 1)

    @property
    def chunk(self) -> int:
        """Entries of data a dot."""
        if self.lanes < LANES and not self.tiles.dequantize:
            return LANES
        most = CHUNK if self.tiles.dequantize else min(CHUNK, self.lanes)
        return next(
            size
            for size in range(most, 0, -LANES)
            if self.width % size == 0 and (self.tiles.dequantize or self.lanes % size == 0)
        )

    @property
    def expanded(self) -> int:
        """Copies of the activations: one a group that shares lanes, zero elsewhere."""
        return 1 if self.tiles.dequantize else self.shared

    @property
    def offset(self) -> float:
        """What is to be taken from every code of a format without zero points."""
        if isinstance(self.format, Int) and self.format.symmetric and self.format.width < 8:
            return 2.0 ** (self.format.width - 1)
        return 0.0

    @property
    def shifts(self) -> bool:
        """Whether codes stand for code - zero."""
        return self.offset != 0 or (self.format is not None and self.format.has_zero)

    @property
    def sums(self) -> bool:
        """Whether zero points leave through the sums of the activations."""
        return self.shifts and (self.groups == 1 or not self.tiles.dequantize)


def tiles(*, tokens: int, length: int, outputs: int, itemsize: int, format_: Format | None) -> Tiles:
    """By shape: tokens that meet one matrix, D, F, bytes of an activation, format of the weights."""
    parts = 1 if format_ is None else _parts(format_)
    lanes = LANES if format_ is None else (format_.group or length) // parts
    few = tokens <= 64 and max(LANES // lanes, 1) * _up(tokens, 16) <= FEW
    packed = length * itemsize if format_ is None else length // parts
    block = BLOCK_BYTES // packed
    if few:
        rows = _up(tokens, 16)
    else:
        rows = min(max(_power(TILE_BYTES // (length * itemsize)), LANES), 512, _up(tokens, LANES))
        block = min(block, TILE_BYTES // (length * itemsize))
    block = min(max(_power(block), LANES), 512)
    return Tiles(tokens=rows, outputs=min(block, _up(outputs, LANES)), dequantize=not few and format_ is not None)


def _power(n: int) -> int:
    """The largest power of two <= n, or 1."""
    return 1 << max(n.bit_length() - 1, 0)


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


# Rows of the list of visits, int32 a visit.
TILE, MATRIX, START, STOP, FIRST, FRESH = range(6)


def all_tiles(count: int) -> jax.Array:
    """int32[6, visits] where every tile meets matrix 0."""
    tile = jnp.arange(count, dtype=jnp.int32)
    zero = jnp.zeros_like(tile)
    return jnp.stack([tile, zero, zero, zero, zero + 1, (tile == 0).astype(jnp.int32)])


def product(x: jax.Array, w: jax.Array | QTensor, visits: jax.Array, plan: Plan, row_scale=None) -> jax.Array:
    """x [T, D] (codes where the plan is native) times w [E, D, F] by `visits` -> [T, F] in x's dtype, float32 of codes.

    visits int32[6, V]: tile of tokens, matrix, rows [start, stop) of the tile's that are this matrix's, whether the visit is
    the first of its tile, and whether its matrix was not that of the visit before. row_scale float32[T] of native calls.
    """
    tokens = x.shape[0]
    outputs = w.shape[-1]
    rows, block = plan.tiles.tokens, plan.tiles.outputs
    groups, count = plan.groups, visits.shape[1]
    x = jnp.pad(x, ((0, _up(tokens, rows) - tokens), (0, 0)))
    look = lambda field, v, visits: visits[field * count + v]  # noqa: E731
    tile = lambda f, v, visits: look(TILE, v, visits)  # noqa: E731
    matrix = lambda f, v, visits: look(MATRIX, v, visits)  # noqa: E731

    arranged = x.reshape(1, -1, plan.width, plan.parts).transpose(0, 3, 1, 2)  # [1, parts, T, width]
    if plan.expanded > 1:
        mine = jnp.arange(plan.width) % LANES // plan.lanes == jnp.arange(plan.expanded)[:, None]
        arranged = jnp.where(mine[:, None, None], arranged, 0)
    operands = {"x": arranged}
    specs = {
        "x": pl.BlockSpec(
            (plan.expanded, plan.parts, rows, plan.width), lambda f, v, visits: (0, 0, tile(f, v, visits), 0)
        )
    }
    if plan.sums:
        operands["sums"] = jnp.sum(x.astype(jnp.float32).reshape(-1, groups, plan.length // groups), axis=-1)
        specs["sums"] = pl.BlockSpec((rows, groups), lambda f, v, visits: (tile(f, v, visits), 0))
    if row_scale is not None:
        operands["row_scale"] = jnp.pad(row_scale, (0, x.shape[0] - tokens))[:, None]
        specs["row_scale"] = pl.BlockSpec((rows, 1), lambda f, v, visits: (tile(f, v, visits), 0))
    if plan.format is None:
        operands["data"] = w
        specs["data"] = pl.BlockSpec((1, plan.length, block), lambda f, v, visits: (matrix(f, v, visits), 0, f))
    else:
        operands["data"] = w.data
        specs["data"] = pl.BlockSpec((1, block, plan.width), lambda f, v, visits: (matrix(f, v, visits), f, 0))
        columns = plan.tiles.dequantize and groups > 1
        for name, part in (("scale", w.scale), ("zero", w.zero)):
            if part is None:
                continue
            part = float16_bits(part)
            operands[name] = part if columns else jnp.swapaxes(part, 1, 2)
            shape = (1, block, groups) if columns else (1, groups, block)
            at = (lambda m, f: (m, f, 0)) if columns else (lambda m, f: (m, 0, f))
            specs[name] = pl.BlockSpec(shape, lambda f, v, visits, at=at: at(matrix(f, v, visits), f))

    integers = plan.native and jnp.issubdtype(x.dtype, jnp.integer)
    scratch = {"acc": pltpu.VMEM((rows, block), jnp.int32 if integers else jnp.float32)}
    if plan.tiles.dequantize:
        scratch["weights"] = pltpu.VMEM((plan.parts, block, plan.width), x.dtype)
    elif plan.format is not None and groups > 1:
        scratch["factors"] = pltpu.VMEM((groups, block), jnp.float32)
        if plan.shifts:
            scratch["shift"] = pltpu.VMEM((groups, block), jnp.float32)
    names = (*operands, "out", *scratch)
    out = pl.pallas_call(
        functools.partial(_kernel, plan=plan, count=count, names=names),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32 if plan.native else x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-outputs // block), count),
            in_specs=[specs[name] for name in operands],
            out_specs=pl.BlockSpec((rows, block), lambda f, v, visits: (tile(f, v, visits), f)),
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        interpret=plan.interpret,
        name="packed_matmul",
    )(visits.ravel(), *operands.values())
    return out[:tokens]


def _kernel(visits, *refs, plan: Plan, count: int, names):
    refs = dict(zip(names, refs))
    visit = pl.program_id(1)
    look = lambda field: visits[field * count + visit]  # noqa: E731
    first, fresh = look(FIRST) != 0, look(FRESH) != 0
    start, stop = look(START), look(STOP)
    out = refs["out"]

    def work():
        if "weights" in refs:
            pl.when(fresh)(lambda: _dequantize(refs, plan))
        elif "factors" in refs:
            pl.when(fresh)(lambda: _unpack_factors(refs, plan))
        _multiply(refs, plan)
        y = _finish(refs, plan)
        if plan.ragged:
            row = jax.lax.broadcasted_iota(jnp.int32, (y.shape[0], 1), 0)
            before = jnp.where(first, 0.0, out[...].astype(jnp.float32))
            y = jnp.where((row >= start) & (row < stop), y, before)
        out[...] = y.astype(out.dtype)

    if not plan.ragged:
        work()
        return
    pl.when(stop > start)(work)

    @pl.when((stop <= start) & first)
    def _():
        out[...] = jnp.zeros(out.shape, out.dtype)


def _codes(data, plan: Plan, dtype) -> list[jax.Array]:
    """Bytes [.., L] -> `parts` arrays of codes as numbers of `dtype`, zero points not yet taken."""
    if plan.parts == 1:
        if isinstance(plan.format, Float8):
            return [data.astype(jnp.float32).astype(dtype)]
        return [data.astype(jnp.int32).astype(jnp.float32).astype(dtype)]
    width = plan.format.width
    codes = data.astype(jnp.int32)
    mask = 2**width - 1
    return [((codes >> (width * p)) & mask).astype(jnp.float32).astype(dtype) for p in range(plan.parts)]


def _dequantize(refs, plan: Plan):
    """A block of bytes -> `weights`, 32 rows at a time; a scale a channel is left to `_finish`."""
    data, weights = refs["data"], refs["weights"]

    def some(i, _):
        here = pl.ds(pl.multiple_of(i * 32, 32), 32)
        scale = number(refs["scale"][0, here]) if plan.groups > 1 else None
        zero = number(refs["zero"][0, here]) if plan.groups > 1 and "zero" in refs else plan.offset
        for at in range(0, plan.width, LANES):
            lanes = slice(at, at + LANES)
            parts = _codes(data[0, here, lanes], plan, jnp.float32)
            if plan.groups > 1:
                spread = functools.partial(_spread, first=at // plan.lanes, plan=plan)
                moved = zero if isinstance(zero, float) else spread(zero)
                parts = [(part - moved) * spread(scale) for part in parts]
            for p, part in enumerate(parts):
                weights[p, here, lanes] = part.astype(weights.dtype)
        return 0

    jax.lax.fori_loop(0, data.shape[1] // 32, some, 0)


def _spread(x, *, first: int, plan: Plan):
    """Factors [R, groups] -> [R, 128] for the lanes whose first group is `first`."""
    out = x[:, first : first + 1]
    if plan.shared == 1:
        return out
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    for i in range(1, plan.shared):
        out = jnp.where(lane < i * plan.lanes, out, x[:, first + i : first + i + 1])
    return out


def _unpack_factors(refs, plan: Plan):
    """Scales and zero points times scales -> float32, a row a group."""
    scale = number(refs["scale"][0])
    refs["factors"][...] = scale
    if plan.shifts:
        refs["shift"][...] = scale * (number(refs["zero"][0]) if "zero" in refs else plan.offset)


def _dot(a, b, contract: int, out=jnp.float32):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((1,), (contract,)), ((), ())), precision=exact, preferred_element_type=out)


def _multiply(refs, plan: Plan):
    """Codes (or weights) times activations -> acc."""
    x, data, acc = refs["x"], refs["data"], refs["acc"]
    rows, size = plan.tiles.tokens, plan.chunk
    if "shift" in refs:
        acc[...] = -_dot(refs["sums"][...], refs["shift"][...], 0)
    else:
        acc[...] = jnp.zeros(acc.shape, acc.dtype)

    def chunk(c):
        lanes = pl.ds(pl.multiple_of(c * size, LANES), size)
        if plan.format is None:
            acc[...] += _dot(x[0, 0, :, lanes], data[0, lanes].astype(x.dtype), 0)
            return
        if "weights" in refs:
            for p in range(plan.parts):
                acc[...] += _dot(x[0, p, :, lanes], refs["weights"][p, :, lanes], 1)
            return
        bytes_ = data[0, :, lanes]
        parts = [bytes_] if plan.native else _codes(bytes_, plan, x.dtype)
        acts = [x[:, p, :, lanes].reshape(plan.expanded * rows, size) for p in range(plan.parts)]
        y = sum(_dot(a, b, 1, acc.dtype) for a, b in zip(acts, parts))
        if plan.groups == 1:
            acc[...] += y
            return
        group = c * size // plan.lanes if plan.shared == 1 else c * plan.shared
        for i in range(plan.shared):
            acc[...] += y[i * rows : (i + 1) * rows] * refs["factors"][pl.ds(group + i, 1)]

    chunks = plan.width // size
    together = next(n for n in (4, 2, 1) if chunks % n == 0) if rows * plan.expanded <= LANES else 1
    jax.lax.fori_loop(0, chunks // together, lambda i, _: ([chunk(i * together + j) for j in range(together)], 0)[1], 0)


def _finish(refs, plan: Plan):
    """acc -> float32[rows, outputs]; a scale a channel and its zero point are applied here."""
    y = refs["acc"][...].astype(jnp.float32)
    if plan.format is None or plan.groups > 1:
        return y
    if plan.shifts:
        y = y - refs["sums"][...] * (number(refs["zero"][0]) if "zero" in refs else plan.offset)
    y = y * number(refs["scale"][0])
    return y * refs["row_scale"][...] if plan.native else y
