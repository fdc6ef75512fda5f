"""Who is admitted next: priority, then the longest cached prefix, with a bound on being overtaken."""

import bisect
import collections
from collections.abc import Callable, Iterator

from optx.engine.request import Request

PATIENCE = 64  # later requests that may overtake one
LOOK = 16  # first requests of a class among which a longer cached prefix comes first
BUMPS = 4  # after losing its row so often a request is senior


def _order(request: Request) -> tuple:
    """Seniors, then smaller priorities, among equals those that lost their row, then by arrival."""
    return (*request.rank[:2], not request.bumps, request.id)


class WaitingQueue:
    """Requests that wait for a row, in order.

    A request overtaken by more than PATIENCE later ones, or that lost its row BUMPS times, becomes senior: it goes before all
    that are not, whatever their priority, so everyone is served.
    """

    def __init__(self):
        self._sorted: list[Request] = []
        self._by_age: collections.deque[tuple[int, Request]] = collections.deque()
        self._arrivals = self._departures = 0

    def __len__(self) -> int:
        return len(self._sorted)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._sorted)

    def add(self, request: Request) -> None:
        request.senior |= request.bumps >= BUMPS
        request.ticket = self._arrivals
        self._arrivals += 1
        self._by_age.append((request.ticket, request))
        bisect.insort(self._sorted, request, key=_order)

    def remove(self, request: Request) -> None:
        self._take(request)
        self._departures += 1

    def first(self, hit: Callable[[Request], int]) -> Request | None:
        """The request to admit next, which stays in the queue. hit: pages of it that the prefix cache has."""
        self._promote()
        if not self._sorted:
            return None
        head = _order(self._sorted[0])[:-1]
        peers = [r for r in self._sorted[:LOOK] if _order(r)[:-1] == head and r.leader is None]
        return max(peers, key=hit) if len(peers) > 1 and not self._sorted[0].senior else self._sorted[0]

    def _promote(self) -> None:
        """All that left the queue since a request came, less all that came before it, have overtaken it."""
        while self._by_age:
            ticket, request = self._by_age[0]
            gone = request.row >= 0 or request.finish is not None or request.ticket != ticket
            if not gone and self._departures <= ticket + PATIENCE:
                return
            self._by_age.popleft()
            if not gone and not request.senior:
                self._take(request)
                request.senior = True
                bisect.insort(self._sorted, request, key=_order)

    def _take(self, request: Request) -> None:
        at = bisect.bisect_left(self._sorted, _order(request), key=_order)
        assert self._sorted[at] is request
        del self._sorted[at]
