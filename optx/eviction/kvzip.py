"""KVzip: the tokens that the model needs to say its context again."""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp

from optx.errors import FormatError
from optx.eviction.policy import Once

NEXT = 0.99  # what neighbours are worth of a token's own: where room ends among them, it stays


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(Once):
    """Keeps, of a prompt, the tokens to which the model attends while it is fed the prompt again. Kim et al. 2025,
    arXiv:2505.23416, section 3.

    worth(s) = max over the queries of the repetition and the query heads of a kv head of their attention to s. Nothing that comes
    after the prompt is asked, so that what is kept serves any question about it. Differs from the paper: the softmax is over the
    whole prompt, as attention computes it anyway, not over a chunk of it. `over: model` is the paper's budget. `pool` is not in
    the paper: what stands before a number, and its first digit, matter more where it is answered than where it is said again.
    """

    recent: int = 16  # newest tokens of the prompt: where the answer begins
    part: int = 2048  # tokens of the prompt that are fed again at a time, each time behind the whole prompt
    pool: int = 1  # tokens around one that is attended to, itself among them, that are worth next to as much; odd
    instruction: str = "\n\nRepeat the previous context: "  # stands before each part, where the engine has a tokenizer

    name: ClassVar[str] = "kvzip"
    channels: ClassVar[int] = 1
    reduce: ClassVar = "max"
    by_query: ClassVar[bool] = False
    replays: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.part < 1:
            raise FormatError(f"{self.name}: part {self.part}; allowed: at least 1")
        if self.pool < 1 or self.pool % 2 == 0:
            raise FormatError(f"{self.name}: pool {self.pool}; allowed: odd numbers")

    def end(self, prompt):
        """All but the last token, which the answer begins from."""
        return prompt - 1

    def kept(self, prompt):
        return min(super().kept(prompt), self.end(prompt))

    def replay(self, before: list[int], prompt: list[int]) -> list[list[int]]:
        """What is fed behind a prompt, dropped after each: the instruction `before` with a part of the prompt."""
        return [[*before, *prompt[i : i + self.part]] for i in range(0, len(prompt), self.part)]

    def behind(self, context):
        return min(self.part, context) + len(self.instruction)

    def most(self, prompt, tokens):
        end = self.end(prompt)
        fed = self.behind(end) if tokens >= end > self.kept(prompt) else 0
        return max(super().most(prompt, tokens), end + fed)

    def weigh(self, asked, prompts):
        return (asked >= self.end(prompts)[:, None]).astype(jnp.float32)

    def record(self, old, mass, queries):
        return jnp.maximum(old, mass[..., None])

    def worth(self, recorded, slots, length):
        found, around = jnp.where(slots < length, recorded[..., 0], 0), self.pool // 2
        padded = jnp.pad(found, ((0, 0), (around, around)))
        most = functools.reduce(jnp.maximum, (padded[:, i : i + found.shape[-1]] for i in range(self.pool)))
        return jnp.maximum(found, NEXT * most)
