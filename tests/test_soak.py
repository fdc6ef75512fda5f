"""`optx serve` under the bench's own clients: the same load as on the bare engine, and a soak in small."""

import asyncio
import dataclasses
import json

import pytest
import tiny

from optx import cli
from optx.bench import bare, client, soak
from optx.bench.load import Load, Server, asks
from optx.bench.soak import Sample, Tally


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.checkpoint(tmp_path_factory.mktemp("soak") / "tiny"))


@pytest.fixture(scope="module")
def server(model):
    with soak.serving(model, "--rows", "2", "--context", "64") as found:
        yield found


def test_bench_serve_measures_the_server_against_the_bare_engine(server, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bare.timing, "read_ceiling", lambda: 1e10)
    monkeypatch.setattr(bare.decode, "matmul_rate", lambda: 1e11)
    load = ["--num_prompts", "6", "--input_len", "10", "--output_len", "8", "--concurrency", "2", "--vocab", "300"]
    load += ["--ignore_eos"]
    alone, served = tmp_path / "bare.json", tmp_path / "served.json"
    engine = ["--engine", "context=64", "--engine", "rows=2"]
    assert cli.run(["bench", "serve", "--in_process", model, *engine, *load, "--out", str(alone)]) == 0
    assert cli.run(["bench", "serve", "--url", server.url, *load, "--against", str(alone), "--out", str(served)]) == 0
    found, want = json.loads(served.read_text()), json.loads(alone.read_text())
    assert found["server"] == {
        "url": server.url, "endpoint": "completions", "prompts": "token ids", "counted": "usage",
    }  # fmt: skip
    for key in ("requests", "errors", "prompt_tokens", "output_tokens", "load"):
        assert found[key] == want[key]
    assert found["output_tokens"] == 48 and found["model"] == "tiny"
    shown = capsys.readouterr().out
    assert "cost in throughput" in shown and "the loads differ" not in shown


def test_a_chat_and_requests_that_the_server_refuses(server):
    load = Load(num_prompts=8, input_len=40, range_ratio=0.9, output_len=2, vocab=300, seed=1)
    long = [len(ask.prompt) >= 64 for ask in asks(load)]
    assert not long[0] and 0 < sum(long) < 8
    found = client.run(Server(url=server.url), load, {})
    assert found["requests"] == {"sent": 8, "completed": 8 - sum(long), "failed": sum(long)}
    assert sum(found["errors"].values()) == sum(long) and all("HTTP 400" in message for message in found["errors"])
    found = client.run(Server(url=server.url, endpoint="chat"), dataclasses.replace(load, input_len=2), {})
    assert found["requests"]["completed"] == 8 and found["server"]["prompts"] == "text"


def test_a_soak_of_seconds_passes(server):
    samples, tally = asyncio.run(soak.soak(server, minutes=0.1, clients=6, vocab=300))
    assert soak.verdict(samples, tally, 0) == []
    assert tally.refused and len(samples) > 3 and samples[-1].tokens > samples[0].tokens
    assert soak.report(samples, tally, [])["clients"]["done"] == tally.done


def samples(count=30, **changes):
    pages = {"used": 2, "cached": 3, "free": 5, "all": 10}
    made = [Sample(at=i, resident=1 << 30, pages=pages, tokens=i, running=2, waiting=1) for i in range(count)]
    rest = dataclasses.replace(made[-1], pages=pages | {"used": 0, "free": 7}, running=0, waiting=0)
    return [*made[:-1], dataclasses.replace(rest, **changes)]


GOOD = Tally(done=5, left=2)


def test_the_verdict_on_a_good_run():
    assert soak.verdict(samples(), GOOD, 0) == []


@pytest.mark.parametrize(
    ("found", "tally", "code", "told"),
    [
        (samples(pages={"used": 0, "cached": 3, "free": 6, "all": 10}), GOOD, 0, "the page sum was wrong in 1 of 30"),
        (samples(pages={"used": 1, "cached": 3, "free": 6, "all": 10}), GOOD, 0, "still 1 pages in use"),
        (samples(running=1), GOOD, 0, "at rest after 60 s"),
        ([dataclasses.replace(s, resident=(1 << 30) + i * (6 << 20)) for i, s in enumerate(samples())], GOOD, 0, "memory grew"),
        (samples(), Tally(done=5, left=2, errors={"HTTP 500: x": 3}), 0, "3 x HTTP 500: x"),
        (samples(), Tally(done=5), 0, "no load"),
        (samples(), GOOD, 1, "the server ended with code 1"),
    ],
)  # fmt: skip
def test_what_a_verdict_names(found, tally, code, told):
    wrong = soak.verdict(found, tally, code)
    assert len(wrong) == 1 and told in wrong[0]


def test_a_model_that_cannot_be_served_is_told():
    with pytest.raises(soak.RequestError, match="ended with code 1 before it was ready"), soak.serving("/nowhere"):
        pass
