"""Bodies into jobs: what is taken, what is refused and in which words. No server, no model."""

import json

import pytest
import tiny

from optx.errors import ServeError
from optx.serve.faults import Fault
from optx.serve.loop import Piece, Token
from optx.serve.metrics import Histogram
from optx.serve.protocol import Protocol, parse
from optx.serve.replies import CompletionReply
from optx.serve.schema import check
from optx.serve.server import bind, listen
from optx.tokenizer import Tokenizer

TOKENIZER = Tokenizer(tiny.tokenizer(), eos_ids=[1], chat_template=tiny.TEMPLATE)
VOCAB = TOKENIZER.vocab_size
PROTOCOL = Protocol(model="fox", tokenizer=TOKENIZER, vocab=VOCAB, context=64)
BARE = Protocol(model="fox", tokenizer=None, vocab=VOCAB, context=64)
HELLO = [{"role": "user", "content": "hm"}]


def completion(protocol=PROTOCOL, **body):
    return protocol.completion(json.dumps({"prompt": "The fox", **body}).encode())


def chat(**body):
    return PROTOCOL.chat(json.dumps({"messages": HELLO, **body}).encode())


def refused(call, status, *told):
    with pytest.raises(Fault) as found:
        call()
    assert found.value.status == status
    for part in told:
        assert part in found.value.message, found.value.message
    return found.value


# What is taken.


def test_defaults_are_those_of_the_api():
    job = completion()
    (sampling,) = job.samplings
    assert (sampling.temperature, sampling.max_tokens, sampling.top_p, sampling.logprobs) == (1.0, 16, 1.0, None)
    assert (job.stream, job.usage, job.echo, job.priority) == (False, "no", None, 0)
    assert chat().samplings[0].max_tokens == PROTOCOL.context


def test_null_is_as_if_it_were_left_out():
    names = [name for name in PROTOCOL.completion_schema["properties"] if name != "prompt"]
    job = completion(**dict.fromkeys(names))
    assert job.samplings[0] == completion(seed=job.samplings[0].seed).samplings[0]
    names = [name for name in PROTOCOL.chat_schema["properties"] if name != "messages"]
    assert chat(**dict.fromkeys(names)).answers == 1


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("a b", 1), (["a", "b"], 2), ([3, 4], 1), ([[3, 4], [5]], 2), ([3.0, 4.0], 1)],
)
def test_forms_of_a_prompt(prompt, count):
    job = completion(prompt=prompt, n=3)
    assert len(job.prompts) == count and job.answers == 3 * count
    assert all(type(token) is int for ids in job.prompts for token in ids)


def test_whole_numbers_may_be_written_as_fractions():
    job = completion(max_tokens=5.0, top_k=2.0, seed=3.0, n=2.0, logprobs=1.0, priority=-1.0)
    assert [sampling.seed for sampling in job.samplings] == [3, 4] and job.priority == -1
    assert (job.samplings[0].max_tokens, job.samplings[0].top_k, job.samplings[0].logprobs) == (5, 2, 1)


def test_seeds_wrap_around():
    assert [sampling.seed for sampling in completion(seed=-1, n=2).samplings] == [2**32 - 1, 0]


