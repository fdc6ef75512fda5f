"""Routers that say, as tokens come, which kv heads keep them (mixture of sparse attention)."""

import jax
import jax.numpy as jnp

from optx.cache import Pool, Ragged, Stream, View
from optx.nn.core import Linear
from optx.nn.selecting import Selector, asked_of, best
from optx.pallas.attention.reference import Mask, gather_pages
from optx.pallas.dispatch import OpSite
from optx.pools import store_tokens
from optx.selection import Selection


class TokenRouter(Selector):
    """A query at t sees of the tokens s <= t the `window` newest, the `sinks` first and those that its kv head keeps:
    sigmoid(x_s W + b) > 1/2, x_s being what enters the layer.

    The router of MoSA (Piekos et al. 2025, arXiv:2505.00315) with a threshold, in b, where the paper takes the k tokens of the
    highest score in a sequence, which a decode cannot know. The cache keeps a bool a token and kv head; pages hold all tokens
    and are read under a mask. The choice is hard: no gradient reaches W and b.
    """

    names = ("kept",)
    parts = ()
    block = every = size = 1
    listed = False

    def __init__(self, d, *, kv_heads, window, sinks, share, dtype="float32"):
        """share: of tokens that b was set to keep."""
        self.window, self.sinks, self.share = window, sinks, share
        self.router = Linear(d, kv_heads, bias=True, dtype=dtype, axes=("embed", "kv_heads"))

    @property
    def selection(self) -> Selection:
        return Selection(blocks=0, block=1, window=self.window, share=self.share, index=self.names)

    def streams(self, kv_heads: int, head_dim: int) -> tuple[Stream, ...]:
        return (Stream(name="kept", shape=(kv_heads, 1), dtype="bool"),)

    def stored(self, pool: Pool, ragged: Ragged, view: View) -> Pool:
        """As it is: what is kept is not read off keys and values (`__call__`)."""
        return pool

    def __call__(self, attn, x, q, pool: Pool, ragged: Ragged, view: View | None, attend) -> jax.Array:
        """x [T, D], q [T, N, H] over the pool -> [T, N, H]. attend: as of `over_parts`."""
        kept = self.router(x) > 0
        if view is not None:
            pool["kept"] = store_tokens(pool["kept"], kept[..., None], view.writes)
        if self.room(ragged, view) <= self.window + self.sinks:
            return attend("", mask=Mask())[0]
        kept = ragged.pad(kept) if view is None else gather_pages(pool["kept"], view.table)[..., 0]
        kept, at = jnp.moveaxis(kept, 1, 2)[:, :, None], jnp.arange(kept.shape[1])

        def chosen(asked):
            """int32[B, Q] -> bool[B, K, Q, S]."""
            return kept | ((at > asked[..., None] - self.window) | (at < self.sinks))[:, None]

        return attend("", mask=Mask(), chosen=chosen, block=1)[0]


class BlockRouter(TokenRouter):
    """The same for blocks of `block` tokens, by the mean of x W + b over their tokens: a query reads the kept blocks before its
    own, those of its `window` newest tokens and of the `sinks` first, and a decode no others. The cache keeps x W + b, a number a
    token and kv head."""

    masks = listed = True

    def __init__(self, d, *, block, **sizes):
        super().__init__(d, **sizes)
        self.block, self.first = block, -(-self.sinks // block)
        self.blocks = self.first + (self.window - 1) // block + 1  # that cover window and sinks wherever a block begins

    @property
    def selection(self) -> Selection:
        return Selection(blocks=self.blocks, block=self.block, share=self.share, index=self.names)

    def streams(self, kv_heads: int, head_dim: int) -> tuple[Stream, ...]:
        return (Stream(name="kept", shape=(kv_heads, 1)),)

    def sites(self, facts):
        return (OpSite(op="top_blocks", args={}),)

    def __call__(self, attn, x, q, pool: Pool, ragged: Ragged, view: View | None, attend) -> jax.Array:
        scores = self.router(x)
        if view is not None:
            scores = scores.astype(pool["kept"].dtype)
            pool["kept"] = store_tokens(pool["kept"], scores[..., None], view.writes)
        if not self.chooses(ragged, view):
            return attend("", mask=Mask())[0]
        scores = ragged.pad(scores) if view is None else gather_pages(pool["kept"], view.table)[..., 0]
        scores = jnp.pad(scores.astype(jnp.float32), ((0, 0), (0, -scores.shape[1] % self.block), (0, 0)))
        means = scores.reshape(len(scores), -1, self.block, scores.shape[-1]).mean(2)
        kept = jnp.moveaxis(jnp.where(means > 0, means, -jnp.inf), 1, 2)[:, None]  # [B, 1, K, blocks]
        asked, at = asked_of(ragged), jnp.arange(kept.shape[-1])
        near = (at + 1) * self.block > asked[:, :, None, None] - self.window + 1
        kept = jnp.broadcast_to(kept, (*asked.shape, *kept.shape[2:]))
        picked = best(kept, asked, near | (at < self.first), len(at), self.block, attn.choices)
        return attend("", mask=Mask(), picked=ragged.unpad(picked), block=self.block)[0]
