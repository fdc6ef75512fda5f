"""The loop: admit requests, prefill a chunk or decode all rows, hand out tokens."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from optx.cache import Layout
from optx.engine.pages import PagePool, PageTable
from optx.engine.prefix import PrefixCache, refusal
from optx.engine.request import Logprobs, Request, Sampling, token_ids
from optx.engine.sampling import BIASES, KNOBS, WAYS, Chosen
from optx.engine.step import Program, Stepper, Tick
from optx.errors import RequestError

TICKS = 16
STOPS = 8  # stop ids a row that the device looks for; with more of them the host looks at every token


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Room and chunk sizes of an engine. Sizes are fixed at start: every tick runs a program compiled for one of them."""

    rows: int = 8  # requests decoded at once
    context: int | None = None  # longest prompt + answer, tokens; None: the model's
    page_size: int = 64  # tokens a cache page
    chunks: tuple[int, ...] = (16, 64, 256, 512)  # prompt tokens a prefill tick, padded up to one of these, ascending
    pages: int | None = None  # pages a token group; None: enough for all rows at full context
    ticks: int | None = None  # decode ticks a dispatch while nothing waits; None: 16, on a CPU 1
    mixed: bool | None = None  # chunks of prompts and decodes in one tick; None: on accelerators
    prefix_cache: bool = True  # keys and values stay while there is room, for prompts that begin alike
    debug: bool = False  # check page tables on the device in every tick; slower

    def __post_init__(self):
        for name in ("rows", "context", "page_size", "pages", "ticks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"engine.{name}: got {value}; allowed: at least 1")
        chunks = tuple(self.chunks)
        if not chunks or chunks[0] < 1 or sorted(set(chunks)) != list(chunks):
            raise RequestError(f"engine.chunks: got {list(chunks)}; allowed: ascending sizes of at least 1")
        object.__setattr__(self, "chunks", chunks)


class Engine:
    """Continuous batching over a lowered program: `add_request`, `step` until `idle`; `stream` yields one answer."""

    def __init__(self, program: Program, options: EngineOptions = EngineOptions(), eos_ids: Sequence[int] = ()):
        self.options = options
        self.eos_ids = frozenset(eos_ids)
        self.context = min(options.context or program.context, program.context)
        self._vocab = program.vocab
        self._ticks = options.ticks or (1 if jax.default_backend() == "cpu" else TICKS)
        self._tables = [self._page_table(spec) for spec in program.plan.groups]
        layouts = [
            Layout(pages=table.pool.pages, page_size=options.page_size, slots=options.rows) for table in self._tables
        ] or [Layout(pages=1, page_size=options.page_size, slots=options.rows)]
        self._mixed = self._may_mix(program) if options.mixed is None else options.mixed
        self._stepper = Stepper(program, layouts, options.rows, options.debug)
        self.prefix_refusal = "switched off" if not options.prefix_cache else refusal(program.plan)
        self.prefix = None if self.prefix_refusal else PrefixCache(self._tables)
        for group, table in enumerate(self._tables if self.prefix else ()):
            table.make_room = functools.partial(self.prefix.make_room, group)
        self._rows: list[Request | None] = [None] * options.rows
        self._waiting: collections.deque[Request] = collections.deque()
        self._prefilling: collections.deque[Request] = collections.deque()
        self._count = 0

    def _may_mix(self, program: Program) -> bool:
        """Not where the reference pads every row to the longest, and states are computed so."""
        states = any(spec is not None and not spec.holds_tokens for spec in program.plan.specs)
        return jax.default_backend() != "cpu" and not states and self.options.rows < self.options.chunks[-1]

    def _page_table(self, spec) -> PageTable:
        size, rows = self.options.page_size, self.options.rows
        width = PageTable.width_for(spec, self.context, max(self.options.chunks[-1], self._ticks), size)
        pool = PagePool(self.options.pages or width * rows)
        return PageTable(spec, pool, rows=rows, width=width, page_size=size)

    @property
    def compiles(self) -> int:
        """Programs compiled so far; constant once every chunk size and the decode tick have run (`warm_up`)."""
        return self._stepper.compiles

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._prefilling and all(request is None for request in self._rows)

    def add_request(self, prompt: Sequence[int], sampling: Sampling = Sampling()) -> Request:
        """Queues a prompt of token ids.

        Raises: RequestError when it is empty, is no list of ids of the vocabulary, or has no room in context or cache.
        """
        prompt = token_ids(prompt, self._vocab)
        room = self.context - len(prompt)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and the context is {self.context}; shorten it to {self.context - 1}"
            )
        if sampling.max_tokens > room:
            sampling = dataclasses.replace(sampling, max_tokens=room)
        stops = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else self.eos_ids)
        request = Request(id=self._count, prompt=prompt, sampling=sampling, stop_ids=stops)
        for table, pages in zip(self._tables, self._most_pages(request), strict=True):
            if pages > table.pool.pages:
                raise RequestError(
                    f"prompt and answer may take {pages} cache pages of {table.page_size} tokens and the cache has "
                    f"{table.pool.pages}; lower max_tokens or make more pages"
                )
        self._count += 1
        self._waiting.append(request)
        return request

    def abort(self, request: Request) -> None:
        """Ends a request now and frees what it held."""
        if request.finish is None:
            self._finish(request, "abort")

    def step(self) -> list[tuple[Request, int]]:
        """One dispatch: while prompts are unfinished a chunk of the first (mixed: a token of every running row and as many prompt
        tokens as the largest chunk has room for); else a token of every running row, or several while nothing waits.

        -> (request, token) of every token produced; a request that ended has `finish` set.
        """
        self._admit()
        if self._prefilling:
            return self._mix() if self._mixed else self._prefill(self._prefilling[0])
        running = [request for request in self._rows if request is not None]
        return self._decode(running) if running else []

    def stream(self, prompt: Sequence[int], sampling: Sampling = Sampling()) -> Iterator[int]:
        """Tokens of one request as they come; other requests advance beside it."""
        request = self.add_request(prompt, sampling)
        try:
            while request.finish is None:
                yield from [token for owner, token in self.step() if owner is request]
        finally:
            self.abort(request)

    def run(self, on_token: Callable[[Request, int], None] | None = None) -> None:
        """Steps until idle."""
        while not self.idle:
            for request, token in self.step():
                if on_token is not None:
                    on_token(request, token)

    def warm_up(self, sampling: Sampling = Sampling()) -> None:
        """Compiles every program that requests with such a sampling need, so that none of them waits for one."""
        assert self.idle, "warm up before the first request"
        sampling = dataclasses.replace(sampling, max_tokens=2, ignore_eos=True, stop=(), stop_ids=())
        lengths = [min(chunk, self.context - 1) for chunk in self.options.chunks]
        # A shorter context leaves no prompt long enough for the chunk.
        long_enough = [
            length for length, less in zip(lengths, (0, *self.options.chunks), strict=False) if length > less
        ]
        if self._ticks > 1 and self.context > 3:
            self._warm([0], dataclasses.replace(sampling, max_tokens=3))
        for length in long_enough:
            self._warm([0] * length, sampling)

    def _warm(self, prompt: list[int], sampling: Sampling) -> None:
        self.add_request(prompt, sampling)
        self.run()
        if self.prefix is not None:  # the next prompt begins alike
            self.prefix.clear()
            self.prefix.hits = self.prefix.asked = 0

    def _most_pages(self, request: Request) -> list[int]:
        """Pages that the request can come to hold, by token group."""
        tokens = len(request.prompt) + request.sampling.max_tokens
        return [min(-(-tokens // table.page_size), table.width) for table in self._tables]

    def _fits(self, request: Request) -> bool:
        """Whether every admitted request can grow to its end beside this one: a row never waits for pages."""
        held = [self._most_pages(other) for other in self._rows if other is not None]
        most = [sum(pages) for pages in zip(*held, self._most_pages(request), strict=True)]
        return all(pages <= table.pool.pages for pages, table in zip(most, self._tables, strict=True))

    def _admit(self) -> None:
        while self._waiting and None in self._rows and self._fits(self._waiting[0]):
            request = self._waiting.popleft()
            request.row = self._rows.index(None)
            self._rows[request.row] = request
            self._prefilling.append(request)
            # A penalized row has to meet every token of its prompt.
            if self.prefix is not None and not request.sampling.penalized:
                self.prefix.asked += len(request.prompt)
                request.computed = self.prefix.adopt(request.row, self.prefix.match(request.prompt))
                self.prefix.hits += request.computed

    def _prefill(self, request: Request) -> list[tuple[Request, int]]:
        chunk = request.prompt[request.computed :][: self.options.chunks[-1]]
        width = self._bucket(len(chunk))
        tokens = np.zeros(width, np.int32)
        tokens[: len(chunk)] = chunk
        return self._after_chunk(request, self._dispatch([request], tokens, [len(chunk)], width), 0)

    def _mix(self) -> list[tuple[Request, int]]:
        rows: list[Request | None] = list(self._rows)
        running = [request for request in rows if request is not None and request not in self._prefilling]
        room = self.options.chunks[-1] - len(running)
        parts: list[list[int]] = [[-1] if request in running else [] for request in rows]
        for request in self._prefilling:
            parts[request.row] = request.prompt[request.computed :][:room]
            room -= len(parts[request.row])
        chunked = [request for request in self._prefilling if parts[request.row]]
        tokens = np.zeros(self._bucket(sum(map(len, parts))), np.int32)
        tokens[: sum(map(len, parts))] = [token for part in parts for token in part]
        batch = [request if part else None for request, part in zip(rows, parts, strict=True)]
        chosen = self._dispatch(batch, tokens, [len(part) for part in parts], None)
        found = [out for request in running for out in self._emit(request, chosen, 0, request.row)]
        return found + [out for request in chunked for out in self._after_chunk(request, chosen, request.row)]

    def _bucket(self, count: int) -> int:
        return next(chunk for chunk in self.options.chunks if chunk >= count)

    def _after_chunk(self, request: Request, chosen: Chosen, row: int) -> list[tuple[Request, int]]:
        if self.prefix is not None:  # after every chunk: windows pass pages by that another prompt would go on from
            self.prefix.insert(request.row, request.prompt[: request.computed])
        if request.computed < len(request.prompt):
            return []
        self._prefilling.remove(request)
        return self._emit(request, chosen, 0, row)

    def _decode(self, running: list[Request]) -> list[tuple[Request, int]]:
        rows: list[Request | None] = list(self._rows)
        tokens = np.full(len(rows), -1, np.int32)
        counts = [0 if request is None else 1 for request in rows]
        found = []
        ticks = self._ticks_for(running)
        chosen = self._dispatch(rows, tokens, counts, 1, ticks)
        for i in range(ticks):
            found += [out for r in running if r.finish is None for out in self._emit(r, chosen, i, r.row)]
        return found

    def _ticks_for(self, running: list[Request]) -> int:
        """Decode ticks of the next dispatch: one where the host has to look at every token."""
        if self._waiting or any(r.sampling.stop or len(r.stop_ids) > STOPS for r in running):
            return 1
        return self._ticks if max(r.left for r in running) > 1 else 1

    def _dispatch(
        self, batch: list[Request | None], tokens: np.ndarray, counts: list[int], width: int | None, ticks: int = 1
    ) -> Chosen:
        """Runs ticks over `batch` (None: an idle row) -> what was chosen as numpy arrays, [ticks, rows, ...].

        width: tokens a row, padding included; None: row after row, as `counts` says.
        """
        b = len(batch)
        live = [(i, request) for i, request in enumerate(batch) if request is not None]
        slots = np.full(b, self.options.rows, np.int32)
        way = max((request.sampling.way for _, request in live), key=WAYS.index)
        biases = BIASES if way == "full" else 0
        starts, seeds, sampling = (
            np.zeros(b, np.int32),
            np.zeros(b, np.uint32),
            np.zeros((b, len(KNOBS) + biases), np.float32),
        )
        limits, stops = np.zeros(b, np.int32), np.full((b, STOPS), -1, np.int32)
        prompts, biased = np.zeros(b, np.int32), np.full((b, biases), -1, np.int32)
        writes = [np.full((ticks, len(tokens)), table.pool.pages * table.page_size, np.int32) for table in self._tables]
        first = np.cumsum(counts) - counts if width is None else np.arange(b) * width
        ahead = np.zeros(b, np.int32)  # slots taken for ticks after the first
        for i, request in live:
            how = request.sampling
            slots[i], starts[i], seeds[i], prompts[i] = request.row, request.computed, how.seed, len(request.prompt)
            limits[i] = request.left if request.computed + counts[i] >= len(request.prompt) else 0
            ids = sorted(request.stop_ids)[:STOPS]
            stops[i, : len(ids)] = ids
            sampling[i, : len(KNOBS)] = how.knobs
            for at, (token, bias) in enumerate((how.logit_bias or {}).items()):
                biased[i, at], sampling[i, len(KNOBS) + at] = token, bias
            rounds = min(ticks, request.left)
            ahead[i] = rounds - 1
            for table, write in zip(self._tables, writes, strict=True):
                taken = table.append(request.row, rounds * counts[i]).reshape(rounds, counts[i])
                write[:rounds, first[i] : first[i] + counts[i]] = taken
            request.computed += counts[i]
        rows = np.minimum(slots, self.options.rows - 1)
        tick = Tick(
            tokens=tokens,
            counts=np.asarray(counts, np.int32),
            starts=starts,
            slots=slots,
            tables=tuple(table.table[None, rows] for table in self._tables),
            lengths=tuple(
                np.where(slots < self.options.rows, table.lengths[rows] - ahead, 0)[None] for table in self._tables
            ),
            writes=tuple(writes),
            limits=limits,
            stops=stops,
            prompts=prompts,
            biased=biased,
            seeds=seeds,
            sampling=sampling,
            ticks=ticks,
            mixed=width is None,
        )
        chosen = jax.device_get(self._stepper(tick, way))
        for i, request in live:
            request.computed += int(np.sum(chosen.tokens[1:, i] >= 0))
        return chosen

    def _emit(self, request: Request, chosen: Chosen, tick: int, row: int) -> list[tuple[Request, int]]:
        token = int(chosen.tokens[tick, row])
        request.output.append(token)
        if (wanted := request.sampling.logprobs) is not None:
            top = zip(
                chosen.top_tokens[tick, row, :wanted].tolist(),
                chosen.top_logprobs[tick, row, :wanted].tolist(),
                strict=True,
            )
            request.logprobs.append(Logprobs(float(chosen.logprobs[tick, row]), tuple(top)))
        if token in request.stop_ids:
            self._finish(request, "stop")
        elif len(request.output) >= request.sampling.max_tokens:
            self._finish(request, "length")
        return [(request, token)]

    def _finish(self, request: Request, why: str) -> None:
        request.finish = why
        if request.row < 0:
            self._waiting.remove(request)
            return
        if request in self._prefilling:
            self._prefilling.remove(request)
        if self.prefix is not None and request.computed > len(request.prompt):
            self.prefix.insert(request.row, [*request.prompt, *request.output][: request.computed])
        for table in self._tables:
            table.free(request.row)
        self._rows[request.row] = None

    def check(self) -> None:
        """When idle, every page is free or cached: raises AssertionError for a leak."""
        assert self.idle
        for group, table in enumerate(self._tables):
            cached = self.prefix.cached(group) if self.prefix else 0
            assert table.pool.available + cached == table.pool.pages, "cache pages leaked"
