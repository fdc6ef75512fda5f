"""Rows that keep some of their cached tokens: the host's tables, whose pages behind the budget are freed, and the program that
moves what stays to a row's first slots.

The host knows how many tokens stay, since the policy says so from numbers of tokens alone; which ones they are, the device
decides, for every layer and kv head apart. Only where heads compete for a budget does it have to ask how many each one keeps.
A token's slot is its position in the cache from then on.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from optx.cache import RECORDED, CachePlan, CacheSpec
from optx.engine.compacted import CompactedPrompts
from optx.engine.head_pages import HeadPools, HeadTables
from optx.engine.options import EngineOptions
from optx.engine.pages import Copy, PagePool, PageTable
from optx.engine.request import Request
from optx.errors import RequestError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compaction:
    """A row of a token group keeps `keep` of `length` cached tokens."""

    group: int
    table: np.ndarray  # int32[G, pages], the row's before
    length: int
    keep: np.ndarray  # int32[G]


class CompactedTable(PageTable):
    """The page table of a group whose policy throws tokens away. Its rows write to all of their pages, so none is shared."""

    def room(self, row, prompt):
        return self.policy.room(int(self.lengths[row]), int(self._next[row]), prompt)

    def most(self, prompt, tokens):
        return self.policy.most(prompt, tokens)

    def compact(self, row: int, prompt: int, group: int) -> Compaction:
        """Frees the pages of a row behind what it keeps."""
        keep = self.policy.kept(prompt)
        done = Compaction(
            group=group,
            table=self.tables[:, row].copy(),
            length=int(self.lengths[row]),
            keep=np.array([keep], np.int32),
        )
        self.shorten(row, keep)
        return done

    def fork(self, row, new):
        raise RequestError("rows of a cache with eviction are not forked: a compaction writes to all of their pages")


def table_for(spec: CacheSpec, pages: int, **room) -> PageTable | HeadTables:
    """The page table of a token group over a pool of so many pages."""
    if spec.evict is not None and spec.evict.apart:
        return HeadTables(spec, HeadPools(pages, spec.streams[0].shape[0]), **room)
    return (PageTable if spec.evict is None else CompactedTable)(spec, PagePool(pages), **room)


def fed_again(specs: Sequence[CacheSpec], context: int) -> int:
    """Tokens that rows of such token groups are fed again at a time, at most, and then step back over."""
    return max((spec.evict.behind(context) for spec in specs if spec.evict is not None), default=0)


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

    def __init__(self, tables: Sequence[PageTable | HeadTables], encode: Callable[[str], list[int]] | None = None):
        """encode: text to token ids, for what stands before a prompt that is fed again; None: nothing does."""
        self._tables = list(tables)
        self._evicting = [(group, table) for group, table in enumerate(tables) if table.policy is not None]
        for table in self._tables if any(table.policy.replays for _, table in self._evicting) else ():
            table.behind = max(each.policy.behind(sys.maxsize) for _, each in self._evicting)
        self.ask: Callable[[Sequence[Compaction]], np.ndarray] | None = (
            None  # `share_out`, after all that was dispatched
        )
        self._encode = encode or (lambda text: [])
        self._due: list[Compaction] = []
        self._copies: list[Copy] = []
        self.kept: CompactedPrompts | None = None  # prompts that other requests may go on from

    def __bool__(self):
        return bool(self._evicting)

    def check(self, prompt: Sequence[int], context: int | None) -> None:
        """Raises RequestError for the context of a prompt that no policy compacts apart from a question."""
        if context is None:
            return
        if not self._evicting or not all(table.policy.reusable for _, table in self._evicting):
            raise RequestError(
                "context: the cache compacts no prompt apart from a question; allowed: None, or a recipe that evicts by what "
                "rebuilds the prompt"
            )
        if not 2 <= context <= len(prompt):
            raise RequestError(
                f"context: got {context}; allowed: 2 to the prompt's {len(prompt)} tokens, or None for all"
            )

    def plan(self, running: Sequence[Request]) -> None:
        """Before a dispatch: rows that are full keep what their policy says; those whose last token is under way stay as they
        are."""
        for request in running if self._evicting else ():
            if request.replay and request.replayed == len(request.replay[0]):
                request.replay, request.replayed = request.replay[1:], 0
                for table in self._tables:
                    table.truncate(request.row, request.computed)
                    table.will_step_back(request.row, bool(request.replay))
            full = [
                (group, table)
                for group, table in self._evicting
                if request.computed and request.left > 0 and table.room(request.row, request.subject) == 0
            ]
            full = [(group, table) for group, table in full if not self._replays(request, table)]
            self._due += [
                table.compact(request.row, request.subject, group) for group, table in full if not table.policy.apart
            ]
            self._share_out(request, [(group, table) for group, table in full if table.policy.apart])
            if full and self.kept is not None:
                self._copies += self.kept.insert(request)

    def adopt(self, request: Request) -> None:
        """Before its first chunk: a row goes on from its prompt as another one has left it, compacted."""
        if self.kept is not None and not request.computed:
            policy = self._evicting[0][1].policy
            self._copies += self.kept.borrow(request, policy.end(request.subject))

    def _share_out(self, request: Request, full: Sequence[tuple[int, HeadTables]]) -> None:
        """Heads that compete: the device says how many tokens each one keeps."""
        due = [
            Compaction(
                group=group,
                table=table.tables[:, request.row].copy(),
                length=int(table.lengths_by_head[0, request.row]),
                keep=np.full(len(table.tables), table.policy.kept(request.subject), np.int32),
            )
            for group, table in full
        ]
        counts = self.ask(due) if due else ()
        for (_, table), one, count in zip(full, due, counts, strict=True):
            table.keep(request.row, count)
            self._due.append(dataclasses.replace(one, keep=np.asarray(count, np.int32)))

    def _replays(self, request: Request, table: PageTable | HeadTables) -> bool:
        """Whether the row is fed more of its prompt again."""
        if request.replay is None and table.policy.replays:
            before = self._encode(table.policy.instruction)
            request.replay = table.policy.replay(before, request.prompt[: request.computed])
            for each in self._tables:
                each.will_step_back(request.row, True)
        return bool(request.replay)

    def room(self, request: Request) -> int:
        """Tokens that its row takes before it is compacted, or before what it was fed again is dropped."""
        if request.replay:
            return len(request.replay[0]) - request.replayed
        rooms = (table.room(request.row, request.subject) for _, table in self._evicting)
        return min((room for room in rooms if room is not None), default=sys.maxsize)

    def rehearse(self, compact: Callable[[Compaction], None]) -> None:
        """Compactions of a row that holds nothing, for programs to be compiled."""
        blanks = [
            Compaction(group=group, table=table.tables[:, 0], length=0, keep=np.zeros(len(table.tables), np.int32))
            for group, table in self._evicting
        ]
        for blank in blanks:
            compact(blank)
        if apart := [one for one, (_, table) in zip(blanks, self._evicting, strict=True) if table.policy.apart]:
            self.ask(apart)

    def take(self) -> tuple[tuple[Compaction, ...], tuple[Copy, ...]]:
        """What the next dispatch begins with: compactions, and after them copies."""
        taken = tuple(self._due), tuple(self._copies)
        self._due, self._copies = [], []
        return taken

    def clear(self) -> None:
        """For when the caches are lost."""
        self.take()
        if self.kept is not None:
            self.kept.clear()


def compact(plan: CachePlan, treedef, group: int, caches, table, length, keep):
    """Flat caches in which a row of a group, in pages table int32[G, pages], has the `keep` int32[G] of its `length` tokens that
    the policy of each layer chooses in its first slots, ascending, with what was recorded of them."""
    caches = jax.tree.unflatten(treedef, caches)
    layers = list(caches.layers)
    for i, spec in enumerate(plan.specs):
        if plan.group(i) == group and spec.share is None:
            layers[i] = _compact_pool(spec.evict, layers[i], table, length, keep)
    return jax.tree.leaves(dataclasses.replace(caches, layers=tuple(layers)))


def share_out(plan: CachePlan, treedef, groups: tuple[int, ...], caches, tables, length, keep):
    """int32[len(groups), K]: of a row's `length` tokens, those that each head keeps in groups whose heads compete, one layer's
    each; a head `keep` on average. tables int32[len(groups), K, pages]."""
    caches = jax.tree.unflatten(treedef, caches)
    found = {}
    for table, group in zip(tables, groups, strict=True):
        layer = next(i for i, spec in enumerate(plan.specs) if plan.group(i) == group and spec.share is None)
        policy = plan.specs[layer].evict
        slots = jnp.arange(table.shape[1] * caches.positions[group].shape[1], dtype=jnp.int32)
        ranked = policy.ranked(_listed(caches.layers[layer][RECORDED], table), slots, length)
        found[group] = dataclasses.replace(policy, layer=None if policy.over == "model" else layer), ranked
    counts = {}
    for policy in dict.fromkeys(policy for policy, _ in found.values()):
        mine = [group for group, (its, _) in found.items() if its == policy]
        worth = jnp.stack([found[group][1] for group in mine])
        order = jnp.argsort(worth.reshape(-1), stable=True, descending=True)
        stays = jnp.argsort(order) < keep * worth.shape[0] * worth.shape[1]
        counts |= dict(zip(mine, jnp.sum(stays.reshape(worth.shape), axis=-1), strict=True))
    return jnp.stack([counts[group] for group in groups])


def _listed(leaf, table):
    """Of a pool's leaf [pages + 1, K, P, ...] what a row lists: [K, S, ...]; table int32[G, pages]."""
    heads, size = leaf.shape[1:3]
    table = jnp.broadcast_to(table, (heads, table.shape[1]))
    rows = leaf.at[table, jnp.arange(heads)[:, None]].get(mode="promise_in_bounds")
    return rows.reshape(heads, table.shape[1] * size, *leaf.shape[3:])


def _compact_pool(policy, pool, table, length, keep):
    """Of every leaf [pages + 1, K, P, ...] of a layer's pool."""
    pages, (last, heads, size) = table.shape[1], jax.tree.leaves(pool)[0].shape[:3]
    slots = jnp.arange(pages * size, dtype=jnp.int32)
    recorded = _listed(pool[RECORDED], table) if policy.channels else None
    chosen = jnp.broadcast_to(policy.keep(recorded, slots, length, keep[:, None]), (heads, pages * size))
    written = jnp.broadcast_to(jnp.where(jnp.arange(pages) * size < keep[:, None], table, last), (heads, pages))

    def moved(leaf):
        kept = jnp.take_along_axis(_listed(leaf, table), chosen[(..., *[None] * (leaf.ndim - 3))], axis=1)
        kept = kept.reshape(heads, pages, size, *leaf.shape[3:])
        return leaf.at[written, jnp.arange(heads)[:, None]].set(kept, mode="drop")

    return jax.tree.map(moved, pool)
