"""The scheduler without a device: whatever comes, pages add up, no page has two writers, everyone is served, and each row finds
the tokens that it would have found alone."""

import functools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from optx.cache import CacheSpec, Stream
from optx.engine.pages import PagePool, PageTable
from optx.engine.prefix import PrefixCache
from optx.engine.queue import BUMPS, LOOK, PATIENCE, WaitingQueue
from optx.engine.request import Request, Sampling
from optx.engine.scheduler import Scheduler

P, BUDGET, LONG, CONTEXT = 4, 8, 14, 40
VOCAB = 3  # few tokens, so that prompts begin alike
END = 0  # the stop id


def spec(window=None):
    return CacheSpec(kind="paged", streams=(Stream(name="k", shape=(1, 8)),), window=window)


def answer(tokens, seed) -> int:
    """What the fake model says next: a function of all tokens before and the seed, so that a wrong cache shows."""
    return (hash((tuple(tokens), seed)) >> 7) % VOCAB


class Device:
    """A scheduler and what a device would hold: the token and its position in every slot, the newest token of every row.

    Dispatches run when they are planned and are handed out later (`late`: after the next was planned), as with overlap.
    """

    def __init__(
        self, *, rows=3, pages=14, windows=(None, 7), cache=True, ticks=1, mixed=False, late=False, stops=(), long=None
    ):
        self.tables = []
        for window in windows:
            width = PageTable.width_for(spec(window), CONTEXT, max(long or BUDGET, ticks), P)
            self.tables.append(PageTable(spec(window), PagePool(pages), rows=rows, width=width, page_size=P))
        self.prefix = PrefixCache(self.tables) if cache else None
        for group, table in enumerate(self.tables if cache else ()):
            table.make_room = functools.partial(self.prefix.make_room, group)
        self.scheduler = Scheduler(
            tables=self.tables, prefix=self.prefix, rows=rows, budget=BUDGET, ticks=ticks, mixed=mixed, long=long
        )
        self.slots = [{} for _ in windows]  # flat slot -> (position, token)
        self.newest, self.late, self.flight, self.count, self.stops = {}, late, None, 0, stops
        self.requests: list[Request] = []

    def request(self, prompt, max_tokens, seed, **more) -> Request:
        how = Sampling(max_tokens=min(max_tokens, CONTEXT - len(prompt)), seed=seed)
        self.count += 1
        made = Request(id=self.count, prompt=prompt, sampling=how, stop_ids=frozenset(self.stops), **more)
        self.requests.append(made)
        return made

    def add(self, prompt, max_tokens=6, n=1, **more):
        group = [self.request(prompt, max_tokens, seed=self.count + i, **more) for i in range(n)]
        self.scheduler.add(group)
        return group

    def step(self):
        before, self.flight = self.flight, None
        plan = self.scheduler.plan(settled=before is None)
        ran = (plan, self.run(plan)) if plan else None
        if before:
            self.land(*before)
        if ran is None and before:
            plan = self.scheduler.plan()
            ran = (plan, self.run(plan)) if plan else None
        if ran and self.late:
            self.flight = ran
        elif ran:
            self.land(*ran)
        self.check()

    def run(self, plan):
        for copy in plan.copies:
            self.newest[copy.target] = self.newest.get(copy.source)
            for slots, (source, target) in zip(self.slots, copy.slots, strict=True):
                slots |= {int(b): slots[int(a)] for a, b in zip(source, target, strict=True)}
        for slots, writes in zip(self.slots, plan.writes, strict=True):
            for slot in writes:
                slots.pop(int(slot), None)
        drawn, at = {}, 0
        for part in plan.parts:
            count = max(part.rounds, len(part.tokens))
            mine = [write[at : at + count] for write in plan.writes]
            at += count
            drawn[part.request] = self.run_part(part, mine, plan.ticks)
        assert all(at == len(write) for write in plan.writes)
        return drawn

    def run_part(self, part, writes, ticks) -> list[int]:
        """Tokens drawn; -1 after a stop that the device saw."""
        held = self.newest.get(part.row)
        tokens = [held] if part.tokens == [-1] else list(part.tokens)
        if part.tokens == [-1] and held in part.request.stop_ids:
            return [-1] * part.rounds
        out = []
        for i in range(ticks if part.rounds > 1 else 1):
            if i and (i >= part.rounds or out[-1] in part.request.stop_ids):
                break
            start = part.start + i
            for table, slots, write in zip(self.tables, self.slots, writes, strict=True):
                for k, token in enumerate(tokens):
                    slot = int(write[i + k])
                    pool, page = table.pool, slot // P
                    assert pool.references[page] - pool.kept[page] == 1, "a page of two rows is written"
                    slots[slot] = start + k, token
            if part.rounds:
                tokens = [self.draw(part, start + len(tokens))]
                out += tokens
                self.newest[part.row] = tokens[0]
        return out + [-1] * (part.rounds - len(out))

    def draw(self, part, length) -> int:
        """The next token, from what the row's own pages hold: all of its tokens in the first group, the last in a window."""
        views = []
        for table, slots in zip(self.tables, self.slots, strict=True):
            index = range(int(table.lengths[part.row]))
            listed = [int(table.table[part.row, i // P]) * P + i % P for i in index]
            found = dict(slots[slot] for slot in listed if slot in slots)
            views.append((table.window, found))
        whole = next(found for window, found in views if window is None)
        tokens = [whole[i] for i in range(length)]
        for window, found in views:
            seen = range(max(0, length - (window or length)), length)
            assert [found[i] for i in seen] == [tokens[i] for i in seen], "a row reads what it did not write"
        return answer(tokens, part.request.sampling.seed)

    def land(self, plan, drawn):
        for part in plan.parts:
            part.request.pending -= part.rounds
        for part in plan.parts:
            request = part.request
            for token in drawn[request][: part.rounds]:
                if request.finish is None:
                    assert token >= 0
                    request.output.append(token)
                    if token in request.stop_ids or len(request.output) == request.sampling.max_tokens:
                        self.scheduler.finish(request, "stop" if token in request.stop_ids else "length")

    def check(self):
        for table in self.tables:
            pool, owners = table.pool, {}
            for request in self.scheduler.running:
                for page in table.table[request.row, : table.pages_of(request.row)].tolist():
                    owners[page] = owners.get(page, 0) + 1
            assert pool.used == len(owners)
            assert [n - kept for n, kept in zip(pool.references, pool.kept)] == [
                owners.get(page, 0) for page in range(pool.pages)
            ]
            assert pool.available + pool.cached + pool.used == pool.pages
            assert pool.cached == sum(k and n == 1 for n, k in zip(pool.references, pool.kept))

    def drain(self, most=2000):
        for _ in range(most):
            if self.scheduler.idle:
                break
            self.step()
        assert self.scheduler.idle, "someone is starved"
        for request in self.requests:
            assert request.finish is not None
            if request.finish != "abort":
                assert request.output == alone(request)
        for table in self.tables:
            assert table.pool.used == 0


def alone(request) -> list[int]:
    tokens, out = list(request.prompt), []
    while len(out) < request.sampling.max_tokens and (not out or out[-1] not in request.stop_ids):
        out.append(answer(tokens + out, request.sampling.seed))
    return out


@hypothesis.settings(max_examples=120, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.data(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 3]),
    st.sampled_from([(None,), (None, 7), (5, None)]),
    st.integers(10, 30),
    st.sampled_from([None, LONG]),
)
def test_everyone_is_served_as_if_alone(data, cache, mixed, late, ticks, windows, pages, long):
    how = {"cache": cache, "ticks": ticks, "mixed": mixed, "late": late, "stops": {END}, "long": long}
    device = Device(pages=pages, windows=windows, **how)
    for _ in range(data.draw(st.integers(3, 30))):
        match data.draw(st.sampled_from(["add", "add", "group", "step", "step", "step", "abort", "clear"])):
            case "add":
                prompt = data.draw(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=24))
                device.add(prompt, data.draw(st.integers(1, 12)), priority=data.draw(st.integers(0, 2)))
            case "group":
                prompt = data.draw(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=24))
                device.add(prompt, data.draw(st.integers(1, 12)), n=data.draw(st.integers(2, 4)))
            case "abort" if live := [r for r in device.requests if r.finish is None]:
                device.scheduler.finish(data.draw(st.sampled_from(live)), "abort")
                device.check()
            case "clear" if cache:
                device.prefix.clear()
            case _:
                device.step()
    device.drain()


