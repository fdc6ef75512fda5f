"""grouped_matmul on Blackwell, dense experts: `optx.pallas.matmul.gemm_sm100` over tiles of rows of one expert each.

Rows are put into whole tiles by XLA and taken out again, so a tile never crosses experts; experts without rows are not read.
Never run on hardware so far.
"""

import dataclasses

import jax
import jax.numpy as jnp

from optx.errors import LoweringError
from optx.pallas.grouped_matmul import reference
from optx.pallas.matmul import gemm_sm100 as gemm

DEPTH = 64


def supports(args, target) -> str | None:
    """args: weight ([E, D, F], may be abstract), dtype of x (bfloat16 when left out)."""
    return _declines(args["weight"], jnp.dtype(args.get("dtype", jnp.bfloat16)))


def _declines(w, dtype) -> str | None:
    if not isinstance(w, jax.Array | jax.ShapeDtypeStruct):
        return f"w is {type(w).__name__}; allowed: dense"
    if dtype != jnp.bfloat16 or w.dtype != dtype:
        return f"x of {dtype.name} with w of {w.dtype}; allowed: bfloat16"
    _, d, f = w.shape
    if d % DEPTH or f % gemm.OUTPUTS or not d or not f:
        return f"D {d}, F {f}; allowed: D in multiples of {DEPTH}, F of {gemm.OUTPUTS}"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Rows in tiles of one expert each."""

    experts: jax.Array  # int32[1 + tiles]: how many tiles there are, the expert of each
    source: jax.Array  # int32[tiles, rows]: the row of x in a tile's place; T where there is none
    place: jax.Array  # int32[T]: where a row lies among the places of all tiles; past them for a row of no expert


def cut(group_sizes: jax.Array, tokens: int, rows: int) -> Cut:
    """group_sizes int32[E], rows of a tile -> tiles, at most T / rows + min(E, T) of them."""
    experts = group_sizes.shape[0]
    most = -(-tokens // rows) + min(experts, tokens)
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes.astype(jnp.int32), 0)), tokens)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    last = jnp.cumsum(-(-(ends - starts) // rows))  # tile behind an expert's last
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), last[:-1]])
    tile = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(last, tile, side="right").astype(jnp.int32), experts - 1)
    at = (starts[expert] + (tile - first[expert]) * rows)[:, None] + jnp.arange(rows, dtype=jnp.int32)
    source = jnp.where((at < ends[expert][:, None]) & (tile < last[-1])[:, None], at, tokens)
    token = jnp.arange(tokens, dtype=jnp.int32)
    mine = jnp.minimum(jnp.searchsorted(ends, token, side="right").astype(jnp.int32), experts - 1)
    place = jnp.where(token < ends[-1], first[mine] * rows + token - starts[mine], most * rows)
    return Cut(experts=jnp.concatenate([last[-1:], expert]).astype(jnp.int32), source=source, place=place)


def tiles_of(tokens: int, experts: int) -> int:
    """Rows of a tile: about those of an expert."""
    return next((n for n in (16, 32, 64) if tokens <= n * experts), 128)


def grouped_matmul(x, w, group_sizes, *, tiles: gemm.Tiles | None = None):
    """`reference.grouped_matmul` for bfloat16 x [T, D] and w [E, D, F].

    Raises: OptxError where shapes do not fit, LoweringError for what the kernel does not take.
    """
    reference.check(x, w, group_sizes)
    if reason := _declines(w, x.dtype):
        raise LoweringError(f"grouped_matmul: {reason}")
    tokens, (experts, d, f) = x.shape[0], w.shape
    if not tokens or not experts:
        return jnp.zeros((tokens, f), x.dtype)
    rows = tiles.rows if tiles else tiles_of(tokens, experts)
    made = cut(group_sizes, tokens, rows)
    first = tiles or gemm.Tiles(rows=rows, depth=DEPTH, stages=2)
    plan = gemm.Plan(tiles=first, depth=d, outputs=f, rows=made.source.size, kind="dense", grouped=True)
    if tiles is None:
        left = gemm.SHARED - 4096 - gemm.out_bytes(first, 2)
        stages = min(12, left // gemm.stage_bytes(plan, x.dtype, w.dtype))
        plan = dataclasses.replace(plan, tiles=dataclasses.replace(first, stages=stages))
    filled = jnp.take(x, made.source.reshape(-1), axis=0, mode="fill", fill_value=0)
    out = gemm.product(filled, w, made.experts, plan=plan, dtype=jnp.dtype(x.dtype))
    return jnp.take(out, made.place, axis=0, mode="fill", fill_value=0)
