"""What stands before the endpoints: the key, the drain, the count of requests under way; bodies and vanished clients."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from optx.serve.faults import Fault, busy
from optx.serve.metrics import Meter
from optx.serve.replies import encode

PATIENCE = (
    4  # a body so many times too large is read to its end, so that its sender, who writes first, reads the answer
)


class ClientGone(Exception):
    """The client has closed its connection; nobody reads what is sent."""


def fault_response(fault: Fault) -> Response:
    headers = {**fault.headers, **({"WWW-Authenticate": "Bearer"} if fault.status == 401 else {})}
    return Response(encode(fault.body), fault.status, headers, "application/json")


class Guard:
    """ASGI middleware. Paths under /v1 and /metrics need the key, if there is one; while `draining` no new work is taken."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, meter: Meter):
        self.app, self.meter = app, meter
        self._key = None if api_key is None else api_key.encode("utf-8")
        self.draining = False
        self._active = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting(message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                status = str(message["status"])
                self.meter.refused[status] = self.meter.refused.get(status, 0) + 1
            await send(message)

        with self._count():
            fault = self._refusal(scope)
            app = self.app if fault is None else fault_response(fault)
            await app(scope, receive, counting)

    def _refusal(self, scope: Scope) -> Fault | None:
        closed = scope["path"] == "/metrics" or scope["path"].startswith("/v1/")
        if closed and self._key is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            kind, _, key = given.partition(b" ")
            if kind.lower() != b"bearer" or not secrets.compare_digest(key.strip(), self._key):
                told = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                return Fault(401, told, code="invalid_api_key")
        if self.draining and scope["method"] == "POST":
            return busy(503, "the server is shutting down; ask another one", "shutting_down")
        return None

    @contextlib.contextmanager
    def _count(self):
        self._active += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._quiet.set()

    async def drain(self) -> None:
        """Takes no new work, and returns when what is under way has ended."""
        self.draining = True
        await self._quiet.wait()


async def read_body(request: Request, most: int) -> bytes:
    """A JSON body of at most `most` bytes. Raises Fault (413, 415), ClientGone."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Fault(415, f"Content-Type: got {kind[:80] or 'none'!r}; allowed: application/json")
    coding = request.headers.get("content-encoding", "identity")
    if coding != "identity":
        raise Fault(415, f"Content-Encoding: got {coding[:80]!r}; allowed: none")
    told = Fault(413, f"the body is larger than {most} bytes; send less", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > PATIENCE * most:
        raise told
    parts, size = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        size += len(message.get("body", b""))
        if size <= most:
            parts.append(message.get("body", b""))
        if size > PATIENCE * most or (size > most and not message.get("more_body")):
            raise told
        if not message.get("more_body"):
            return b"".join(parts)


async def unless_gone[T](receive: Receive, work: Coroutine[None, None, T]) -> T:
    """The result of `work`, which is cancelled when the client closes its connection. Raises ClientGone then."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """Server-sent events as `body` writes them, until the client goes; `done` runs whatever happens."""

    media_type = "text/event-stream"

    def __init__(self, body: AsyncIterator[bytes], done: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._body, self._done = body, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self._body:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            with contextlib.suppress(ClientGone):
                await unless_gone(receive, write())
        finally:
            self._done()
