"""Compaction over HTTP: what is answered, what clients are told whole and streaming, usage, metrics, pages, and the ways out."""

import json

import openai
import pytest
import tiny
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import Server
from test_compaction import SYSTEM, turns

import optx
from optx import cli
from optx.compaction import HEADING, Compaction, Compactor
from optx.generate import encode_chat, generate
from optx.serve.faults import Fault
from optx.serve.protocol import Protocol

CONTEXT, AT = 640, 300
LONG = turns(6, size=60)
PATH = "/v1/chat/completions"
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    return tiny.checkpoint(folder, max_position_embeddings=CONTEXT, num_hidden_layers=1)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    flags = ("--rows", "2", "--budget", "64", "--compact_at", str(AT))
    made = Server(tmp_path_factory.mktemp("server"), model, *flags)
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
def chat(client):
    """Fields that are not OpenAI's go into extra_body."""

    def call(messages, *, stream=False, **fields):
        extra = {name: fields.pop(name) for name in ("compaction", "ignore_eos") if name in fields}
        return client.chat.completions.create(
            model="tiny-llama", messages=messages, stream=stream, extra_body=extra, **fields
        )

    return call


@pytest.fixture(scope="module")
def want(compiled):
    engine = compiled.engine(rows=2, chunks=(16, 64), context=CONTEXT)

    def call(ids, most):
        return generate(engine, compiled.tokenizer, [ids], optx.Sampling(max_tokens=most))[0]

    return call


@pytest.fixture(scope="module")
def expected(compiled, want):
    """(event, ids) of the compaction of a conversation by the compiled model."""

    def call(messages, **how):
        compactor = Compactor(Compaction(**{"at": AT} | how), compiled.tokenizer, CONTEXT)
        talk = compactor.talk(messages, encode_chat(messages, compiled.tokenizer), {})
        made = want(talk.next(), talk.how.most)
        assert talk.next(made.text, len(made.token_ids)) is None
        return talk.event, talk.ids

    return call


def size(compiled, messages) -> int:
    return len(encode_chat(messages, compiled.tokenizer))


def grown(server, act) -> dict[str, float]:
    before = server.settled()
    act()
    return {name: value - before.get(name, 0) for name, value in server.settled().items()}


def other(messages, name: str) -> list[dict]:
    """The same conversation under another system message, which the server has not seen."""
    return [{"role": "system", "content": f"Be {name}."}, *messages[1:]]


def test_nothing_is_compacted_up_to_the_threshold(server, chat, compiled):
    short = turns(3, size=30)
    assert size(compiled, short) <= AT

    def act():
        got = chat(short, **GREEDY)
        assert "compaction" not in got.model_extra and got.usage.prompt_tokens == size(compiled, short)
        parts = list(chat(short, stream=True, **GREEDY))
        assert not any("compaction" in part.model_extra for part in parts)

    assert not any(value for name, value in grown(server, act).items() if "compaction" in name)


def test_a_long_conversation_is_answered_from_its_summary_and_the_client_is_told(
    server, chat, compiled, expected, want
):
    messages = other(LONG, "terse")
    event, ids = expected(messages)

    def act():
        got = chat(messages, **GREEDY, logprobs=True)
        assert ChatCompletion.model_validate(got.model_dump())
        told = got.model_extra["compaction"]
        assert told["failed"] is None and told["summary"] == event.summary and not told["reused"]
        assert (told["messages_before"], told["messages_after"]) == (12, 5)
        assert told["tokens_before"] == size(compiled, messages) > AT
        assert told["tokens_after"] == len(ids) == got.usage.prompt_tokens < told["tokens_before"]
        assert 0 < told["summary_tokens"] == event.summary_tokens <= AT // 4
        kept = [messages[0], {"role": "user", "content": HEADING + told["summary"]}, *messages[-3:]]
        assert encode_chat(kept, compiled.tokenizer) == ids, "the system message and the newest turns word for word"
        text = compiled.generate([ids], optx.Sampling(max_tokens=6, ignore_eos=True))[0]
        assert got.choices[0].message.content == compiled.tokenizer.decode(text)
        assert got.usage.total_tokens == len(ids) + 6

    change = grown(server, act)
    assert change['optx:compactions_total{summary="made"}'] == 1
    assert change["optx:compaction_tokens_before_total"] == event.tokens_before
    assert change["optx:compaction_tokens_after_total"] == event.tokens_after
    assert change["optx:compiles_total"] == 0
    assert change["optx:prompt_tokens_total"] > event.tokens_after, "the summary's own prompt counts too"


