"""KVzip: the tokens that the model needs to say its context again."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from optx.eviction.policy import Once


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(Once):
    """Keeps, of a prompt, the tokens to which the model attends while it is fed the prompt again. Kim et al. 2025,
    arXiv:2505.23416, section 3.

    worth(s) = max over the queries of the repetition and the query heads of a kv head of their attention to s. It asks nothing of
    what comes after, so one compaction serves any question about the prompt. Differs from the paper: the softmax is over the
    whole prompt, as attention computes it anyway, not over a chunk of it; and heads keep equally many tokens.
    """

    recent: int = 16  # newest tokens of the prompt: where the answer begins

    name: ClassVar[str] = "kvzip"
    channels: ClassVar[int] = 1
    reduce: ClassVar = "max"
    by_query: ClassVar[bool] = False
    replays: ClassVar[bool] = True

    def weigh(self, asked, prompts):
        return (asked >= prompts[:, None]).astype(jnp.float32)

    def record(self, old, mass, queries):
        return jnp.maximum(old, mass[..., None])

    def worth(self, recorded, slots, length):
        return recorded[..., 0]
