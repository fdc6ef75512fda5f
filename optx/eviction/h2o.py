"""H2O: heavy hitters and the newest tokens."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from optx.eviction.policy import Rolling


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Rolling):
    """Keeps the tokens on which most attention has fallen, and the newest half of the budget. Zhang et al. 2023,
    arXiv:2306.14048, algorithm 1.

    worth(s) = sum over queries and the query heads of a kv head of attention to s, divided by how many queries could see s:
    the plain sum favours tokens for being old.
    """

    sinks: int = 0
    recent: int | None = None  # None: half of the budget

    name: ClassVar[str] = "h2o"
    channels: ClassVar[int] = 2  # attention, queries

    @property
    def newest(self):
        return self.budget // 2 if self.recent is None else self.recent

    def record(self, old, mass, queries):
        return old + jnp.stack([mass, jnp.broadcast_to(queries, mass.shape).astype(mass.dtype)], axis=-1)

    def worth(self, recorded, slots, length):
        return recorded[..., 0] / jnp.maximum(recorded[..., 1], 1)
