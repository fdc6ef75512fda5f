"""Helpers of tests of selected reads: answers by whole forwards and by engines, and the page lists that a decode asks for."""

import dataclasses

import families
import jax
import jax.numpy as jnp

from optx.engine.engine import Engine, EngineOptions
from optx.engine.request import Sampling
from optx.engine.speculation import Speculation
from optx.pallas import dispatch

P = 4
PROMPTS = [families.prompt(length, seed=length) for length in (3, 33, 9, 21)]
OPTIONS = EngineOptions(rows=3, context=48, page_size=P, chunks=(4, 8))
WAYS = {
    "apart": OPTIONS,
    "mixed": dataclasses.replace(OPTIONS, rows=2, mixed=True, ticks=3),
    "speculated": dataclasses.replace(OPTIONS, speculate=Speculation(method="ngram", tokens=3)),
}
TOKENS = 12


def greedy(tree) -> list[list[int]]:
    """Continuations of the prompts by whole forwards."""
    out, run = [], jax.jit(lambda tokens, counts: tree(tokens, counts))
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(TOKENS):
            padded = jnp.asarray([tokens + [0] * (48 - len(tokens))], jnp.int32)
            tokens.append(int(run(padded, jnp.asarray([len(tokens)]))[0, len(tokens) - 1].argmax()))
        out.append(tokens[len(prompt) :])
    return out


def answers(engine: Engine) -> list[list[int]]:
    requests = [engine.add_request(prompt, Sampling(max_tokens=TOKENS)) for prompt in PROMPTS]
    engine.run()
    engine.check()
    return [request.output for request in requests]


def lists_read(tree, length: int, page: int = P) -> list[tuple[int, ...]]:
    """Shapes of the page tables with which the decode step at `length` tokens asks for attention."""
    found = []

    def note(run, *args, **kwargs):
        if run.__name__ == "paged_decode" and "table" in kwargs:
            found.append(kwargs["table"].shape)
        return run(*args, **kwargs)

    with dispatch.through(note):
        families.incremental(tree, families.prompt(length), (length - 1, 1), page_size=page)
    return found
