"""How the tokens of one step belong to sequences."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged:
    """How T tokens belong to B rows. Tokens of a row are adjacent; padding tokens have row B and position 0."""

    rows: jax.Array  # int32[T]
    starts: jax.Array  # int32[B], first token of each row
    counts: jax.Array  # int32[B], tokens of each row, 0 for an idle row
    positions: jax.Array  # int32[T]
    longest: int = dataclasses.field(metadata={"static": True})  # bound on counts
    rectangular: bool = dataclasses.field(default=False, metadata={"static": True})  # T = B * longest, row-major

    @property
    def batch(self) -> int:
        return self.starts.shape[0]

    def pad(self, x: jax.Array) -> jax.Array:
        """[T, ...] -> [B, Q, ...] with Q = longest; entries past a row's count are other tokens' values."""
        if self.rectangular:
            return x.reshape(self.batch, self.longest, *x.shape[1:])
        index = jnp.clip(self.starts[:, None] + jnp.arange(self.longest), 0, x.shape[0] - 1)
        return x[index]

    def unpad(self, x: jax.Array) -> jax.Array:
        """[B, Q, ...] -> [T, ...]."""
        if self.rectangular:
            return x.reshape(self.batch * self.longest, *x.shape[2:])
        row = jnp.minimum(self.rows, self.batch - 1)
        offset = jnp.clip(jnp.arange(self.rows.shape[0]) - self.starts[row], 0, self.longest - 1)
        return x[row, offset]

    def without(self, rows: jax.Array) -> "Ragged":
        """The same tokens, those of rows bool[B] being padding."""
        gone = rows[jnp.minimum(self.rows, self.batch - 1)]
        counts = jnp.where(rows, 0, self.counts)
        return dataclasses.replace(self, rows=jnp.where(gone, self.batch, self.rows), counts=counts)

    @property
    def valid(self) -> jax.Array:
        """bool[B, Q]: which padded entries are tokens."""
        return jnp.arange(self.longest) < self.counts[:, None]

    @classmethod
    def dense(cls, batch: int, length: int, counts: jax.Array | None = None) -> "Ragged":
        """`batch` rows of `length` tokens each from position 0, of which the first `counts` are real."""
        total = jnp.arange(batch * length, dtype=jnp.int32)
        return cls(
            rows=total // length,
            starts=jnp.arange(batch, dtype=jnp.int32) * length,
            counts=jnp.full((batch,), length, jnp.int32) if counts is None else counts,
            positions=total % length,
            longest=length,
            rectangular=True,
        )
