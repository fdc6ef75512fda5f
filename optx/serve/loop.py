"""The thread that owns the engine: requests come in through a queue, pieces of answers go out to asyncio.

A step that raises fails the requests that ran in it, and the engine makes its caches anew; when that helps no longer the loop
says so and serves nothing more. Cache pages belong to this thread alone: a client that vanishes is a message to it.
"""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from optx.engine.engine import Engine
from optx.engine.request import Logprobs, Request
from optx.errors import QueueFull, RequestError
from optx.generate import Answer
from optx.serve.faults import Fault, busy
from optx.serve.metrics import Meter
from optx.serve.protocol import Job
from optx.tokenizer import Tokenizer

FAILURES = 3  # failures with no request finished between them, after which the loop gives up
log = logging.getLogger("optx.serve")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
    """One token of an answer with its log-probabilities."""

    id: int
    offset: int  # characters of the answer before it
    logprobs: Logprobs | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step gave to one answer."""

    index: int  # of the answer among the ticket's
    ids: tuple[int, ...]
    text: str  # final: no stop text can begin in it any more
    tokens: tuple[Token, ...] = ()  # those of the text, where log-probabilities are wanted
    finish: str | None = None  # "stop" or "length"


class Ticket:
    """One job on its way through the engine. `next` gives its pieces."""

    def __init__(self, job: Job, arrived: float):
        self.job, self.arrived = job, arrived
        self.left = job.answers  # answers that have not ended
        self.events: asyncio.Queue[Piece | Fault] = asyncio.Queue()

    async def next(self) -> list[Piece]:
        """Pieces that have come, at least one; [] after the last. Raises the Fault that ended the job."""
        if not self.left:
            return []
        found = [await self.events.get()]
        while not self.events.empty():
            found.append(self.events.get_nowait())
        for event in found:
            if isinstance(event, Fault):
                raise event
        self.left -= sum(piece.finish is not None for piece in found)
        return found


@dataclasses.dataclass(eq=False)
class Live:
    """An answer while it is being decoded. Owned by the thread."""

    ticket: Ticket
    index: int
    request: Request
    answer: Answer
    ids: list[int] = dataclasses.field(default_factory=list)  # since the last piece
    tokens: list[Token] = dataclasses.field(default_factory=list)  # whose text has not gone out yet
    last: float | None = None  # time of the newest token, seconds

    def push(self, token: int) -> str:
        self.ids.append(token)
        offset, wanted = len(self.answer.text), self.request.sampling.logprobs is not None
        text = self.answer.push(token)
        if wanted and token not in self.request.stop_ids:
            found = self.request.logprobs[len(self.request.output) - 1]
            self.tokens.append(Token(id=token, offset=offset, logprobs=found))
        return text

    def piece(self, text: str, finish: str | None) -> Piece:
        """What is new. Tokens wait for their text; those of a stop text never come."""
        whole = self.answer.tokenizer is None or (finish is not None and not self.answer.stopped)
        count = sum(whole or token.offset < self.answer.sent for token in self.tokens)
        ids, tokens = tuple(self.ids), tuple(self.tokens[:count])
        self.ids.clear()
        del self.tokens[:count]
        return Piece(index=self.index, ids=ids, text=text, tokens=tokens, finish=finish)


class EngineLoop:
    """Steps an engine in a thread of its own."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, meter: Meter, *, step_limit: float):
        """engine: warmed up. step_limit: seconds that a step may take before the loop counts as hung."""
        self._engine, self._tokenizer, self._meter, self._limit = engine, tokenizer, meter, step_limit
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: dict[int, Live] = {}  # by the request's id
        self._entering: Ticket | None = None  # handed to the engine just now
        self._out: list[tuple[Ticket, Piece | Fault]] = []
        self._began: float | None = None  # when the step that runs now began
        self._failures = 0
        self._stopping = False
        self._aio: asyncio.AbstractEventLoop | None = None
        self._on_death: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.trouble: str | None = None  # why requests cannot be served now
        self.dead = False  # whether that is for good

    def start(self, on_death: Callable[[], None]) -> None:
        """Starts the thread, from the running asyncio loop, where `on_death` is called when the thread gives up."""
        self._aio, self._on_death = asyncio.get_running_loop(), on_death
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step that runs now."""
        self._inbox.put(self._stop)
        while self._thread.is_alive():
            await asyncio.sleep(0.01)

    def submit(self, job: Job, arrived: float) -> Ticket:
        """Hands a job in, which came at `arrived` (perf_counter seconds). Raises Fault (503) when the loop has ended."""
        if self.dead:
            raise self._stopped()
        ticket = Ticket(job, arrived)
        self._inbox.put(lambda: self._admit(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends what is left of a job, and frees what it holds. Says nothing to the ticket."""
        if ticket.left:
            self._inbox.put(lambda: self._drop(ticket))

    def forget(self, prompts: Sequence[list[int]], keep: list[int]) -> None:
        """Gives the cached pages of prompts back that nobody will send again, but for those that `keep` begins with."""

        def drop() -> None:
            self._meter.compaction_pages += sum(self._engine.forget(prompt, keep) for prompt in prompts)

        self._inbox.put(drop)

    def unhealthy(self) -> str | None:
        """Why requests are not being served now, None while they are."""
        began = self._began
        if self.trouble is None and began is not None and time.perf_counter() - began > self._limit:
            return f"a step has run for {time.perf_counter() - began:.0f} s; allowed: {self._limit:g} s"
        return self.trouble

    # The thread.

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._turn()
                continue
            except Exception as error:
                log.exception("the engine failed")
                told = f"{type(error).__name__}: {error}"[:500]
            self._fail(told)  # outside `except`: the traceback holds the caches

    def _turn(self) -> None:
        if self.dead:  # whoever asked before it was known is told so
            self._inbox.get()()
            self._send()
            return
        if self.trouble is not None:
            self._recover()
        self._read_inbox()
        self._began = time.perf_counter()
        found = self._engine.step()
        now, self._began = time.perf_counter(), None
        self._hand_out(found, now)
        self._meter.stats = self._engine.stats()
        self._send()

    def _read_inbox(self) -> None:
        if self._engine.idle:
            self._meter.stats = self._engine.stats()
            self._inbox.get()()
        with contextlib.suppress(queue.Empty):
            while not self._stopping:
                self._inbox.get_nowait()()

    def _stop(self) -> None:
        self._stopping = True

    def _admit(self, ticket: Ticket) -> None:
        if self.dead:
            self._out.append((ticket, self._stopped()))
            return
        job, added = ticket.job, []
        self._entering = ticket
        try:
            for prompt in job.prompts:
                added += self._add(prompt, job)
        except RequestError as error:
            for request in added:
                self._engine.abort(request)
            full = isinstance(error, QueueFull)
            self._out.append((ticket, busy(429, str(error), "queue_full") if full else Fault(400, str(error))))
            return
        for index, request in enumerate(added):
            answer = Answer(request, self._tokenizer)
            self._live[request.id] = Live(ticket=ticket, index=index, request=request, answer=answer)
        self._entering = None

    def _stopped(self) -> Fault:
        return busy(503, f"the engine has stopped: {self.trouble}", "engine_stopped")

    def _add(self, prompt: list[int], job: Job) -> list[Request]:
        if len(job.samplings) > 1:
            return self._engine.add_group(prompt, job.samplings, priority=job.priority)
        return [self._engine.add_request(prompt, job.samplings[0], priority=job.priority)]

    def _drop(self, ticket: Ticket) -> None:
        for live in [live for live in self._live.values() if live.ticket is ticket]:
            self._engine.abort(live.request)
            self._end(live, "abort", time.perf_counter())

    def _hand_out(self, found: list[tuple[Request, int]], now: float) -> None:
        texts: dict[int, str] = {}
        for request, token in found:
            live = self._live.get(request.id)
            if live is not None and not live.answer.stopped:
                texts[request.id] = texts.get(request.id, "") + live.push(token)
                if live.answer.stopped:
                    self._engine.abort(request)
        for id, text in texts.items():
            live = self._live[id]
            self._meter.tokens(live.ticket.arrived, live.last, now, len(live.ids))
            live.last = now
            finish = "stop" if live.answer.stopped else live.request.finish
            if finish is not None:
                text += live.answer.end()
            if finish not in ("error", "abort"):
                self._out.append((live.ticket, live.piece(text, finish)))
            if finish is not None:
                self._end(live, finish, now)
        for live in [live for live in self._live.values() if live.request.finish is not None]:
            self._end(live, "error", now)  # without a token

    def _end(self, live: Live, finish: str, now: float) -> None:
        if self._live.pop(live.request.id, None) is None:
            return
        self._meter.finished(finish, live.ticket.arrived, now, live.request)
        if finish in ("stop", "length"):
            self._failures = 0
        elif finish == "error":
            self._out.append((live.ticket, Fault(500, live.request.error or self.trouble or "its tokens were lost")))

    def _fail(self, told: str) -> None:
        """Notes a failure; the third in a row is the last."""
        self._began = None
        self._failures += 1
        self.dead = self._failures >= FAILURES
        self.trouble = f"the engine failed: {told}"
        if self._entering is not None:
            self._out.append((self._entering, self._failed()))
            self._entering = None
        if self.dead:
            self._give_up(list(self._live.values()))
            self._aio.call_soon_threadsafe(self._on_death)
        self._send()

    def _recover(self) -> None:
        """Requests that ran, or ended in the step whose tokens were lost, fail; those that wait go on."""
        self._engine.recover()
        self._give_up([live for live in self._live.values() if live.request.finish is not None])
        self._meter.recoveries += 1
        self.trouble = None

    def _give_up(self, lost: list[Live]) -> None:
        self._out += [(ticket, self._failed()) for ticket in {live.ticket for live in lost}]
        for live in lost:
            self._meter.finished("error", live.ticket.arrived, time.perf_counter(), live.request)
            del self._live[live.request.id]

    def _failed(self) -> Fault:
        return Fault(500, self.trouble, code="engine_failed")

    def _send(self) -> None:
        if self._out:
            self._aio.call_soon_threadsafe(_deliver, self._out)
            self._out = []


def _deliver(events: list[tuple[Ticket, Piece | Fault]]) -> None:
    for ticket, event in events:
        ticket.events.put_nowait(event)
