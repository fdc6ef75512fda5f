"""The index over cached tokens that sparse attention chooses from (DeepSeek-V3.2, arXiv:2512.02556)."""

import jax
import jax.numpy as jnp
from flax import nnx

from optx import tensor
from optx.cache import Stream
from optx.nn.core import LayerNorm, Linear, Rope, param


class Indexer(nnx.Module):
    """I_ts = sum_n w_tn relu(q_tn . k_s): what attention at t takes are the `top_k` earlier tokens s of the highest I_ts.

    q = rope(c W_q) from the queries' latent c, k = rope(norm(x W_k)), one for all heads; w = x W_w / sqrt(N H), in float32.
    """

    def __init__(self, d, *, heads, head_dim, top_k, q_rank, rope: Rope, eps=1e-6, dtype="float32", rngs=None):
        """q_rank: numbers of the queries' latent; rope turns the first `rope.dim` numbers of a head."""
        self.heads, self.head_dim, self.top_k, self.rope = heads, head_dim, top_k, rope
        self.q = Linear(q_rank, heads * head_dim, dtype=dtype, axes=("rank", "heads"), rngs=rngs)
        self.k = Linear(d, head_dim, dtype=dtype, axes=("embed", "head"), rngs=rngs)
        self.k_norm = LayerNorm(head_dim, eps=eps, dtype=dtype, axes=("head",), rngs=rngs)
        self.weight = param((d, heads), "float32", ("embed", "heads"), rngs)

    @property
    def stream(self) -> Stream:
        """What a token leaves behind."""
        return Stream(name="index", shape=(1, self.head_dim))

    def queries(self, x: jax.Array, latent: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [T, D], latent [T, q_rank] -> q [T, N, H], weights float32[T, N]."""
        q = self.rope(self.q(latent).reshape(-1, self.heads, self.head_dim), positions)
        weights = jnp.dot(x.astype(jnp.float32), tensor.dense(self.weight.get_value()).astype(jnp.float32))
        return q, weights * (self.heads * self.head_dim) ** -0.5

    def keys(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [T, D] -> [T, 1, H]."""
        return self.rope(self.k_norm(self.k(x))[:, None], positions)
