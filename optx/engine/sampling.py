"""Token choice on the device: penalties, bias and masks, temperature, min-p, top-k, top-p, a seed a row, log-probabilities.

Nothing is sorted: thresholds are found by binary search over the bits of the logits, exact, in 32 passes over a row.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Way = Literal["greedy", "sampled", "full"]  # what a program of the engine can do; each can do what those before it can
WAYS: tuple[Way, ...] = ("greedy", "sampled", "full")
KNOBS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
TOP = 20  # most likely tokens that come with log-probabilities
BIASES = 64  # biased tokens a row, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """Tokens of one tick. Log-probabilities are the model's own, before temperature, penalties, bias and masks."""

    tokens: jax.Array  # int32[B]
    logprobs: jax.Array | None = None  # float32[B], of `tokens`
    top_tokens: jax.Array | None = None  # int32[B, TOP], most likely first
    top_logprobs: jax.Array | None = None  # float32[B, TOP]


def choose(way: Way, logits, knobs, seeds, steps, seen=None, bias=None, masks=None) -> Chosen:
    """logits float32[B, V]; by row: knobs float32[B, 7] in the order of KNOBS, seeds uint32[B], steps int32[B].

    Only with way "full": seen uint16[B, V] (`mark`), bias (tokens int32[B, K], -1 for none; values float32[B, K]), masks
    uint32[B, ceil(V / 32)] (`mask_tokens`; None: all tokens).
    """
    if way == "greedy":
        return Chosen(tokens=jnp.argmax(logits, axis=-1).astype(jnp.int32))
    raw = logits
    if way == "full":
        logits = penalize(add_bias(logits, *bias), seen, *knobs[:, 4:7].T)
        logits = logits if masks is None else mask_tokens(logits, masks)
    temperature, top_k, top_p, min_p = knobs[:, :4].T
    tokens = sample(logits, temperature, top_k.astype(jnp.int32), top_p, seeds, steps, min_p)
    if way == "sampled":
        return Chosen(tokens=tokens)
    likely = jax.nn.log_softmax(raw, axis=-1)
    top_logprobs, top_tokens = jax.lax.top_k(likely, min(TOP, likely.shape[-1]))
    mine = jnp.take_along_axis(likely, tokens[:, None], axis=-1)[:, 0]
    return Chosen(tokens=tokens, logprobs=mine, top_tokens=top_tokens.astype(jnp.int32), top_logprobs=top_logprobs)


def sample(logits, temperature, top_k, top_p, seeds, steps, min_p=None):
    """logits float32[B, V]; by row: temperature (0: greedy), top_k (0: off), top_p and min_p, seed uint32, step int32
    -> int32[B].

    min-p drops tokens less likely than min_p times the likeliest (arXiv:2407.01082); then the top_k likeliest stay; of what
    they weigh together, the likeliest with at least top_p of it. Tokens as likely as the last one kept stay too. The draw
    depends on the row's seed and step alone (Gumbel maximum over the kept tokens), not on the batch.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
    keys = _ordered(scaled)
    keep = jnp.ones(scaled.shape, bool)
    if min_p is not None:
        least = jnp.max(scaled, axis=-1) + jnp.log(jnp.maximum(min_p, 1e-37))
        keep &= (scaled >= least[:, None]) | (min_p <= 0)[:, None]
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, scaled.shape[-1]), scaled.shape[-1])
    first = _largest(keys, lambda at_least: jnp.sum(at_least, axis=-1) >= wanted)
    keep &= keys >= first[:, None]
    mass = jax.nn.softmax(jnp.where(keep, scaled, -jnp.inf), axis=-1)
    first = _largest(keys, lambda at_least: jnp.sum(jnp.where(at_least, mass, 0), axis=-1) >= top_p)
    keep &= keys >= first[:, None]
    noise = jax.vmap(
        lambda seed, step: jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), step), logits.shape[-1:])
    )
    drawn = jnp.argmax(jnp.where(keep, scaled + noise(seeds, steps), -jnp.inf), axis=-1).astype(jnp.int32)
    return jnp.where(temperature > 0, drawn, greedy)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 keys in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(keys: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest uint32[B] for which `enough` (bool[B, V]: keys at least that) holds; it must hold more easily lower down.
    0 where it never does."""

    def bit(i, found):
        tried = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(keys >= tried[:, None]), tried, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(keys.shape[0], jnp.uint32))


def mark(seen, slots, tokens, prompt):
    """seen uint16[R, V] with tokens [T] of rows `slots` int32[T] (past the end: dropped) marked: those of the prompt (bool[T])
    set the lowest bit, others count in the bits above it."""
    most = jnp.uint16(0xFFFC)
    dropped = jnp.asarray(seen.shape[0], slots.dtype)
    asked = jnp.where(prompt, slots, dropped)
    seen = seen.at[asked, tokens].set(seen.at[asked, tokens].get(mode="clip") | jnp.uint16(1), mode="drop")
    seen = jnp.minimum(seen, most | 1)
    return seen.at[jnp.where(prompt, dropped, slots), tokens].add(jnp.uint16(2), mode="drop")


def penalize(logits, seen, repetition, presence, frequency):
    """Tokens of prompt and answer: positive logits / repetition, negative ones * repetition (arXiv:1909.05858); tokens of the
    answer: - presence - frequency * times they came (the OpenAI API's definition). Rows float32[B]."""
    times = (seen >> 1).astype(jnp.float32)
    factor = jnp.where(seen > 0, repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency[:, None] * times - jnp.where(times > 0, presence[:, None], 0.0)


def add_bias(logits, tokens, values):
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, jnp.where(tokens < 0, logits.shape[-1], tokens)].add(values, mode="drop")


def mask_tokens(logits, mask):
    """logits float32[B, V], -inf where bit v % 32 of word v // 32 of the row's mask, uint32[B, ceil(V / 32)], is not set."""
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed = bits.reshape(mask.shape[0], -1)[:, : logits.shape[-1]]
    return jnp.where(allowed == 1, logits, -jnp.inf)
