"""A real server under load that never lets up, with clients that vanish: is its memory bounded, are its pages whole?

    python -m optx.bench.soak MODEL [--minutes 20] [--clients 24] [--rows 8] [--context 512] [--json FILE]

MODEL is served by `optx serve` in a process of its own. More clients than rows send prompts of random lengths, half of them with
shared beginnings, streamed and whole, greedy and sampled; some leave in the middle of an answer, some send what must be refused.
One asks the same greedy question over and over and must get the same answer: a page with two writers shows there. Memory (RSS)
and page counts are sampled every second. The last line is the verdict, and so is the exit code. Needs the extra `serve`.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import aiohttp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from optx.errors import RequestError

PAGES = ("used", "cached", "free")
GROWTH = 0.03, 16 << 20  # of memory, between the middle and the last third of a run: a share and bytes, both allowed
DRAIN = 60.0  # seconds in which the server must come to rest after the load
PREFIXES = 4
ANSWER = 96  # most tokens of an answer: requests come and go
FIRST, LAST = 0.4, 0.2  # shares of requests: that leave early, that are wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A server that is ready."""

    url: str
    process: subprocess.Popen


@contextlib.contextmanager
def serving(model: str, *flags: str, stop: signal.Signals = signal.SIGTERM) -> Iterator[Served]:
    """`optx serve MODEL` with these flags on a free port, in a process of its own; ended by a signal after the body.

    Raises: RequestError when it ends before it is ready; what it says on stderr is shown.
    """
    command = [sys.executable, "-m", "optx", "serve", model, "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = next((line for line in process.stdout if line.startswith("optx serve:")), None)
        if line is None:
            raise RequestError(f"{' '.join(command)}: ended with code {process.wait()} before it was ready")
        yield Served(url=line.split()[-1], process=process)
    finally:
        process.send_signal(stop)
        try:
            process.wait(DRAIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def read_metrics(text: str) -> dict[str, float]:
    """Samples of Prometheus text without labels, by name."""
    families = text_string_to_metric_families(text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return 1024 * int(
        subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """The server at one moment."""

    at: float  # seconds from the start
    resident: int  # bytes
    pages: dict[str, int]  # used, cached, free and all
    tokens: float  # generated so far
    running: float
    waiting: float

    @property
    def whole(self) -> bool:
        return sum(self.pages[kind] for kind in PAGES) == self.pages["all"]


@dataclasses.dataclass
class Tally:
    """What clients saw."""

    done: int = 0
    left: int = 0  # clients that went away in the middle
    refused: int = 0  # wrong requests, refused as they must be
    busy: int = 0  # told to come back: the queue was full
    errors: dict[str, int] = dataclasses.field(default_factory=dict)

    def error(self, text: str) -> None:
        self.errors[text] = self.errors.get(text, 0) + 1


class Clients:
    """Clients of one server until a deadline."""

    def __init__(self, session: aiohttp.ClientSession, model: str, context: int, vocab: int, until: float):
        self.session, self.model, self.context, self.vocab, self.until = session, model, context, vocab, until
        self.tally = Tally()
        rng = np.random.default_rng(0)
        self._prefixes = [rng.integers(0, vocab, context // 4).tolist() for _ in range(PREFIXES)]

    async def wander(self, seed: int) -> None:
        """One client: request after request."""
        rng = np.random.default_rng(seed)
        while time.monotonic() < self.until:
            draw = rng.random()
            try:
                if draw < LAST:
                    await self._wrong(rng)
                elif draw < LAST + FIRST:
                    await self._leave(self._body(rng), rng)
                else:
                    await self._whole(self._body(rng))
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                self.tally.error(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)  # a server that has gone is not asked a thousand times a second

    async def repeat(self) -> None:
        """The same greedy question over and over."""
        body = {
            "model": self.model,
            "prompt": self._prefixes[0][:24],
            "max_tokens": 24,
            "temperature": 0,
            "ignore_eos": True,
        }
        first = None
        while time.monotonic() < self.until:
            async with self.session.post("/v1/completions", json=body) as response:
                if response.status == 200:
                    text = (await response.json())["choices"][0]["text"]
                    first = text if first is None else first
                    if text != first:
                        self.tally.error(f"the same question got another answer: {text!r} in place of {first!r}")
            await asyncio.sleep(0.5)

    def _body(self, rng) -> dict:
        prompt = rng.integers(0, self.vocab, int(rng.integers(1, self.context // 3))).tolist()
        if rng.random() < 0.5:
            prompt = self._prefixes[rng.integers(PREFIXES)] + prompt
        most = int(rng.integers(1, min(ANSWER, self.context - len(prompt)) + 1))
        knobs = {"temperature": float(rng.choice([0.0, 1.0])), "seed": int(rng.integers(1 << 31))}
        return {"model": self.model, "prompt": prompt, "max_tokens": most, "ignore_eos": True, **knobs}

    async def _whole(self, body: dict) -> None:
        async with self.session.post("/v1/completions", json=body) as response:
            if not await self._served(response):
                return
            answer = await response.json()
        if answer["usage"]["completion_tokens"] != min(body["max_tokens"], self.context - len(body["prompt"])):
            self.tally.error(
                f"an answer of {answer['usage']['completion_tokens']} tokens in place of {body['max_tokens']}"
            )
        self.tally.done += 1

    async def _leave(self, body: dict, rng) -> None:
        """Goes after some of the answer, streamed or not; the connection closes."""
        patience = float(rng.exponential(1.0))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                async with self.session.post(
                    "/v1/completions", json=body | {"stream": bool(rng.random() < 0.5)}
                ) as response:
                    if not await self._served(response):
                        return
                    await response.read()
                self.tally.done += 1
                return
        self.tally.left += 1

    async def _wrong(self, rng) -> None:
        wrong = (
            {"prompt": []},
            {"prompt": [self.vocab + 10**6]},
            {"max_tokens": -1},
            {"colour": "red"},
            {"temperature": "x"},
        )
        body = self._body(rng) | wrong[rng.integers(len(wrong))]
        async with self.session.post("/v1/completions", json=body) as response:
            await response.read()
            if response.status == 400:
                self.tally.refused += 1
            else:
                self.tally.error(f"a wrong request was answered with {response.status}")

    async def _served(self, response: aiohttp.ClientResponse) -> bool:
        if response.status == 200:
            return True
        text = await response.text()
        if response.status == 429:
            self.tally.busy += 1
            await asyncio.sleep(float(response.headers["Retry-After"]))
        else:
            self.tally.error(f"HTTP {response.status}: {text[:200]}")
        return False


async def sample(session: aiohttp.ClientSession, pid: int, start: float) -> Sample:
    async with session.get("/metrics") as response:
        found = read_metrics(await response.text())
    pages = {kind: int(found[f"optx:kv_pages_{kind}"]) for kind in PAGES} | {"all": int(found["optx:kv_pages"])}
    return Sample(
        at=time.monotonic() - start,
        resident=resident(pid),
        pages=pages,
        tokens=found["optx:generation_tokens_total"],
        running=found["optx:num_requests_running"],
        waiting=found["optx:num_requests_waiting"],
    )


async def soak(server: Served, *, minutes: float, clients: int, vocab: int) -> tuple[list[Sample], Tally]:
    """Loads the server, prints a line a minute -> samples, the last one at rest, and what clients saw."""
    start, samples = time.monotonic(), []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, connector=connector) as session:
        async with session.get("/v1/models") as response:
            facts = (await response.json())["data"][0]
        load = Clients(session, facts["id"], facts["max_model_len"], vocab, start + 60 * minutes)
        tasks = [asyncio.create_task(load.wander(seed)) for seed in range(clients)]
        tasks.append(asyncio.create_task(load.repeat()))
        shown = 0
        while not all(task.done() for task in tasks):
            await asyncio.sleep(1)
            samples.append(await sample(session, server.process.pid, start))
            if samples[-1].at >= 60 * (shown + 1):
                before = next((s for s in samples if s.at >= 60 * shown), samples[0])
                shown += 1
                print(line(before, samples[-1], load.tally), flush=True)
        await asyncio.gather(*tasks)
        end = time.monotonic() + DRAIN
        while time.monotonic() < end:
            samples.append(await sample(session, server.process.pid, start))
            if not samples[-1].running + samples[-1].waiting + samples[-1].pages["used"]:
                break
            await asyncio.sleep(0.5)
    return samples, load.tally


def line(before: Sample, now: Sample, tally: Tally) -> str:
    """One minute in a line."""
    rate = (now.tokens - before.tokens) / max(now.at - before.at, 1e-9)
    pages = ", ".join(f"{now.pages[kind]} {kind}" for kind in PAGES)
    seen = f"{tally.done} done, {tally.left} left, {tally.refused} refused, {tally.busy} busy"
    seen += f", {sum(tally.errors.values())} errors"
    return (
        f"{now.at / 60:5.1f} min  {rate:8,.1f} tokens/s  {now.resident / 2**20:8,.1f} MiB  "
        f"pages {pages}  {now.running:.0f} running, {now.waiting:.0f} waiting  {seen}"
    )


def growth(samples: Sequence[Sample]) -> tuple[float, float]:
    """Medians of the resident bytes in the middle and in the last third."""
    third = max(len(samples) // 3, 1)
    middle, last = samples[third : 2 * third] or samples, samples[-third:]
    return statistics.median(s.resident for s in middle), statistics.median(s.resident for s in last)


def verdict(samples: Sequence[Sample], tally: Tally, code: int) -> list[str]:
    """What is wrong; nothing if all is well. code: the server's exit code."""
    found = [f"{count} x {text}" for text, count in tally.errors.items()]
    middle, last = growth(samples)
    if last > middle * (1 + GROWTH[0]) + GROWTH[1]:
        found.append(
            f"memory grew from {middle / 2**20:,.1f} to {last / 2**20:,.1f} MiB between the middle and the last third"
        )
    broken = [s for s in samples if not s.whole]
    if broken:
        found.append(f"the page sum was wrong in {len(broken)} of {len(samples)} samples, first {broken[0].pages}")
    if samples[-1].running or samples[-1].waiting or samples[-1].pages["used"]:
        found.append(f"at rest after {DRAIN:g} s there are still {samples[-1].pages['used']} pages in use")
    if not tally.done or not tally.left:
        found.append(f"no load: {tally.done} answers, {tally.left} clients that left")
    return found + ([f"the server ended with code {code}"] if code else [])


def report(samples: Sequence[Sample], tally: Tally, wrong: Sequence[str]) -> Mapping:
    middle, last = growth(samples)
    return {
        "minutes": samples[-1].at / 60,
        "tokens": samples[-1].tokens,
        "resident_bytes": {"middle_third": middle, "last_third": last, "most": max(s.resident for s in samples)},
        "clients": dataclasses.asdict(tally),
        "wrong": list(wrong),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what `optx serve` takes")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=10_000, help="token ids are drawn below this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server ends too
    with serving(args.model, "--rows", str(args.rows), "--context", str(args.context)) as server:
        print(f"{args.model} at {server.url}: {args.clients} clients, {args.minutes:g} minutes", flush=True)
        work = soak(server, minutes=args.minutes, clients=args.clients, vocab=args.vocab)
        samples, tally = asyncio.run(work)
    wrong = verdict(samples, tally, server.process.returncode)
    if args.json:
        args.json.write_text(json.dumps(report(samples, tally, wrong), indent=1) + "\n")
    print(
        "\n".join(["FAILED", *wrong])
        if wrong
        else "passed: memory bounded, pages whole, no error, server ended in order"
    )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
