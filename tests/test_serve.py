"""The server over HTTP with OpenAI's own client: what it answers is what the compiled model generates."""

import json
import math

import numpy as np
import openai
import pytest
import tiny
from serving import Server

import optx
from optx.generate import encode_chat, generate

PROMPTS = ["The quick brown fox", "Pack my box", "jugs"]
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server"), model, "--rows", "2", "--budget", "64")
    yield made
    made.end()


@pytest.fixture(scope="module")
def compiled(model):
    return optx.compile(optx.load(model))


@pytest.fixture(scope="module")
def client(server, compiled):
    """compiled is made while the server starts."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def complete(client):
    """Completions with token ids beside the texts."""

    def call(prompt, **fields):
        ours = ("top_k", "min_p", "ignore_eos", "repetition_penalty", "priority", "stop_token_ids", "response_format")
        extra = {name: fields.pop(name) for name in ours if name in fields}
        return client.completions.create(
            model="tiny-llama", prompt=prompt, **fields, extra_body={"return_token_ids": True} | extra
        )

    return call


@pytest.fixture(scope="module")
def want(compiled):
    """Answers of the compiled model, by an engine as large as the server's."""
    engine = compiled.engine(rows=2, chunks=(16, 64))

    def call(prompts, **sampling):
        return generate(engine, compiled.tokenizer, prompts, optx.Sampling(**sampling))

    return call


# Completions.


def test_texts_and_token_ids_are_those_of_the_compiled_model(complete, want, compiled):
    answers = want(PROMPTS, **GREEDY)
    assert compiled.generate(PROMPTS, optx.Sampling(**GREEDY)) == [answer.text for answer in answers]
    ids = [compiled.tokenizer.encode(prompt) for prompt in PROMPTS]
    for prompt in (PROMPTS, ids):
        got = complete(prompt, **GREEDY)
        assert [choice.index for choice in got.choices] == [0, 1, 2]
        assert [choice.token_ids for choice in got.choices] == [list(answer.token_ids) for answer in answers]
        assert [choice.text for choice in got.choices] == [answer.text for answer in answers]
        assert [choice.finish_reason for choice in got.choices] == [answer.finish for answer in answers]
        counts = sum(map(len, ids)), sum(len(answer.token_ids) for answer in answers)
        assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (*counts, sum(counts))
    assert (
        complete(PROMPTS[1], **GREEDY).choices[0].text == complete(ids[1], **GREEDY).choices[0].text == answers[1].text
    )


def test_seeds_draw_what_the_compiled_model_draws(complete, want):
    drawn = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "max_tokens": 10}
    got = complete(PROMPTS[0], n=3, seed=7, **drawn)
    expected = [list(want(PROMPTS[:1], seed=7 + i, **drawn)[0].token_ids) for i in range(3)]
    assert [choice.token_ids for choice in got.choices] == expected
    assert len({tuple(ids) for ids in expected}) == 3
    assert complete(PROMPTS[0], seed=7 - 2**32, **drawn).choices[0].token_ids == expected[0]
    free = [complete(PROMPTS[0], **drawn).choices[0].token_ids for _ in range(3)]
    assert len({tuple(ids) for ids in free}) > 1, "without a seed every request draws anew"


def test_the_temperature_is_one_unless_given(complete, want):
    got = complete(PROMPTS[0], seed=3, max_tokens=10)
    assert got.choices[0].token_ids == list(want(PROMPTS[:1], seed=3, temperature=1.0, max_tokens=10)[0].token_ids)
    assert len(complete(PROMPTS[0], ignore_eos=True).choices[0].token_ids) == 16


def test_penalties_and_bias(complete, want):
    hows = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3}
    got = complete(PROMPTS[0], **GREEDY, **hows).choices[0].token_ids
    assert got == list(want(PROMPTS[:1], **GREEDY, **hows)[0].token_ids)
    biased = complete(PROMPTS[0], **GREEDY, logit_bias={"65": 100}, ignore_eos=True).choices[0]
    assert biased.token_ids == [65] * 12


def test_stop_texts_cut_the_answer(complete, want):
    whole = want(PROMPTS[:1], temperature=1.0, seed=1, max_tokens=60, ignore_eos=True)[0].text
    stop = whole[20:23]
    for stops in (stop, [stop, "no such text"]):
        got = complete(PROMPTS[0], temperature=1.0, seed=1, max_tokens=60, stop=stops, ignore_eos=True, logprobs=0)
        choice = got.choices[0]
        assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
        assert all(offset < len(choice.text) for offset in choice.logprobs.text_offset)
    ids = want(PROMPTS[:1], **GREEDY)[0].token_ids
    got = complete(PROMPTS[0], **GREEDY, stop_token_ids=[ids[3]]).choices[0]
    assert (got.token_ids, got.finish_reason) == (list(ids[: ids.index(ids[3]) + 1]), "stop")


