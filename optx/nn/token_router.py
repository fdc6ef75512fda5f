"""Routers that say, as a token comes, which kv heads keep it (mixture of sparse attention)."""

import jax
import jax.numpy as jnp

from optx.cache import Pool, Ragged, Stream, View
from optx.nn.core import Linear
from optx.nn.selecting import Selector
from optx.pallas.attention.reference import Mask, gather_pages
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
