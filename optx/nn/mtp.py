"""Multi-token prediction: a block that drafts the token after the next (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from optx.cache import CacheSpec, Ragged, View
from optx.nn.core import Linear
from optx.nn.decoder import Block


class MTP(nnx.Module):
    """h'_t = norm(block([embed_norm(e_t+1), hidden_norm(h_t)] W)): what the model's head turns into the token at t + 2.

    h are the model's hidden states before its head, e the embeddings of the tokens that follow; embedding and head are the
    model's own. The block's cache holds one entry for every h.
    """

    def __init__(self, d, *, norm, block: Block, dtype="float32", rngs=None):
        """norm: a callable that builds an RMSNorm of d numbers."""
        self.embed_norm, self.hidden_norm = norm(), norm()
        self.join = Linear(2 * d, d, dtype=dtype, axes=(None, "embed"), rngs=rngs)
        self.block = block
        self.norm = norm()

    @property
    def cache(self) -> CacheSpec:
        return self.block.mixer.cache

    def __call__(self, hidden: jax.Array, embedded: jax.Array, ragged: Ragged, view: View | None):
        """hidden [T, D] and the next tokens' embeddings [T, D] -> (hidden [T, D] before the head, the block's pool)."""
        x = self.join(jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(hidden)], axis=-1))
        x, pool = self.block(x, ragged, view)
        return self.norm(x), pool
