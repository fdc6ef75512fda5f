"""`optx bench serve`: the load, the figures, the bare engine, and a client that counts every error."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiny
from aiohttp import web

from optx import bench, cli
from optx.bench import bare, client, figures, serve
from optx.bench.figures import Outcome
from optx.bench.load import Load, Server, asks
from optx.engine import memory
from optx.errors import LoweringError, RequestError, UsageError

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32",
    "tie_word_embeddings": False,
}  # fmt: skip
SPREAD = {"mean", "p50", "p90", "p99"}
KEYS = {
    *(
        "form",
        "model",
        "load",
        "requests",
        "errors",
        "seconds",
        "prompt_tokens",
        "output_tokens",
        "requests_per_second",
    ),
    *("output_tokens_per_second", "total_tokens_per_second", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "slo_ms"),
    "goodput_requests_per_second",
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A tiny shape; the ceilings, which take seconds to measure, stand in for a machine's."""
    monkeypatch.setattr(bare.timing, "read_ceiling", lambda: 1e10)
    monkeypatch.setattr(bare.decode, "matmul_rate", lambda: 1e11)
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return path


# Load


def test_a_load_is_fixed_by_its_seed():
    load = Load(num_prompts=20, input_len=10, output_len=5, range_ratio=0.5, request_rate=3)
    assert asks(load) == asks(load)
    assert asks(load) != asks(Load(**{**vars(load), "seed": 1}))


def test_lengths_are_exact_without_a_range_and_within_it_with_one():
    exact = asks(Load(num_prompts=50, input_len=10, output_len=5))
    assert {(len(ask.prompt), ask.tokens) for ask in exact} == {(10, 5)}
    load = Load(num_prompts=500, input_len=10, output_len=20, range_ratio=0.5)
    found = asks(load)
    assert {len(ask.prompt) for ask in found} == set(range(5, 16))
    assert {ask.tokens for ask in found} == set(range(10, 31))
    assert load.longest == 15 + 30


def test_prompts_take_turns_at_shared_prefixes():
    found = asks(Load(num_prompts=9, input_len=4, prefix_len=6, num_prefixes=3, vocab=1000))
    heads = [tuple(ask.prompt[:6]) for ask in found]
    assert len(set(heads)) == 3 and heads[:3] == heads[3:6] == heads[6:]
    assert len({tuple(ask.prompt[6:]) for ask in found}) == 9 and {len(ask.prompt) for ask in found} == {10}


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_asked_for(burstiness):
    at = [ask.at for ask in asks(Load(num_prompts=20_000, input_len=1, request_rate=5, burstiness=burstiness))]
    gaps = np.diff(at)
    assert at[0] == 0 and gaps.mean() == pytest.approx(1 / 5, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.06)


def test_an_infinite_rate_sends_all_at_once():
    assert {ask.at for ask in asks(Load(num_prompts=5))} == {0.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_prompts", 0), ("range_ratio", 1), ("request_rate", 0), ("burstiness", -1), ("concurrency", 0)],
)
def test_wrong_loads_name_the_flag(name, value):
    with pytest.raises(UsageError, match=f"--{name}: got {value}; allowed: "):
        Load(**{name: value})


# Figures


def outcome(sent, *arrivals, tokens=None, error=None):
    tokens = len(arrivals) if tokens is None else tokens
    return Outcome(sent=sent, prompt_tokens=7, arrivals=list(arrivals), output_tokens=tokens, error=error)


def test_figures_of_three_requests_by_hand():
    outcomes = [
        outcome(10.0, 10.1, 10.2, 10.4),  # TTFT 100, TPOT 150, e2e 400
        outcome(10.5, 10.9, 11.0, tokens=6),  # TTFT 400, TPOT 20 (two pieces of six tokens), e2e 500
        outcome(11.0, 12.0),  # TTFT = e2e = 1000, no TPOT
        outcome(11.0, 11.1, error="HTTP 500: out"),
        outcome(13.0, error="HTTP 500: out"),
    ]
    found = figures.summarize(outcomes, Load(num_prompts=5), {"ttft": 500, "tpot": 100})
    assert found.keys() == KEYS - {"form", "model"}
    assert found["requests"] == {"sent": 5, "completed": 3, "failed": 2} and found["errors"] == {"HTTP 500: out": 2}
    assert found["seconds"] == pytest.approx(2.0)
    assert (found["prompt_tokens"], found["output_tokens"]) == (21, 10)
    assert found["output_tokens_per_second"] == pytest.approx(5) and found["total_tokens_per_second"] == pytest.approx(
        15.5
    )
    assert found["ttft_ms"] == pytest.approx({"mean": 500, "p50": 400, "p90": 880, "p99": 988})
    assert found["tpot_ms"]["mean"] == pytest.approx(85) and found["itl_ms"]["mean"] == pytest.approx(400 / 3)
    assert found["e2e_ms"]["mean"] == pytest.approx(1900 / 3)
    assert found["goodput_requests_per_second"] == pytest.approx(1 / 2), "the second request alone meets both limits"
    shown = figures.text(found | {"form": "HTTP", "model": "m"})
    assert "FAILED 2 of 5: HTTP 500: out" in shown and "3 of 5" in shown and "goodput" in shown


