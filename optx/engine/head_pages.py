"""Page tables of groups whose kv heads keep different numbers of tokens: one a head, over page numbers of its own.

A page of head h is a page of the pool's arrays at head h alone, so that what one head gives back another row's head h takes.
Until a row is compacted its heads hold the same tokens; what they hold afterwards may be kept for other rows.
"""

from collections.abc import Callable, Sequence

import numpy as np

from optx.cache import CacheSpec
from optx.engine.pages import Lent, OutOfPages, PagePool, PageTable


class HeadPools:
    """The pools of the heads."""

    def __init__(self, pages: int, heads: int):
        self.pages = pages
        self.heads = [PagePool(pages) for _ in range(heads)]

    @property
    def available(self) -> int:
        """Free pages of the head that has fewest."""
        return min(pool.available for pool in self.heads)

    @property
    def cached(self) -> int:
        """What the head that then has fewest can have besides, when all that is kept for others is given back."""
        return min(pool.available + pool.cached for pool in self.heads) - self.available

    @property
    def used(self) -> int:
        """Pages that rows hold, a head on average."""
        return -(-sum(pool.used for pool in self.heads) // len(self.heads))


class HeadTables:
    """`PageTable` for all heads of a group at once: `tables` int32[K, rows, width], `lengths_by_head` int32[K, rows]."""

    window, sinks = None, 0

    def __init__(self, spec: CacheSpec, pools: HeadPools, *, rows: int, width: int, page_size: int):
        self.pool, self.page_size, self.width, self.policy = pools, page_size, width, spec.evict
        self.make_room: Callable[[int], None] | None = None  # as `PageTable.make_room`
        self._heads = [PageTable(spec, pool, rows=rows, width=width, page_size=page_size) for pool in pools.heads]
        self.tables = np.zeros((len(self._heads), rows, width), np.int32)
        self.lengths_by_head = np.zeros(self.tables.shape[:2], np.int32)
        for head, table, lengths in zip(self._heads, self.tables, self.lengths_by_head, strict=True):
            head.table, head.lengths = table, lengths
        self._seen = np.zeros(rows, np.int64)  # tokens
        self._compacted = np.zeros(rows, bool)

    def room(self, row: int, prompt: int) -> int | None:
        """As `PageTable.room`; a row is compacted once."""
        if self._compacted[row]:
            return None
        return self.policy.room(int(self.lengths_by_head[0, row]), int(self._seen[row]), prompt)

    def most(self, prompt: int, tokens: int) -> int:
        """A head may keep all of a prompt."""
        return max(tokens, self.policy.most(prompt, tokens))

    def pages_of(self, row: int) -> int:
        """A head on average."""
        return -(-sum(head.pages_of(row) for head in self._heads) // len(self._heads))

    def needed(self, rows: np.ndarray, counts: np.ndarray) -> int:
        """More than `pool.available + pool.cached` where a head has too few pages, even with those that are kept for others."""
        least = self.pool.available + self.pool.cached
        return max(head.needed(rows, counts) - head.pool.available - head.pool.cached for head in self._heads) + least

    def append(self, row: int, count: int) -> np.ndarray:
        return self.append_rows(np.array([row]), np.array([count]))

    def append_rows(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """As `PageTable.append_rows`, by head: int32[K, sum(counts)]."""
        needed = [head.needed(rows, counts) for head in self._heads]
        if self.make_room is not None and self._lacking(needed) > 0:
            self.make_room(max(needed))
        if (lacking := self._lacking(needed)) > 0:
            raise OutOfPages(
                f"{len(rows)} rows need more cache pages of {self.page_size} tokens than a head has free: {lacking} are lacking"
            )
        self._seen[rows] += counts
        return np.stack([head.append_rows(rows, counts) for head in self._heads])

    def _lacking(self, needed: Sequence[int]) -> int:
        """Pages, of the head that lacks most."""
        return max(count - head.pool.available for count, head in zip(needed, self._heads, strict=True))

    def lend(self, row: int) -> tuple[list[Lent], tuple[np.ndarray, np.ndarray]]:
        """As `PageTable.lend`, by head; slots int32[K, P], those of padding where a head has fewer to copy."""
        lent, moves = zip(*(head.lend(row) for head in self._heads), strict=True)
        return list(lent), self._padded(moves)

    def borrow(self, row: int, lent: Sequence[Lent]) -> tuple[np.ndarray, np.ndarray]:
        moves = [head.borrow(row, one) for head, one in zip(self._heads, lent, strict=True)]
        self._seen[row], self._compacted[row] = lent[0].next, True
        return self._padded(moves)

    def give_back(self, lent: Sequence[Lent]) -> int:
        """-> pages, a head on average."""
        pages = [head.give_back(one) for head, one in zip(self._heads, lent, strict=True)]
        return -(-sum(pages) // len(pages))

    @property
    def no_moves(self) -> tuple[np.ndarray, np.ndarray]:
        """As `PageTable.no_moves`."""
        return self._padded([])

    def _padded(self, moves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        padding = self.pool.pages * self.page_size
        slots = np.full((2, len(self._heads), self.page_size), padding, np.int32)
        for head, (from_, to) in enumerate(moves):
            slots[:, head, : len(to)] = from_, to
        return slots[0], slots[1]

    def keep(self, row: int, counts: Sequence[int]) -> None:
        """Each head of a row keeps its first `counts` tokens and gives back the pages behind them."""
        for head, count in zip(self._heads, counts, strict=True):
            head.shorten(row, int(count))
        self._compacted[row] = True

    def will_step_back(self, row: int, whether: bool) -> None:
        """As `PageTable.will_step_back`: there is no window."""

    def truncate(self, row: int, tokens: int) -> None:
        assert not self._compacted[row], "heads have kept different tokens"
        for head in self._heads:
            head.truncate(row, tokens)
        self._seen[row] = tokens

    def free(self, row: int) -> None:
        for head in self._heads:
            head.free(row)
        self._seen[row], self._compacted[row] = 0, False
