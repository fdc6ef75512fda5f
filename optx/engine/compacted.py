"""Compacted prompts that stay cached: what a policy kept of a prompt, whatever is asked about it, for requests that begin with
the same tokens. They borrow its pages in place of a prefill and of what the policy feeds again.

Whole pages are shared; a partial last one is copied for the store, and for each row that borrows: rows write behind it. Given
back when room is needed, the longest unused first (Kim et al. 2025, arXiv:2505.23416, section 1: one compression, many queries).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from optx.engine.head_pages import HeadTables
from optx.engine.pages import Copy, PageTable
from optx.engine.request import Request


@dataclasses.dataclass(eq=False)
class Entry:
    """lent: by group, what the table has lent; tokens: that it stands for."""

    lent: list[Any]
    tokens: int


class CompactedPrompts:
    """The prompts of one engine, over the page tables of its token groups."""

    def __init__(self, tables: Sequence[PageTable | HeadTables]):
        self.tables = list(tables)
        self.entries: dict[bytes, Entry] = {}  # the longest unused first
        self.hits = 0  # prompt tokens that were found
        self.asked = 0  # prompt tokens of all admitted requests

    def borrow(self, request: Request, tokens: int) -> list[Copy]:
        """Gives a row that holds nothing what is kept of its first `tokens` tokens, if they are known; -> what to copy first.
        A prompt is found whole or not at all: what was kept of a longer one was chosen by that one's tokens."""
        if not request.preemptions:  # computing again is no hit
            self.asked += request.tokens
        key = _key(request.prompt[:tokens])
        if key not in self.entries:
            return []
        self.entries[key] = entry = self.entries.pop(key)  # the newest
        if not self._has_room() or key not in self.entries:
            return []
        request.computed = entry.tokens
        self.hits += 0 if request.preemptions else entry.tokens
        moves = [table.borrow(request.row, lent) for table, lent in zip(self.tables, entry.lent, strict=True)]
        return [Copy(source=request.row, target=request.row, slots=tuple(moves))]

    def insert(self, request: Request) -> list[Copy]:
        """Keeps what a row holds, which has just been compacted, where there is a page for a copy of its last one."""
        key = _key(request.prompt[: request.computed])
        if key in self.entries or not self._has_room():
            return []
        lent, moves = zip(*(table.lend(request.row) for table in self.tables), strict=True)
        self.entries[key] = Entry(list(lent), request.computed)
        return [Copy(source=request.row, target=request.row, slots=moves)]

    def make_room(self, group: int, pages: int) -> None:
        """Gives entries back until the group's pool has `pages` free, or none is left."""
        while self.entries and self.tables[group].pool.available < pages:
            self._drop(next(iter(self.entries)))

    def clear(self) -> None:
        for key in list(self.entries):
            self._drop(key)

    def forget(self, tokens: Sequence[int], keep: Sequence[int] = ()) -> int:
        """Gives back what is kept of a prompt that nobody will send again, unless `keep` begins with it. -> pages, of all groups,
        those that rows use among them."""
        whole, other = _key(tokens), _key(keep)
        gone = [key for key in self.entries if whole.startswith(key) and not other.startswith(key)]
        return sum(self._drop(key) for key in gone)

    def _has_room(self) -> bool:
        """Whether there is a page for the copy of each last one, of every group; older entries are given back for it."""
        for group in range(len(self.tables)):
            self.make_room(group, 1)
        return all(table.pool.available > 0 for table in self.tables)

    def _drop(self, key: bytes) -> int:
        lent = self.entries.pop(key).lent
        return sum(table.give_back(one) for table, one in zip(self.tables, lent, strict=True))


def _key(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()
