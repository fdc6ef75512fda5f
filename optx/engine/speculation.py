"""Exact speculative decoding: drafts of several tokens are verified in one tick, and no token changes by it.

The target draws its own token at every position with the noise that a plain tick of that seed and step has; drafts are kept
while they equal it. What comes out is therefore the plain engine's answer token for token, whatever drafted and however badly
(drafter-invariant speculative decoding by a shared Gumbel noise, arXiv:2408.07978). Drafts that are sampled with the same noise
are kept with a chance of at least (1 - d) / (1 + d), d being the total variation between the two distributions; a maximal
coupling (accept with min(1, p/q), else draw from (p - q)+: arXiv:2211.17192, arXiv:2302.01318) keeps 1 - d and gives other
tokens of the same distribution.
"""

import collections
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from optx.engine.sampling import Chosen, Way, choose, mark
from optx.errors import RequestError, did_you_mean

Method = Literal["ngram", "draft", "mtp"]
MOST = 7  # drafts a tick: kernels that decode take up to 8 tokens a row
RIDGE = (
    256  # tokens a tick that take as long to compute as the weights to read: 989 TFLOP/s over 3.35 TB/s in bf16, H100
)
PROBE = 64  # a look at the other way of decoding once in so many dispatches
BURST = 4  # verify ticks of such a look
MEMORY = 0.9  # weight of what was measured before in the running mean of tokens a tick


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """How an engine drafts. The answers stay what they are without it; only their time changes."""

    method: Method = (
        "ngram"  # "ngram": what followed in prompt and answer; "draft": a smaller model; "mtp": the model's own
    )
    tokens: int = 4  # drafts a row and tick
    draft: Any = None  # method "draft": the compiled smaller model (anything with a `program`), of the same vocabulary
    least: int = 2  # method "ngram": fewest tokens at the end of the text that must have come before
    always: bool = False  # True: also where plain ticks are measured to be faster

    def __post_init__(self):
        if self.method not in get_args(Method):
            raise RequestError(f"speculate.method: {self.method!r}{did_you_mean(self.method, get_args(Method))}")
        if not 1 <= self.tokens <= MOST:
            raise RequestError(f"speculate.tokens: got {self.tokens}; allowed: 1 to {MOST}")
        if self.least < 1:
            raise RequestError(f"speculate.least: got {self.least}; allowed: at least 1")
        if (self.method == "draft") != (self.draft is not None):
            raise RequestError(
                f"speculate.draft: {'none' if self.draft is None else 'a model'} given for method {self.method!r}; "
                "allowed: a compiled model for method 'draft', nothing for the others"
            )


def verify(
    way: Way, logits, tokens, counts, knobs, seeds, steps, seen=None, bias=None, masks=None
) -> tuple[Chosen, jax.Array]:
    """Chooses at all Q positions of every row and keeps what follows kept drafts.

    logits float32[B, Q, V] after each of tokens int32[B, Q]: the newest token, then drafts; counts int32[B] of both together,
    0 for an idle row; steps int32[B]: of the first choice. The rest as in `choose`; seen: with all but the drafts marked; masks:
    of the first position, so rows with one get no drafts.
    -> what was chosen with leading axes [Q, B], token -1 after the first that no draft foresaw (as from Q plain ticks), and
    the accepted drafts int32[B].
    """
    b, q, v = logits.shape
    each = lambda x: jnp.repeat(x, q, axis=0)  # noqa: E731
    extra = {}
    if way == "full":
        extra["seen"] = _seen_before(seen, tokens).reshape(b * q, v)
        extra |= jax.tree.map(each, {"bias": bias, "masks": masks})
    places = jnp.arange(q, dtype=jnp.int32)
    flat = (steps[:, None] + places).reshape(-1)
    chosen = choose(way, logits.reshape(b * q, v), each(knobs), each(seeds), flat, **extra)
    drawn = chosen.tokens.reshape(b, q)
    foreseen = (drawn[:, :-1] == tokens[:, 1:]) & (places[1:] < counts[:, None])
    accepted = jnp.sum(jnp.cumprod(foreseen, axis=1, dtype=jnp.int32), axis=1)
    kept = (places <= accepted[:, None]) & (counts[:, None] > 0)
    chosen = dataclasses.replace(chosen, tokens=jnp.where(kept, drawn, -1).reshape(-1))
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(b, q, *x.shape[1:]), 0, 1), chosen), accepted


def _seen_before(seen, tokens):
    """seen uint16[B, V] -> [B, Q, V]: at each position, the drafts up to it counted as answers."""
    rows = jnp.arange(seen.shape[0], dtype=jnp.int32)
    out = [seen]
    for i in range(1, tokens.shape[1]):
        out.append(mark(out[-1], rows, tokens[:, i], jnp.zeros(rows.shape, bool)))
    return jnp.stack(out, axis=1)


def prior_cost(speculation: Speculation, share: float) -> Callable[[int], float]:
    """rows -> what a verify tick costs in plain ticks, before either was measured.

    share: bytes that one draft token reads, of those that a plain tick reads. A tick reads the weights once, and computes for
    longer than it reads from RIDGE tokens on.
    """
    width = speculation.tokens + 1

    def cost(rows: int) -> float:
        return (max(1.0, rows * width / RIDGE) + width * share) / max(1.0, rows / RIDGE)

    return cost


class Governor:
    """Says whether the next tick verifies drafts: where the tokens that a row gets of it outweigh what it costs.

    Both are measured as the engine runs, by number of rows; the other way is looked at now and then.
    """

    def __init__(self, speculation: Speculation, prior: Callable[[int], float]):
        self.always = speculation.always
        self.gain = float(speculation.tokens + 1)  # tokens a row and verify tick, as a running mean
        self._prior = prior
        self._seconds: dict[tuple[bool, int], collections.deque[float]] = {}
        self.asked = BURST  # dispatches planned so far

    def cost(self, rows: int) -> float:
        """A verify tick of so many rows, in plain ticks."""
        drafted, plain = (self._seconds.get((kind, rows.bit_length())) for kind in (True, False))
        return statistics.median(drafted) / statistics.median(plain) if drafted and plain else self._prior(rows)

    def wants(self, rows: int) -> bool:
        """Whether the next dispatch should verify drafts: the same answer until `asked` says that it was planned."""
        if self.always:
            return True
        pays = self.gain > self.cost(rows)
        return pays if self.asked % PROBE >= (1 if pays else BURST) else not pays

    def verified(self, rows: int, tokens: int) -> None:
        """A verify tick gave `rows` rows `tokens` tokens together."""
        self.gain = MEMORY * self.gain + (1 - MEMORY) * tokens / rows

    def took(self, drafted: bool, rows: int, seconds: float) -> None:
        """A tick's time; of a program that was compiled for it there is none."""
        self._seconds.setdefault((drafted, rows.bit_length()), collections.deque(maxlen=16)).append(seconds)
