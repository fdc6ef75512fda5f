"""What an eviction policy says: its budget, when a row is compacted, what is recorded of attention, which slots are kept.

A row's cached tokens lie in slots 0, 1, ... in the order of their positions. Compaction keeps some, for every kv head apart
where the policy tells heads apart, and moves them to the first slots: what a token's slot is changes, its key does not. All
heads keep equally many, so that one page table serves them all and the pages behind the budget are free; or, where heads
compete for a common budget (`Once.over`), each has a page table of its own (engine/head_pages.py).

The host plans from `room`, `kept` and `most` alone, which know numbers of tokens and nothing of the device, but for heads that
compete, whose numbers it asks for when a prompt ends; the device runs `weigh`, `record` and `keep`. A row is compacted at fixed
numbers of tokens, whatever the chunks were: an answer that is computed again after a preemption is the same.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from optx.errors import FormatError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """The base: a policy gives `worth`, and what it records of attention."""

    budget: int | None  # slots that a row keeps; None: another field says how many
    sinks: int = 4  # first slots, always kept
    recent: int = 1  # newest slots, always kept

    name: ClassVar[str]
    channels: ClassVar[int] = 0  # float32 numbers recorded by kv head and slot; 0: attention records nothing
    reduce: ClassVar[Literal["sum", "max"]] = (
        "sum"  # of the attention that a slot gets, over queries and heads of a group
    )
    once: ClassVar[bool] = False  # at the end of a prompt; else whenever a row is full
    by_query: ClassVar[bool] = True  # what is kept depends on the tokens that come last
    reindexed: ClassVar[bool] = False  # RoPE counts slots: keys are stored before it
    replays: ClassVar[bool] = (
        False  # the prompt is fed again behind itself, as `replay` says, before the row is compacted
    )

    def __post_init__(self):
        for field in ("sinks", "recent"):
            if (getattr(self, field) or 0) < 0:
                raise FormatError(f"{self.name}: {field} {getattr(self, field)}; allowed: at least 0")
        if self.budget is not None and self.budget <= self.safe:
            raise FormatError(
                f"{self.name}: a budget of {self.budget} tokens; allowed: above {self.safe}, the {self.sinks} sinks and "
                f"{self.newest} recent tokens that are always kept; raise budget, or lower sinks or recent"
            )

    @property
    def apart(self) -> bool:
        """Whether heads keep different numbers of tokens."""
        return False

    @property
    def reusable(self) -> bool:
        """Whether what is kept of a prompt serves every request that begins with it."""
        return self.once and not self.by_query

    @property
    def newest(self) -> int:
        """Newest slots that are always kept."""
        return self.recent

    @property
    def safe(self) -> int:
        return self.sinks + self.newest

    @property
    def plain(self) -> bool:
        """Whether all queries count alike, and what is recorded is their sum."""
        return type(self).weigh is Policy.weigh and self.reduce == "sum"

    # The host's.

    def kept(self, prompt: int) -> int:
        """Slots that a row with a prompt of so many tokens keeps."""
        raise NotImplementedError

    def room(self, slots: int, tokens: int, prompt: int) -> int | None:
        """Tokens that a row in `slots` slots, which has seen `tokens`, takes before it is compacted: 0, now; None: any number."""
        raise NotImplementedError

    def most(self, prompt: int, tokens: int) -> int:
        """Slots that a row holds at most until it has seen `tokens` tokens."""
        raise NotImplementedError

    def behind(self, context: int) -> int:
        """Tokens that a row is fed again at a time, at most, behind a prompt of up to `context`."""
        return 0

    def held(self, context: int) -> int:
        """Slots that a row holds at most after `context` tokens, all of them its prompt where the budget is a share of it."""
        raise NotImplementedError

    # The device's.

    def weigh(self, asked: jax.Array, prompts: jax.Array) -> jax.Array:
        """How much the attention of each query counts: asked int32[B, Q], slots of the queries, -1 for none; prompts int32[B],
        tokens of each row's prompt -> float32[B, Q]."""
        return jnp.ones(asked.shape, jnp.float32)

    def record(self, old: jax.Array, mass: jax.Array, queries: jax.Array) -> jax.Array:
        """What is known of slots: old float32[..., C], 0 for new slots; mass float32[...], weighed attention of this step's
        queries; queries int32[...], how many of them could see the slot -> float32[..., C]."""
        return old + mass[..., None]

    def worth(self, recorded: jax.Array, slots: jax.Array, length: jax.Array) -> jax.Array:
        """recorded float32[K, S, C] or None, slots int32[S], of which `length` are held -> float32[K or 1, S]: the more, the
        longer kept. 1: for all heads alike."""
        raise NotImplementedError

    def ranked(self, recorded: jax.Array | None, slots: jax.Array, length: jax.Array) -> jax.Array:
        """`worth`, infinite for sinks and newest, which always stay, and -inf for slots that hold nothing."""
        held = slots < length
        safe = held & ((slots < self.sinks) | (slots >= length - self.newest))
        return jnp.where(safe, jnp.inf, jnp.where(held, self.worth(recorded, slots, length), -jnp.inf))

    def keep(self, recorded: jax.Array | None, slots: jax.Array, length: jax.Array, budget: jax.Array) -> jax.Array:
        """-> int32[K or 1, S]: the `budget` slots that stay (a number, or int32[K, 1]), ascending, and behind them the others:
        those of the greatest worth; of equal ones the earlier."""
        order = jnp.argsort(self.ranked(recorded, slots, length), axis=-1, stable=True, descending=True)
        stays = jnp.argsort(order, axis=-1) < budget  # its rank
        return jnp.argsort(~stays, axis=-1, stable=True).astype(jnp.int32)

    def __str__(self):
        return f"{self.name} {self.budget}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rolling(Policy):
    """Policies that compact whenever a row is full: its memory does not grow, however long the text is."""

    budget: int  # slots that a row keeps
    slack: int = 64  # tokens that it grows past the budget before it is compacted: one compaction for so many tokens

    def __post_init__(self):
        super().__post_init__()
        if self.slack < 1:
            raise FormatError(f"{self.name}: slack {self.slack}; allowed: at least 1")

    def kept(self, prompt):
        return self.budget

    def room(self, slots, tokens, prompt):
        return self.budget + self.slack - slots

    def most(self, prompt, tokens):
        return self.held(tokens)

    def held(self, context):
        return min(context, self.budget + self.slack)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Once(Policy):
    """Policies that compact a prompt at its end; the answer is kept whole. One of budget and ratio is given.

    What heads of a layer or of the whole model keep of a common budget differs by a factor of ten and more, and quality at a
    budget is better for it: Feng et al. 2024 (Ada-KV), arXiv:2407.11550.
    """

    budget: int | None = None  # slots that a prompt keeps; None: `ratio` of it
    ratio: float | None = None  # share of the prompt that is kept, never less than sinks and recent tokens
    # Whose common budget that is, a kv head on average: head, each keeps as many; layer, model: heads of one compete by worth.
    over: Literal["head", "layer", "model"] = "head"
    layer: int | None = None  # whose cache it is, where heads compete: such layers have page tables of their own

    once: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if (self.budget is None) == (self.ratio is None):
            raise FormatError(
                f"{self.name}: budget {self.budget} and ratio {self.ratio}; allowed: one of them, the other null"
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise FormatError(f"{self.name}: ratio {self.ratio}; allowed: above 0, at most 1")
        if self.over not in (allowed := ("head", "layer", "model")):
            raise FormatError(f"{self.name}: over {self.over!r}; allowed: {', '.join(allowed)}")

    @property
    def apart(self):
        return self.over != "head"

    def kept(self, prompt):
        wanted = self.budget if self.ratio is None else max(math.ceil(self.ratio * prompt), self.safe + 1)
        return min(prompt, wanted)

    def end(self, prompt: int) -> int:
        """Tokens of a prompt that are computed before it is compacted."""
        return prompt

    def room(self, slots, tokens, prompt):
        end = self.end(prompt)
        if tokens < end:
            return end - tokens
        return 0 if tokens == end and slots > self.kept(prompt) else None

    def most(self, prompt, tokens):
        return max(min(prompt, tokens), self.kept(prompt) + max(0, tokens - self.end(prompt)))

    def held(self, context):
        return self.kept(context)

    def __str__(self):
        what = self.budget if self.ratio is None else f"{self.ratio:g} of the prompt"
        return f"{self.name} {what}{f', heads of a {self.over} compete' if self.apart else ''}"
