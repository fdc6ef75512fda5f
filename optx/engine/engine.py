"""The loop: a plan becomes a dispatch, what the device chose is handed out, finished requests leave."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from tqdm import tqdm

from optx.cache import Layout
from optx.engine.compacted import CompactedPrompts
from optx.engine.compaction import check_eviction, fed_again, table_for
from optx.engine.constraint import Constraint
from optx.engine.drafting import with_drafter
from optx.engine.memory import page_bytes, pages_by_group
from optx.engine.options import TICKS, EngineOptions
from optx.engine.pages import PageTable
from optx.engine.plan import Part, Plan
from optx.engine.prefix import PrefixCache, refusal
from optx.engine.request import Logprobs, Request, Sampling, token_ids
from optx.engine.sampling import WAYS, Chosen, Way
from optx.engine.scheduler import Scheduler
from optx.engine.speculator import Speculator
from optx.engine.step import Program, Stepper
from optx.engine.ticks import TickBuilder
from optx.errors import QueueFull, RequestError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """An engine's counts. Pages are those of all token groups: free, cached and used ones add up to `pages`."""

    waiting: int  # requests without a row
    running: int  # requests with one
    pages: int
    pages_used: int  # rows hold them
    pages_cached: int  # the prefix cache alone holds them
    prefix_asked_tokens: int  # of prompts that the prefix cache was asked for; after a preemption not again
    prefix_hit_tokens: int  # of those, found
    prompt_tokens: int  # of finished requests, computed or found
    output_tokens: int
    preemptions: int
    finished: dict[str, int]  # requests by finish
    steps: int  # dispatches
    waited: float  # seconds in which the host waited for their results
    compiles: int  # programs compiled
    drafted: int  # tokens proposed by speculation
    accepted: int  # of those, kept


@dataclasses.dataclass(frozen=True)
class Flight:
    """A dispatch under way."""

    plan: Plan
    chosen: Chosen
    launched: float  # perf_counter seconds
    compiled: bool  # a program was compiled for it


