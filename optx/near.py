"""Tokens kept exact beside packed ones: the newest, the first, and those of a block that is not complete yet.

A layer with `CacheSpec.near` belongs to two token groups: one of packed pages, which hold every token, and one of plain pages
that is the cache of a sliding window with sinks. A query reads a token in one of them: with recent = R, first = F and blocks of
G tokens the query at position p reads positions < F and >= floor((p + 1 - R) / G) G exactly, the others packed. Keys whose
scales span tokens are packed from the plain pages in the step that brings a block's last token, so that a row which steps back
over it packs the block again when it is complete again.
"""

import dataclasses

import jax
import jax.numpy as jnp

from optx import tensor
from optx.cache import NEAR, CacheSpec, Pool, Ragged, View
from optx.formats import Format
from optx.pools import load, store_tokens


def append(spec: CacheSpec, new: dict[str, jax.Array], view: View, ragged: Ragged) -> Pool:
    """The layer's pools with `new` [T, ...] by stream in both groups, and with the blocks that it completes packed."""
    exact = spec.near.append(
        {NEAR + name: view.pool[NEAR + name] for name in new},
        {NEAR + name: x for name, x in new.items()},
        view.near.writes,
    )
    spans = _spanning(spec)
    each = {name: x for name, x in new.items() if name not in spans}
    pool = spec.append({name: view.pool[name] for name in each}, each, view.writes)
    return with_blocks(spec, {name: view.pool[name] for name in spans} | pool | exact, view, ragged)


def with_blocks(spec: CacheSpec, pool: Pool, view: View, ragged: Ragged) -> Pool:
    """The layer's pools after an append to all streams but those whose scales span tokens, with the blocks of these that it
    completes packed."""
    packed = {
        name: _pack_blocks(pool[name], pool[NEAR + name], format_, view, ragged)
        for name, format_ in _spanning(spec).items()
    }
    return pool | packed


def _spanning(spec: CacheSpec) -> dict[str, Format]:
    """Formats of the streams whose scales span tokens."""
    return {s.name: f for s, f in zip(spec.streams, spec.formats, strict=True) if f and f.block_rows > 1}


def as_stored(spec: CacheSpec, new: dict[str, jax.Array], ragged: Ragged) -> dict[str, jax.Array]:
    """`new` [T, ...] of self-contained sequences as attention reads it back: packed, and exact under `near_<name>`."""
    spans = _spanning(spec)
    stored = spec.as_stored({name: x for name, x in new.items() if name not in spans})
    stored |= {name: _blocks_as_stored(new[name], format_, ragged) for name, format_ in spans.items()}
    return stored if spec.near is None else stored | {NEAR + name: x for name, x in new.items()}


def _blocks_as_stored(x: jax.Array, format_: Format, ragged: Ragged) -> jax.Array:
    """x [T, K, H], a block of a sequence's tokens at a time; no query reads what an incomplete one gives."""
    padded, length = ragged.pad(x), ragged.longest
    padded = jnp.pad(padded, ((0, 0), (0, -length % format_.block_rows), (0, 0), (0, 0)))
    packed = tensor.quantize(jnp.moveaxis(padded, 1, 2), format_, axis=-1)
    return ragged.unpad(jnp.moveaxis(packed.dequantize(), 2, 1)[:, :length])


def _pack_blocks(pool: tensor.QTensor, exact: jax.Array, format_: Format, view: View, ragged: Ragged) -> tensor.QTensor:
    """The blocks that the step completes, read from the plain pages `exact` [pages, K, P, H] into the packed ones."""
    size = format_.block_rows
    row, left, real = completed(ragged, size)
    source, target = (
        slots_of(v.table, v.lengths, p, row, left, real, size) for v, p in ((view.near, exact), (view, pool))
    )
    blocks = load(exact, source.reshape(-1), True).reshape(*source.shape, *exact.shape[1:2], exact.shape[3])
    packed = tensor.quantize(jnp.moveaxis(blocks, 1, 2), format_, axis=-1)  # [M, K, G, H]
    data = jnp.moveaxis(packed.data, 2, 1).reshape(target.size, *packed.data.shape[1:2], -1)
    once = lambda part, new: store_tokens(part, new[:, :, 0], target[:, 0] // size)  # noqa: E731
    scale, zero = (jax.tree.map(once, getattr(pool, part), getattr(packed, part)) for part in ("scale", "zero"))
    return dataclasses.replace(pool, data=store_tokens(pool.data, data, target.reshape(-1)), scale=scale, zero=zero)


def completed(ragged: Ragged, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Blocks of `size` positions whose last token is among the step's, of at most T / size + B -> (row int32[M], tokens of the
    row from the block's first to its newest int32[M], whether it is one bool[M])."""
    start = ragged.positions[jnp.clip(ragged.starts, 0, ragged.positions.shape[0] - 1)]
    end = start + ragged.counts
    count = jnp.where(ragged.counts > 0, end // size - start // size, 0)
    ends = jnp.cumsum(count)
    index = jnp.arange(ragged.positions.shape[0] // size + ragged.batch, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right"), ragged.batch - 1)
    first = (start[row] // size + index - (ends - count)[row]) * size
    return row, end[row] - first, index < ends[-1]


def slots_of(table, lengths, pool, row, left, real, size: int) -> jax.Array:
    """Flat slots int32[M, size] of blocks whose first token is `left` before the end of its row's listing, whose newest slots
    are its newest positions; of the page that takes the writes of padding where a block is not real."""
    pages, page = pool.shape[0] - 1, pool.shape[2]
    at = jnp.maximum(lengths[0, row] - left, 0)[:, None] + jnp.arange(size)
    listed = table[0, row[:, None], jnp.minimum(at // page, table.shape[2] - 1)]
    return jnp.where(real[:, None], listed * page + at % page, pages * page + jnp.arange(size) % page)