# What each part does.


def test_a_dry_pool_preempts_the_newest_of_the_lowest_priority():
    device = Device(pages=9, windows=(None,), cache=False)
    (first,), (urgent,), (last,) = (device.add([1, 2, 1], 12, priority=priority) for priority in (1, 0, 1))
    order = []
    finish = device.scheduler.finish
    device.scheduler.finish = lambda request, why: (order.append(request), finish(request, why))
    while not last.preemptions:
        assert not first.preemptions and not urgent.preemptions
        device.step()
    assert last.row == -1 and last.finish is None and device.scheduler.preemptions == 1
    device.drain()
    assert order[-1] is last


def test_nothing_is_preempted_while_a_dispatch_is_under_way():
    device = Device(pages=9, windows=(None,), cache=False, late=True)
    for _ in range(3):
        device.add([1, 2, 1], 12)
    device.drain()
    assert device.scheduler.preemptions


def test_a_group_computes_its_prompt_once():
    device = Device(pages=30, windows=(None,), cache=False)
    prompt = [1, 2] * 9
    group = device.add(prompt, n=3)
    computed, run_part = [], device.run_part
    device.run_part = lambda part, *rest: (computed.append(part), run_part(part, *rest))[1]
    while not all(request.output for request in group):
        device.step()
    assert sum(len(part.tokens) for part in computed if part.tokens != [-1]) == len(prompt) - 1 + 3
    assert device.tables[0].pool.used == 4 + 3, "four whole pages for all, and a last one each"
    device.drain()


