"""Prompts in, text out, over an engine: tokens, stop texts, streaming."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from optx.engine.engine import Engine
from optx.engine.request import Completion, Request, Sampling, token_ids
from optx.errors import RequestError
from optx.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, object]  # {"role": "user", "content": "..."}
OnText = Callable[[int, str], None]  # (index of the prompt, new text)


def encode(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids of a prompt, with the model's first token where it wants one. Raises RequestError."""
    if not isinstance(prompt, str):
        return token_ids(prompt)
    if tokenizer is None:
        raise RequestError("the model has no tokenizer: give token ids in place of text")
    if not prompt:
        raise RequestError("the prompt is empty; give at least one character")
    return tokenizer.encode(prompt)


def encode_chat(messages: str | Sequence[Message], tokenizer: Tokenizer | None, **variables: object) -> list[int]:
    """Token ids of a conversation in the model's chat template; a text is one turn of the user. Raises RequestError.

    variables: what the template reads besides, such as enable_thinking=False.
    """
    if tokenizer is None:
        raise RequestError("the model has no tokenizer, so it has no chat template: give token ids")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return tokenizer.encode(tokenizer.chat(messages, **variables), add_special=False, parse_special=True)


@dataclasses.dataclass
class Answer:
    """Text of one request as it grows. What could be the start of a stop text is held back."""

    request: Request
    tokenizer: Tokenizer | None
    text: str = ""
    sent: int = 0  # characters given out
    stopped: bool = False  # a stop text was met

    def __post_init__(self):
        self._stream = self.tokenizer.stream() if self.tokenizer else None

    def push(self, token: int) -> str:
        """Takes a token, returns text that is final."""
        if self._stream is None or token in self.request.stop_ids or self.stopped:
            return ""
        self.text += self._stream.push(token)
        return self._settle()

    def end(self) -> str:
        """The rest of the text when no more tokens come."""
        start = self.sent
        if self._stream is not None and not self.stopped:
            self.text += self._stream.finish()
            self._settle()
        self.sent = len(self.text)
        return self.text[start:]

    def _settle(self) -> str:
        stops = self.request.sampling.stop
        found = [at for at in (self.text.find(stop, max(0, self.sent - len(stop))) for stop in stops) if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        held = 0 if self.stopped else max((_overlap(self.text, stop) for stop in stops), default=0)
        final = self.text[self.sent : len(self.text) - held]
        self.sent += len(final)
        return final


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def generate(
    engine: Engine,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    on_text: OnText | None = None,
) -> list[Completion]:
    """Answers to all prompts, decoded together. Raises RequestError before anything runs when one cannot be served."""
    if sampling.stop and tokenizer is None:
        raise RequestError("sampling.stop needs a tokenizer; use stop_ids")
    encoded = [encode(prompt, tokenizer) for prompt in prompts]
    requests: list[Request] = []
    try:
        for ids in encoded:
            requests.append(engine.add_request(ids, sampling))
        answers = {request.id: Answer(request, tokenizer) for request in requests}
        index = {request.id: i for i, request in enumerate(requests)}
        while not all(request.finish for request in requests):
            for request, token in engine.step():
                if request.id not in answers:
                    continue
                answer = answers[request.id]
                text = answer.push(token)
                if answer.stopped:
                    engine.abort(request)
                if request.finish:
                    text += answer.end()
                if text and on_text is not None:
                    on_text(index[request.id], text)
    finally:
        for request in requests:
            engine.abort(request)
    return [_completion(answers[request.id]) for request in requests]


def _completion(answer: Answer) -> Completion:
    request = answer.request
    finish = request.finish if request.finish in ("length", "error") and not answer.stopped else "stop"
    return Completion(
        text=answer.text,
        token_ids=tuple(request.output),
        finish=finish,
        prompt_tokens=len(request.prompt),
        logprobs=None if request.sampling.logprobs is None else tuple(request.logprobs),
    )
