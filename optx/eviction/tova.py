"""TOVA: the tokens to which the newest one attends."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from optx.eviction.policy import Rolling


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(Rolling):
    """Keeps the tokens to which the newest query attends most, on average over all heads of the layer, which keep the same
    tokens. Oren et al. 2024, arXiv:2401.06104, section 3.2.

    The paper drops a token a step; here `slack` + 1 go at once, by the attention of the query that filled the row.
    """

    sinks: int = 0

    name: ClassVar[str] = "tova"
    channels: ClassVar[int] = 1

    def weigh(self, asked, prompts):
        return ((asked >= 0) & (asked == jnp.max(asked, axis=1, keepdims=True))).astype(jnp.float32)

    def record(self, old, mass, queries):
        return mass[..., None]

    def worth(self, recorded, slots, length):
        return jnp.mean(recorded[..., 0], axis=0, keepdims=True)