def test_messages_are_what_templates_know():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    job = chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert TOKENIZER.decode(job.prompts[0]) == "<|system|>be brief<|user|>one\ntwo<|assistant|>"
    answer = {"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "annotations": []}
    assert TOKENIZER.decode(chat(messages=[*HELLO, answer]).prompts[0]) == "<|user|>hm<|assistant|><|assistant|>"


def test_variables_go_to_the_template():
    template = "{% if shout %}{{ messages[0].content | upper }}{% endif %}."
    tokenizer = Tokenizer(tiny.tokenizer(), chat_template=template)
    protocol = Protocol(model="fox", tokenizer=tokenizer, vocab=VOCAB, context=64)
    body = {"messages": HELLO, "chat_template_kwargs": {"shout": True}}
    assert tokenizer.decode(protocol.chat(json.dumps(body).encode()).prompts[0]) == "HM."


# What is not.

BODIES = [
    (b"\xff", "not UTF-8: byte 0xff at 0"),
    (b'{"prompt": "\xe4"}', "not UTF-8"),
    (b"{", "not JSON"),
    (b"", "not JSON"),
    (b"[1]", "got list; allowed: a JSON object"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"a":' * 200_000, "nested too deeply"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN is no number"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"prompt": "a", "stop": ["\\uDFFF"]}', "surrogate"),
]


@pytest.mark.parametrize(("data", "told"), BODIES, ids=range(len(BODIES)))
def test_bodies_that_are_no_json_objects(data, told):
    assert refused(lambda: parse(data), 400, "body: ", told).code == "invalid_json"


def test_pairs_of_surrogates_are_characters():
    assert parse(b'{"prompt": "\\ud83e\\udd8a"}') == {"prompt": "\N{FOX FACE}"}


WRONG = [
    ({"prompt": ""}, "prompt", "got no character"),
    ({"prompt": []}, "prompt", "none empty"),
    ({"prompt": [[]]}, "prompt", "none empty"),
    ({"prompt": ["a", 3]}, "prompt", "a list of 2"),
    ({"prompt": [VOCAB]}, "prompt", f"0 to {VOCAB - 1}"),
    ({"prompt": [-1]}, "prompt", f"0 to {VOCAB - 1}"),
    ({"prompt": {"a": 1}}, "prompt", "an object of 1"),
    ({"prompt": "x " * 100}, "prompt", "the context is 64; shorten it to 63"),
    ({"temperature": -0.1}, "temperature", "a number or null, at least 0"),
    ({"temperature": "hot"}, "temperature", "got 'hot'"),
    ({"temperature": True}, "temperature", "got true"),
    ({"top_p": 0}, "top_p", "above 0, at most 1"),
    ({"top_k": 1.5}, "top_k", "a whole number"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"n": 129}, "n", "at most 128"),
    ({"logprobs": 21}, "logprobs", "at most 20"),
    ({"stop": [""]}, "stop[0]", "not empty"),
    ({"stop": ["a"] * 17}, "stop", "at most 16 of them"),
    ({"seed": 2**63}, "seed", "a whole number"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "a token id in digits"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "at most 100"),
    ({"logit_bias": {str(VOCAB): 1}}, "logit_bias", "outside the vocabulary"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "include_usage"),
    ({"echo": True, "logprobs": 1}, "echo", "not supported"),
    ({"topk": 3}, "topk", "did you mean 'top_k'?"),
    ({"suffix": "end"}, "suffix", "does not fill in the middle"),
    ({"best_of": True}, "best_of", "does not rank"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
]


@pytest.mark.parametrize(("body", "param", "told"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_fields_are_named(body, param, told):
    assert refused(lambda: completion(**body), 400, told).param == param


WRONG_CHATS = [
    ({"messages": []}, "messages", "not empty"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "'developer'"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "text, or a list of parts"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "'text'"),
    ({"messages": [*HELLO, {"role": "user", "content": "a", "nam": "b"}]}, "messages[1].nam", "did you mean 'name'?"),
    ({"tools": [{"type": "function"}]}, "tools", "does not call tools"),
    ({"tool_choice": "required"}, "tool_choice", "does not call tools"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
    ({"chat_template_kwargs": {"messages": "a"}}, "chat_template_kwargs.messages", "does not set itself"),
    ({"chat_template_kwargs": {"deep": {}}}, "chat_template_kwargs.deep", "true or false or a number or text"),
    ({"prompt": "a"}, "prompt", "unknown field"),
    ({"messages": HELLO * 40}, "messages", "the context is 64; shorten it to 63"),
]


@pytest.mark.parametrize(("body", "param", "told"), WRONG_CHATS, ids=[str(i) for i in range(len(WRONG_CHATS))])
def test_wrong_fields_of_a_chat_are_named(body, param, told):
    assert refused(lambda: chat(**body), 400, told).param == param


def test_numbers_that_no_float_can_hold():
    refused(lambda: PROTOCOL.completion(b'{"prompt": "a", "temperature": 1e999}'), 400, "temperature: got inf")
    refused(lambda: PROTOCOL.completion(b'{"prompt": "a", "max_tokens": 1e999}'), 400, "max_tokens: got inf")


def test_missing_and_foreign_models():
    assert refused(lambda: PROTOCOL.completion(b"{}"), 400, "prompt: missing").param == "prompt"
    assert refused(lambda: completion(model="ox"), 404, "served: 'fox'").code == "model_not_found"
    assert completion(model="fox").answers == 1


def test_a_model_without_a_tokenizer_takes_ids():
    assert completion(BARE, prompt=[3, 4]).prompts == ([3, 4],)
    refused(lambda: completion(BARE), 400, "no tokenizer")
    refused(lambda: completion(BARE, prompt=[3], stop="a"), 400, "stop_token_ids")
    refused(lambda: BARE.chat(json.dumps({"messages": HELLO}).encode()), 400, "no chat template")


def test_what_a_template_refuses_is_the_clients_fault():
    tokenizer = Tokenizer(tiny.tokenizer(), chat_template="{{ raise_exception('roles must alternate') }}")
    protocol = Protocol(model="fox", tokenizer=tokenizer, vocab=VOCAB, context=64)
    body = json.dumps({"messages": HELLO}).encode()
    assert refused(lambda: protocol.chat(body), 400, "roles must alternate").param == "messages"


def test_values_in_messages_are_short():
    fault = refused(lambda: check("x" * 10_000, {"type": "integer"}, "n"), 400, "...; allowed: a whole number")
    assert len(fault.message) < 200


def test_long_prompts_are_checked_at_once_and_as_strictly():
    body = {"prompt": [5] * 63}
    assert completion(**body).prompt_tokens == 63
    refused(lambda: completion(prompt=[5] * 62 + [True]), 400, "prompt")
    refused(lambda: completion(prompt=[5] * 62 + [VOCAB]), 400, "prompt")


# Replies, figures, sockets.


def test_tokens_of_two_texts_with_one_face_keep_the_likelier():
    class Top:
        chosen, top = -1.0, ((7, -0.5), (8, -float("inf")))

    job = completion(logprobs=2)
    reply = CompletionReply(job, "fox", TOKENIZER)
    reply.add([Piece(index=0, ids=(7,), text="x", tokens=(Token(id=7, offset=0, logprobs=Top),), finish="stop")])
    (choice,) = reply.whole()["choices"]
    (top,) = choice["logprobs"]["top_logprobs"]
    assert list(top.values()) == [-0.5, -9999.0], "JSON has no infinity"


def test_histograms_count_as_prometheus_does():
    histogram = Histogram("optx:test_seconds", "help", (0.1, 0.5))
    for value, times in ((0.1, 1), (0.3, 2), (7.0, 1)):
        histogram.add(value, times)
    samples = {(s.name, s.labels.get("le")): s.value for s in histogram.family().samples}
    assert samples["optx:test_seconds_bucket", "0.1"] == 1, "a bound belongs to its bucket"
    assert samples["optx:test_seconds_bucket", "0.5"] == 3
    assert samples["optx:test_seconds_bucket", "+Inf"] == samples["optx:test_seconds_count", None] == 4
    assert samples["optx:test_seconds_sum", None] == pytest.approx(7.7)


def test_a_port_that_another_has_is_told():
    one = bind("127.0.0.1", 0)
    port = one.getsockname()[1]
    two = bind("127.0.0.1", port)  # nothing listens yet
    with one, two:
        assert listen(one) == f"http://127.0.0.1:{port}"
        with pytest.raises(ServeError, match=f"127.0.0.1:{port} cannot be listened on: Address already in use"):
            listen(two)
        with pytest.raises(ServeError, match="give another --host or --port, 0 for a port that is free"):
            bind("127.0.0.1", port)
    with pytest.raises(ServeError, match="no-such-host.invalid:80"):
        bind("no-such-host.invalid", 80)
