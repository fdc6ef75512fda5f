"""Requests made from the server's own OpenAPI document, right and wrong ones: none may meet an error of the server."""

import collections

import hypothesis
import pytest
import schemathesis
import tiny
from schemathesis import GenerationMode, checks
from serving import Server

# Whether a right body is taken depends on more than JSON Schema can say: a prompt's tokens, the room in the queue.
checks.load_all_checks()
EXCLUDED = [checks.CHECKS.get_one("positive_data_acceptance")]
PATHS = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Small, so that bodies which ask for everything take no time."""
    folder = tmp_path_factory.mktemp("server")
    made = Server(
        folder, tiny.checkpoint(folder / "tiny-llama"), "--rows", "8", "--context", "32", "--max_waiting", "8"
    )
    yield made
    made.end()


def fuzz(server, mode: GenerationMode, examples: int) -> collections.Counter:
    """Sends `examples` bodies to each path; -> responses by status."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: collections.Counter = collections.Counter()
    for path in PATHS:
        operation = schema[path]["POST"]

        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def send(case):
            response = case.call_and_validate(excluded_checks=EXCLUDED, timeout=60)
            statuses[response.status_code] += 1

        send()
    return statuses


def assert_whole(server, compiles: float):
    found = server.settled()
    assert found["optx:kv_pages_used"] == 0 and found["optx:compiles_total"] == compiles
    assert found["optx:kv_pages_free"] + found["optx:kv_pages_cached"] == found["optx:kv_pages"]
    assert found["optx:engine_recoveries_total"] == 0
    assert server.send(PATHS[0], {"prompt": "a", "max_tokens": 2})[0] == 200
    assert server.send("/health")[0] == 200
    assert "Traceback" not in server.errors.read_text()


def test_wrong_bodies_are_refused(server):
    compiles = server.metrics()["optx:compiles_total"]
    statuses = fuzz(server, GenerationMode.NEGATIVE, 60)
    assert set(statuses) <= {400, 404, 415} and statuses[400] > 50, statuses
    assert_whole(server, compiles)


def test_right_bodies_are_answered(server):
    compiles = server.metrics()["optx:compiles_total"]
    statuses = fuzz(server, GenerationMode.POSITIVE, 40)
    assert set(statuses) <= {200, 400, 429} and statuses[200] > 20, statuses
    assert_whole(server, compiles)


@pytest.mark.slow
def test_a_thousand_wrong_bodies(server):
    compiles = server.metrics()["optx:compiles_total"]
    statuses = fuzz(server, GenerationMode.NEGATIVE, 500)
    assert set(statuses) <= {400, 404, 415} and sum(statuses.values()) >= 900, statuses
    assert_whole(server, compiles)


@pytest.mark.parametrize("path", ["/health", "/metrics", "/openapi.json", "/v1/models", "/v1/models/{name}"])
def test_the_other_endpoints_are_as_documented(server, path):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path]["GET"]

    @hypothesis.given(case=operation.as_strategy())
    @hypothesis.settings(max_examples=5, deadline=None, database=None, derandomize=True)
    def send(case):
        case.call_and_validate(excluded_checks=EXCLUDED)

    send()