def test_a_group_that_loses_its_first_request():
    device = Device(windows=(None,))
    group = device.add([1, 2] * 9, n=3)
    device.step()
    assert group[0].computed and group[1].row >= 0 and not group[1].computed
    device.scheduler.finish(group[0], "abort")
    device.drain()


def test_more_of_a_group_than_rows():
    device = Device(rows=2, windows=(None,))
    device.add([1, 2] * 9, n=5)
    device.drain()
    assert device.prefix.hits >= 3 * 16


def test_prompts_that_begin_alike_are_read_once():
    """Both wait at once: the second takes what the first has computed by the time it is read."""
    device = Device(pages=30, windows=(None,))
    prompt = [1, 2] * 8
    device.add([*prompt, 1], 3)
    device.add([*prompt, 2], 3)
    device.drain()
    assert device.prefix.hits == 16


def queued(count, **more) -> tuple[WaitingQueue, list[Request]]:
    queue = WaitingQueue()
    requests = [Request(id=i, prompt=[1], sampling=Sampling(), stop_ids=frozenset(), **more) for i in range(count)]
    for request in requests:
        queue.add(request)
    return queue, requests


def none(request):
    return 0


def test_order_of_waiting():
    queue, requests = queued(4)
    assert queue.first(none) is requests[0]
    assert queue.first(lambda request: request.id) is requests[3], "the longest cached prefix"
    urgent = Request(id=4, prompt=[1], sampling=Sampling(), stop_ids=frozenset(), priority=-1)
    queue.add(urgent)
    assert queue.first(lambda request: request.id % 4) is urgent
    queue.remove(urgent)
    back = Request(id=5, prompt=[1], sampling=Sampling(), stop_ids=frozenset(), bumps=1)
    queue.add(back)
    assert queue.first(lambda request: request.id % 4) is back and len(queue) == 5
    many, requests = queued(LOOK + 4)
    assert many.first(lambda request: request.id) is requests[LOOK - 1]


@pytest.mark.parametrize("how", ["priority", "prefix"])
def test_waiting_has_a_bound(how):
    """A stream of better requests, each served at once: the worst is served after PATIENCE of them."""
    queue, (worst,) = queued(1, priority=1 if how == "priority" else 0)
    for i in range(1, 3 * PATIENCE):
        queue.add(Request(id=i, prompt=[1], sampling=Sampling(), stop_ids=frozenset()))
        first = queue.first(lambda request: int(request is not worst))
        if first is worst:
            break
        queue.remove(first)
    assert i == PATIENCE + 2 and worst.senior


