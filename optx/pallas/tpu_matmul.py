"""What the matmul rows of TPU share: a Pallas Mosaic kernel that multiplies tiles of tokens by blocks of packed weights.

A grid step is (block of outputs, visit); a visit is a tile of tokens and the matrix that it meets, so a plain matmul is a
list of tiles and a grouped one a list of (tile, expert), in scalar memory (megablox: Gale et al. 2022, arXiv:2211.15841).
A weight [D, F] is read as it is stored, [F, D packed]. Two bytes-to-numbers schemes, because a weight is converted once
and used by as many rows as there are tokens:

- few tokens: codes go to the matrix unit as they are, tile of 128 lanes by tile; scales multiply the products
- many tokens: a block is dequantized once into VMEM and meets all its tiles from there

Numbers that share a byte (int4: even and odd index) are not interleaved: the activations are ordered as they lie.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optx.formats import Format
from optx.pallas.tpu_common import LANES, VMEM, codes, float16_bits, number, offset_of, parts_of
from optx.tensor import QTensor

CHUNK = 512  # numbers of the contraction a dot where scales allow
FEW = 256  # rows of activations up to which scales multiply products
BLOCK_BYTES = 2 << 20  # of packed weights a step
TILE_BYTES = 4 << 20  # of activations, and of dequantized weights
LONGEST = 96 << 10  # bytes of a row of activations


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
        return 1 if self.format is None else parts_of(self.format)

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
        """Entries of data, or where weights are whole numbers of the contraction, a dot."""
        whole = self.tiles.dequantize or self.format is None
        within = self.length if whole else max(self.lanes, LANES)
        return next(size for size in range(CHUNK, 0, -LANES) if within % size == 0)

    @property
    def expanded(self) -> int:
        """Copies of the activations: one a group that shares lanes, zero elsewhere."""
        return 1 if self.tiles.dequantize else self.shared

    @property
    def splits(self) -> bool:
        """Whether the kernel orders the activations itself."""
        return not self.tiles.dequantize and (self.parts > 1 or self.expanded > 1)

    @property
    def offset(self) -> float:
        """What is to be taken from every code beside its zero point."""
        return offset_of(self.format)

    @property
    def shifts(self) -> bool:
        """Whether codes stand for code - zero."""
        return self.offset != 0 or (self.format is not None and self.format.has_zero)


def tiles(*, tokens: int, length: int, outputs: int, itemsize: int, format_: Format | None) -> Tiles:
    """By shape: tokens that meet one matrix, D, F, bytes of an activation, format of the weights."""
    parts = 1 if format_ is None else parts_of(format_)
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
    if plan.tiles.dequantize and plan.parts > 1:
        x = _split_all(x, plan)
    look = lambda field, v, visits: visits[field * count + v]  # noqa: E731
    tile = lambda f, v, visits: look(TILE, v, visits)  # noqa: E731
    matrix = lambda f, v, visits: look(MATRIX, v, visits)  # noqa: E731

    operands = {"x": x}
    specs = {"x": pl.BlockSpec((rows, plan.length), lambda f, v, visits: (tile(f, v, visits), 0))}
    if row_scale is not None:
        operands["row_scale"] = jnp.pad(row_scale, (0, x.shape[0] - tokens))[:, None]
        specs["row_scale"] = pl.BlockSpec((rows, 1), lambda f, v, visits: (tile(f, v, visits), 0))
    if plan.format is None:
        operands["data"] = w
        specs["data"] = pl.BlockSpec((1, plan.length, block), lambda f, v, visits: (matrix(f, v, visits), 0, f))
    else:
        operands["data"] = w.data
        specs["data"] = pl.BlockSpec((1, block, plan.width), lambda f, v, visits: (matrix(f, v, visits), f, 0))
        for name, part in (("scale", w.scale), ("zero", w.zero)):
            if part is None:
                continue
            columns = plan.tiles.dequantize and (groups > 1 or name == "zero")
            part = float16_bits(part)
            operands[name] = part if columns else jnp.swapaxes(part, 1, 2)
            shape = (1, block, groups) if columns else (1, groups, block)
            at = (lambda m, f: (m, f, 0)) if columns else (lambda m, f: (m, 0, f))
            specs[name] = pl.BlockSpec(shape, lambda f, v, visits, at=at: at(matrix(f, v, visits), f))

    integers = plan.native and jnp.issubdtype(x.dtype, jnp.integer)
    scratch = {"acc": pltpu.VMEM((rows, block), jnp.int32 if integers else jnp.float32)}
    if plan.tiles.dequantize:
        scratch["weights"] = pltpu.VMEM((block, plan.length), x.dtype)
    elif plan.format is not None and groups > 1:
        scratch["factors"] = pltpu.VMEM((groups, block), jnp.float32)
        if w.zero is not None:
            scratch["zeros"] = pltpu.VMEM((groups, block), jnp.float32)
    if plan.splits:
        scratch["acts"] = pltpu.VMEM((plan.expanded, rows, plan.length), x.dtype)
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
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM),
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
        if "acts" in refs:  # one tile of tokens is ordered once for all blocks of outputs
            moved = first if count > 1 else pl.program_id(0) == 0
            pl.when(moved)(lambda: _split(refs["x"], refs["acts"], plan))
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


def _split_all(x, plan: Plan):
    """x [T, D] in the order of `_split`, by a kernel of its own: XLA turns x twice for it."""
    rows = plan.tiles.tokens
    spec = pl.BlockSpec((rows, plan.length), lambda i: (i, 0))

    return pl.pallas_call(
        functools.partial(_split, plan=plan),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0] // rows,),
        in_specs=[spec],
        out_specs=spec,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM),
        interpret=plan.interpret,
        name="split_activations",
    )(x)


def _split(x_ref, out_ref, plan: Plan):
    """Orders activations as bytes lie: of every 128 bytes the first numbers of all bytes, then the second ones. A product
    with a permutation, which is exact. out [D] a row, or [copies, rows, D], each copy with the lanes of its groups only."""
    parts = plan.parts
    size = parts * LANES
    source = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    target = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    order = (source == target % LANES * parts + target // LANES).astype(x_ref.dtype)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) % LANES

    def one(c, _):
        lanes = pl.ds(pl.multiple_of(c * size, LANES), size)
        x = x_ref[:, lanes]
        x = _dot(x, order, 0) if parts > 1 else x.astype(jnp.float32)
        if len(out_ref.shape) == 2:
            out_ref[:, lanes] = x.astype(out_ref.dtype)
            return 0
        for i in range(plan.expanded):
            mine = (lane >= i * plan.lanes) & (lane < (i + 1) * plan.lanes)
            out_ref[i, :, lanes] = (x if plan.expanded == 1 else jnp.where(mine, x, 0)).astype(out_ref.dtype)
        return 0

    jax.lax.fori_loop(0, plan.length // size, one, 0)


def _dequantize(refs, plan: Plan):
    """A block of bytes -> `weights`, 32 rows at a time, numbers in the order of `_split`; a scale a channel is left to
    `_finish`."""
    data, weights = refs["data"], refs["weights"]

    def some(i, _):
        here = pl.ds(pl.multiple_of(i * 32, 32), 32)
        scale = number(refs["scale"][0, here]) if plan.groups > 1 else None
        zero = number(refs["zero"][0, here]) + plan.offset if "zero" in refs else None
        for at in range(0, plan.width, LANES):
            spread = functools.partial(_spread, first=at // plan.lanes, plan=plan)
            parts = codes(data[0, here, at : at + LANES], plan.format, jnp.float32)
            if plan.shifts:
                moved = plan.offset if zero is None else spread(zero)
                parts = [part - moved for part in parts]
            if scale is not None:
                factor = spread(scale)
                parts = [part * factor for part in parts]
            for p, part in enumerate(parts):
                to = at * plan.parts + p * LANES
                weights[here, to : to + LANES] = part.astype(weights.dtype)
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
    """Scales and zero points -> float32, a row a group."""
    refs["factors"][...] = number(refs["scale"][0])
    if "zeros" in refs:
        refs["zeros"][...] = number(refs["zero"][0]) + plan.offset


def _dot(a, b, contract: int, out=jnp.float32):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((1,), (contract,)), ((), ())), precision=exact, preferred_element_type=out)


def _multiply(refs, plan: Plan):
    """Codes (or weights) times activations -> acc."""
    x, data, acc = refs["x"], refs["data"], refs["acc"]
    rows, size, parts = plan.tiles.tokens, plan.chunk, plan.parts
    acc[...] = jnp.zeros(acc.shape, acc.dtype)

    def whole(c):
        """A chunk of numbers against weights that need nothing more."""
        lanes = pl.ds(pl.multiple_of(c * size, LANES), size)
        if plan.format is None:
            return _dot(x[:, lanes], data[0, lanes].astype(x.dtype), 0)
        weights = refs["weights"][:, lanes] if "weights" in refs else data[0, :, lanes]
        return _dot(x[:, lanes], weights, 1, acc.dtype)

    def packed(c):
        """A chunk of bytes: one product for all groups in it, then their scales."""
        weights = codes(data[0, :, pl.ds(pl.multiple_of(c * size, LANES), size)], plan.format, x.dtype)
        acts = []
        for p in range(parts):  # of every 128 bytes
            pieces = []
            for i in range(size // LANES):
                lanes = pl.ds(pl.multiple_of((c * (size // LANES) + i) * parts * LANES + p * LANES, LANES), LANES)
                pieces.append(refs["acts"][:, :, lanes] if plan.splits else x[:, lanes][None])
            acts.append(jnp.concatenate(pieces, axis=-1).reshape(plan.expanded * rows, size))
        y = sum(_dot(a, b, 1) for a, b in zip(acts, weights))
        if plan.groups == 1:
            return y
        group = c * size // plan.lanes if plan.shared == 1 else c * plan.shared
        sums = sum(jnp.sum(a.astype(jnp.float32), axis=1, keepdims=True) for a in acts) if plan.shifts else None
        total = 0
        for i in range(plan.shared):
            mine = slice(i * rows, (i + 1) * rows)
            zero = refs["zeros"][pl.ds(group + i, 1)] if "zeros" in refs else plan.offset
            z = y[mine] - sums[mine] * zero if plan.shifts else y[mine]
            total += z * refs["factors"][pl.ds(group + i, 1)]
        return total

    direct = plan.format is None or plan.native or "weights" in refs
    chunks = (plan.length if direct else plan.width) // size
    together = next(n for n in (8, 4, 2, 1) if chunks % n == 0) if rows * plan.expanded <= LANES else 1
    step = whole if direct else packed

    def some(i, _):
        acc[...] += sum(step(i * together + j) for j in range(together))
        return 0

    jax.lax.fori_loop(0, chunks // together, some, 0)


def _finish(refs, plan: Plan):
    """acc -> float32[rows, outputs]; a scale a channel is applied here, and its zero point where codes were multiplied."""
    y = refs["acc"][...].astype(jnp.float32)
    if plan.format is None or plan.groups > 1:
        return y
    if plan.shifts and not plan.tiles.dequantize:
        sums = jnp.sum(refs["x"][...].astype(jnp.float32), axis=1, keepdims=True)
        y = y - sums * (number(refs["zero"][0]) + plan.offset if "zero" in refs else plan.offset)
    y = y * number(refs["scale"][0])
    return y * refs["row_scale"][...] if plan.native else y
