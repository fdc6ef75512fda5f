"""Answers in the form of OpenAI's API: whole, or as chunks of a stream."""

import abc
import json
import time
import uuid
from collections.abc import Iterator, Sequence

from optx.serve.loop import Piece, Token
from optx.serve.protocol import Job
from optx.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
LEAST = -9999.0  # stands for minus infinity, which JSON cannot hold


def event(body: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(body) + b"\n\n"


def encode(body: dict) -> bytes:
    return _ENCODER.encode(body).encode("utf-8")


class Reply(abc.ABC):
    """One response as its pieces come. `whole` after the last of them; or `opening`, `chunks` of each and `closing`."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, job: Job, model: str, tokenizer: Tokenizer | None):
        self.job, self.tokenizer = job, tokenizer
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.texts = [[self.echo(i)] for i in range(job.answers)]
        self.ids: list[list[int]] = [[] for _ in range(job.answers)]
        self.tokens: list[list[Token]] = [[] for _ in range(job.answers)]
        self.finishes: list[str | None] = [None] * job.answers
        # What all chunks begin with, encoded once: a chunk is sent for every token of every answer.
        self._begin = b"data: " + encode({**self.head, "object": self.chunk_kind})[:-1] + b',"choices":['

    def add(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self.texts[piece.index].append(piece.text)
            self.ids[piece.index] += piece.ids
            self.tokens[piece.index] += piece.tokens
            self.finishes[piece.index] = piece.finish

    def whole(self) -> dict:
        choices = []
        for i in range(self.job.answers):
            choice = {"index": i, **self.message("".join(self.texts[i])), "logprobs": self.logprobs(self.tokens[i], i)}
            ids = {"token_ids": self.ids[i]} if self.job.ids else {}
            choices.append(choice | {"finish_reason": self.finishes[i]} | ids)
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage(), **self.compaction()}

    def compaction(self) -> dict:
        """What a client is told of a compaction: a field of the whole answer, or of a stream's first chunk."""
        return {} if self.job.compaction is None else {"compaction": self.job.compaction}

    def usage(self) -> dict:
        given = sum(map(len, self.ids))
        prompt = self.job.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": given, "total_tokens": prompt + given}

    def opening(self) -> Iterator[bytes]:
        """Chunks before the first token."""
        for i in range(self.job.answers):
            delta = self.first(self.echo(i))
            if delta is not None:
                more = encode(self.compaction()) if i == 0 else b"{}"
                yield self.chunk(i, delta, [], (), None, more)

    def chunks(self, pieces: Sequence[Piece]) -> Iterator[bytes]:
        for piece in pieces:
            self.ids[piece.index] += piece.ids
            yield self.chunk(piece.index, self.delta(piece.text), piece.tokens, piece.ids, piece.finish)

    def closing(self) -> Iterator[bytes]:
        if self.job.usage != "no":
            yield event({**self.head, "object": self.chunk_kind, "choices": [], "usage": self.usage()})
        yield DONE

    def chunk(
        self,
        index: int,
        delta: dict,
        tokens: Sequence[Token],
        ids: Sequence[int],
        finish: str | None,
        more: bytes = b"{}",
    ) -> bytes:
        """more: an object whose fields the chunk has besides."""
        choice = {"index": index, **delta, "logprobs": self.logprobs(tokens, index) if tokens else None}
        choice |= {"finish_reason": finish} | ({"token_ids": list(ids)} if self.job.ids else {})
        return (
            self._begin
            + encode(choice)
            + b"]"
            + self._usage_of_chunk()
            + (b"," + more[1:] if len(more) > 2 else b"}")
            + b"\n\n"
        )

    def _usage_of_chunk(self) -> bytes:
        if self.job.usage == "no":
            return b""
        return b',"usage":' + (encode(self.usage()) if self.job.usage == "every" else b"null")

    def echo(self, index: int) -> str:
        """The text that an answer begins with."""
        return "" if self.job.echo is None else self.job.echo[index // len(self.job.samplings)]

    def text_of(self, id: int) -> str:
        """A token's text; bytes that are no whole characters as the API writes them."""
        data = self.bytes_of(id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def bytes_of(self, id: int) -> bytes:
        return str(id).encode() if self.tokenizer is None else self.tokenizer.token_bytes(id)

    @abc.abstractmethod
    def message(self, text: str) -> dict:
        """What a whole answer adds to its choice."""

    @abc.abstractmethod
    def delta(self, text: str) -> dict:
        """What a piece adds to its choice."""

    @abc.abstractmethod
    def first(self, echo: str) -> dict | None:
        """What stands in a chunk before the first token, None for no such chunk."""

    @abc.abstractmethod
    def logprobs(self, tokens: Sequence[Token], index: int) -> dict | None:
        """Log-probabilities of tokens, None where none were asked for."""


class CompletionReply(Reply):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def message(self, text: str) -> dict:
        return {"text": text}

    def delta(self, text: str) -> dict:
        return {"text": text}

    def first(self, echo: str) -> dict | None:
        return {"text": echo} if echo else None

    def logprobs(self, tokens: Sequence[Token], index: int) -> dict | None:
        if self.job.samplings[0].logprobs is None:
            return None
        before = len(self.echo(index))
        return {
            "tokens": [self.text_of(token.id) for token in tokens],
            "token_logprobs": [max(token.logprobs.chosen, LEAST) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [before + token.offset for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float]:
        """The likeliest tokens, and the one chosen: of two with one text the likelier."""
        found: dict[str, float] = {}
        for id, value in sorted([*token.logprobs.top, (token.id, token.logprobs.chosen)], key=lambda pair: -pair[1]):
            found.setdefault(self.text_of(id), max(value, LEAST))
        return found


class ChatReply(Reply):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def message(self, text: str) -> dict:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict:
        return {"delta": {"content": text}}

    def first(self, echo: str) -> dict | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def logprobs(self, tokens: Sequence[Token], index: int) -> dict | None:
        if self.job.samplings[0].logprobs is None:
            return None
        return {"content": [self._entry(token) for token in tokens], "refusal": None}

    def _entry(self, token: Token) -> dict:
        top = [self._one(id, value) for id, value in token.logprobs.top]
        return {**self._one(token.id, token.logprobs.chosen), "top_logprobs": top}

    def _one(self, id: int, value: float) -> dict:
        return {"token": self.text_of(id), "logprob": max(value, LEAST), "bytes": list(self.bytes_of(id))}


REPLIES = {"completion": CompletionReply, "chat": ChatReply}
