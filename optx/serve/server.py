"""`optx serve`: from a socket and an engine to an exit code."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn

from optx.compaction import Compactor
from optx.engine.engine import Engine
from optx.errors import ServeError
from optx.serve.app import Api, Limits, make_app
from optx.serve.guard import Guard
from optx.serve.loop import EngineLoop
from optx.serve.metrics import Meter
from optx.serve.protocol import Protocol
from optx.tokenizer import Tokenizer

BACKLOG = 2048  # connections that the system holds until they are accepted
KEEP_ALIVE = 30  # seconds that a connection may be idle
LINGER = 2.0  # seconds that /health still tells why the engine has stopped, before the process ends
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def bind(host: str, port: int) -> socket.socket:
    """A socket of its own, on which nothing listens yet. Raises ServeError when it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        told = f"{host}:{port} cannot be listened on: {error.strerror or error}"
        raise ServeError(f"{told}; give another --host or --port, 0 for a port that is free") from None
    return taken


def listen(taken: socket.socket) -> str:
    """Lets connections in; -> the server's URL. Raises ServeError when another program was faster."""
    host, port = taken.getsockname()[:2]
    where = f"{f'[{host}]' if ':' in host else host}:{port}"
    try:
        taken.listen(BACKLOG)
    except OSError as error:
        raise ServeError(f"{where} cannot be listened on: {error.strerror or error}; give another --port") from None
    return f"http://{where}"


def serve(
    engine: Engine,
    *,
    model: str,
    version: str,
    tokenizer: Tokenizer | None,
    vocab: int,
    limits: Limits,
    listener: socket.socket,
    say: Callable[[str], None],
    compactor: Compactor | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what is under way and returns; a second signal ends the process at once.

    engine: warmed up. vocab: of the model. listener: from `bind`. say: prints a line. compactor: of long conversations.
    Raises: ServeError when the engine could not go on.
    """
    meter = Meter(model, version)
    loop = EngineLoop(engine, tokenizer, meter, step_limit=limits.step)
    gc.collect()
    gc.freeze()  # what stands now lives as long as the process: no pause of a collection looks at it again
    protocol = Protocol(model=model, tokenizer=tokenizer, vocab=vocab, context=engine.context, compactor=compactor)
    app, guard = make_app(Api(loop, protocol, meter, limits, int(time.time())))
    config = uvicorn.Config(
        app, lifespan="off", log_level="warning", access_log=False, server_header=False, date_header=False,
        timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=5,
    )  # fmt: skip
    server = _Server(config)
    line = f"optx serve: {model} at {listen(listener)}"
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_run(server, guard, loop, listener, lambda: say(line)))
    if loop.dead:
        raise ServeError(f"stopped: {loop.trouble}")


class _Server(uvicorn.Server):
    """uvicorn without its own signals, which would close connections before they are drained."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(server: _Server, guard: Guard, loop: EngineLoop, listener: socket.socket, ready: Callable) -> None:
    endings: list[asyncio.Task] = []

    def end() -> None:
        endings.append(asyncio.ensure_future(_end(server, guard, loop)))

    def on_signal(number: int) -> None:
        if endings:  # asked twice: whoever asks wants it now
            os._exit(128 + number)
        end()

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    loop.start(on_death=end)
    running = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    if not running.done():
        ready()
    await running
    await asyncio.gather(*endings)
    await loop.stop()


async def _end(server: _Server, guard: Guard, loop: EngineLoop) -> None:
    """Finishes what is under way, then lets the server go."""
    if loop.dead:
        await asyncio.sleep(LINGER)
    await guard.drain()
    server.should_exit = True