class Engine:
    """Continuous batching over a lowered program: `add_request`, `step` until `idle`; `stream` yields one answer.

    One thread owns it: nothing here locks.
    """

    def __init__(
        self, program: Program, options: EngineOptions = EngineOptions(), eos_ids: Sequence[int] = (),
        encode: Callable[[str], list[int]] | None = None,
    ):  # fmt: skip
        """encode: text to token ids, for policies of eviction that say something to the model; None: they say nothing."""
        self.options = options
        program, share = with_drafter(program, options.speculate)
        check_eviction(program.plan, options)
        self.eos_ids = frozenset(eos_ids)
        most = sys.maxsize if program.plan.endless else program.context
        self.context = min(options.context or program.context, most)
        self._vocab = program.vocab
        host_only, alone = jax.default_backend() == "cpu", options.batch_invariant
        self._ticks = options.ticks or (1 if host_only or alone or not options.graphs else TICKS)
        self._mixed = self._may_mix(program) and not alone if options.mixed is None else options.mixed
        self._single = options.rows > 1 and not alone and (not host_only if options.single is None else options.single)
        self._overlap = not host_only if options.overlap is None else options.overlap
        self._tables = self._page_tables(program)
        off = "switched off" if not options.prefix_cache else "batch_invariant" if alone else None
        self.prefix_refusal = off or refusal(program.plan)
        kind = CompactedPrompts if any(table.policy for table in self._tables) else PrefixCache
        self.prefix = None if self.prefix_refusal else kind(self._tables)
        for group, table in enumerate(self._tables if self.prefix else ()):
            table.make_room = functools.partial(self.prefix.make_room, group)
        self.scheduler = Scheduler(
            tables=self._tables, prefix=self.prefix, rows=options.rows, budget=options.chunks[-1], long=options.long,
            ticks=self._ticks, mixed=self._mixed, alone=alone, single=self._single, encode=encode,
        )  # fmt: skip
        self.speculator = self.scheduler.speculator = options.speculate and Speculator(options.speculate, share)
        self._landed = self._waited = 0.0
        self._page_bytes = [page_bytes(program.plan, group, options.page_size) for group in range(len(self._tables))]
        self._builder = TickBuilder(self._tables, options.rows, options.sizes, self._ticks)
        room = functools.partial(Layout, page_size=options.page_size, slots=options.rows)
        layouts = [room(pages=table.pool.pages) for table in self._tables] or [room(pages=1)]
        self._stepper = Stepper(program, layouts, options.rows, options.debug, options.graphs)
        self.scheduler.compactor.ask = self._stepper.share_out
        self._flight: Flight | None = None
        self._warm: set[Way] = set()
        self._count = self._steps = self._prompt_tokens = self._output_tokens = 0
        self._finished = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.drafted = self.accepted = 0

    def _may_mix(self, program: Program) -> bool:
        """Not where the reference pads every row to the longest, and states are computed so."""
        states = any(spec is not None and not spec.holds_tokens for spec in program.plan.specs)
        return jax.default_backend() != "cpu" and not states and self.options.rows < self.options.chunks[-1]

    def _page_tables(self, program: Program) -> list[PageTable]:
        size, rows, specs = self.options.page_size, self.options.rows, program.plan.groups
        drafts = self.options.speculate.tokens if self.options.speculate else 0
        longest = max(self.options.sizes[-1], self._ticks, 1 + drafts)
        behind = fed_again(specs, self.context)
        widths = [PageTable.width_for(spec, self.context, longest, size, behind) for spec in specs]
        pages = pages_by_group(program.plan, widths, self.options)
        return [
            table_for(spec, count, rows=rows, width=width, page_size=size)
            for spec, count, width in zip(specs, pages, widths, strict=True)
        ]

    @property
    def compiles(self) -> int:
        """Programs compiled so far; constant after `warm_up`."""
        return self._stepper.compiles

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def stats(self) -> Stats:
        pools = [table.pool for table in self._tables]
        return Stats(
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            pages=sum(pool.pages for pool in pools),
            pages_used=sum(pool.used for pool in pools),
            pages_cached=sum(pool.cached for pool in pools),
            prefix_asked_tokens=self.prefix.asked if self.prefix else 0,
            prefix_hit_tokens=self.prefix.hits if self.prefix else 0,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            preemptions=self.scheduler.preemptions,
            finished=dict(self._finished),
            steps=self._steps,
            waited=self._waited,
            compiles=self.compiles,
            drafted=self.drafted,
            accepted=self.accepted,
        )

    def held(self, request: Request) -> tuple[int, float]:
        """Cache pages that a request holds now, those that it shares too, and their bytes in all layers; 0 while it waits."""
        if request.row < 0:
            return 0, 0.0
        pages = [table.pages_of(request.row) for table in self._tables]
        return sum(pages), sum(count * size for count, size in zip(pages, self._page_bytes, strict=True))

    def forget(self, tokens: Sequence[int], keep: Sequence[int] = ()) -> int:
        """Takes a prompt that nobody will send again out of the prefix cache, with all that goes on from it: the pages after
        those that it shares with the prompt `keep`. What running requests use stays. -> pages given back, of all groups."""
        return 0 if self.prefix is None else self.prefix.forget(tokens, keep)

    def add_request(
        self, prompt: Sequence[int], sampling: Sampling = Sampling(), *, priority: int = 0, context: int | None = None
    ) -> Request:
        """Queues a prompt of token ids. priority: smaller ones are served first. context: tokens of the prompt that a question
        follows: caches that need no question compact these alone, and requests with the same ones go on from them; None: all.

        Raises: RequestError when it is empty, is no list of ids of the vocabulary, has no room in context or cache, or when its
        grammar allows no first token, and for a context where none is compacted; QueueFull when as many requests wait as may.
        """
        return self.add_group(prompt, [sampling], priority=priority, context=context)[0]

    def add_group(
        self, prompt: Sequence[int], samplings: Sequence[Sampling], *, priority: int = 0, context: int | None = None
    ) -> list[Request]:
        """Queues several answers to one prompt, which is computed once; their pages with the prompt are shared.

        Raises: as `add_request`; then none is queued.
        """
        prompt = token_ids(prompt, self._vocab)
        self.scheduler.compactor.check(prompt, context)
        requests = [self._request(self._count + i, prompt, how, priority, context) for i, how in enumerate(samplings)]
        most, waiting = self.options.max_waiting, len(self.scheduler.waiting)
        # As many as there are free rows wait for no more than the next step.
        if most is not None and waiting + len(requests) > most + self.scheduler.rows.count(None):
            what = "another" if len(requests) == 1 else f"{len(requests)} more"
            raise QueueFull(f"{waiting} requests wait for a row and {what} cannot; allowed: {most}; ask again later")
        self._count += len(requests)
        self.scheduler.add(requests)
        return requests

    def _request(
        self, number: int, prompt: list[int], sampling: Sampling, priority: int, context: int | None
    ) -> Request:
        room = self.context - len(prompt)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and the context is {self.context}; shorten it to {self.context - 1}"
            )
        if sampling.max_tokens > room:
            sampling = dataclasses.replace(sampling, max_tokens=room)
        for table in self._tables:
            most = table.most(context or len(prompt), len(prompt) + sampling.max_tokens)
            pages = min(-(-most // table.page_size), table.width)
            if pages > table.pool.pages:
                raise RequestError(
                    f"prompt and answer may take {pages} cache pages of {table.page_size} tokens and the cache has "
                    f"{table.pool.pages}; lower max_tokens or make more pages"
                )
        if sampling.penalized and any(table.policy is not None and table.policy.replays for table in self._tables):
            raise RequestError(
                "penalties count the tokens of an answer, and this cache feeds a prompt again before it is compacted; leave "
                "out repetition_penalty, presence_penalty and frequency_penalty"
            )
        constraint = None if sampling.grammar is None else Constraint(sampling.grammar, self._vocab)
        stops = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else self.eos_ids)
        return Request(
            id=number, prompt=prompt, sampling=sampling, stop_ids=stops, priority=priority, way=sampling.way,
            penalized=sampling.penalized, constraint=constraint, context=context,
        )  # fmt: skip

    def abort(self, request: Request) -> None:
        """Ends a request now, wherever it is, and frees what it held."""
        if request.finish is None:
            self._finish(request, "abort")

    def step(self) -> list[tuple[Request, int]]:
        """One dispatch: a token of every running row, or several while nothing waits; beside them (mixed), or between,
        chunks of prompts up to the budget of a tick.

        -> (request, token) of every token produced; a request that ended has `finish` set. With overlap these are the tokens
        of the dispatch before, and the one that was started goes on after the return.
        """
        before, self._flight = self._flight, None
        unknown = before is not None and before.plan.width > 1  # how far its rows came
        plan = None if unknown else self.scheduler.plan(settled=before is None)
        started = self._launch(plan) if plan else None
        found = self._land(before) if before else []
        if started is None and before is not None:  # what was under way had to be known first
            plan = self.scheduler.plan()
            started = self._launch(plan) if plan else None
        if started is not None and self._overlap:
            self._flight = started
            return found
        return found + self._land(started) if started else found

    def stream(self, prompt: Sequence[int], sampling: Sampling = Sampling()) -> Iterator[int]:
        """Tokens of one request as they come; other requests, of other streams too, advance beside it."""
        request, given = self.add_request(prompt, sampling), 0
        try:
            while request.finish is None or given < len(request.output):
                if given == len(request.output):
                    self.step()
                new = request.output[given:]
                given += len(new)
                yield from new
        finally:
            self.abort(request)

    def run(self, on_token: Callable[[Request, int], None] | None = None) -> None:
        """Steps until idle."""
        while not self.idle:
            for request, token in self.step():
                if on_token is not None:
                    on_token(request, token)

    def warm_up(self, *samplings: Sampling, progress: bool = False) -> None:
        """Compiles every program that requests with such samplings need (default: greedy ones), so that none waits for one.

        Decode ticks in every way of sampling; a tick for each of `chunks` and `long` in the most capable way, which serves the
        prompts of all. From then on a request takes the cheapest of these ways that can serve it. Several programs compile at
        once.
        """
        assert self.idle, "warm up before the first request"
        ways = sorted({how.way for how in samplings or (Sampling(),)}, key=WAYS.index)
        self._warm |= set(ways)
        blank, longest = self._builder.blank, (self.options.rows if self._mixed else 1) * (self.context - 1)
        ticks = [(blank(way, single=one), way) for way in ways for one in (False, True)[: 1 + self._single]]
        if self.speculator is not None:
            ticks += [(blank(way, width=self.speculator.width), way) for way in ways]
        for chunk, less in zip(self.options.sizes, (1, *self.options.sizes), strict=False):
            if longest > less:  # else no tick has so many prompt tokens
                ticks.append((blank(ways[-1], chunk=chunk, mixed=self._mixed), ways[-1]))
        compiled = self._stepper.compile(ticks)
        for _ in tqdm(compiled, desc="warm up", unit="program", total=len(ticks), disable=not progress):
            pass
        for tick, way in ticks:  # a first run also loads the program
            self._stepper(tick, way)
        if self.options.rows > 1 or self.scheduler.compactor.kept is not None:
            self._stepper.copy(0, 0, [table.no_moves for table in self._tables])
        self.scheduler.compactor.rehearse(self._stepper.compact)

    def recover(self) -> list[Request]:
        """After a `step` that raised: running requests end with "error", their caches and the prefix cache are made anew;
        waiting ones go on. -> the requests that ended."""
        self._flight = None
        lost = self.scheduler.drop_running()
        for request in lost:
            self._note_finish(request, "error")
        self._stepper.renew()
        return lost

    def _launch(self, plan: Plan) -> Flight:
        for compaction in plan.compactions:
            self._stepper.compact(compaction)
        for copy in plan.copies:
            self._stepper.copy(copy.source, copy.target, copy.slots)
        way, began, programs = self._way(plan), time.perf_counter(), self.compiles
        chosen = self._stepper(self._builder.build(plan, way), way)
        for leaf in jax.tree.leaves(chosen):
            leaf.copy_to_host_async()
        self._steps += 1
        return Flight(plan, chosen, began, self.compiles > programs)

    def _way(self, plan: Plan) -> Way:
        """The cheapest that serves all rows, among those that were warmed up if one of these does."""
        needed = max((part.request.way for part in plan.parts), key=WAYS.index)
        able = [way for way in WAYS[WAYS.index(needed) :] if way in self._warm]
        return able[-1 if plan.chunk else 0] if able else needed

    def _land(self, flight: Flight) -> list[tuple[Request, int]]:
        """Waits for a dispatch and hands out its tokens, tick by tick."""
        start = time.perf_counter()
        plan, chosen, found = flight.plan, jax.device_get(flight.chosen), []
        self._waited += time.perf_counter() - start
        tokens = chosen.tokens.tolist()
        for part in plan.parts:
            part.request.pending -= part.rounds
            if plan.width > 1:
                kept = sum(tick[part.row] >= 0 for tick in tokens)
                self.scheduler.settle(part, kept)
                self.drafted, self.accepted = self.drafted + len(part.tokens) - 1, self.accepted + kept - 1
        self._note_speed(flight, tokens)
        for tick in range(len(tokens)):
            for part in plan.parts:
                row = 0 if plan.alone else part.row
                foreseen = plan.width == 1 or tokens[tick][row] >= 0
                if tick < part.rounds and part.request.finish is None and foreseen:
                    self._emit(part, tokens[tick][row], chosen, tick, row)
                    found.append((part.request, tokens[tick][row]))
        return found

    def _note_speed(self, flight: Flight, tokens: list[list[int]]) -> None:
        """Tells what decides about speculation what a tick gave and took."""
        plan, now = flight.plan, time.perf_counter()
        began, self._landed = max(flight.launched, self._landed), now
        if self.speculator is None or plan.chunk:
            return
        rows = len(plan.parts)
        if plan.width > 1:
            self.speculator.landed(rows, sum(token >= 0 for tick in tokens for token in tick))
        if not flight.compiled and (plan.width > 1 or plan.ticks == self._ticks):
            self.speculator.took(plan.width > 1, rows, (now - began) / plan.ticks)

    def _emit(self, part: Part, token: int, chosen: Chosen, tick: int, row: int) -> None:
        request = part.request
        assert token >= 0, "a row ended on the device before the host knew why"
        if request.first_token_at is None:
            request.first_token_at = time.perf_counter()
        request.output.append(token)
        self._output_tokens += 1
        if (wanted := request.sampling.logprobs) is not None:
            top = zip(
                chosen.top_tokens[tick, row, :wanted].tolist(),
                chosen.top_logprobs[tick, row, :wanted].tolist(),
                strict=True,
            )
            request.logprobs.append(Logprobs(float(chosen.logprobs[tick, row]), tuple(top)))
        if (constraint := request.constraint) is not None:
            constraint.accept(token)
        if token in request.stop_ids or (constraint is not None and constraint.done):
            self._finish(request, "stop")
        elif len(request.output) >= request.sampling.max_tokens:
            self._finish(request, "length")
        elif constraint is not None and constraint.stuck:
            request.error = constraint.reason
            self._finish(request, "error")

    def _finish(self, request: Request, why: str) -> None:
        self.scheduler.finish(request, why)
        self._note_finish(request, why)

    def _note_finish(self, request: Request, why: str) -> None:
        request.finished_at = time.perf_counter()
        self._finished[why] += 1
        self._prompt_tokens += len(request.prompt)

    def check(self) -> None:
        """When idle, every page is free or cached: raises AssertionError for a leak."""
        assert self.idle
        for table in self._tables:
            assert table.pool.available + table.pool.cached == table.pool.pages, "cache pages leaked"