def test_a_stream_tells_it_in_its_first_chunk(server, chat):
    messages = other(LONG, "quick")
    whole = chat(messages, **GREEDY)
    parts = list(chat(messages, stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert all(ChatCompletionChunk.model_validate(part.model_dump()) for part in parts)
    told, *others = [part.model_extra.get("compaction") for part in parts]
    again = {"reused": True, "summary_tokens": 0}
    assert told == whole.model_extra["compaction"] | again and not any(others)
    assert parts[0].choices[0].delta.role == "assistant" and parts[0].choices[0].delta.content == ""
    assert "".join(p.choices[0].delta.content for p in parts[:-1]) == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage
    body = {
        "messages": messages,
        "stream": True,
        "n": 2,
        "max_tokens": 2,
        "stream_options": {"continuous_usage_stats": True},
    }
    lines = server.send(PATH, body)[2].split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert [i for i, chunk in enumerate(chunks) if "compaction" in chunk] == [0] and lines[-2] == "data: [DONE]"


def test_a_summary_is_used_again_while_it_lasts(server, chat):
    messages = other(LONG, "calm")
    first = chat(messages, **GREEDY).model_extra["compaction"]

    def act():
        more = [*messages, {"role": "assistant", "content": "so"}, {"role": "user", "content": "and?"}]
        told = chat(more, **GREEDY).model_extra["compaction"]
        assert told["reused"] and told["summary"] == first["summary"] and told["summary_tokens"] == 0
        assert told["messages_after"] == first["messages_after"] + 2

    change = grown(server, act)
    assert (change['optx:compactions_total{summary="reused"}'], change['optx:compactions_total{summary="made"}']) == (
        1,
        0,
    )
    assert change['optx:requests_total{finish="length"}'] == 1, "no request but the answer's"


def test_old_pages_leave_the_cache(server, chat, compiled):
    messages = other(LONG, "neat")
    whole = size(compiled, messages)

    def plain():
        got = chat(messages, **GREEDY, compaction=False)
        assert "compaction" not in got.model_extra and got.usage.prompt_tokens == whole

    def compact():
        told.append(chat(messages, **GREEDY).model_extra["compaction"])

    told: list[dict] = []
    assert grown(server, plain)["optx:kv_pages_cached"] == whole // 64
    change = grown(server, compact)
    after = (told[0]["tokens_after"] + 6) // 64
    assert change["optx:compaction_pages_total"] >= whole // 64
    assert change["optx:kv_pages_cached"] <= after - whole // 64 < 0
    assert server.settled()["optx:kv_pages_used"] == 0


def test_a_client_sets_its_own_threshold_or_none(chat, compiled, expected):
    messages = other(LONG, "fair")
    event, ids = expected(messages, at=200, keep_turns=3)
    got = chat(messages, **GREEDY, compaction={"at": 200, "keep_turns": 3})
    assert got.usage.prompt_tokens == len(ids)
    assert got.model_extra["compaction"]["messages_after"] == event.messages_after == 7
    high = chat(messages, **GREEDY, compaction={"at": size(compiled, messages)})
    assert "compaction" not in high.model_extra
    for wrong, told in (
        ({"at": CONTEXT}, f"compaction.at: got {CONTEXT}; allowed: a whole number, at least 32, at most {CONTEXT - 1}"),
        ({"keep_turn": 2}, "compaction.keep_turn: unknown field; did you mean 'keep_turns'"),
        ("yes", "compaction: got 'yes'; allowed: true, false, or an object with 'at'"),
    ):
        with pytest.raises(openai.BadRequestError, match=told):
            chat(messages, compaction=wrong)


def test_a_conversation_beyond_the_context_is_answered_unless_compaction_is_off(chat, compiled):
    messages = turns(16, size=60, lead=({"role": "system", "content": "Be kind."},))
    assert size(compiled, messages) > CONTEXT
    told = chat(messages, **GREEDY).model_extra["compaction"]
    assert told["tokens_before"] > CONTEXT > told["tokens_after"] and told["failed"] is None
    with pytest.raises(openai.BadRequestError, match=f"tokens and the context is {CONTEXT}; shorten it"):
        chat(messages, compaction=False)
    with pytest.raises(openai.BadRequestError, match="a turn of the conversation takes more than the 565 tokens"):
        chat(turns(3, size=1600), **GREEDY)


def test_the_document_describes_it(server):
    schemas = server.send("/openapi.json")[2]["components"]["schemas"]
    assert (
        "compaction" in schemas["ChatRequest"]["properties"]
        and "compaction" not in schemas["CompletionRequest"]["properties"]
    )
    assert (
        "compaction" in schemas["ChatCompletion"]["properties"]
        and "compaction" not in schemas["ChatCompletion"]["required"]
    )


# Without a server


def test_a_server_without_the_flag_refuses_the_field(compiled):
    protocol = Protocol(model="fox", tokenizer=compiled.tokenizer, vocab=compiled.vocab, context=CONTEXT)

    def read(**body):
        return protocol.chat(json.dumps({"messages": [SYSTEM, {"role": "user", "content": "hm"}], **body}).encode())

    assert read(compaction=False).talk is None and read(compaction=None).talk is None and read().talk is None
    for asked in (True, {"at": 100}):
        with pytest.raises(Fault, match="compaction: got .*this server was started without --compact_at"):
            read(compaction=asked)


def test_a_model_that_cannot_be_asked_is_refused_at_the_start(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(optx, "compile", None)
    bare = tiny.checkpoint(tmp_path / "bare")
    config = json.loads((bare / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    for path, flags, code, told in (
        (bare, ["--compact_at", "100"], 1, "compaction: the model has no chat template"),
        (model, ["--compact_at", "700"], 1, f"compaction.at: got 700; allowed: 32 to {CONTEXT - 1}"),
        (model, ["--compact_at", "100", "--context", "90"], 1, "compaction.at: got 100; allowed: 32 to 89"),
        (model, ["--compact_at", "5"], 2, "allowed: a whole number, 32 or more"),
        (model, ["--keep_turns", "3"], 2, "--keep_turns=3 goes with --compact_at"),
    ):
        assert cli.run(["serve", str(path), "--port", "0", *flags]) == code
        assert told in capsys.readouterr().err
