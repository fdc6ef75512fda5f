"""What a serving bench asks for: prompts of random token ids, how long the answers are, when each request leaves.

The shapes are those of `vllm bench serve` on its random dataset: fixed or spread lengths, shared prefixes, a Poisson or bursty
stream at a rate, or everything at once under a cap of requests in flight.
"""

import dataclasses
import typing

import numpy as np

from optx.errors import UsageError, did_you_mean

VOCAB = 10_000  # token ids are below it by default: most vocabularies are larger
ENDPOINTS = ("completions", "chat")


def flag(help: str, default=None):
    """A field of a bench's settings that is a flag of its command line too. help: what the flag's help says."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """A load. Lengths in tokens, rates in requests a second."""

    num_prompts: int = flag("requests in all", 1000)
    input_len: int = flag("tokens of a prompt, its shared prefix not counted", 1024)
    output_len: int = flag("tokens of an answer", 128)
    range_ratio: float = flag("r: lengths are drawn evenly from length * (1 - r) to length * (1 + r)", 0.0)
    prefix_len: int = flag("tokens before each prompt that it shares with others", 0)
    num_prefixes: int = flag("different shared prefixes; prompts take turns", 1)
    request_rate: float = flag("requests a second; inf sends all at once", float("inf"))
    burstiness: float = flag("1: a Poisson stream; below 1 burstier, above 1 more even (gamma-distributed gaps)", 1.0)
    concurrency: int | None = flag("most requests in flight; by default as many as there are")
    ignore_eos: bool = flag("answers go on to their full length", False)
    temperature: float = flag("0 takes the likeliest token", 0.0)
    vocab: int = flag("token ids are drawn below this", VOCAB)
    seed: int = flag("of lengths, prompts and gaps: the same seed gives the same load", 0)

    def __post_init__(self):
        for name, fits, allowed in (
            *((name, lambda x: x >= 1, "1 or more") for name in ("num_prompts", "input_len", "output_len", "num_prefixes")),
            ("range_ratio", lambda x: 0 <= x < 1, "0 to below 1"),
            ("prefix_len", lambda x: x >= 0, "0 or more"),
            ("request_rate", lambda x: x > 0, "above 0, or inf"),
            ("burstiness", lambda x: 0 < x < float("inf"), "above 0"),
            ("concurrency", lambda x: x is None or x >= 1, "1 or more"),
            ("temperature", lambda x: 0 <= x < float("inf"), "0 or more"),
            ("vocab", lambda x: x >= 2, "2 or more"),
            ("seed", lambda x: x >= 0, "0 or more"),
        ):  # fmt: skip
            if not fits(getattr(self, name)):
                raise UsageError(f"--{name}: got {getattr(self, name)}; allowed: {allowed}")

    @property
    def in_flight(self) -> int:
        """Most requests at once."""
        return min(self.concurrency or self.num_prompts, self.num_prompts)

    @property
    def longest(self) -> int:
        """Tokens that prompt and answer of one request can come to."""
        return self.prefix_len + sum(_most(length, self.range_ratio) for length in (self.input_len, self.output_len))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server:
    """An OpenAI-compatible server under the load."""

    url: str | None = flag("of the server, as in http://127.0.0.1:8000")
    model: str | None = flag("over HTTP, the model's name there; by default the first that it lists")
    endpoint: str = flag("over HTTP, completions or chat", "completions")
    text: bool = flag(
        "over HTTP, send words in place of token ids (chat, and servers that refuse ids, get them anyway)", False
    )
    api_key: str | None = flag("over HTTP, sent as a bearer token")
    timeout: float = flag("over HTTP, seconds that a request may take", 600.0)

    def __post_init__(self):
        if self.endpoint not in ENDPOINTS:
            raise UsageError(f"--endpoint: {self.endpoint!r}{did_you_mean(self.endpoint, ENDPOINTS)}")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise UsageError(f"--url: got {self.url!r}; allowed: http://HOST:PORT or https://...")
        if not self.timeout > 0:
            raise UsageError(f"--timeout: got {self.timeout}; allowed: seconds above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """One request of a load."""

    prompt: list[int]
    tokens: int  # of its answer, at most
    at: float  # seconds after the first


def asks(load: Load) -> list[Ask]:
    """The requests of a load in the order in which they leave."""
    rng = np.random.default_rng(load.seed)
    count = load.num_prompts
    inputs, outputs = (_lengths(rng, length, load.range_ratio, count) for length in (load.input_len, load.output_len))
    prefixes = rng.integers(0, load.vocab, (load.num_prefixes, load.prefix_len)).tolist()
    prompts = [rng.integers(0, load.vocab, length).tolist() for length in inputs]
    gaps = np.zeros(count)
    if load.request_rate != float("inf"):  # mean gap 1 / rate, coefficient of variation burstiness^-1/2
        gaps[1:] = rng.gamma(load.burstiness, 1 / (load.request_rate * load.burstiness), count - 1)
    return [
        Ask(prompt=prefixes[i % load.num_prefixes] + prompts[i], tokens=outputs[i], at=at)
        for i, at in enumerate(np.cumsum(gaps).tolist())
    ]


def _lengths(rng, length: int, ratio: float, count: int) -> list[int]:
    return rng.integers(max(1, int(length * (1 - ratio))), _most(length, ratio) + 1, count).tolist()


def _most(length: int, ratio: float) -> int:
    return int(length * (1 + ratio))


def kind(field: dataclasses.Field) -> type:
    """The type of a setting's value: int, float, str or bool."""
    options = [hint for hint in typing.get_args(field.type) if hint is not type(None)]
    return options[0] if options else field.type


def flag_of(field: dataclasses.Field) -> tuple[str, type, bool, str]:
    """A setting as a flag: (name, type, whether it may be repeated, help with its default)."""
    shown = "" if field.default in (None, False, "", ()) else f" ({field.default})"
    repeated = kind(field) is tuple
    return field.name, str if repeated else kind(field), repeated, field.metadata["help"] + shown


def settings[T](cls: type[T], given: dict) -> T:
    """The settings dataclass from the flags that were given; None and what belongs to others is left out."""
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in given.items() if name in names and value is not None})
