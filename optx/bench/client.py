"""A served load over HTTP: an asyncio client of OpenAI's completions and chat, streamed. Needs the extra `serve`."""

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import aiohttp
from tqdm import tqdm

from optx.bench.figures import Outcome, summarize
from optx.bench.load import Ask, Load, Server, asks
from optx.errors import RequestError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
REFUSED = (400, 415, 422)  # what servers answer to a prompt in a form that they do not take
# One token each in the vocabularies in use, with the space before it.
TEXT = (
    "the of and to in is it you that he was for on are with as his they be at one have this from or had by but some what "
    "there we can out other were all your when up use how said an each she which do their time if will way about many then "
    "them would like so these her long make thing see him two has look more day could go come did my no most who over know "
    "than call first people down side been now find any new work part take get place made where after back only round man year "
    "came show every good me give our under name very through just form much great think say help low line before turn cause"
)
WORDS = TEXT.split()


def run(server: Server, load: Load, slo: Mapping[str, float], *, progress: bool = False) -> dict:
    """Figures of the load as `figures.summarize` has them, with `form`, `model` and `server` {url, endpoint, prompts, counted}:
    prompts are "token ids" or "text", answers' tokens counted by "usage" or, of a server that reports none, by "pieces".

    Raises: RequestError when the server cannot be reached, refuses the first request, or completes none.
    """
    return asyncio.run(_run(server, load, slo, progress))


async def _run(server: Server, load: Load, slo: Mapping[str, float], progress: bool) -> dict:
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    timeout = aiohttp.ClientTimeout(total=server.timeout)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        server.url.rstrip("/"), headers=headers, timeout=timeout, connector=connector
    ) as session:
        client = Client(session, server, load, server.model or await _first_model(session, server.url))
        todo = asks(load)
        client = await _probed(client, todo[0])
        outcomes = await _drive(client, load, todo, progress)
    figures = {"form": "HTTP", "model": client.model} | summarize(outcomes, load, slo)
    if not figures["requests"]["completed"]:
        raise RequestError(f"no request of {len(outcomes)} was completed: {next(iter(figures['errors']))}")
    facts = {"url": server.url, "endpoint": server.endpoint, "prompts": "text" if client.text else "token ids"}
    return figures | {"server": facts | {"counted": "usage" if client.usage else "pieces"}}


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get("/v1/models") as response:
            if response.status != 200:
                raise RequestError(f"{url}/v1/models: {await _refusal(response)}")
            return (await response.json())["data"][0]["id"]
    except (aiohttp.ClientError, TimeoutError) as error:
        raise RequestError(f"{url}: cannot be reached: {_why(error)}; is the server up?") from None
    except (LookupError, TypeError, ValueError):
        raise RequestError(f"{url}/v1/models: lists no model; name one with --model") from None


async def _probed(client: "Client", ask: Ask) -> "Client":
    """The client after a first request: it falls back to text where ids are refused, and learns whether usage is reported."""
    first = dataclasses.replace(ask, prompt=ask.prompt[::-1])  # caches its prefix for no other
    outcome = await client.send(first)
    if outcome.status in REFUSED and not client.text:
        client.text = True
        outcome = await client.send(first)
    if outcome.error is not None:
        raise RequestError(f"{client.server.url}: the first request failed: {outcome.error}")
    client.usage = outcome.usage
    return client


async def _drive(client: "Client", load: Load, todo: Sequence[Ask], progress: bool) -> list[Outcome]:
    """Sends the requests at their times, at most `load.in_flight` at once."""
    turns, began = asyncio.Semaphore(load.in_flight), time.perf_counter()
    with tqdm(total=len(todo), desc="requests", disable=not progress) as bar:

        async def one(index: int, ask: Ask) -> Outcome:
            async with turns:
                outcome = await client.send(ask, seed=index + 1)
            bar.update()
            return outcome

        tasks = []
        for index, ask in enumerate(todo):
            if (ahead := ask.at - (time.perf_counter() - began)) > 0:
                await asyncio.sleep(ahead)
            tasks.append(asyncio.create_task(one(index, ask)))
        return await asyncio.gather(*tasks)


@dataclasses.dataclass(kw_only=True)
class Answer(Outcome):
    """An outcome with what HTTP adds."""

    status: int = 0  # 0: no answer at all
    usage: bool = False  # the server counted the tokens
    ended: bool = False  # the stream came to its end


@dataclasses.dataclass
class Client:
    """One server, one model, one way of asking."""

    session: aiohttp.ClientSession
    server: Server
    load: Load
    model: str
    text: bool = False
    usage: bool = False

    def __post_init__(self):
        self.text = self.server.text or self.server.endpoint == "chat"

    def body(self, ask: Ask, seed: int) -> dict:
        load = self.load
        body = {"model": self.model, "max_tokens": ask.tokens, "temperature": load.temperature, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        body |= {"ignore_eos": True} if load.ignore_eos else {}
        body |= {"seed": seed} if load.temperature else {}
        prompt = " ".join(WORDS[i % len(WORDS)] for i in ask.prompt) if self.text else ask.prompt
        if self.server.endpoint == "chat":
            return body | {"messages": [{"role": "user", "content": prompt}]}
        return body | {"prompt": prompt}

    async def send(self, ask: Ask, seed: int = 0) -> Answer:
        """Never raises for what the server or the network does: `error` says it."""
        body = json.dumps(self.body(ask, seed))
        answer = Answer(sent=time.perf_counter(), prompt_tokens=len(ask.prompt))
        headers = {"Content-Type": "application/json"}
        try:
            async with self.session.post(PATHS[self.server.endpoint], data=body, headers=headers) as response:
                answer.status = response.status
                if response.status != 200:
                    answer.error = await _refusal(response)
                    return answer
                async for event in _events(response):
                    _take(answer, event)
        except TimeoutError:
            answer.error = f"no whole answer within {self.server.timeout:g} s"
        except (aiohttp.ClientError, OSError) as error:
            answer.error = _why(error)
        except ValueError as error:
            answer.error = f"the stream holds what is no JSON: {error}"
        if answer.error is None and not answer.ended:
            answer.error = "the stream broke off before its end"
        if not answer.usage:
            answer.output_tokens = len(answer.arrivals)
        if answer.error is None and not answer.arrivals:  # nothing but an end token
            answer.arrivals.append(time.perf_counter())
        return answer


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict | None]:
    """The data of server-sent events, parsed; None for the end mark."""
    left = b""
    async for piece in response.content.iter_any():
        *lines, left = (left + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                yield None if data == b"[DONE]" else json.loads(data)


def _take(answer: Answer, event: Mapping | None) -> None:
    if event is None:
        answer.ended = True
        return
    if event.get("error"):
        answer.error = f"in the stream: {_message(event)}"
        return
    if usage := event.get("usage"):
        answer.usage = True
        answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in event.get("choices", ()):
        delta = choice.get("delta", choice)
        text = delta.get("text") or delta.get("content") or delta.get("reasoning_content")
        # A piece without text is a token too, unless it only opens or closes the message.
        if text or not (choice.get("finish_reason") or "role" in delta):
            answer.arrivals.append(time.perf_counter())


async def _refusal(response: aiohttp.ClientResponse) -> str:
    raw = await response.read()
    try:
        return f"HTTP {response.status}: {_message(json.loads(raw))}"
    except ValueError:
        return f"HTTP {response.status}: {raw[:200].decode(errors='replace')}"


def _message(body) -> str:
    """The message of OpenAI's error form, or of what a server has in its place."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    return str(error.get("message", error) if isinstance(error, Mapping) else error)[:200]


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
