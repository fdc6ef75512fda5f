"""Page tables of groups whose kv heads keep different numbers of tokens: one a head, over page numbers of its own.

A page of head h is a page of the pool's arrays at head h alone, so that what one head gives back another row's head h takes.
Until a row is compacted its heads hold the same tokens.
"""

from collections.abc import Sequence

import numpy as np

from optx.cache import CacheSpec
from optx.engine.pages import OutOfPages, PagePool, PageTable


class HeadPools:
    """The pools of the heads. Nothing of them is shared or kept for others."""

    cached = 0

    def __init__(self, pages: int, heads: int):
        self.pages = pages
        self.heads = [PagePool(pages) for _ in range(heads)]

    @property
    def available(self) -> int:
        """Free pages of the head that has fewest."""
        return min(pool.available for pool in self.heads)

    @property
    def used(self) -> int:
        """Pages that rows hold, a head on average."""
        return -(-sum(pool.used for pool in self.heads) // len(self.heads))


class HeadTables:
    """`PageTable` for all heads of a group at once: `tables` int32[K, rows, width], `lengths_by_head` int32[K, rows]."""

    window, sinks = None, 0

    def __init__(self, spec: CacheSpec, pools: HeadPools, *, rows: int, width: int, page_size: int):
        self.pool, self.page_size, self.width, self.policy = pools, page_size, width, spec.evict
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
        """More than `pool.available` where a head has too few pages."""
        least = self.pool.available
        return max(head.needed(rows, counts) - head.pool.available for head in self._heads) + least

    def append(self, row: int, count: int) -> np.ndarray:
        return self.append_rows(np.array([row]), np.array([count]))

    def append_rows(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """As `PageTable.append_rows`, by head: int32[K, sum(counts)]."""
        if (needed := self.needed(rows, counts)) > self.pool.available:
            raise OutOfPages(
                f"{len(rows)} rows need more cache pages of {self.page_size} tokens than a head has free: "
                f"{needed - self.pool.available} are lacking"
            )
        self._seen[rows] += counts
        return np.stack([head.append_rows(rows, counts) for head in self._heads])

    def keep(self, row: int, counts: Sequence[int]) -> None:
        """Each head of a row keeps its first `counts` tokens and gives back the pages behind them."""
        for head, count in zip(self._heads, counts, strict=True):
            head.shorten(row, int(count))
        self._compacted[row] = True

    def truncate(self, row: int, tokens: int) -> None:
        assert not self._compacted[row], "heads have kept different tokens"
        for head in self._heads:
            head.truncate(row, tokens)
        self._seen[row] = tokens

    def free(self, row: int) -> None:
        for head in self._heads:
            head.free(row)
        self._seen[row], self._compacted[row] = 0, False