def test_logprobs_are_the_models(complete, compiled):
    choice = complete(PROMPTS[0], **GREEDY, logprobs=3, ignore_eos=True).choices[0]
    ids = compiled.tokenizer.encode(PROMPTS[0])
    logits = np.asarray(compiled.logits([ids + choice.token_ids]))[0, len(ids) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = [expected[i, token] for i, token in enumerate(choice.token_ids)]
    assert choice.logprobs.token_logprobs == pytest.approx(chosen, abs=1e-4)
    assert [max(top.values()) for top in choice.logprobs.top_logprobs] == pytest.approx(expected.max(-1), abs=1e-4)
    assert all(len(top) == 3 for top in choice.logprobs.top_logprobs), "greedy: the one chosen is among them"
    assert choice.logprobs.text_offset[0] == 0 and len(choice.logprobs.tokens) == 12


def test_echo_begins_with_the_prompt(complete, want, compiled):
    answer = want(PROMPTS[:1], **GREEDY)[0].text
    assert complete(PROMPTS[0], **GREEDY, echo=True).choices[0].text == PROMPTS[0] + answer
    streamed = "".join(part.choices[0].text for part in complete(PROMPTS[0], **GREEDY, echo=True, stream=True))
    assert streamed == PROMPTS[0] + answer


@pytest.mark.parametrize("how", [{}, {"logprobs": 2}, {"stop": ["qu", "zzz"]}], ids=["plain", "logprobs", "stop"])
def test_a_stream_gives_what_the_whole_answer_gives(complete, how):
    fields = {"temperature": 1.0, "seed": 5, "max_tokens": 40, "n": 2, **how}
    whole = complete(PROMPTS[:2], **fields)
    parts = list(complete(PROMPTS[:2], **fields, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert len({part.id for part in parts}) == 1 and all(part.usage is None for part in parts[:-1])
    for choice in whole.choices:
        mine = [part.choices[0] for part in parts[:-1] if part.choices[0].index == choice.index]
        assert "".join(part.text for part in mine) == choice.text
        assert [token for part in mine for token in part.token_ids] == choice.token_ids
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        if "logprobs" in how:
            tokens = [token for part in mine if part.logprobs for token in part.logprobs.tokens]
            assert tokens == choice.logprobs.tokens


def test_usage_in_every_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    fields = {"model": "tiny-llama", "prompt": PROMPTS[0], **GREEDY, "stream": True, "extra_body": {"ignore_eos": True}}
    parts = list(client.completions.create(**fields, stream_options=options))
    assert [part.usage.completion_tokens for part in parts] == [*range(1, 13), 12]


# Chat.


def test_chat_answers_as_the_compiled_model(client, compiled, want):
    def chat(messages):
        return want([encode_chat(messages, compiled.tokenizer)], **GREEDY)[0].text

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which fox?"}]
    expected = chat(messages)
    for told in (
        messages,
        [{**messages[0], "role": "developer"}, {"role": "user", "content": [{"type": "text", "text": "Which fox?"}]}],
    ):
        got = client.chat.completions.create(
            model="tiny-llama", messages=told, temperature=0, max_completion_tokens=12, user="me", metadata={"a": "b"}
        )
        assert (got.choices[0].message.content, got.choices[0].message.role) == (expected, "assistant")
    history = [*messages, got.choices[0].message, {"role": "user", "content": "And then?"}]
    more = client.chat.completions.create(model="tiny-llama", messages=history, temperature=0, max_tokens=12)
    told = [*messages, {"role": "assistant", "content": expected}, {"role": "user", "content": "And then?"}]
    assert more.choices[0].message.content == chat(told)


def test_a_chat_goes_on_to_the_end_of_the_context_unless_told(client, compiled):
    got = client.chat.completions.create(
        model="tiny-llama", messages=[{"role": "user", "content": "hm"}], seed=1, extra_body={"ignore_eos": True}
    )
    assert got.usage.total_tokens == compiled.program.context and got.choices[0].finish_reason == "length"


def test_chat_streams_with_logprobs(client, compiled):
    fields = {
        "model": "tiny-llama",
        "messages": [{"role": "user", "content": "Which fox?"}],
        "temperature": 0,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(**fields).choices[0]
    parts = [part.choices[0] for part in client.chat.completions.create(**fields, stream=True)]
    assert parts[0].delta.role == "assistant" and parts[-1].finish_reason == whole.finish_reason == "length"
    assert "".join(part.delta.content for part in parts) == whole.message.content
    entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    assert entries == whole.logprobs.content and len(entries) == 12
    joined = b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", errors="replace")
    assert joined == whole.message.content
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in entries), "greedy takes the likeliest"


def test_an_answer_can_be_held_to_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"fox": {"enum": ["quick", "lazy"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["fox", "legs"],
        "additionalProperties": False,
    }
    got = client.chat.completions.create(
        model="tiny-llama",
        messages=[{"role": "user", "content": "Which fox?"}],
        seed=4,
        n=2,
        max_tokens=150,
        response_format={"type": "json_schema", "json_schema": {"name": "fox", "schema": schema, "strict": True}},
    )
    for choice in got.choices:
        found = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and found["fox"] in ("quick", "lazy") and 0 <= found["legs"] <= 9


# The rest of the API.


def test_models_are_listed(client):
    (listed,) = client.models.list().data
    assert (listed.id, listed.owned_by, listed.max_model_len) == ("tiny-llama", "optx", 256)
    assert client.models.retrieve("tiny-llama") == listed
    for call in (
        lambda: client.models.retrieve("gpt-9"),
        lambda: client.completions.create(model="gpt-9", prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here; served: 'tiny-llama'"):
            call()


def test_health_metrics_and_document(server):
    assert server.send("/health")[0] == 200
    status, headers, text = server.send("/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert 'optx:info{model="tiny-llama",version=' in text
    status, _, document = server.send("/openapi.json")
    assert status == 200 and document["openapi"].startswith("3.1")


@pytest.mark.parametrize(("path", "kind"), [("/", "html"), ("/page.js", "javascript"), ("/page.css", "css")])
def test_the_page_ships_with_the_server(server, path, kind):
    status, headers, text = server.send(path)
    assert status == 200 and kind in headers["Content-Type"] and len(text) > 100


@pytest.mark.parametrize(
    ("status", "told", "send"),
    [
        (400, "not UTF-8", {"body": b'{"prompt": "\xff"}'}),
        (400, "nested too deeply", {"body": b"[" * 100_000}),
        (400, "nested too deeply", {"body": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"}),
        (400, "topk: unknown field; did you mean 'top_k'?", {"body": {"prompt": "a", "topk": 3}}),
        (400, "the prompt has 300 tokens and the context is 256; shorten it to 255", {"body": {"prompt": [5] * 300}}),
        (404, "no such path: /v1/completion", {"path": "/v1/completion", "body": {"prompt": "a"}}),
        (404, "no such path: /v1/completions/", {"path": "/v1/completions/", "body": {"prompt": "a"}}),
        (405, "GET /v1/completions: wrong method; allowed: POST", {"method": "GET"}),
        (405, "DELETE /v1/chat/completions: wrong method", {"path": "/v1/chat/completions", "method": "DELETE"}),
        (
            415,
            "got 'text/plain'; allowed: application/json",
            {"body": b"{}", "headers": {"Content-Type": "text/plain"}},
        ),
        (415, "Content-Encoding: got 'gzip'", {"body": b"{}", "headers": {"Content-Encoding": "gzip"}}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_errors_have_the_form_of_the_api(server, status, told, send):
    got, headers, answer = server.send(**{"path": "/v1/completions"} | send)
    assert got == status and told in answer["error"]["message"]
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert (headers["Allow"] == "POST") == (status == 405)


def test_figures_add_up_and_nothing_compiles(server, complete):
    before = server.settled()
    for how in ({}, {"temperature": 0}, {"logprobs": 2}, {"frequency_penalty": 1.0}, {"n": 2}):
        complete([[5] * 70, [5] * 80], max_tokens=5, ignore_eos=True, **how)
    after = server.settled()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["optx:compiles_total"] == 0
    assert grown['optx:requests_total{finish="length"}'] == grown["optx:time_to_first_token_seconds_count"] == 12
    assert grown["optx:generation_tokens_total"] == 60 and grown["optx:inter_token_latency_seconds_count"] == 48
    assert grown["optx:time_per_output_token_seconds_count"] == grown["optx:e2e_request_latency_seconds_count"] == 12
    assert grown["optx:prompt_tokens_total"] == 6 * 150
    assert 0 < grown["optx:prefix_cache_hits_total"] < grown["optx:prefix_cache_queries_total"]
    assert after["optx:kv_pages_used"] == 0
    assert after["optx:kv_pages_free"] + after["optx:kv_pages_cached"] == after["optx:kv_pages"]
    assert not any(map(math.isnan, after.values()))