def test_without_an_slo_there_is_no_goodput_and_a_json_holds_the_infinite_rate():
    found = figures.summarize([outcome(0.0, 0.5)], Load(), {})
    assert found["goodput_requests_per_second"] is None and found["tpot_ms"] is None
    assert json.loads(json.dumps(found, allow_nan=False))["load"]["request_rate"] == "inf"


@pytest.mark.parametrize(
    ("slo", "told"),
    [("tpott:5", "did you mean 'tpot'"), ("ttft", "milliseconds above 0"), ("ttft:-1", "milliseconds above 0")],
)
def test_wrong_slos(slo, told):
    with pytest.raises(UsageError, match=told):
        figures.parse_slo(slo)
    assert figures.parse_slo("ttft:1000  tpot:50.5") == {"ttft": 1000, "tpot": 50.5}


# The bare engine


def test_bare_engine_serves_the_load(config, tmp_path, capsys):
    out = tmp_path / "bare.json"
    flags = [
        "--num_prompts",
        "7",
        "--input_len",
        "12",
        "--output_len",
        "4",
        "--concurrency",
        "2",
        "--slo",
        "e2e:600000",
    ]
    assert cli.run(["bench", "serve", "--in_process", str(config), *flags, "--out", str(out)]) == 0
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found.keys() == KEYS | {"engine"}
    assert found["requests"] == {"sent": 7, "completed": 7, "failed": 0}
    assert (found["prompt_tokens"], found["output_tokens"]) == (7 * 12, 7 * 4)
    assert found["goodput_requests_per_second"] == pytest.approx(found["requests_per_second"])
    assert all(found[f"{name}_ms"].keys() == SPREAD for name in figures.METRICS)
    engine = found["engine"]
    assert engine["compiles_after_warm_up"] == 0 < engine["compiles"]
    assert engine["steps"] >= 7 + 4 * 3 and 0 < engine["host_ms"] <= engine["step_ms"]
    assert 0 < engine["mean_batch"] <= 2 and engine["mean_context"] == 14
    assert engine["bound"] * engine["of_bound"] == pytest.approx(found["output_tokens_per_second"])
    assert engine["start_seconds"] == pytest.approx(
        engine["weights_seconds"] + engine["compile_seconds"] + engine["first_token_seconds"]
    )
    assert "measured / bound" in shown and "output tokens/s" in shown
    again = ["bench", "serve", "--in_process", str(config), *flags, "--seed", "3", "--against", str(out)]
    assert cli.run(again) == 0
    shown = capsys.readouterr().out
    assert "cost in throughput" in shown and "the loads differ in seed" in shown


def test_requests_in_flight_stay_under_the_cap_and_leave_at_their_times(config):
    model = bare.compiled(bare.Bare(in_process=str(config)))
    load = Load(num_prompts=6, input_len=4, output_len=6, concurrency=2, vocab=64)
    engine = model.engine(rows=4, context=16, chunks=(16,))
    step, seen = engine.step, []

    def watched():
        found = step()
        seen.append(sum(request is not None and request.finish is None for request in requests))
        return found

    add, requests = engine.add_request, []
    engine.add_request = lambda *args: requests.append(add(*args)) or requests[-1]
    engine.step = watched
    outcomes, inside = bare.drive(engine, load, asks(load))
    assert max(seen) == 2 and len(outcomes) == 6 and inside > 0
    spread = Load(num_prompts=4, input_len=4, output_len=2, request_rate=20, vocab=64)
    outcomes, _ = bare.drive(engine, spread, todo := asks(spread))
    late = [o.sent - outcomes[0].sent - ask.at for o, ask in zip(outcomes, todo, strict=True)]
    assert min(late) > -0.01, "no request leaves before its time"


def test_shared_prefixes_hit_the_cache_and_lower_the_bound_of_prompts(config):
    flags = {
        "in_process": str(config),
        "num_prompts": 6,
        "input_len": 4,
        "output_len": 2,
        "prefix_len": 64,
        "concurrency": 1,
    }
    found = serve.run(flags | {"engine": ("page_size=16", "chunks=[64]")})
    alone = serve.run(flags | {"engine": ("page_size=16", "chunks=[64]", "prefix_cache=false")})
    assert found["prompt_tokens"] == alone["prompt_tokens"] == 6 * 68
    assert found["engine"]["prefix_hit_tokens"] == 5 * 64 and alone["engine"]["prefix_hit_tokens"] == 0


