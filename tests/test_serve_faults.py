"""What goes wrong around a server: clients that vanish, full queues, steps that raise or hang, signals. After each fault the
next request is served and no cache page is missing."""

import concurrent.futures
import contextlib
import http.client
import json
import signal
import socket
import urllib.parse

import pytest
import tiny
from serving import Server, wait

PATH = "/v1/completions"
LONG = {"prompt": "The quick", "max_tokens": 150, "ignore_eos": True, "temperature": 0}
SHORT = {**LONG, "max_tokens": 4}
KEY = {"Authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Three processes: an open one, one with every limit, one that is to fail."""
    folder = tmp_path_factory.mktemp("servers")
    model = tiny.checkpoint(folder / "tiny-llama")
    flags = {
        "open": ("--max_waiting", "2", "--step_limit", "1"),
        "strict": ("--api_key", "sesame", "--max_body_mb", "1", "--timeout", "2", "--cors", "https://a.example"),
        "doomed": (),
    }
    made = {}
    for name, more in flags.items():
        made[name] = Server(folder / name, model, "--rows", "2", "--budget", "64", *more)
        assert made["open"].url  # the others find what the first has compiled
    yield made
    for server in made.values():
        server.end()


@pytest.fixture
def server(servers):
    """The open one, as whole afterwards as it was before."""
    yield servers["open"]
    assert_serves(servers["open"])


@pytest.fixture
def strict(servers):
    yield servers["strict"]
    assert servers["strict"].send(PATH, SHORT, headers=KEY)[0] == 200


def assert_serves(server):
    status, _, answer = server.send(PATH, SHORT)
    assert status == 200 and answer["usage"]["completion_tokens"] == 4
    found = server.settled()
    assert found["optx:kv_pages_used"] == 0
    assert found["optx:kv_pages_free"] + found["optx:kv_pages_cached"] == found["optx:kv_pages"]
    assert server.send("/health")[0] == 200


@contextlib.contextmanager
def opened(server, body):
    """A connection on which a request has been sent, and its response when it has begun."""
    where = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
    try:
        yield connection
    finally:
        connection.close()


def many(server, bodies, **options):
    """Answers to requests sent at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: server.send(PATH, body, **options), bodies))


def count(server, finish):
    return server.metrics()[f'optx:requests_total{{finish="{finish}"}}']


# Clients.


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_vanishes_frees_its_rows(server, stream):
    before = count(server, "abort")
    with server.fault("slow"):
        with opened(server, {**LONG, "n": 2, "stream": stream}) as connection:
            if stream:
                assert connection.getresponse().read(200).startswith(b"data: {")
            else:
                wait(lambda: server.metrics()["optx:num_requests_running"] == 2, 20)
        wait(lambda: count(server, "abort") == before + 2, 5)  # to its end it would take longer
    found = server.settled()
    assert found["optx:kv_pages_used"] == 0


def test_a_client_that_vanishes_while_it_waits_or_sends(server):
    with server.fault("slow"), opened(server, {**LONG, "n": 2}), opened(server, LONG):
        wait(lambda: server.metrics()["optx:num_requests_waiting"] == 1, 20)
    where = urllib.parse.urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port)) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
        half.sendall(b'Content-Length: 100\r\n\r\n{"prompt"')


def test_a_full_queue_says_when_to_come_again(server):
    with server.fault("slow"):
        answers = many(server, [{**LONG, "max_tokens": 40}] * 10)
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 4  # two rows, two that wait
    refused = next(answer for answer in answers if answer[0] == 429)
    assert refused[1]["Retry-After"] == "1"
    assert refused[2]["error"]["code"] == "queue_full" and refused[2]["error"]["type"] == "rate_limit_error"
    status, _, answer = server.send(PATH, {**SHORT, "n": 5})
    assert (status, answer["error"]["code"]) == (429, "queue_full"), "more than there is ever room for"
    assert server.send(PATH, {**SHORT, "prompt": ["a"] * 5})[0] == 429
    assert server.send(PATH, {**SHORT, "prompt": ["a", "b"], "n": 2})[0] == 200


def test_no_key_no_answer(strict):
    for headers in (
        {},
        {"Authorization": "Bearer sesam"},
        {"Authorization": "Basic sesame"},
        {"Authorization": "sesame"},
    ):
        for path, body in ((PATH, SHORT), ("/v1/models", None), ("/metrics", None), ("/v1/nothing", None)):
            status, found, answer = strict.send(path, body, headers=headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert found["WWW-Authenticate"] == "Bearer"
    assert strict.send("/health")[0] == strict.send("/openapi.json")[0] == 200
    assert strict.send("/v1/models", headers=KEY)[0] == strict.send("/metrics", headers=KEY)[0] == 200


def test_bodies_have_a_largest_size(strict):
    body = b" " * (1 << 20) + json.dumps(SHORT).encode()
    status, _, answer = strict.send(PATH, body, headers=KEY)
    assert (status, answer["error"]["code"]) == (413, "body_too_large") and "1048576 bytes" in answer["error"][
        "message"
    ]
    where = urllib.parse.urlsplit(strict.url)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    parts = (b" " * (1 << 18) for _ in range(8))  # chunked: no length is told
    with contextlib.suppress(BrokenPipeError):
        connection.request("POST", PATH, parts, {"Content-Type": "application/json", **KEY}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_answers_have_a_longest_time(strict):
    with strict.fault("slow"):
        status, _, answer = strict.send(PATH, LONG, headers=KEY)
        assert (status, answer["error"]["type"]) == (504, "timeout_error") and "2 s" in answer["error"]["message"]
        status, _, text = strict.send(PATH, {**LONG, "stream": True}, headers=KEY)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert status == 200 and events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "timeout" and len(events) > 10


def test_only_pages_that_are_told_may_call(server, strict):
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "Authorization, Content-Type"
    status, headers, _ = strict.send(PATH, method="OPTIONS", headers=ask)
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, "https://a.example")
    status, headers, _ = strict.send(PATH, method="OPTIONS", headers={**ask, "Origin": "https://b.example"})
    assert status == 400 and "Access-Control-Allow-Origin" not in headers
    status, headers, _ = server.send(PATH, method="OPTIONS", headers=ask)
    assert status == 405 and "Access-Control-Allow-Origin" not in headers


# The engine.


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_step_that_raises_fails_what_it_ran_and_nothing_else(server, stream):
    before = server.settled()
    with server.fault("slow"), concurrent.futures.ThreadPoolExecutor(3) as pool:
        running = [pool.submit(server.send, PATH, {**LONG, "stream": stream}) for _ in range(2)]
        wait(lambda: server.metrics()["optx:num_requests_running"] == 2, 20)
        waiting = pool.submit(server.send, PATH, SHORT)
        wait(lambda: server.metrics()["optx:num_requests_waiting"] == 1, 20)
        (server.folder / "once").touch()
        for status, _, answer in (future.result() for future in running):
            if stream:
                events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
                assert status == 200 and events[-1] == "[DONE]"
                answer = json.loads(events[-2])
            else:
                assert status == 500
            assert answer["error"]["code"] == "engine_failed"
            assert "RuntimeError: a bit flipped" in answer["error"]["message"]
        assert waiting.result()[0] == 200
    after = server.settled()
    assert after["optx:engine_recoveries_total"] == before["optx:engine_recoveries_total"] + 1
    assert after["optx:compiles_total"] == before["optx:compiles_total"]
    assert "a bit flipped" in server.errors.read_text()


def test_health_fails_while_a_step_hangs(server):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with server.fault("hang"):
            answer = pool.submit(server.send, PATH, SHORT)
            wait(lambda: server.send("/health")[0] == 503, 20)
            assert "a step has run for" in server.send("/health")[2]["reason"]
        assert answer.result()[0] == 200
    assert server.send("/health")[0] == 200


def test_an_engine_that_cannot_go_on_ends_the_process(servers):
    server = servers["doomed"]
    assert_serves(server)
    (server.folder / "always").touch()
    status, _, answer = server.send(PATH, SHORT)
    assert (status, answer["error"]["code"]) == (500, "engine_failed")
    status, _, answer = server.send("/health")
    assert status == 503 and "the device is on fire" in answer["reason"]
    assert server.send(PATH, SHORT)[0] == 503
    assert server.process.wait(timeout=20) == 1
    assert "error: stopped: the engine failed: RuntimeError: the device is on fire" in server.errors.read_text()


# Signals. They end the servers that the tests above use.


def test_sigterm_finishes_what_is_under_way(servers):
    server = servers["open"]
    with server.fault("slow"), concurrent.futures.ThreadPoolExecutor(4) as pool:
        bodies = [{**LONG, "max_tokens": 60, "stream": i % 2 == 0} for i in range(4)]
        answers = [pool.submit(server.send, PATH, body) for body in bodies]
        wait(lambda: server.metrics()["optx:num_requests_waiting"] == 2, 20)
        server.signal()
        wait(lambda: server.send("/health")[0] == 503, 5)
        status, headers, answer = server.send(PATH, SHORT)
        assert (status, headers["Retry-After"], answer["error"]["code"]) == (503, "1", "shutting_down")
        for body, (status, _, answer) in zip(bodies, (future.result() for future in answers)):
            assert status == 200
            assert (
                answer.endswith("data: [DONE]\n\n") and answer.count('"text"') == 60
                if body["stream"]
                else (answer["usage"]["completion_tokens"] == 60)
            )
    assert server.process.wait(timeout=20) == 0
    with pytest.raises(OSError):
        server.send("/health")


def test_a_second_signal_ends_at_once(servers):
    server = servers["strict"]
    with server.fault("slow"), concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.send, PATH, LONG, headers=KEY)
        wait(lambda: server.metrics(KEY)["optx:num_requests_running"], 20)
        (server.folder / "hang").touch()
        server.signal(signal.SIGINT)
        wait(lambda: server.send("/health")[0] == 503, 5)
        server.signal()
        assert server.process.wait(timeout=5) == 128 + signal.SIGTERM
        with pytest.raises((OSError, http.client.HTTPException)):
            answer.result()
