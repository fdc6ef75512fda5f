"""Selected reads: blocks of cached tokens that queries choose by an index over them, which the cache keeps beside its pages.

An entry of the index is made of `size` tokens and stands for the `every` last of them. It is made from the pages in the step
that brings the last of its tokens, so that a row which steps back over it makes it again; whole pages carry their entries
along when they are shared. A kv head chooses for all query heads that read it: few tokens a row then read pages listed by row
and kv head, and no others; chunks of prompts are masked.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optx import near
from optx.cache import Pool, Ragged, Stream, View
from optx.pallas import dispatch
from optx.pallas.attention.reference import Mask, gather_pages
from optx.pallas.dispatch import OpSite
from optx.pools import PICKED, load, store_tokens
from optx.selection import Selection
from optx.tensor import Tensor, dense

DECODE = 8  # tokens a row up to which a step is decoding: one, or a few speculated ones


def best(scores: jax.Array, asked: jax.Array, forced: jax.Array, count: int, block: int, choices=()) -> jax.Array:
    """The `count` blocks of the highest scores before a query's own, which is one of them, as are those that are `forced`.

    scores [B, Q, K, blocks]; asked int32[B, Q]: positions, -1 where there is no query; forced bool[blocks], or [B, Q, 1, blocks].
    -> int32[B, Q, K, count], ascending; `blocks` where there are fewer.
    """
    blocks = scores.shape[-1]
    own, at = (asked // block)[:, :, None, None], jnp.arange(blocks)
    scores = jnp.where(at < own, scores.astype(jnp.float32), -jnp.inf)
    scores = jnp.where((at == own) | (forced & (at < own)), jnp.inf, scores)
    picked = dispatch.call("top_blocks", choices, scores.reshape(-1, blocks), count=min(count, blocks))
    return picked.reshape(*scores.shape[:-1], -1)


def as_mask(picked: jax.Array, blocks: int) -> jax.Array:
    """What `best` returns -> bool[B, K, Q, blocks]."""
    picked = jnp.moveaxis(picked, 2, 1)
    none = jnp.zeros((*picked.shape[:-1], blocks + 1), bool)
    return jnp.put_along_axis(none, jnp.minimum(picked, blocks), True, axis=-1, inplace=False)[..., :blocks]


def listed(picked: jax.Array, asked: jax.Array, table: jax.Array, page: int, block: int) -> dict[str, jax.Array]:
    """What `best` returns as page lists of every query and kv head, a query being a row: table int32[K, B Q, pages], lengths
    int32[K, B Q]. table: int32[1, B, pages] of the rows."""
    each = block // page
    pages = picked[..., None] * each + jnp.arange(each)
    pages = jnp.minimum(pages.reshape(*picked.shape[:-1], -1), table.shape[2] - 1)
    lists = jnp.take_along_axis(table[0][:, None, None], pages, axis=-1)
    own = (asked // block)[..., None]
    before = jnp.sum(picked < own[..., None], axis=-1)
    lengths = jnp.where(asked[..., None] < 0, 0, before * block + asked[..., None] % block + 1)
    heads = picked.shape[2]
    return {
        "table": jnp.moveaxis(lists, 2, 0).reshape(heads, -1, lists.shape[-1]),
        "lengths": jnp.moveaxis(lengths, 2, 0).reshape(heads, -1).astype(jnp.int32),
    }


def tail(asked: jax.Array, table: jax.Array, page: int, window: int) -> dict[str, jax.Array]:
    """Page lists of every query, a query being a row, of the pages that hold the `window` tokens up to its own."""
    count = min(-(-(window - 1) // page) + 1, table.shape[2])
    first = jnp.clip(asked // page - (count - 1), 0)
    pages = jnp.minimum(first[..., None] + jnp.arange(count), table.shape[2] - 1)
    lists = jnp.take_along_axis(table[0][:, None], pages, axis=-1)
    lengths = jnp.where(asked < 0, 0, asked - first * page + 1)
    return {"table": lists.reshape(1, -1, count), "lengths": lengths.reshape(1, -1).astype(jnp.int32)}


class Selector(nnx.Module):
    """What a layer of attention reads by: its index, and how queries choose."""

    block: int  # tokens
    blocks: int  # that a query reads, its own included
    every: int  # tokens of an entry of the index
    size: int  # tokens that it is made of
    names: tuple[str, ...]  # of its streams
    parts: tuple[str, ...] = ("k", "v")  # names of the streams that its entries are made of
    masks: bool = True  # chunks of prompts read all, under a mask
    listed: bool = True  # few tokens a row read lists of pages; False: all, under a mask

    @property
    def selection(self) -> Selection:
        return Selection(blocks=self.blocks, block=self.block, index=self.names)

    def streams(self, kv_heads: int, head_dim: int) -> tuple[Stream, ...]:
        return tuple(Stream(name=name, shape=(kv_heads, head_dim), every=self.every) for name in self.names)

    def entries(self, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        """k, v (or what `parts` names) [M, size, K, H] -> entries [M, K, H] by stream."""
        raise NotImplementedError

    def sites(self, facts: Mapping[str, Any]) -> tuple[OpSite, ...]:
        """Its own call sites, from the facts of the layer's."""
        return ()

    def stored(self, pool: Pool, ragged: Ragged, view: View) -> Pool:
        """The pool with the entries that the step's tokens complete."""
        row, left, real = near.completed(ragged, self.every)
        find = functools.partial(near.slots_of, view.table, view.lengths, pool[self.parts[0]], row)
        source = find(left + self.size - self.every, real, self.size)
        target = find(left, real, self.every)[:, -1] // self.every
        new = self.entries(*(_tokens(pool[name], source) for name in self.parts))
        return pool | {name: store_tokens(pool[name], x, target) for name, x in new.items()}

    def listing(self, pool: Pool, ragged: Ragged, view: View | None) -> dict[str, jax.Array]:
        """Entries by stream [B, entries, K, H] of whole rows. What no query may see of them can be anything."""
        if view is not None:
            return {name: gather_pages(pool[name], view.table) for name in self.names}
        count = -(-ragged.longest // self.every)
        at = (jnp.arange(count)[:, None] + 1) * self.every - self.size + jnp.arange(self.size)
        parts = (
            jnp.take(ragged.pad(pool[name]), jnp.maximum(at, 0), axis=1, mode="fill", fill_value=0)
            for name in self.parts
        )
        new = self.entries(*(part.reshape(-1, *part.shape[2:]) for part in parts))
        return {name: x.reshape(ragged.batch, count, *x.shape[1:]) for name, x in new.items()}

    def room(self, ragged: Ragged, view: View | None) -> int:
        """Tokens that a row can list."""
        return ragged.longest if view is None else view.table.shape[-1] * view.positions.shape[-1]

    def chooses(self, ragged: Ragged, view: View | None) -> bool:
        """Whether queries may have to leave blocks out."""
        return self.room(ragged, view) > self.block * self.blocks

    def grouped(self, q: jax.Array, entries: jax.Array) -> jax.Array:
        """q [B, Q, N, H] -> [B, Q, K, N / K, H]."""
        return q.reshape(*q.shape[:2], entries.shape[2], -1, q.shape[-1])


def _tokens(pool: Tensor, slots: jax.Array) -> jax.Array:
    """Flat slots int32[M, S] of a pool, dense or packed -> [M, S, K, H]."""
    found = dense(jax.tree.map(lambda part: load(part, slots.reshape(-1), True), pool))
    return found.reshape(*slots.shape, *found.shape[1:])


def asked_of(ragged: Ragged) -> jax.Array:
    """int32[B, Q]: positions of the tokens, -1 where there is none."""
    return jnp.where(ragged.valid, ragged.pad(ragged.positions), -1)


class BlockMeans(Selector):
    """MoBA (Lu et al. 2025, arXiv:2502.13189): a query reads its own block, the `first` ones and of those between them the ones
    with the largest sum over the query heads of a kv head of softmax(scale q . mean(k)) over blocks. No weights."""

    names = ("mean",)

    def __init__(self, *, block: int, blocks: int, first: int, every: int):
        self.block, self.blocks, self.first, self.every, self.size = block, blocks, first, every, every
        self.lends = False  # whether other layers take its choice

    def sites(self, facts):
        return (OpSite(op="top_blocks", args={}),)

    def entries(self, k, v):
        return {"mean": jnp.mean(k.astype(jnp.float32), axis=1).astype(k.dtype)}

    def __call__(self, attn, x, q, pool: Pool, ragged: Ragged, view: View | None, attend: Callable) -> jax.Array:
        """q [T, N, H] over the pool -> [T, N, H]. attend: as of `over_parts`."""
        if not self.chooses(ragged, view):
            return attend("", mask=Mask())[0]
        means, asked = self.listing(pool, ragged, view)["mean"], asked_of(ragged)
        if (each := self.block // self.every) > 1:
            means = jnp.pad(means.astype(jnp.float32), ((0, 0), (0, -means.shape[1] % each), (0, 0), (0, 0)))
            means = means.reshape(len(means), -1, each, *means.shape[2:]).mean(2)
        q = self.grouped(ragged.pad(q).astype(means.dtype), means)
        logits = jnp.einsum("bqkgh,bjkh->bqkgj", q, means, preferred_element_type=jnp.float32) * attn.scale
        before = jnp.arange(means.shape[1]) < (asked // self.block)[:, :, None, None, None]
        scores = jax.nn.softmax(jnp.where(before, logits, -1e30), axis=-1).sum(3)
        first = jnp.arange(scores.shape[-1]) < self.first
        picked = best(scores, asked, first, self.blocks, self.block, attn.choices)
        if self.lends:
            pool[PICKED] = ragged.unpad(picked)
        return attend("", mask=Mask(), picked=ragged.unpad(picked), block=self.block)[0]


class LatentMeans(BlockMeans):
    """The same over the latents of `GroupedMLA`, which all heads read: one choice for all of them. Where latents have scales
    by kv head (`normed`), a latent counts by their mean."""

    def __init__(self, *, normed: bool, **sizes):
        super().__init__(**sizes)
        self.parts = ("latent", "norm") if normed else ("latent",)

    def entries(self, latent, norm=None):
        """latent [M, size, 1, R], norm [M, size, K, 1] -> {"mean": [M, 1, R]}."""
        x = latent.astype(jnp.float32)
        x = x if norm is None else x * jnp.mean(norm.astype(jnp.float32), axis=2, keepdims=True)
        return {"mean": jnp.mean(x, axis=1).astype(latent.dtype)}


class Follower(Selector):
    """Blocks that an earlier layer `like` has chosen in the same step; no index of its own."""

    names = ()

    def __init__(self, chooser: BlockMeans, like: int):
        self.block, self.blocks, self.like = chooser.block, chooser.blocks, like

    @property
    def selection(self) -> Selection:
        return Selection(blocks=self.blocks, block=self.block, like=self.like)

    def stored(self, pool: Pool, ragged: Ragged, view: View) -> Pool:
        return pool

    def __call__(self, attn, x, q, pool: Pool, ragged: Ragged, view: View | None, attend: Callable) -> jax.Array:
        """As of BlockMeans, with the choice in the pool."""
        if not self.chooses(ragged, view):
            return attend("", mask=Mask())[0]
        return attend("", mask=Mask(), picked=pool[PICKED], block=self.block)[0]