def test_requests_that_the_engine_refuses_are_counted(config):
    flags = {
        "in_process": str(config),
        "num_prompts": 8,
        "input_len": 20,
        "range_ratio": 0.5,
        "output_len": 2,
        "seed": 1,
    }
    found = serve.run(flags | {"engine": ("context=20", "chunks=[64]")})
    failed = sum(
        len(ask.prompt) >= 20 for ask in asks(Load(num_prompts=8, input_len=20, range_ratio=0.5, output_len=2, seed=1))
    )
    assert 0 < failed < 8 and found["requests"] == {"sent": 8, "completed": 8 - failed, "failed": failed}
    assert all("the context is 20" in message for message in found["errors"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "give one of --url (a server) and --in_process"),
        (["--url", "http://x", "--in_process", "y"], "give one of"),
        (["--url", "http://x", "--recipe", "int8_kv8"], "--recipe says nothing with --url"),
        (["--in_process", "qwen3-8b", "--api_key", "k"], "--api_key says nothing with --in_process"),
        (["--url", "localhost:8000"], "--url: got 'localhost:8000'; allowed: http://HOST:PORT"),
        (["--url", "http://x", "--endpoint", "chats"], "did you mean 'chat'"),
        (["--in_process", "y", "--slo", "ttft"], "--slo: 'ttft'"),
        (["--in_process", "y", "--against", "/nowhere.json"], "--against /nowhere.json"),
        (["--shape", "x"], "--shape says nothing here"),
    ],
)
def test_wrong_command_lines(flags, told, capsys):
    assert cli.run(["bench", "serve", *flags]) == 2
    assert told in capsys.readouterr().err


def test_an_engine_option_that_there_is_none_of(config, capsys):
    assert cli.run(["bench", "serve", "--in_process", str(config), "--engine", "row=3"]) == 2
    assert "--engine.row: unknown field of EngineOptions; did you mean 'rows'?" in capsys.readouterr().err


def test_a_backend_that_is_required_is_so_with_weights_and_without(config, tmp_path):
    for model in (str(config), str(tiny.checkpoint(tmp_path / "tiny"))):
        with pytest.raises(LoweringError, match="mosaic_gpu"):
            bare.compiled(bare.Bare(in_process=model, require="mosaic_gpu"))


WEB = ("aiohttp", "llguidance", "prometheus_client", "starlette", "uvicorn")


