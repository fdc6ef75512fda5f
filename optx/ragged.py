"""How the tokens of a step belong to rows, and where they lie in the caches."""

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

    def in_slots(self, lengths: jax.Array) -> "Ragged":
        """The same with slots for positions: tokens are the newest of lengths int32[B] cached ones, their own included."""
        row = jnp.minimum(self.rows, self.batch - 1)
        slots = (lengths - self.counts - self.starts)[row] + jnp.arange(self.rows.shape[0], dtype=jnp.int32)
        return dataclasses.replace(self, positions=jnp.where(self.rows < self.batch, slots, 0))

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Address:
    """Where the tokens of a ragged batch lie in the pools, by token group, and rows in the state pools."""

    tables: tuple[jax.Array, ...]  # int32[G, B, pages] by group; G = 1, or K where heads keep different pages
    lengths: tuple[jax.Array, ...]  # int32[G, B]: cached tokens after this tick's append
    writes: tuple[
        jax.Array, ...
    ]  # int32[T] by group, [K, T] with G = K: flat slot of each token; pages * P for padding
    slots: jax.Array  # int32[B]: row of the state pools; number of slots for idle rows
    prompts: jax.Array | None = None  # int32[B]: tokens of each row's prompt, of which policies of eviction ask
