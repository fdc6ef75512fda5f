"""Bodies of requests into what the engine is asked for, strictly: a field that is not known is an error that names it."""

import contextlib
import dataclasses
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Literal, NoReturn

from optx.compaction import Compactor, Talk
from optx.engine.request import Sampling, token_ids
from optx.errors import CheckpointError, RequestError
from optx.generate import encode, encode_chat
from optx.grammar import Grammar
from optx.serve import fields
from optx.serve.faults import Fault
from optx.serve.schema import check
from optx.tokenizer import Tokenizer

COMPLETION_TOKENS = 16  # of /v1/completions without max_tokens, as in OpenAI's API
SEEDS = 2**32
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BAD_TEXT = "body: a text holds half of a surrogate pair; allowed: valid Unicode"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one HTTP request asks for: `samplings` answers to each of `prompts`."""

    kind: Literal["completion", "chat"]
    prompts: tuple[list[int], ...]
    samplings: tuple[Sampling, ...]
    priority: int = 0  # smaller is served first
    echo: tuple[str, ...] | None = None  # texts of the prompts, to begin the answers with; None: they are left out
    stream: bool = False
    usage: Literal["no", "end", "every"] = "no"  # chunks of a stream that carry the usage
    ids: bool = False  # choices carry token ids
    talk: Talk | None = None  # the conversation, where it is to be compacted before it is answered
    compaction: Mapping | None = None  # what the answer tells of that

    @property
    def answers(self) -> int:
        return len(self.prompts) * len(self.samplings)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def parse(data: bytes) -> dict:
    """The object in a body. Raises Fault (400) for what is no JSON object in UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{data[error.start]:02x} at {error.start}"
        raise Fault(400, f"body: not UTF-8: {got}; send JSON in UTF-8", code="invalid_json") from None
    try:
        body = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise Fault(400, "body: JSON nested too deeply", code="invalid_json") from None
    except ValueError as error:  # JSONDecodeError, and an integer of thousands of digits
        raise Fault(400, f"body: not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Fault(400, f"body: got {type(body).__name__}; allowed: a JSON object", code="invalid_json")
    if _SURROGATE.search(text):
        try:
            json.dumps(body, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise Fault(400, _BAD_TEXT, code="invalid_json") from None
    return body


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


class Protocol:
    """Reads bodies for one served model. Safe to call from several threads."""

    def __init__(
        self,
        *,
        model: str,
        tokenizer: Tokenizer | None,
        vocab: int,
        context: int,
        compactor: Compactor | None = None,
    ):
        """compactor: of long conversations; None: they are refused."""
        self.model, self.tokenizer, self.vocab, self.context = model, tokenizer, vocab, context
        self.compactor = compactor
        self.completion_schema = fields.completion(model, vocab)
        self.chat_schema = fields.chat(model, compactor is not None, context)

    def completion(self, data: bytes) -> Job:
        """Raises Fault (400, 404)."""
        body = self._checked(data, self.completion_schema)
        prompts = _prompts(body["prompt"])
        logprobs = None if "logprobs" not in body else int(body["logprobs"])
        if body.get("echo") and logprobs is not None:
            why = "echo with logprobs: log-probabilities of the prompt are not supported; leave one of the two out"
            raise Fault(400, why, param="echo")
        with _naming("prompt"):
            ids = tuple(self._fits(encode(prompt, self.tokenizer), "prompt") for prompt in prompts)
            echo = tuple(p if isinstance(p, str) else self._text(p) for p in prompts) if body.get("echo") else None
        wanted = int(body.get("max_tokens", COMPLETION_TOKENS))
        return self._job("completion", body, ids, wanted, logprobs, echo)

    def chat(self, data: bytes) -> Job:
        """Raises Fault (400, 404)."""
        body = self._checked(data, self.chat_schema)
        logprobs = int(body.get("top_logprobs", 0)) if body.get("logprobs") else None
        if "top_logprobs" in body and logprobs is None:
            raise Fault(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
        variables = body.get("chat_template_kwargs", {})
        messages = [_message(message) for message in body["messages"]]
        with _naming("messages"):
            if self.tokenizer is None or self.tokenizer.chat_template is None:
                raise RequestError("this model has no chat template: use /v1/completions")
            ids = encode_chat(messages, self.tokenizer, **variables)
            talk = self._talk(body.get("compaction", True), messages, ids, variables)
            ids = ids if talk is not None else self._fits(ids, "messages")
        given = [body[name] for name in ("max_completion_tokens", "max_tokens") if name in body]
        job = self._job("chat", body, (ids,), int((given or [self.context])[0]), logprobs, None)
        return dataclasses.replace(job, talk=talk)

    def _talk(self, asked: bool | Mapping, messages, ids: list[int], variables: Mapping) -> Talk | None:
        if self.compactor is None or asked is False:
            return None
        changes = {} if asked is True else {name: int(value) for name, value in asked.items() if value is not None}
        return self.compactor.talk(messages, ids, variables, dataclasses.replace(self.compactor.how, **changes))

    def summary(self, job: Job, text: str | None, tokens: int) -> Job | None:
        """Takes the summary that was made last, if any; -> the job that makes the next one, None when all are made.

        Raises Fault (400).
        """
        with _naming("messages"):
            prompt = job.talk.next(text, tokens)
        if prompt is None:
            return None
        sampling = Sampling(max_tokens=job.talk.how.most)
        return Job(kind="chat", prompts=(prompt,), samplings=(sampling,), priority=job.priority)

    def compacted(self, job: Job) -> Job:
        """The job when its summaries are made. Raises Fault (400)."""
        with _naming("messages"):
            ids = self._fits(job.talk.ids, "messages")
        return dataclasses.replace(job, prompts=(ids,), talk=None, compaction=dataclasses.asdict(job.talk.event))

    def _checked(self, data: bytes, schema: Mapping) -> dict:
        body = parse(data)
        asked = body.get("model")
        if isinstance(asked, str) and asked != self.model:
            told = f"model {asked!r:.80} is not served here; served: {self.model!r}"
            raise Fault(404, told, param="model", code="model_not_found")
        check(body, schema)
        return {name: value for name, value in body.items() if value is not None}

    def _fits(self, ids: list[int], param: str) -> list[int]:
        ids = token_ids(ids, self.vocab)
        if len(ids) >= self.context:
            told = f"{len(ids)} tokens and the context is {self.context}; shorten it to {self.context - 1}"
            raise Fault(400, f"the prompt has {told}", param=param, code="context_length_exceeded")
        return ids

    def _text(self, ids: list[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(ids, skip_special=False)

    def _job(self, kind, body: Mapping, ids, max_tokens: int, logprobs: int | None, echo) -> Job:
        options = body.get("stream_options")
        if options is not None and not body.get("stream"):
            raise Fault(400, "stream_options: needs stream: true", param="stream_options")
        with _naming(None):
            samplings = self._samplings(body, max_tokens, logprobs)
        every, end = ((options or {}).get(name) for name in ("continuous_usage_stats", "include_usage"))
        return Job(
            kind=kind,
            prompts=ids,
            samplings=samplings,
            priority=int(body.get("priority", 0)),
            echo=echo,
            stream=bool(body.get("stream")),
            usage="every" if every else "end" if end else "no",
            ids=bool(body.get("return_token_ids")),
        )

    def _samplings(self, body: Mapping, max_tokens: int, logprobs: int | None) -> tuple[Sampling, ...]:
        numbers = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        stop = body.get("stop", ())
        if stop and self.tokenizer is None:
            raise Fault(400, "stop: the model has no tokenizer; use stop_token_ids", param="stop")
        grammar = self._grammar(body.get("response_format", {}))
        first = int(body["seed"]) if "seed" in body else secrets.randbelow(SEEDS)
        one = Sampling(
            max_tokens=max_tokens,
            temperature=float(body.get("temperature", 1.0)),
            top_k=max(0, int(body.get("top_k", 0))),
            logit_bias=self._biases(body.get("logit_bias")),
            logprobs=logprobs,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_ids=tuple(map(int, body.get("stop_token_ids", ()))),
            ignore_eos=bool(body.get("ignore_eos")),
            **{name: float(body[name]) for name in numbers if name in body},
            **({} if grammar is None else {"grammar": grammar}),
        )
        return tuple(dataclasses.replace(one, seed=(first + i) % SEEDS) for i in range(int(body.get("n", 1))))

    def _biases(self, biases: Mapping[str, float] | None) -> dict[int, float] | None:
        wrong = next((token for token in biases or () if int(token) >= self.vocab), None)
        if wrong is not None:
            told = f"logit_bias.{wrong}: outside the vocabulary; allowed: 0 to {self.vocab - 1}"
            raise Fault(400, told, param="logit_bias")
        return {int(token): float(bias) for token, bias in biases.items()} if biases else None

    def _grammar(self, form: Mapping) -> Grammar | None:
        kind = form.get("type", "text")
        if kind == "text":
            return None
        if kind == "json_schema" and "json_schema" not in form:
            raise Fault(400, "response_format.json_schema: missing", param="response_format.json_schema")
        with _naming("response_format"):
            if kind == "json_object":
                return Grammar.json_object(self.tokenizer)
            return Grammar.json_schema(form["json_schema"]["schema"], self.tokenizer)


@contextlib.contextmanager
def _naming(param: str | None) -> Iterator[None]:
    """Turns what the parts of optx say of a request into a fault of the field that it came from."""
    try:
        yield
    except (RequestError, CheckpointError) as error:
        raise Fault(400, str(error), param=param) from None


def _prompts(prompt: str | list) -> list[str | list[int]]:
    several = isinstance(prompt, list) and isinstance(prompt[0], str | list)
    # JSON's 5.0 is a whole number too.
    return [one if isinstance(one, str) else list(map(int, one)) for one in (prompt if several else [prompt])]


def _message(message: Mapping) -> dict[str, str]:
    """A message as chat templates know it: text, and the role that instructions have there."""
    content = message["content"] or ""
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    name = {"name": message["name"]} if message.get("name") else {}
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": content, **name}