def test_the_bare_form_needs_no_web_package():
    """In a process where none of them can be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({WEB})); import optx.bench.serve as s; print(s.bare.ROWS)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "256\n"


def test_a_client_without_its_package_is_told_where_it_comes_from(monkeypatch):
    monkeypatch.delitem(sys.modules, "optx.bench.client")
    monkeypatch.delattr(bench, "client")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UsageError, match=r"needs aiohttp; pip install 'optx\[serve\]'"):
        serve.run({"url": "http://127.0.0.1:9"})


# The client


class Peer:
    """A server of OpenAI's completions and chat, with the habits of servers in use. Faults come by request number."""

    def __init__(self, *, ids=True, usage=True, faults=()):
        self.ids, self.usage, self.faults = ids, usage, dict(faults)
        self.bodies, self.now, self.most = [], 0, 0

    async def models(self, request):
        if request.headers.get("Authorization") == "Bearer wrong":
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        return web.json_response({"data": [{"id": "peer"}]})

    async def answer(self, request):
        body = await request.json()
        chat = request.path.endswith("chat/completions")
        if not chat and not self.ids and not isinstance(body["prompt"], str):
            return web.json_response({"error": {"message": "prompt must be text"}}, status=400)
        self.bodies.append(body)
        fault = self.faults.get(len(self.bodies) - 1)
        if fault in ("500", "429"):
            return web.json_response({"error": {"message": "no luck"}}, status=int(fault))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await self.stream(request, body, chat, fault)
        finally:
            self.now -= 1

    async def stream(self, request, body, chat, fault):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def say(data):
            await response.write(
                b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\r\n\r\n"
            )

        if chat:
            await say({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for i in range(body["max_tokens"]):
            await asyncio.sleep(0.002)
            if fault == "breaks" and i == 2:
                request.transport.abort()
                return response
            if fault == "hangs" and i == 2:
                await asyncio.sleep(5)
            if fault == "error" and i == 2:
                await say({"error": {"message": "a step failed"}})
                break
            text = {"delta": {"content": "x"}} if chat else {"text": "" if i == 1 else "x"}
            await say({"choices": [text | {"finish_reason": None}]})
        await say({"choices": [({"delta": {}} if chat else {"text": ""}) | {"finish_reason": "length"}]})
        if self.usage and body.get("stream_options", {}).get("include_usage"):
            await say({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": body["max_tokens"]}})
        if fault != "endless":
            await say(b"[DONE]")
        return response


@contextlib.contextmanager
def running(peer):
    """The URL of the peer, served from a thread."""
    loop, ready, url = asyncio.new_event_loop(), threading.Event(), []

    async def start():
        app = web.Application()
        app.router.add_get("/v1/models", peer.models)
        app.router.add_post("/v1/completions", peer.answer)
        app.router.add_post("/v1/chat/completions", peer.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")
        ready.set()
        return runner

    def serve_forever():
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve_forever)
    thread.start()
    assert ready.wait(10)
    try:
        yield url[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


SMALL = Load(num_prompts=6, input_len=9, output_len=5, concurrency=2)


def test_the_client_sends_the_load_of_the_bare_engine():
    peer = Peer()
    with running(peer) as url:
        found = client.run(Server(url=url), SMALL, {"ttft": 1e5})
    assert found.keys() == KEYS | {"server"} and found["model"] == "peer"
    assert [body["prompt"] for body in peer.bodies[1:]] == [ask.prompt for ask in asks(SMALL)], (
        "after the first, a probe"
    )
    assert peer.most == 2 and peer.bodies[1].keys().isdisjoint({"ignore_eos", "seed"})
    assert found["requests"] == {"sent": 6, "completed": 6, "failed": 0}
    assert (found["prompt_tokens"], found["output_tokens"]) == (54, 30)
    assert found["server"] == {"url": url, "endpoint": "completions", "prompts": "token ids", "counted": "usage"}
    assert found["tpot_ms"]["p50"] > 2 and found["ttft_ms"]["p50"] > 2
    assert found["goodput_requests_per_second"] == pytest.approx(found["requests_per_second"])


def test_servers_without_ids_or_usage():
    peer = Peer(ids=False, usage=False)
    with running(peer) as url:
        found = client.run(Server(url=url), SMALL, {})
    assert found["server"]["prompts"] == "text" and found["server"]["counted"] == "pieces"
    assert all(len(body["prompt"].split()) == 9 for body in peer.bodies)
    assert found["output_tokens"] == 30, "a piece without text is a token, the one that closes the answer is none"


def test_chat_and_extensions():
    peer, load = Peer(), Load(num_prompts=3, input_len=4, output_len=3, ignore_eos=True, temperature=0.5)
    with running(peer) as url:
        found = client.run(Server(url=url, endpoint="chat", model="mine"), load, {})
    assert found["requests"]["completed"] == 3 and found["model"] == "mine" and found["server"]["endpoint"] == "chat"
    assert all(body["model"] == "mine" and body["ignore_eos"] and body["temperature"] == 0.5 for body in peer.bodies)
    assert {body["seed"] for body in peer.bodies[1:]} == {1, 2, 3}
    assert len(peer.bodies[0]["messages"][0]["content"].split()) == 4


def test_every_error_is_counted_under_its_name():
    faults = {2: "500", 3: "breaks", 4: "error", 5: "endless", 6: "hangs", 7: "429", 8: "500"}
    with running(Peer(faults=faults)) as url:
        found = client.run(
            Server(url=url, timeout=1), Load(num_prompts=10, input_len=9, output_len=5, concurrency=1), {}
        )
    assert found["requests"] == {"sent": 10, "completed": 3, "failed": 7}
    errors = dict(found["errors"])
    assert errors.pop("HTTP 500: no luck") == 2 and errors.pop("HTTP 429: no luck") == 1
    assert errors.pop("in the stream: a step failed") == 1 and errors.pop("the stream broke off before its end") == 1
    assert errors.pop("no whole answer within 1 s") == 1
    assert list(errors.values()) == [1] and "Client" in next(iter(errors)), "the connection that was cut"
    assert (found["prompt_tokens"], found["output_tokens"]) == (27, 15), "of completed requests alone"


def test_a_server_that_refuses_or_is_not_there():
    with (
        running(Peer(faults={0: "500"})) as url,
        pytest.raises(RequestError, match="the first request failed: HTTP 500"),
    ):
        client.run(Server(url=url), SMALL, {})
    with running(Peer()) as url, pytest.raises(RequestError, match="/v1/models: HTTP 401: wrong key"):
        client.run(Server(url=url, api_key="wrong"), SMALL, {})
    with pytest.raises(RequestError, match="cannot be reached: .*is the server up"):
        client.run(Server(url=url), SMALL, {})


def test_a_server_takes_most_of_a_gpu_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    memory.claim()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    memory.claim()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
