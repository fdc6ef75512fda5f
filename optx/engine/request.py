"""What is asked for and what comes back."""

import dataclasses
import numbers
import operator
import time
from collections.abc import Iterable, Mapping

from optx.engine.constraint import Constraint, Grammar
from optx.engine.sampling import BIASES, KNOBS, TOP, Way
from optx.errors import RequestError

STOPS = 8  # stop ids a row that the device looks for; with more of them the host looks at every token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # nucleus: the smallest set of tokens with at least this mass
    min_p: float = 0.0  # tokens less likely than this times the likeliest are out
    repetition_penalty: float = 1.0  # divides (multiplies, where negative) the logits of tokens of prompt and answer
    presence_penalty: float = 0.0  # off the logits of tokens of the answer
    frequency_penalty: float = 0.0  # the same, for each time that they came
    logit_bias: Mapping[int, float] | None = None  # token id -> added to its logit
    logprobs: int | None = None  # log-probabilities of the tokens chosen, and of this many likeliest beside them
    seed: int = 0  # with a temperature: equal seeds and prompts give equal tokens, whatever runs beside them
    stop: tuple[str, ...] = ()  # texts that end the answer; they are not part of it
    stop_ids: tuple[int, ...] = ()  # token ids that end the answer, besides the tokenizer's own
    ignore_eos: bool = False  # True: the tokenizer's end tokens do not stop
    grammar: Grammar | None = None  # what the answer follows to its end (`optx.Grammar`); None: free text

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
            ("min_p", lambda x: _number(x) and 0 <= x <= 1, "0 (off) to 1"),
            ("repetition_penalty", lambda x: _number(x) and 0 < x < float("inf"), "above 0; 1 is off"),
            ("presence_penalty", lambda x: _number(x) and -2 <= x <= 2, "-2 to 2; 0 is off"),
            ("frequency_penalty", lambda x: _number(x) and -2 <= x <= 2, "-2 to 2; 0 is off"),
            ("logit_bias", _biases, f"at most {BIASES} token ids with a bias of -100 to 100 each"),
            ("logprobs", lambda x: x is None or (_whole(x) and 0 <= x <= TOP), f"0 to {TOP}, or null for none"),
            ("seed", lambda x: _whole(x) and 0 <= x < 2**32, "0 to 2^32 - 1"),
            ("stop", lambda x: isinstance(x, tuple) and all(isinstance(t, str) and t for t in x), "texts, none empty"),
            ("stop_ids", lambda x: isinstance(x, tuple) and all(map(_whole, x)), "token ids"),
            ("grammar", lambda x: x is None or isinstance(x, Grammar), "an optx.Grammar, or None for free text"),
        ):
            if not fits(getattr(self, name)):
                raise RequestError(f"sampling.{name}: got {getattr(self, name)!r}; allowed: {allowed}")

    @property
    def way(self) -> Way:
        """What the program that serves it must be able to do."""
        if self.penalized or self.logit_bias or self.logprobs is not None or self.grammar is not None:
            return "full"
        return "sampled" if self.temperature > 0 else "greedy"

    @property
    def penalized(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def knobs(self) -> list[float]:
        return [float(getattr(self, name)) for name in KNOBS]


def _biases(value) -> bool:
    return value is None or (
        isinstance(value, Mapping)
        and len(value) <= BIASES
        and all(_whole(token) and _number(bias) and -100 <= bias <= 100 for token, bias in value.items())
    )


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


@dataclasses.dataclass(frozen=True)
class Logprobs:
    """The model's log-probabilities at one token, before temperature, penalties and bias."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), likeliest first


@dataclasses.dataclass(kw_only=True, eq=False)
class Request:
    """One running request: its prompt, what it has produced, how far its cache is. Times are `time.perf_counter` seconds."""

    id: int  # in order of arrival
    prompt: list[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    priority: int = 0  # smaller is served first
    context: int | None = None  # tokens of its prompt that a question follows; None: all of them
    output: list[int] = dataclasses.field(default_factory=list)
    logprobs: list["Logprobs"] = dataclasses.field(default_factory=list)  # of `output`, where asked for
    constraint: Constraint | None = None  # its place in `sampling.grammar`
    finish: str | None = None  # "stop" (a stop id, the end of its grammar), "length", "abort", "error"
    error: str | None = None  # why, where a grammar left no token to go on with
    arrived: float = dataclasses.field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    finished_at: float | None = None
    preemptions: int = 0

    # The scheduler's.
    row: int = -1  # row of the batch; -1: waiting
    computed: int = 0  # tokens whose keys are cached, those of dispatches under way among them
    pending: int = 0  # tokens that dispatches under way draw
    drawn: bool = False  # its newest token was drawn in this row: the device holds it
    bumps: int = 0  # times it lost its row, before its first token was computed too
    senior: bool = False  # was overtaken or lost its row too often: goes before all that are not
    ticket: int = 0  # requests that were queued before it
    keys: list[bytes] | None = None  # pages of its known tokens, for the prefix cache
    shared: int = 0  # pages found in the prefix cache, and in use, when it was admitted
    leader: "Request | None" = None  # the request whose prompt it will fork
    followers: list["Request"] = dataclasses.field(default_factory=list)  # requests that will fork its prompt
    replay: list[list[int]] | None = (
        None  # parts of its prompt to be fed again before it is compacted; None: not asked yet
    )
    replayed: int = 0  # tokens of the first of these that were
    way: Way = "greedy"  # what the programs that compute its tokens must be able to do
    penalized: bool = False  # must meet its whole prompt: takes nothing from the prefix cache

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def subject(self) -> int:
        """Tokens that a policy of eviction takes for its prompt: what comes behind them is computed over what was kept."""
        return len(self.prompt) if self.context is None else self.context

    @property
    def left(self) -> int:
        """Tokens that it may still produce, those under way not counted."""
        return self.sampling.max_tokens - len(self.output) - self.pending

    @property
    def watched(self) -> bool:
        """Whether the host has to look at every token."""
        return bool(self.sampling.stop) or len(self.stop_ids) > STOPS or self.constraint is not None

    @property
    def rank(self) -> tuple[int, int, int]:
        """Smaller: is kept longer when cache pages run out."""
        return (0, 0, self.id) if self.senior else (1, self.priority, self.id)

    def known(self, start: int, end: int) -> list[int]:
        """Tokens start to end of prompt and output."""
        if end <= len(self.prompt):
            return self.prompt[start:end]
        return [*self.prompt, *self.output][start:end]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished answer."""

    text: str  # "" without a tokenizer
    token_ids: tuple[int, ...]
    finish: str  # "stop", "length", or "error": its grammar left no token to go on with
    prompt_tokens: int
    logprobs: tuple[Logprobs, ...] | None = None  # of token_ids, where asked for
