"""Which row owns which pages: allocation with reference counts, page tables by group, windows that free passed pages."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from optx.cache import CacheSpec
from optx.errors import RequestError


class OutOfPages(RequestError):
    """The pool has no free page; nothing was allocated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    """Row `target` goes on as `source` would. slots: by group (from, to), tokens of the page that is not shared."""

    source: int
    target: int
    slots: tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclasses.dataclass(frozen=True)
class Lent:
    """A row's pages and state that others may begin with; the last page is partial where `length` is no multiple of a page."""

    pages: np.ndarray
    first: np.ndarray  # as `_first` of the row
    length: int
    next: int
    freed: int


class PagePool:
    """Page numbers 0 .. pages - 1 with reference counts; `kept` pages are held by the prefix cache as one of their owners."""

    def __init__(self, pages: int):
        self.pages = pages
        self.references = [0] * pages
        self.kept = [False] * pages
        self.cached = 0  # kept pages that nobody else holds: what the prefix cache can give back
        self._free = collections.deque(range(pages))

    @property
    def available(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that rows hold: available + cached + used == pages."""
        return self.pages - self.available - self.cached

    def allocate(self) -> int:
        """Raises OutOfPages."""
        if not self._free:
            raise OutOfPages(f"all {self.pages} cache pages are in use; finish or abort requests, or make more pages")
        page = self._free.popleft()
        assert self.references[page] == 0
        self.references[page] = 1
        return page

    def retain(self, page: int) -> None:
        assert self.references[page] > 0
        self.cached -= self.kept[page] and self.references[page] == 1
        self.references[page] += 1

    def release(self, page: int) -> None:
        assert self.references[page] > self.kept[page]
        self.references[page] -= 1
        if self.references[page] == 0:
            self._free.append(page)
        self.cached += self.kept[page] and self.references[page] == 1

    def keep(self, page: int) -> None:
        """The prefix cache becomes an owner of a page that a row holds."""
        assert not self.kept[page]
        self.retain(page)
        self.kept[page] = True

    def drop(self, page: int) -> None:
        """It gives the page back."""
        assert self.kept[page]
        self.cached -= self.references[page] == 1
        self.kept[page] = False
        self.release(page)


class PageTable:
    """Pages of every row of one cache group, in the order in which their tokens were appended.

    `table` int32[rows, width] and `lengths` int32[rows] go to the device as they are. A page holds positions
    first .. first + page_size - 1; with a window, pages that no later query can see are freed and the listing closes up.
    """

    def __init__(self, spec: CacheSpec, pool: PagePool, *, rows: int, width: int, page_size: int):
        self.pool, self.page_size, self.width = pool, page_size, width
        self.window, self.sinks, self.policy = spec.window, spec.sinks, spec.evict
        self.make_room: Callable[[int], None] | None = None  # asked for so many free pages before some are taken
        self.table = np.zeros((rows, width), np.int32)
        self.lengths = np.zeros(rows, np.int32)  # slots in use in the row's listing
        self._first = np.zeros((rows, width), np.int64)  # position of the first token of each listed page
        self._next = np.zeros(rows, np.int64)  # position of the next token
        self._freed = np.zeros(rows, np.int64)  # end of the positions that the window has freed
        self._steps_back = np.zeros(rows, bool)  # the window frees nothing: what is appended now will be dropped
        self.behind = 0  # tokens that are appended so, at most

    @staticmethod
    def width_for(spec: CacheSpec, context: int, chunk: int, page_size: int, behind: int = 0) -> int:
        """Pages that one row can list at once, `chunk` new tokens included, and `behind` that it steps back over."""
        whole = -(-(context + behind if spec.evict is None else spec.evict.most(context, context)) // page_size)
        if spec.window is None:
            return whole
        return min(whole, -(-spec.sinks // page_size) + -(-(spec.window + chunk + behind) // page_size) + 1)

    def room(self, row: int, prompt: int) -> int | None:
        """Tokens that a row with a prompt of so many takes before it is compacted: 0, now; None: any number."""
        return None

    def most(self, prompt: int, tokens: int) -> int:
        """Tokens that a row with a prompt of so many lists at most until it has seen `tokens`, but for a window."""
        return tokens + self.behind

    def pages_of(self, row: int) -> int:
        return -(-int(self.lengths[row]) // self.page_size)

    def append(self, row: int, count: int) -> np.ndarray:
        """`append_rows` for one row."""
        return self.append_rows(np.array([row]), np.array([count]))

    def needed(self, rows: np.ndarray, counts: np.ndarray) -> int:
        """Pages to take for `counts` more tokens of `rows` (distinct). Frees passed pages of the rows that take any."""
        return int(np.sum(self._growth(rows, counts)))

    def _growth(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        if self.window is not None:
            for row in rows[self._pages_for(rows, counts) > 0]:
                self._free_passed(row)
        return self._pages_for(rows, counts)

    def _pages_for(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        lengths = self.lengths[rows]
        return -(-(lengths + counts) // self.page_size) - -(-lengths // self.page_size)

    def append_rows(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Room for `counts` int[N] more tokens of `rows` int[N], distinct: their flat slots int32[sum(counts)], row after row.
        A row that takes a page frees passed ones first.

        Raises: OutOfPages, with the rows as they were (apart from freed pages).
        """
        size, growth = self.page_size, self._growth(rows, counts)
        total = int(np.sum(growth))
        if self.make_room is not None and total > self.pool.available:
            self.make_room(total)
        if total > self.pool.available:
            what = "a row needs" if len(rows) == 1 else f"{len(rows)} rows need"
            raise OutOfPages(f"{what} {total} more cache pages of {size} tokens and {self.pool.available} are free")
        for at in np.flatnonzero(growth):
            row, length = rows[at], int(self.lengths[rows[at]])
            have = self.pages_of(row)
            for index in range(have, have + int(growth[at])):
                self.table[row, index] = self.pool.allocate()
                self._first[row, index] = self._next[row] + (index * size - length)
        ends = np.cumsum(counts)
        owner = np.repeat(np.arange(len(rows)), counts)
        slots = self.lengths[rows][owner] + np.arange(len(owner)) - (ends - counts)[owner]
        self.lengths[rows] += counts.astype(np.int32)
        self._next[rows] += counts
        return (self.table[rows[owner], slots // size] * size + slots % size).astype(np.int32)

    @property
    def tables(self) -> np.ndarray:
        """int32[G, rows, width]: one list for all heads."""
        return self.table[None]

    @property
    def lengths_by_head(self) -> np.ndarray:
        """int32[G, rows]."""
        return self.lengths[None]

    @property
    def no_moves(self) -> tuple[np.ndarray, np.ndarray]:
        """Slots to copy of which there are none."""
        return np.zeros(0, np.int32), np.zeros(0, np.int32)

    def shorten(self, row: int, count: int) -> None:
        """The row keeps its first `count` slots; pages behind them are free."""
        for index in range(-(-count // self.page_size), self.pages_of(row)):
            self.pool.release(int(self.table[row, index]))
        self.lengths[row] = count

    def partial(self, row: int) -> bool:
        """Whether the row's last page has room: a fork has to copy it."""
        return bool(self.lengths[row] % self.page_size)

    def seen_pages(self, count: int) -> list[int]:
        """Of the first `count` whole pages of a sequence, those that the token after them sees, or a later one may."""
        if self.window is None:
            return list(range(count))
        oldest = count * self.page_size - self.window + 1
        first = [i * self.page_size for i in range(count)]
        return [i for i, at in enumerate(first) if at + self.page_size > oldest or at < self.sinks]

    def listed(self, row: int) -> dict[int, int]:
        """The row's whole pages: place in the sequence (0: its first tokens) -> page."""
        full = int(self.lengths[row]) // self.page_size
        return {int(self._first[row, i]) // self.page_size: int(self.table[row, i]) for i in range(full)}

    def adopt(self, row: int, pages: dict[int, int], count: int) -> None:
        """An empty row gets whole pages of other rows, by place in the sequence; its next token comes after `count` pages."""
        assert self.lengths[row] == 0, f"row {row} is in use"
        for index, (place, page) in enumerate(sorted(pages.items())):
            self.pool.retain(page)
            self.table[row, index], self._first[row, index] = page, place * self.page_size
        self.lengths[row] = len(pages) * self.page_size
        self._next[row] = count * self.page_size
        gaps = [place for place in range(count) if place not in pages]
        self._freed[row] = (max(gaps) + 1) * self.page_size if gaps else 0

    def _free_passed(self, row: int) -> None:
        """Frees full pages whose positions are all before the next query's window and past the sinks."""
        if self.window is None or self._steps_back[row]:
            return
        first = self._first[row, : self.lengths[row] // self.page_size].copy()
        oldest = self._next[row] - self.window + 1
        passed = (first + self.page_size <= oldest) & (first >= self.sinks)
        for index in np.flatnonzero(passed)[::-1]:
            self.pool.release(int(self.table[row, index]))
            self._freed[row] = max(self._freed[row], first[index] + self.page_size)
            for listing in (self.table, self._first):
                listing[row, index:-1] = listing[row, index + 1 :]
            self.lengths[row] -= self.page_size

    def will_step_back(self, row: int, whether: bool) -> None:
        """Until it is taken back, a window frees nothing of the row."""
        self._steps_back[row] = whether

    def truncate(self, row: int, tokens: int) -> None:
        """Drops the newest tokens until the row has seen `tokens`. Raises RequestError when a window freed them."""
        drop = int(self._next[row]) - tokens
        if tokens < 0 or drop < 0:
            raise RequestError(f"cannot truncate to {tokens} tokens; allowed: 0 to {int(self._next[row])}")
        if drop and max(tokens - (self.window or 0) + 1, 0) < self._freed[row]:
            raise RequestError(
                f"cannot step back to {tokens} of {int(self._next[row])} tokens: the window of {self.window} has freed "
                f"tokens before position {int(self._freed[row])}; compute the row again from its start"
            )
        keep = -(-(int(self.lengths[row]) - drop) // self.page_size)
        for index in range(keep, self.pages_of(row)):
            self.pool.release(int(self.table[row, index]))
        self.lengths[row] -= drop
        self._next[row] = tokens

    def fork(self, row: int, new: int) -> tuple[np.ndarray, np.ndarray]:
        """Row `new` (empty) gets the tokens of `row`: full pages are shared, a partial last one is copied.

        -> flat slots (source, destination) to copy on the device, empty when nothing is partial.
        """
        assert self.lengths[new] == 0, f"row {new} is in use"
        full, rest = divmod(int(self.lengths[row]), self.page_size)
        moves: Sequence[int] = range(0)
        if rest:
            if self.make_room is not None:
                self.make_room(1)
            self.table[new, full] = self.pool.allocate()
            moves = range(rest)
        for index in range(full):
            self.pool.retain(int(self.table[row, index]))
        self.table[new, :full] = self.table[row, :full]
        self._first[new] = self._first[row]
        for per_row in (self.lengths, self._next, self._freed):
            per_row[new] = per_row[row]
        offsets = np.asarray(moves, np.int32)
        return (int(self.table[row, full]) * self.page_size + offsets if rest else offsets,
                int(self.table[new, full]) * self.page_size + offsets if rest else offsets)  # fmt: skip

    def lend(self, row: int) -> tuple[Lent, tuple[np.ndarray, np.ndarray]]:
        """The row's tokens, kept for other rows: full pages are shared, a partial last one is copied into a page that the caller
        knows to be free. -> (what `borrow` takes, flat slots (source, destination) to copy)."""
        pages = self.table[row, : self.pages_of(row)].copy()
        own, moves = self._own_last(pages, int(self.lengths[row]))
        for page in own:
            self.pool.keep(int(page))
        if len(moves[0]):
            self.pool.release(int(own[-1]))  # the store is its one owner
        state = int(self.lengths[row]), int(self._next[row]), int(self._freed[row])
        return Lent(own, self._first[row].copy(), *state), moves

    def borrow(self, row: int, lent: Lent) -> tuple[np.ndarray, np.ndarray]:
        """An empty row goes on from what was lent; as `lend`."""
        assert self.lengths[row] == 0, f"row {row} is in use"
        own, moves = self._own_last(lent.pages, lent.length)
        for page in own[: lent.length // self.page_size]:
            self.pool.retain(int(page))
        self.table[row, : len(own)] = own
        self._first[row] = lent.first
        self.lengths[row], self._next[row], self._freed[row] = lent.length, lent.next, lent.freed
        return moves

    def give_back(self, lent: Lent) -> int:
        """What was lent is no longer kept. -> pages."""
        for page in lent.pages:
            self.pool.drop(int(page))
        return len(lent.pages)

    def _own_last(self, pages: np.ndarray, length: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """(pages with a new one in place of a partial last one, flat slots to copy)."""
        offsets = np.arange(length % self.page_size, dtype=np.int32)
        if not len(offsets):
            return pages, (offsets, offsets)
        own = np.append(pages[:-1], self.pool.allocate())
        return own, (int(pages[-1]) * self.page_size + offsets, int(own[-1]) * self.page_size + offsets)

    def free(self, row: int) -> None:
        for index in range(self.pages_of(row)):
            self.pool.release(int(self.table[row, index]))
        for per_row in (self.lengths, self._next, self._freed, self._steps_back):
            per_row[row] = 0
