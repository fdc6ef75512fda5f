"""Reading and writing entries of cache pools: flat token slots page * P + offset, or rows of states."""

import dataclasses

import jax
import jax.numpy as jnp

from optx.formats import Format
from optx.ragged import Ragged
from optx.tensor import Tensor, is_qtensor

Pool = dict[str, Tensor]
PICKED = "picked"  # what a layer has chosen to read in a step, beside the streams until the layers that take its choice have run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """One array that a layer leaves behind: `shape` a token (`(K, H)`) for token caches, a row for state caches."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None  # None: the spec's dtype
    format: Format | None = None  # None: the spec's format
    every: int = 1  # tokens of a row that leave one such array behind: an index over blocks of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Room in the pools: `pages` of `page_size` tokens in every token pool, `slots` rows in every state pool.

    Pools have one page (row) more, which takes the writes of padding: flat slot pages * page_size, row slots.
    """

    pages: int
    page_size: int
    slots: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Caches:
    """All pools of a model: one dict of streams a layer, and int32[pages, P] positions a token group."""

    layers: tuple[Pool, ...]
    positions: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """One layer's side of the caches during a step."""

    pool: Pool
    slots: jax.Array
    positions: jax.Array | None = None
    table: jax.Array | None = None
    lengths: jax.Array | None = None
    writes: jax.Array | None = None
    prompts: jax.Array | None = None
    near: "View | None" = None  # of what the layer keeps exact


def as_pages(new: Pool, ragged: Ragged) -> View:
    """Self-contained sequences as a cache of one page a row."""
    rows = jnp.arange(ragged.batch, dtype=jnp.int32)
    return View(
        pool={name: jnp.moveaxis(ragged.pad(x), 1, 2) for name, x in new.items()},
        slots=rows,
        positions=jnp.broadcast_to(jnp.arange(ragged.longest, dtype=jnp.int32), (ragged.batch, ragged.longest)),
        table=rows[None, :, None],
        lengths=ragged.counts[None],
    )


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


def _coordinates(pool, index, tokens: bool) -> tuple:
    """Where entries lie: (row,) of a state pool; (page, slice of heads, offset) of a token pool, whose tokens are the last
    but one axis ([pages + 1, K, P, H]; positions, [pages + 1, P], have nothing after them)."""
    if not tokens:
        return (index,)
    axis = max(pool.ndim - 2, 1)
    page, offset = index // pool.shape[axis], index % pool.shape[axis]
    return (page, *[slice(None)] * (axis - 1), offset)


def load(pool, index, tokens: bool):
    """Entries `index` int32[M] of the pool: flat token slots, or rows; or int32[K, M] of heads apart. [M, ...]"""
    if index.ndim == 2:
        page, offset = index // pool.shape[2], index % pool.shape[2]
        return jnp.swapaxes(pool.at[page, jnp.arange(len(index))[:, None], offset].get(mode="clip"), 0, 1)
    return pool.at[_coordinates(pool, index, tokens)].get(mode="clip")


def store_tokens(pool: jax.Array, new: jax.Array, writes: jax.Array) -> jax.Array:
    """`new` [T, ...] into a token pool, [pages + 1, K, P, H] or [pages + 1, P], at flat slots `writes` int32[T]."""
    return store(pool, new, writes, True)


FEW = 16  # entries up to which they are stored one by one on CPU


def store_by_head(pool: jax.Array, new: jax.Array, writes: jax.Array) -> jax.Array:
    """`new` [T, K, H] into a token pool [pages + 1, K, P, H] at flat slots `writes` int32[K, T], of each head its own."""
    page, offset = writes // pool.shape[2], writes % pool.shape[2]
    at = (page, jnp.arange(len(writes))[:, None], offset)
    return pool.at[at].set(jnp.swapaxes(new, 0, 1).astype(pool.dtype), mode="drop")


def store(pool, new, index, tokens: bool):
    """Entries `new` [M, ...] into the pool, in place when it is donated; index int32[M], or [K, M] of heads apart."""
    if index.ndim == 2:
        return store_by_head(pool, new, index)
    new, where = new.astype(pool.dtype), _coordinates(pool, index, tokens)
    scatter = lambda pool: pool.at[where].set(new, mode="drop")  # noqa: E731
    if new.shape[0] > FEW:
        return scatter(pool)

    def slices(pool):
        """XLA on CPU copies the whole pool when a scatter, or a reshape of the pool, is also read in the same program;
        slices at full rank it does not."""
        for i in range(new.shape[0]):
            start = [0 if isinstance(at, slice) else at[i] for at in where]
            start += [0] * (pool.ndim - len(start))
            pool = jax.lax.dynamic_update_slice(pool, entry(new[i]), start)
        return pool

    def entry(x):
        return x.reshape(
            [1 if not isinstance(at, slice) else pool.shape[d] for d, at in enumerate(where)]
            + list(pool.shape[len(where) :])
        )

    return jax.lax.platform_dependent(pool, cpu=slices, default=scatter)


def copy(stored: Tensor, src: jax.Array, dst: jax.Array, tokens: bool) -> Tensor:
    """Entries `src` int32[M] of a stored stream over its entries `dst`; scales that tokens share go with their block."""
    rows = stored.format.block_rows if is_qtensor(stored) else 1

    def moved(part, rows=1):
        return store(part, load(part, src // rows, tokens), dst // rows, tokens)

    if rows == 1:
        return jax.tree.map(moved, stored)
    return dataclasses.replace(jax.tree.map(lambda part: moved(part, rows), stored), data=moved(stored.data))
