"""Quality on text: perplexity, and against a reference model KL divergence and top-1 agreement.

Protocol: the text is tokenized once, cut into windows of `context` tokens at `stride`, each window starts with the model's
first token where it has one (then context - 1 tokens of text), and every token after the window's first is scored; with a
stride below the window, only the tokens that no earlier window scored.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from optx.errors import QualityError, RequestError


class Model(Protocol):
    """What is evaluated: a compiled model."""

    program: Any
    tokenizer: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures over all scored tokens."""

    perplexity: float
    bits_per_byte: float
    windows: int
    tokens: int  # scored
    kl: float | None = None  # mean KL(reference || model), nats a token
    top1: float | None = None  # share of tokens whose most likely next token agrees with the reference

    def to_dict(self) -> dict:
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def windows_of(ids: list[int], context: int, stride: int, first: int | None) -> list[tuple[list[int], int]]:
    """(window, index of its first scored token); windows are full but for the last with a stride below the window."""
    room = context - (first is not None)
    out = []
    for start in range(0, len(ids), stride):
        chunk = ids[start : start + room]
        if len(chunk) < room and stride >= room and start:
            break  # a short last window is dropped where windows do not overlap
        window = chunk if first is None else [first, *chunk]
        scored = room - stride if start else 0  # tokens of the chunk that the window before has scored
        fresh = max(1, scored + (first is not None))
        if len(window) > fresh:
            out.append((window, fresh))
        if start + room >= len(ids):
            break
    return out


def evaluate(
    model: Model,
    text: str,
    *,
    context: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    against: Model | None = None,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of `model` on `text`. stride None: context, less the model's first token (every token scored once).

    Raises: RequestError for a text too short to score, a context beyond the model's, other vocabularies than `against`'s;
    QualityError for a cache that throws tokens away.
    """
    windows = texts_of(model, text, context, stride, max_windows, against)
    _check_whole(model, max(len(window) for window, _ in windows))
    total = np.zeros(4)
    bar = tqdm(windows, desc="evaluate", unit="window", disable=not progress)
    for window, fresh in bar:
        total += _score(model, against, window, fresh, context)
        bar.set_postfix(perplexity=f"{_perplexity(total[0] / total[3]):.4f}")
    return Evaluation(**figures(model, windows, total, against is not None))


def _check_whole(model: Model, length: int) -> None:
    """Raises QualityError where a forward, in which all tokens see all, would not show what the cache has kept."""
    for spec in model.program.plan.groups:
        if spec.evict is not None and spec.evict.held(length) < length:
            raise QualityError(
                f"evaluate: the cache throws tokens away ({spec.evict}), which one forward of {length} tokens does not show; "
                "evaluate over pages: paged=True, or --paged"
            )


def texts_of(
    model: Model, text: str, context: int, stride: int | None, max_windows: int | None, against: Model | None, *,
    endless: bool = False,
) -> list[tuple[list[int], int]]:  # fmt: skip
    """`windows_of` a text. endless: they may be longer than the model's context. Raises as `evaluate`."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise RequestError("evaluate: the model has no tokenizer, so a text cannot be scored")
    if context < 2 or (context > model.program.context and not endless):
        raise RequestError(f"evaluate: context {context}; allowed: 2 to the model's {model.program.context}")
    first = tokenizer.bos_id if tokenizer.add_bos else None
    room = context - (first is not None)
    step = room if stride is None else stride
    if not 1 <= step <= room:
        raise RequestError(f"evaluate: stride {step}; allowed: 1 to {room}, the tokens of text in a window")
    if max_windows is not None and max_windows < 1:
        raise RequestError(f"evaluate: max_windows {max_windows}; allowed: at least 1")
    _check_pair(model, against, context)
    ids = tokenizer.encode(text, add_special=False)
    if ids and max(ids) >= model.program.vocab:
        raise RequestError(f"evaluate: the tokenizer gave the id {max(ids)}; the model has {model.program.vocab} ids")
    windows = windows_of(ids, context, step, first)[:max_windows]
    if not windows:
        raise RequestError(f"evaluate: the text has {len(ids)} tokens; at least {1 + (first is None)} needed")
    return windows


def figures(model: Model, windows, total: np.ndarray, compared: bool, *, least: int = 0) -> dict:
    """Fields of `Evaluation` from [sum of -log p, sum of KL, agreements, tokens] over windows, scored from place `least` on."""
    nll, kl, agree, count = total
    texts = (model.tokenizer.decode(window[max(fresh, least) :], skip_special=False) for window, fresh in windows)
    return {
        "perplexity": _perplexity(nll / count),
        "bits_per_byte": nll / math.log(2) / max(sum(len(text.encode()) for text in texts), 1),
        "windows": len(windows),
        "tokens": int(count),
        "kl": kl / count if compared else None,
        "top1": agree / count if compared else None,
    }


def _perplexity(nll: float) -> float:
    """exp(nats a token); a model that is broken enough leaves the range of a float."""
    return math.exp(min(nll, 700.0))


def _check_pair(model: Model, against: Model | None, context: int) -> None:
    """Raises RequestError for a reference that cannot be compared with."""
    if against is None:
        return
    if against.program.vocab != model.program.vocab:
        sizes = f"{model.program.vocab} and {against.program.vocab}"
        raise RequestError(f"evaluate: vocabularies of {sizes} tokens cannot be compared")
    if against.program.context < context:
        raise RequestError(f"evaluate: context {context}; allowed: up to the reference's {against.program.context}")


def _score(model, against, window, fresh, context) -> np.ndarray:
    """[sum of -log p, sum of KL, agreements, tokens] over the window's tokens from `fresh` on."""
    length = len(window)
    tokens = np.zeros((1, context), np.int32)
    tokens[0, :length] = window
    weight = np.zeros(context, np.float32)
    weight[fresh:length] = 1
    counts = jnp.asarray([length], jnp.int32)
    logits = model.program.forward(model.program.leaves, tokens, counts)[0]
    if against is None:
        nll = _nll(logits, tokens[0], weight)
        return np.asarray([float(nll), 0, 0, weight.sum()])
    other = against.program.forward(against.program.leaves, tokens, counts)[0]
    return np.asarray([*map(float, compare(logits, other, tokens[0], weight)), weight.sum()])


@jax.jit
def _nll(logits, tokens, weight):
    """-sum log p(token t | logits t - 1) over tokens of weight 1."""
    chosen = jnp.take_along_axis(logits[:-1], tokens[1:, None], axis=-1)[:, 0]
    return jnp.sum((jax.nn.logsumexp(logits[:-1], axis=-1) - chosen) * weight[1:])


@jax.jit
def compare(logits, other, tokens, weight):
    """Logits [T, V] against a reference's: sums of -log p, of KL(reference || model) in nats and of agreements of the most
    likely token, each over what the tokens before predict of tokens int32[T] of weight 1."""
    log_p, log_q = jax.nn.log_softmax(other[:-1], axis=-1), jax.nn.log_softmax(logits[:-1], axis=-1)
    kl = jnp.sum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) * weight[1:])
    agree = jnp.sum((jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)) * weight[1:])
    return _nll(logits, tokens, weight), kl, agree
