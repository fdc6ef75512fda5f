"""SnapKV: the tokens of a prompt to which its end attends."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optx.errors import FormatError
from optx.eviction.policy import Once


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Once):
    """Keeps, of a prompt, its last `window` tokens and those before them to which these attend. Li et al. 2024,
    arXiv:2404.14469, listing 1.

    worth(s) = mean over s - pool // 2 .. s + pool // 2 of the attention of the window's queries and of the query heads of a kv
    head; what lies outside the tokens before the window counts as 0.
    """

    sinks: int = 0
    recent: int = 64  # the window: newest tokens of the prompt, which score the others and stay
    pool: int = 5  # neighbours over which attention is averaged, itself among them; odd

    name: ClassVar[str] = "snapkv"
    channels: ClassVar[int] = 1

    def __post_init__(self):
        super().__post_init__()
        if self.recent < 1:
            raise FormatError(f"{self.name}: recent {self.recent}; allowed: at least 1, the queries that score")
        if self.pool < 1 or self.pool % 2 == 0:
            raise FormatError(f"{self.name}: pool {self.pool}; allowed: odd numbers")

    def weigh(self, asked, prompts):
        end = prompts[:, None]
        return ((asked >= end - self.recent) & (asked < end)).astype(jnp.float32)

    def worth(self, recorded, slots, length):
        return averaged(jnp.where(slots < length - self.newest, recorded[..., 0], 0), self.pool)


def averaged(x: jax.Array, size: int) -> jax.Array:
    """Mean over `size` neighbours along the last axis, zeros beyond its ends."""
    padded = jnp.pad(x, ((0, 0), (size // 2, size // 2)))
    return sum(padded[:, i : i + x.shape[-1]] for i in range(size)) / size
