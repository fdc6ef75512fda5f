"""What is asked for and what comes back."""

import dataclasses
import numbers
import operator
from collections.abc import Iterable

from optx.errors import RequestError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # nucleus: the smallest set of tokens with at least this mass
    seed: int = 0  # with a temperature: equal seeds and prompts give equal tokens, whatever runs beside them
    stop: tuple[str, ...] = ()  # texts that end the answer; they are not part of it
    stop_ids: tuple[int, ...] = ()  # token ids that end the answer, besides the tokenizer's own
    ignore_eos: bool = False  # True: the tokenizer's end tokens do not stop

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_ids"):
            if isinstance(getattr(self, name), list | set | frozenset):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, fits, allowed in (
            ("max_tokens", lambda x: _whole(x) and x >= 1, "a whole number, at least 1"),
            ("temperature", lambda x: _number(x) and 0 <= x < float("inf"), "0 (greedy) or more"),
            ("top_k", lambda x: _whole(x) and x >= 0, "0 (off) or more"),
            ("top_p", lambda x: _number(x) and 0 < x <= 1, "above 0, at most 1"),
            ("seed", lambda x: _whole(x) and 0 <= x < 2**32, "0 to 2^32 - 1"),
            ("stop", lambda x: isinstance(x, tuple) and all(isinstance(t, str) and t for t in x), "texts, none empty"),
            ("stop_ids", lambda x: isinstance(x, tuple) and all(map(_whole, x)), "token ids"),
        ):
            if not fits(getattr(self, name)):
                raise RequestError(f"sampling.{name}: got {getattr(self, name)!r}; allowed: {allowed}")


def _number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def token_ids(prompt: Iterable[int], vocab: int | None = None) -> list[int]:
    """A prompt's token ids as ints, at least one. Raises RequestError for what is none, or is outside the vocabulary."""
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError:
        raise RequestError(f"the prompt is {prompt!r:.60}; allowed: text, or a list of token ids") from None
    if not ids:
        raise RequestError("the prompt is empty; give at least one token")
    wrong = next((i for i in ids if i < 0 or (vocab is not None and i >= vocab)), None)
    if wrong is not None:
        most = "" if vocab is None else f" to {vocab - 1}"
        raise RequestError(f"token id {wrong} is outside the vocabulary; allowed: 0{most}")
    return ids


@dataclasses.dataclass(kw_only=True)
class Request:
    """One running request: its prompt, what it has produced, how far its cache is."""

    id: int
    prompt: list[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    output: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0  # prompt and output tokens whose keys are cached
    row: int = -1  # row of the batch; -1: waiting
    finish: str | None = None  # "stop" (a stop id), "length", "abort"

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def left(self) -> int:
        """Tokens that it may still produce."""
        return self.sampling.max_tokens - len(self.output)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished answer."""

    text: str  # "" without a tokenizer
    token_ids: tuple[int, ...]
    finish: str  # "stop" or "length"
    prompt_tokens: int