def test_rows_lost_too_often_make_senior():
    queue, (request,) = queued(1, priority=5, bumps=BUMPS)
    queue.add(Request(id=9, prompt=[1], sampling=Sampling(), stop_ids=frozenset(), priority=0))
    assert queue.first(none) is request and request.rank < (1, 0, 0)


def test_the_budget_bounds_a_tick():
    device = Device(pages=60, windows=(None,), mixed=True, cache=False)
    device.add([1, 2], 12)
    device.step()
    device.add([1] * 20, 1)
    device.add([2] * 3, 1)
    sizes, run = [], device.run
    device.run = lambda plan: (sizes.append([len(part.tokens) for part in plan.parts]), run(plan))[1]
    device.drain()
    assert sizes[:3] == [[1, 7], [1, 7], [1, 6, 1]] and max(map(sum, sizes)) == BUDGET


@pytest.mark.parametrize("mixed", [False, True])
def test_a_long_tick_is_full_and_stops_no_decode(mixed):
    device = Device(pages=60, windows=(None,), mixed=mixed, long=LONG)
    sizes, run = [], device.run
    device.run = lambda plan: (sizes.append(sum(len(part.tokens) for part in plan.parts)), run(plan))[1]
    device.add([1] * 26, 1)
    device.drain()
    assert sizes == [LONG, BUDGET, 26 - LONG - BUDGET], "the 12 tokens that are left fill none"
    device.add([1] * 20 + [2] * 6, 1)
    device.drain()
    assert sizes[3:] == [6], "5 pages of 4 tokens are cached"
    device.add([2, 1], 12)
    device.step()
    device.add([2] * 30, 1)
    device.drain()
    assert max(sizes[4:]) <= BUDGET, "while a row decodes"


def test_prompts_and_decodes_take_turns():
    """Without mixed ticks: a decode tick after a budget of prompt tokens, so that a stream of prompts stops nobody."""
    device = Device(pages=60, windows=(None,), cache=False)
    device.add([1, 2], 12)
    device.step()
    device.add([1] * 24, 1)
    kinds, run = [], device.run
    device.run = lambda plan: (kinds.append(plan.chunk), run(plan))[1]
    while len(kinds) < 6:
        device.step()
    assert kinds == [True, False, True, False, True, False]


def test_a_full_pool_admits_when_the_prompt_fits():
    """Not only when the whole answer does: two requests that may take 6 pages each run beside each other in 8."""
    device = Device(pages=8, windows=(None,), cache=False)
    for _ in range(2):
        device.add([1, 2, 1], 20)
    device.step()
    device.step()
    assert len(device.scheduler.running) == 2


def test_pages_are_numbers_of_one_owner():
    pool = PagePool(3)
    page = pool.allocate()
    pool.keep(page)
    assert (pool.available, pool.cached, pool.used) == (2, 0, 1)
    pool.release(page)
    assert (pool.available, pool.cached, pool.used) == (2, 1, 0)
    pool.retain(page)
    assert (pool.cached, pool.used) == (0, 1)
    pool.drop(page)
    assert (pool.available, pool.cached, pool.used) == (2, 0, 1)
    pool.release(page)
    assert pool.available == 3


def test_rows_grow_together_as_each_would():
    tables = [PageTable(spec(5), PagePool(30), rows=3, width=8, page_size=P) for _ in range(2)]
    rng = np.random.default_rng(0)
    for _ in range(40):
        rows = rng.permutation(3)[: rng.integers(1, 4)]
        counts = rng.integers(1, 5, len(rows))
        together = tables[0].append_rows(rows, counts)
        one_by_one = [tables[1].append(row, count) for row, count in zip(rows, counts)]
        assert [slot % P for slot in together] == [slot % P for slot in np.concatenate(one_by_one)]
        np.testing.assert_array_equal(tables[0].lengths, tables[1].lengths)
        np.testing.assert_array_equal(tables[0]._first, tables[1]._first)
