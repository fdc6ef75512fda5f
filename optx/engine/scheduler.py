"""What the next dispatch computes: admission, one token budget for prompts and decodes, preemption. No device is touched.

Every request has tokens that are known (prompt and output) and of those `computed` many whose keys are cached; a tick brings
`computed` nearer to what is known, and the last known token draws the next one. Decoding, prefill in chunks, the tail of a
cached prefix and recomputation after a preemption are that one thing (vLLM's scheduler, arXiv:2309.06180, section 4.5).

A plan may be made while an earlier one is under way: its tokens are then `pending` and stay on the device. Dispatches run in
the order of their plans, so a page may go to its next owner at once: what an earlier dispatch writes is written before.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from optx.engine.compacted import CompactedPrompts
from optx.engine.compaction import Compactor
from optx.engine.pages import Copy, PageTable
from optx.engine.plan import Part, Plan
from optx.engine.prefix import PrefixCache
from optx.engine.queue import WaitingQueue
from optx.engine.request import Request
from optx.engine.speculator import Speculator


class Scheduler:
    """Waiting and running requests over page tables. `plan` says what to run, `finish` ends a request and frees its pages."""

    def __init__(
        self,
        *,
        tables: Sequence[PageTable],
        prefix: PrefixCache | CompactedPrompts | None,
        rows: int,
        budget: int,
        ticks: int,
        mixed: bool,
        long: int | None = None,
        alone: bool = False,
        single: bool = False,
        encode: Callable[[str], list[int]] | None = None,
    ):
        """budget: tokens a tick. ticks: decode ticks a dispatch while nothing waits. mixed: prompts and decodes in one tick;
        else a prompt's chunk alone, and after a budget of prompt tokens a decode tick. long: the budget while nothing decodes and
        prompts fill it. alone: a request has pages for its whole answer when it gets a row, and computes its prompt itself.
        single: a decode of one row is a batch of its own. encode: text to token ids."""
        self.tables = list(tables)
        self.budget, self.long, self.ticks, self.mixed, self.alone = budget, long, ticks, mixed, alone
        self.single = single
        self.speculator: Speculator | None = None
        self.rows: list[Request | None] = [None] * rows
        self.waiting = WaitingQueue()
        self.preemptions = 0
        self.compactor = Compactor(self.tables, encode)
        self.prefix, self.compactor.kept = (None, prefix) if self.compactor else (prefix, None)
        self._copies: list[Copy] = []
        self._read = 0  # prompt tokens since the last decode tick

    @property
    def running(self) -> list[Request]:
        return [request for request in self.rows if request is not None]

    @property
    def idle(self) -> bool:
        return not len(self.waiting) and not self.running

    def add(self, requests: Sequence[Request]) -> None:
        """Queues one request, or several with the same prompt: the first computes it and the others fork."""
        first, *others = requests
        if others and len(first.prompt) > 1 and not self.alone and not self.compactor:
            first.followers = others
            for other in others:
                other.leader = first
            first.way = max((r.way for r in requests), key=("greedy", "sampled", "full").index)
            first.penalized = any(r.penalized for r in requests)
        for request in requests:
            self._name_pages(request)
            self.waiting.add(request)

    def plan(self, settled: bool = True) -> Plan | None:
        """The next dispatch; None where there is none now.

        settled: no dispatch is under way, so that requests may be preempted; else None where that would be needed, and where a
        request follows a grammar.
        """
        if not settled and any(request.constraint and request.pending for request in self.running):
            return None  # which tokens it may choose next depends on the one under way
        self._admit()
        self.compactor.plan(self.running)
        while True:
            self._fork()
            wanted, chunk = self._choose()
            if not wanted:
                return None
            drafting = self.speculator is not None and not chunk and self.speculator.wants(len(wanted))
            if drafting and not settled:
                return None  # drafts come after tokens that are known
            ticks = 1 if chunk or drafting else self._ticks_for(wanted)
            if drafting and (drafts := self._drafts(wanted)):
                return self._reserve(wanted, ticks, chunk, drafts)
            if ticks > 1 and self._short(wanted, ticks):
                ticks = 1
            if not self._short(wanted, ticks):
                return self._reserve(wanted, ticks, chunk)
            if not settled:
                return None
            self._preempt(max(self.running, key=lambda request: request.rank))

    def finish(self, request: Request, why: str) -> None:
        """Ends a request, wherever it is, and frees what it held."""
        request.finish = why
        self._leave_group(request)
        if request.row < 0:
            self.waiting.remove(request)
        else:
            self._vacate(request)

    def drop_running(self) -> list[Request]:
        """Ends running requests with "error" and forgets the prefix cache: for when the caches are lost. -> the requests."""
        lost = self.running
        for request in lost:
            self._leave_group(request)
            request.finish, request.pending, self.rows[request.row] = "error", 0, None
            for table in self.tables:
                table.free(request.row)
        if self.prefix is not None:
            self.prefix.clear()
        self._copies.clear()
        self.compactor.clear()
        return lost

    # Admission.

    def _admit(self) -> None:
        free = [row for row, request in enumerate(self.rows) if request is None]
        owed = self._owed_by_running() if free and len(self.waiting) else []
        while free and (request := self.waiting.first(self._hit)) is not None and self._fits(request, owed):
            self._seat(request, free.pop(0))
            waiting = request.followers
            request.followers = waiting[: len(free)]
            for follower in request.followers:
                self._seat(follower, free.pop(0))
            for follower in waiting[len(request.followers) :]:
                follower.leader = None

    def _seat(self, request: Request, row: int) -> None:
        self.waiting.remove(request)
        request.row, self.rows[row] = row, request

    def _fits(self, request: Request, owed: list[int]) -> bool:
        """Whether its known tokens find pages beside those `owed` to running requests by group, to which they are added.

        Any one request fits alone.
        """
        request.shared = self._shared(request)
        more = [self._owed(table, request) + 1 + len(request.followers) for table in self.tables]
        pools = [table.pool for table in self.tables]
        if any(old + new - 1 > p.available + p.cached for old, new, p in zip(owed, more, pools, strict=True)) and any(
            running is not None for running in self.rows
        ):
            return False
        owed[:] = [old + new for old, new in zip(owed, more, strict=True)]
        return True

    def _owed_by_running(self) -> list[int]:
        """Pages by group that running requests lack for their known tokens, and a page of growth for each."""
        running = self.running
        reading = [r for r in running if self.alone or (not r.drawn and r.leader is None)]
        return [sum(self._owed(table, request) for request in reading) + len(running) for table in self.tables]

    def _owed(self, table: PageTable, request: Request) -> int:
        """Pages that it lacks to hold its known tokens and the next, or (`alone`) its whole answer."""
        most = request.tokens + (request.left if self.alone else 1)
        whole = min(-(-table.most(request.subject, most) // table.page_size), table.width)
        held = table.pages_of(request.row) if request.row >= 0 else 0
        return max(0, whole - (held or (request.shared if table.window is None else 0)))

    def _hit(self, request: Request) -> int:
        """Pages that the prefix cache has for it."""
        if self.prefix is None or request.penalized:
            return 0
        return len(self.prefix.match(request.keys, request.tokens))

    def _shared(self, request: Request) -> int:
        """Pages of a cached prefix that rows use: they cost nothing."""
        if self.prefix is None or request.penalized:
            return 0
        path = self.prefix.match(request.keys, request.tokens)
        held = [[p is not None and t.pool.references[p] > 1 for t, p in zip(self.tables, n.pages)] for n in path]
        return sum(map(all, held))

    def _name_pages(self, request: Request) -> None:
        if self.prefix is not None:
            request.keys = self.prefix.keys(request.known(0, request.tokens))

    # What runs.

    def _choose(self) -> tuple[dict[Request, int], bool]:
        """(tokens of each request in the next tick, whether there are prompt tokens among them)."""
        decoding, reading = [], []
        for request in self.running:
            if request.left <= 0 or request.leader is not None:
                continue  # its last token is under way; it waits for its leader
            last = request.drawn or (request.computed == request.tokens - 1 and not self.compactor)
            (decoding if last and not request.followers and not request.replay else reading).append(request)
        reading.sort(key=lambda request: request.rank)
        if not reading or (not self.mixed and decoding and self._read >= self.budget):
            return dict.fromkeys(decoding, 1), False
        wanted = dict.fromkeys(decoding, 1) if self.mixed else {}
        reading = reading if self.mixed else reading[:1]
        room = self.long if not decoding and self._fill_long(reading) else self.budget - len(wanted)
        for request in reading:
            if room > 0:
                self._adopt(request)
                left = self._goal(request) - request.computed if not request.replay else room
                count = min(left, room, self.compactor.room(request))
                wanted |= {request: count} if count else {}
                room -= count
        if len(wanted) > (len(decoding) if self.mixed else 0):
            return wanted, True
        assert self.mixed <= (room > 0), "decodes leave no room for prompts"
        self._fork()  # all that there was to read came from the cache
        return self._choose()

    def _fill_long(self, reading: list[Request]) -> bool:
        """Whether there are prompt tokens for a `long` tick, without what the prefix cache has by now."""
        if self.long is None or self.compactor:
            return False
        page = self.prefix.page_size if self.prefix is not None else 0
        done = (request.computed or self._hit(request) * page for request in reading)
        left = itertools.accumulate(self._goal(r) - have for r, have in zip(reading, done, strict=True))
        return any(tokens >= self.long for tokens in left)

    def _goal(self, request: Request) -> int:
        """Tokens to compute in chunks: the last one of a prompt to fork is computed by each of its rows."""
        return len(request.prompt) - 1 if request.followers else request.tokens

    def _adopt(self, request: Request) -> None:
        """Before its first chunk: what the prefix cache has by now."""
        self.compactor.adopt(request)
        if self.prefix is None or request.penalized or request.computed:
            return
        request.computed = self.prefix.adopt(request.row, self.prefix.match(request.keys, request.tokens))
        if not request.preemptions:  # computing again is no hit
            self.prefix.asked += request.tokens
            self.prefix.hits += request.computed

    def _ticks_for(self, wanted: dict[Request, int]) -> int:
        """Decode ticks of the next dispatch: one where the host has to look at every token, or could admit after it."""
        reading = any(not request.drawn and request not in wanted for request in self.running)
        if len(self.waiting) or reading or any(request.watched for request in wanted):
            return 1
        return self.ticks if max(request.left for request in wanted) > 1 else 1

    def _counts(self, wanted: dict[Request, int], ticks: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.array([request.row for request in wanted])
        counts = [min(ticks, r.left, self.compactor.room(r)) if ticks > 1 else count for r, count in wanted.items()]
        return rows, np.array(counts)

    def _short(self, wanted: dict[Request, int], ticks: int) -> bool:
        """Whether the pools cannot give what the tokens need."""
        rows, counts = self._counts(wanted, ticks)
        return any(t.needed(rows, counts) > t.pool.available + t.pool.cached for t in self.tables)

    def _drafts(self, wanted: dict[Request, int]) -> dict[Request, list[int]]:
        """Drafts to verify, by request; none where nobody has any or the pools have no room for them."""
        drafts = self.speculator.offer(wanted)
        if not drafts:
            self.speculator.landed(len(wanted), len(wanted))
        return {} if self._short({r: 1 + len(drafts.get(r, ())) for r in wanted}, 1) else drafts

    def _reserve(
        self, wanted: dict[Request, int], ticks: int, chunk: bool, drafts: dict[Request, list[int]] | None = None
    ) -> Plan:
        if drafts:
            wanted = {request: count + len(drafts.get(request, ())) for request, count in wanted.items()}
        wanted = dict(sorted(wanted.items(), key=lambda item: item[0].row))
        rows, counts = self._counts(wanted, ticks)
        writes = tuple(table.append_rows(rows, counts) for table in self.tables)
        parts = []
        for (request, count), slots in zip(wanted.items(), counts.tolist(), strict=True):
            if request.replay:
                parts.append(self._again(request, count))
                continue
            start, end = request.computed, request.computed + count
            tokens = [-1] if request.drawn else request.known(start, end)
            draws = request.drawn or end >= request.tokens
            rounds = slots if ticks > 1 or drafts else int(draws)
            tokens = [*tokens, *drafts.get(request, ())] if drafts else tokens
            parts.append(Part(request=request, row=request.row, start=start, tokens=tokens, rounds=rounds))
            request.computed += slots
            request.pending += rounds
            if not request.drawn:
                self._keep(request)
                self._read += count
            request.drawn |= draws
        self._read = self._read if chunk else 0
        if self.speculator is not None and not chunk:
            self.speculator.decided()
        compactions, kept = self.compactor.take()
        copies, self._copies = (*self._copies, *kept), []
        return Plan(
            parts=tuple(parts), writes=writes, copies=copies, compactions=compactions, ticks=ticks, chunk=chunk,
            mixed=chunk and self.mixed, width=self.speculator.width if drafts else 1,
            alone=not self.mixed if chunk else self.single and len(parts) == 1 and not drafts,
        )  # fmt: skip

    def _again(self, request: Request, count: int) -> Part:
        """The next `count` tokens of its prompt that it is fed again, behind those computed."""
        done = request.replayed
        request.replayed += count
        self._read += count
        tokens = request.replay[0][done : request.replayed]
        return Part(request=request, row=request.row, start=request.computed + done, tokens=tokens, rounds=0)

    def settle(self, part: Part, kept: int) -> None:
        """Of the tokens that a row computed with drafts, `kept` stand; the caches step back over the others."""
        if part.request.finish is None:
            part.request.computed = part.start + kept
            for table in self.tables:
                table.truncate(part.row, part.start + kept)

    # Leaving rows.

    def _preempt(self, request: Request) -> None:
        """Back into the queue; it will compute its prompt and output again."""
        assert not request.pending
        self._leave_group(request)
        self._vacate(request)
        request.bumps += 1
        request.preemptions += request.computed > 0
        self.preemptions += request.computed > 0
        request.row, request.computed, request.drawn = -1, 0, False
        request.replay, request.replayed = None, 0
        self._name_pages(request)
        self.waiting.add(request)

    def _vacate(self, request: Request) -> None:
        if request.drawn:
            self._name_pages(request)
            self._keep(request)
        for table in self.tables:
            table.free(request.row)
        self.rows[request.row] = None

    def _keep(self, request: Request) -> None:
        """The prefix cache gets the pages computed so far: after every chunk, since windows pass pages by that another prompt
        would go on from."""
        if self.prefix is not None:
            tokens = min(request.computed, request.tokens - request.drawn)  # the newest is not computed for certain
            self.prefix.insert(request.row, request.keys[: tokens // self.prefix.page_size])

    # Forks.

    def _fork(self) -> None:
        """Followers of prompts that are computed up to their last token get their pages."""
        for leader in self.running:
            if not leader.followers or leader.computed < len(leader.prompt) - 1:
                continue
            for follower in list(leader.followers):
                if any(t.partial(leader.row) and not t.pool.available + t.pool.cached for t in self.tables):
                    break
                moves = tuple(table.fork(leader.row, follower.row) for table in self.tables)
                self._copies.append(Copy(source=leader.row, target=follower.row, slots=moves))
                follower.computed, follower.leader = leader.computed, None
                leader.followers.remove(follower)
            for follower in leader.followers:  # no page is left: each reads the prompt itself
                follower.leader = None
            leader.followers = []

    def _leave_group(self, request: Request) -> None:
        """Others of a group go on without it: the first of them computes the prompt."""
        if request.leader is not None:
            request.leader.followers.remove(request)
            request.leader = None
        if request.followers:
            first, *others = request.followers
            first.leader, first.followers, request.followers = None, others, []
            first.way, first.penalized = request.way, request.penalized
            for other in others:
                other.leader = first
