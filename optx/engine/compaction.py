"""Rows that keep some of their cached tokens: the host's tables, whose pages behind the budget are freed, and the program that
moves what stays to a row's first slots.

The host knows how many tokens stay, since the policy says so from numbers of tokens alone; which ones they are, the device
decides, for every layer and kv head apart. A token's slot is its position in the cache from then on.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from optx.cache import RECORDED, CachePlan
from optx.engine.options import EngineOptions
from optx.engine.pages import PageTable
from optx.engine.request import Request
from optx.errors import RequestError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compaction:
    """A row of a token group keeps `keep` of `length` cached tokens."""

    group: int
    table: np.ndarray  # int32[pages], the row's before
    length: int
    keep: int


class CompactedTable(PageTable):
    """The page table of a group whose policy throws tokens away. Its rows write to all of their pages, so none is shared."""

    def room(self, row, prompt):
        return self.policy.room(int(self.lengths[row]), int(self._next[row]), prompt)

    def most(self, prompt, tokens):
        return self.policy.most(prompt, tokens)

    def compact(self, row: int, prompt: int, group: int) -> Compaction:
        """Frees the pages of a row behind what it keeps."""
        length, keep, held = int(self.lengths[row]), self.policy.kept(prompt), self.pages_of(row)
        done = Compaction(group=group, table=self.table[row].copy(), length=length, keep=keep)
        for index in range(-(-keep // self.page_size), held):
            self.pool.release(int(self.table[row, index]))
        self.lengths[row] = keep
        return done

    def fork(self, row, new):
        raise RequestError("rows of a cache with eviction are not forked: a compaction writes to all of their pages")


def table_for(spec, pool, **room) -> PageTable:
    """The page table of a token group."""
    return (PageTable if spec.evict is None else CompactedTable)(spec, pool, **room)


def check_eviction(plan: CachePlan, options: EngineOptions) -> None:
    """Raises RequestError for options with which a plan's policies of eviction do not run."""
    policies = [spec.evict for spec in plan.groups if spec.evict is not None]
    if policies and options.speculate is not None:
        raise RequestError(
            f"engine.speculate: the cache throws tokens away ({policies[0]}), and what drafts that are refused attended to, or "
            "pushed out, could not be taken back; leave speculate out, or take a recipe without eviction"
        )
    if any(policy.once for policy in policies) and options.chunks[0] == 1:
        raise RequestError(
            f"engine.chunks: {list(options.chunks)}, and a chunk of one token passes for a decode, of which {policies[0]} "
            "records nothing; allowed: chunks of at least 2 tokens"
        )


class Compactor:
    """When rows are compacted, and what they are fed before it.

    Where a policy asks for it, the row's prompt is fed again behind itself, a part at a time: its keys and values are dropped
    after each, and what is left is what attention to the prompt was recorded.
    """

    def __init__(self, tables: Sequence[PageTable], encode: Callable[[str], list[int]] | None = None):
        """encode: text to token ids, for what stands before a prompt that is fed again; None: nothing does."""
        self._tables = list(tables)
        self._evicting = [(group, table) for group, table in enumerate(tables) if table.policy is not None]
        self._encode = encode or (lambda text: [])
        self._due: list[Compaction] = []

    def __bool__(self):
        return bool(self._evicting)

    def plan(self, running: Sequence[Request]) -> None:
        """Before a dispatch: rows that are full keep what their policy says; those whose last token is under way stay as they
        are."""
        for request in running if self._evicting else ():
            if request.replay and request.replayed == len(request.replay[0]):
                request.replay, request.replayed = request.replay[1:], 0
                for table in self._tables:
                    table.truncate(request.row, request.computed)
            for group, table in self._evicting if request.computed and request.left > 0 else ():
                if table.room(request.row, len(request.prompt)) == 0 and not self._replays(request, table):
                    self._due.append(table.compact(request.row, len(request.prompt), group))

    def _replays(self, request: Request, table: PageTable) -> bool:
        """Whether the row is fed more of its prompt again."""
        if request.replay is None and table.policy.replays:
            before = self._encode(table.policy.instruction)
            request.replay = table.policy.replay(before, request.prompt[: request.computed])
        return bool(request.replay)

    def room(self, request: Request) -> int:
        """Tokens that its row takes before it is compacted, or before what it was fed again is dropped."""
        if request.replay:
            return len(request.replay[0]) - request.replayed
        rooms = (table.room(request.row, len(request.prompt)) for _, table in self._evicting)
        return min((room for room in rooms if room is not None), default=sys.maxsize)

    def take(self) -> tuple[Compaction, ...]:
        """What the next dispatch begins with."""
        due, self._due = tuple(self._due), []
        return due


def compact(plan: CachePlan, treedef, group: int, caches, table, length, keep):
    """Flat caches in which a row of a group, in pages table int32[pages], has the `keep` of its `length` tokens that the policy
    of each layer chooses in its first slots, ascending, with what was recorded of them."""
    caches = jax.tree.unflatten(treedef, caches)
    layers = list(caches.layers)
    for i, spec in enumerate(plan.specs):
        if plan.group(i) == group and spec.share is None:
            layers[i] = _compact_pool(spec.evict, layers[i], table, length, keep)
    return jax.tree.leaves(dataclasses.replace(caches, layers=tuple(layers)))


def _compact_pool(policy, pool, table, length, keep):
    """Of every leaf [pages + 1, K, P, ...] of a layer's pool."""
    pages, (last, heads, size) = table.shape[0], jax.tree.leaves(pool)[0].shape[:3]
    slots = jnp.arange(pages * size, dtype=jnp.int32)

    def listed(leaf):
        rows = leaf.at[table].get(mode="promise_in_bounds")
        return jnp.moveaxis(rows, 1, 0).reshape(heads, pages * size, *leaf.shape[3:])

    recorded = listed(pool[RECORDED]) if policy.channels else None
    chosen = jnp.broadcast_to(policy.keep(recorded, slots, length, keep), (heads, pages * size))
    written = jnp.where(jnp.arange(pages) * size < keep, table, last)

    def moved(leaf):
        kept = jnp.take_along_axis(listed(leaf), chosen[(..., *[None] * (leaf.ndim - 3))], axis=1)
        kept = jnp.moveaxis(kept.reshape(heads, pages, size, *leaf.shape[3:]), 0, 1)
        return leaf.at[written].set(kept, mode="drop")

    return jax.tree.map(moved, pool)
