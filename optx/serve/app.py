"""The web application: endpoints over the engine's loop."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from optx.serve.faults import Fault
from optx.serve.guard import ClientGone, Guard, Stream, fault_response, read_body, unless_gone
from optx.serve.loop import EngineLoop, Ticket
from optx.serve.metrics import Meter
from optx.serve.openapi import document
from optx.serve.protocol import Job, Protocol
from optx.serve.replies import DONE, REPLIES, ChatReply, Reply, encode, event

PAGE = Path(__file__).parent
PAGE_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
GONE = 499  # what logs show for a client that closed its connection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for, and who it must be."""

    api_key: str | None = None  # None: anybody
    body: int = 32 << 20  # bytes of a request's body
    seconds: float | None = None  # from a request's arrival to the end of its answer; None: any time
    step: float = 60.0  # seconds after which a step of the engine counts as hung
    cors: tuple[str, ...] = ()  # origins whose pages may call the server; ("*",): all


class Api:
    """The endpoints."""

    def __init__(self, loop: EngineLoop, protocol: Protocol, meter: Meter, limits: Limits, created: int):
        self.loop, self.protocol, self.meter, self.limits, self.created = loop, protocol, meter, limits, created

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, self.protocol.completion)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, self.protocol.chat)

    async def _generate(self, request: Request, read: Callable[[bytes], Job]) -> Response:
        data = await read_body(request, self.limits.body)
        arrived = time.perf_counter()
        job = await run_in_threadpool(read, data)
        if job.talk is not None:
            job = await unless_gone(request.receive, self._in_time(arrived, self._compacted(job, arrived)))
        ticket = self.loop.submit(job, arrived)
        reply = REPLIES[job.kind](job, self.protocol.model, self.protocol.tokenizer)
        streams = False
        try:
            # A stream's headers wait for its first token, so that what goes wrong before it has a status.
            work = ticket.next() if job.stream else self._collect(ticket, reply)
            first = await unless_gone(request.receive, self._in_time(arrived, work))
            if not job.stream:
                return _json(reply.whole())
            streams = True
            return Stream(self._events(ticket, reply, first), lambda: self.loop.cancel(ticket))
        finally:
            if not streams:
                self.loop.cancel(ticket)

    async def _collect(self, ticket: Ticket, reply: Reply) -> None:
        while pieces := await ticket.next():
            reply.add(pieces)

    async def _events(self, ticket: Ticket, reply: Reply, pieces: Sequence) -> AsyncIterator[bytes]:
        yield b"".join(reply.opening())
        try:
            while pieces:
                yield b"".join(reply.chunks(pieces))
                pieces = await self._in_time(ticket.arrived, ticket.next())
        except Fault as fault:
            yield event(fault.body) + DONE
            return
        yield b"".join(reply.closing())

    async def _compacted(self, job: Job, arrived: float) -> Job:
        """The job with old turns of its conversation in summaries, which are requests to the engine like others."""
        text, tokens = None, 0
        while (asking := await run_in_threadpool(self.protocol.summary, job, text, tokens)) is not None:
            ticket = self.loop.submit(asking, arrived)
            reply = ChatReply(asking, self.protocol.model, self.protocol.tokenizer)
            try:
                await self._collect(ticket, reply)
            finally:
                self.loop.cancel(ticket)
            text, tokens = "".join(reply.texts[0]), len(reply.ids[0])
        done = await run_in_threadpool(self.protocol.compacted, job)
        self.meter.compacted(job.talk.event)
        if not job.talk.failed:
            self.loop.forget((job.talk.before, *job.talk.asked), done.prompts[0])
        return done

    async def _in_time[T](self, arrived: float, work: Coroutine[None, None, T]) -> T:
        """The result of `work`, in what is left of the time that a request may take. Raises Fault (504)."""
        most = self.limits.seconds
        if most is None:
            return await work
        try:
            async with asyncio.timeout(max(0.0, most - (time.perf_counter() - arrived))):
                return await work
        except TimeoutError:
            told = f"the answer was not finished after {most:g} s; ask for fewer tokens, or raise --timeout"
            raise Fault(504, told, code="timeout") from None

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.protocol.model:
            told = f"model {name!r:.80} is not served here; served: {self.protocol.model!r}"
            raise Fault(404, told, param="model", code="model_not_found")
        return _json(self._model())

    def _model(self) -> dict:
        facts = {"id": self.protocol.model, "object": "model", "created": self.created, "owned_by": "optx"}
        return facts | {"max_model_len": self.protocol.context}

    async def health(self, request: Request) -> Response:
        draining = request.app.state.guard.draining
        reason = self.loop.unhealthy() or ("the server is shutting down" if draining else None)
        if reason is not None:
            return _json({"status": "unhealthy", "reason": reason}, 503)
        return _json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self.meter.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return _json(document(self.protocol, self.limits.api_key is not None, self.meter.version))


def make_app(api: Api) -> tuple[ASGIApp, Guard]:
    """The application and the guard that drains it."""
    routes = [
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        Route("/openapi.json", api.openapi),
        *_page(),
    ]
    handlers = {Fault: _on_fault, HTTPException: _on_http, ClientGone: _on_gone, Exception: _on_bug}
    inner = Starlette(routes=routes, exception_handlers=handlers)
    guard = Guard(inner, api_key=api.limits.api_key, meter=api.meter)
    inner.state.guard = guard
    inner.router.redirect_slashes = False
    if not api.limits.cors:
        return guard, guard
    allowed = {"allow_methods": ["GET", "POST"], "allow_headers": ["Authorization", "Content-Type"]}
    return CORSMiddleware(guard, allow_origins=api.limits.cors, **allowed), guard


def _page() -> Iterator[Route]:
    """The files of the page that ships with the server, read once."""
    for path in sorted(PAGE.glob("page.*")):
        if path.suffix not in PAGE_TYPES:
            continue
        content, kind = path.read_bytes(), PAGE_TYPES[path.suffix]
        where = "/" if path.suffix == ".html" else f"/{path.name}"
        yield Route(where, lambda request, content=content, kind=kind: Response(content, media_type=kind))


def _json(body: Mapping, status: int = 200) -> Response:
    return Response(encode(body), status, media_type="application/json")


async def _on_fault(request: Request, fault: Fault) -> Response:
    return fault_response(fault)


async def _on_gone(request: Request, error: ClientGone) -> Response:
    return Response(status_code=GONE)


async def _on_http(request: Request, error: HTTPException) -> Response:
    told = {
        404: f"no such path: {request.url.path[:200]}; GET /openapi.json lists them",
        405: f"{request.method} {request.url.path[:200]}: wrong method; allowed: {(error.headers or {}).get('Allow')}",
    }
    headers = dict(error.headers or {})
    return fault_response(Fault(error.status_code, told.get(error.status_code, str(error.detail)), headers=headers))


async def _on_bug(request: Request, error: Exception) -> Response:
    return fault_response(Fault(500, "the server made an error; its log says more", code="internal_error"))
