"""What is asked for and what comes back."""

import dataclasses

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
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        for name, ok, allowed in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", 0 <= self.seed < 2**32, "0 to 2^32 - 1"),
            ("stop", all(stop), "no empty text"),
        ):
            if not ok:
                raise RequestError(f"sampling.{name}: got {getattr(self, name)!r}; allowed: {allowed}")


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished answer."""

    text: str  # "" without a tokenizer
    token_ids: tuple[int, ...]
    finish: str  # "stop" or "length"
    prompt_tokens: int
