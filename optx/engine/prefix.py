"""Prefixes that stay cached: a radix tree over whole pages of tokens, shared by rows, given back when room is needed.

An edge is one page of tokens; its node holds, for each token group, the page with their keys and values. A page in the tree is
never written again: rows share whole pages only, and write into pages of their own (SGLang's RadixAttention,
arXiv:2312.07104, at page granularity). Nodes that no row uses and nothing hangs on are evicted, the longest unused first.
"""

import dataclasses
import heapq
from collections.abc import Sequence

import numpy as np

from optx.cache import CachePlan
from optx.engine.pages import PageTable

BATCH = 64  # a walk through the tree frees at least one in so many pages of the pool


@dataclasses.dataclass(eq=False)
class Node:
    """One page of tokens after its parent's. pages: by group; None where the group's window had passed it."""

    parent: "Node | None"
    key: bytes
    pages: list[int | None]
    children: dict[bytes, "Node"] = dataclasses.field(default_factory=dict)
    used: int = 0  # clock of the last match or insertion


def refusal(plan: CachePlan) -> str | None:
    """Why prefixes of such a model are not shared, or None. What a policy keeps of a prompt without looking at the question is
    (compacted.py)."""
    if any(spec is not None and not spec.holds_tokens for spec in plan.specs):
        return "layers with a state keep it for their last token alone, so a prefix has none to go on from"
    if any(spec.evict is not None and not spec.evict.reusable for spec in plan.groups):
        return "layers throw cached tokens away, and what is left of a prefix depends on what came after it"
    if not plan.keys:
        return "no layer keeps tokens"
    return None


class PrefixCache:
    """The tree of one engine, over the page pools of its token groups."""

    def __init__(self, tables: Sequence[PageTable]):
        self.tables = list(tables)
        self.page_size = self.tables[0].page_size
        self.root = Node(None, b"", [])
        self.hits = 0  # prompt tokens that were found
        self.asked = 0  # prompt tokens of all admitted requests
        self._clock = 0

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """Names of the whole pages of a sequence: their tokens. What `match` and `insert` take."""
        whole = len(tokens) // self.page_size * self.page_size
        packed, size = np.asarray(tokens[:whole], np.int32).tobytes(), 4 * self.page_size
        return [packed[at : at + size] for at in range(0, len(packed), size)]

    def match(self, keys: Sequence[bytes], tokens: int) -> list[Node]:
        """Nodes of the longest usable prefix of a sequence of so many tokens that leaves at least one to compute."""
        node, path = self.root, []
        for key in keys[: (tokens - 1) // self.page_size]:
            node = node.children.get(key)
            if node is None:
                break
            path.append(node)
        while path and not self._usable(path):
            path.pop()
        return path

    def _usable(self, path: list[Node]) -> bool:
        """Whether every page that the next token sees is there."""
        return all(
            path[i].pages[g] is not None for g, table in enumerate(self.tables) for i in table.seen_pages(len(path))
        )

    def adopt(self, row: int, path: list[Node]) -> int:
        """Gives an empty row the tokens of a path; -> how many."""
        for g, table in enumerate(self.tables):
            table.adopt(row, {i: path[i].pages[g] for i in table.seen_pages(len(path))}, len(path))
        self._touch(path)
        return len(path) * self.page_size

    def insert(self, row: int, keys: Sequence[bytes]) -> None:
        """Keeps the whole pages of a row that begins with the tokens of `keys`; the row goes on using them."""
        listed = [table.listed(row) for table in self.tables]
        node, path = self.root, []
        for i, key in enumerate(keys):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(node, key, [None] * len(self.tables))
            for g, pages in enumerate(listed):
                if child.pages[g] is None and i in pages:
                    child.pages[g] = pages[i]
                    self.tables[g].pool.keep(pages[i])
            path.append(child)
            node = child
        self._touch(path)

    def _touch(self, path: list[Node]) -> None:
        self._clock += 1
        for node in path:
            node.used = self._clock

    def make_room(self, group: int, pages: int) -> None:
        """Evicts until the group's pool has `pages` free, or no page is left that the tree alone holds."""
        pool = self.tables[group].pool
        if pool.available >= pages:
            return
        pages = max(pages, pool.pages // BATCH)
        leaves = [(node.used, id(node), node) for node in self._nodes() if not node.children and self._idle(node)]
        heapq.heapify(leaves)
        while leaves and pool.available < pages:
            node = heapq.heappop(leaves)[2]
            parent = node.parent
            self._drop(node)
            if parent is not self.root and not parent.children and self._idle(parent):
                heapq.heappush(leaves, (parent.used, id(parent), parent))
        # Pages that a window has passed, of nodes that rows use for their other groups.
        for node in sorted(self._nodes(), key=lambda node: node.used) if pool.available < pages else ():
            if node.pages[group] is not None and pool.references[node.pages[group]] == 1:
                pool.drop(node.pages[group])
                node.pages[group] = None

    def clear(self) -> None:
        """Gives every page back that no row uses."""
        for group in range(len(self.tables)):
            self.make_room(group, self.tables[group].pool.pages)

    def forget(self, tokens: Sequence[int], keep: Sequence[int] = ()) -> int:
        """Gives back the pages of a sequence after those that it shares with `keep`, and of all that goes on from them, but for
        what rows use. -> how many, of all groups."""
        keys, keep = self.keys(tokens), self.keys(keep)
        shared = next(
            (i for i, (mine, other) in enumerate(zip(keys, keep)) if mine != other), min(len(keys), len(keep))
        )
        node = self.root
        for key in keys[: shared + 1]:
            node = node.children.get(key)
            if node is None:
                return 0
        if len(keys) <= shared:
            return 0
        below, count = [node], 0
        for node in below:
            below.extend(node.children.values())
        for node in reversed(below):
            if not node.children and self._idle(node):
                count += sum(page is not None for page in node.pages)
                self._drop(node)
        return count

    def cached(self, group: int) -> int:
        """Pages of the group that the tree alone holds."""
        return self.tables[group].pool.cached

    def _idle(self, node: Node) -> bool:
        """Whether no row uses its pages."""
        held = zip(self.tables, node.pages, strict=True)
        return all(page is None or table.pool.references[page] == 1 for table, page in held)

    def _drop(self, node: Node) -> None:
        del node.parent.children[node.key]
        for table, page in zip(self.tables, node.pages, strict=True):
            if page is not None:
                table.pool.drop(page)

    def _nodes(self):
        todo = list(self.root.children.values())
        while todo:
            node = todo.pop()
            yield node
            todo.extend(node.children.values())
