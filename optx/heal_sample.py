"""Text that the uncompiled model writes for its own healing."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from optx import heal_data, ir, lower
from optx import target as targets
from optx.cache import CacheSpec
from optx.checkpoint.source import fill
from optx.engine.engine import Engine, EngineOptions
from optx.engine.request import Sampling
from optx.errors import HealError
from optx.heal_loss import cast, narrow, values_of
from optx.lower import Program
from optx.passes.distill import Distill

ROWS = 256  # sequences that are sampled at once, as far as their pages fit


def sampled(
    model: nnx.Module, starts: Sequence[Sequence[int]], options: Distill, shard: Path, progress: bool = False
) -> np.ndarray:
    """int32[n, context]: `starts`, as the model goes on with them at temperature 1; kept in the file `shard`, from which a second
    call reads."""
    if shard.is_file():
        return np.load(shard)
    model = model if jax.default_backend() == "cpu" else in_dtype(model, options.dtype)
    program = Program.of(lower.lower(model, targets.get("auto")))
    engine = Engine(program, EngineOptions(rows=min(ROWS, len(starts)), context=options.context, prefix_cache=False))
    how = Sampling(temperature=1.0, ignore_eos=True)
    rows = []
    with heal_data.bar("sample", len(starts), progress) as advance:
        for first in range(0, len(starts), engine.options.rows):  # nothing waits: many steps a dispatch
            now = [
                engine.add_request(
                    list(start),
                    dataclasses.replace(how, max_tokens=options.context - len(start), seed=(options.seed + i) % 2**32),
                )
                for i, start in enumerate(starts[first : first + engine.options.rows], first)
            ]
            done = 0
            while done < len(now):
                engine.step()
                done, before = sum(request.finish is not None for request in now), done
                advance(done - before)
            rows += [request.prompt + request.output for request in now]
    table = np.asarray(rows, np.int32)
    shard.parent.mkdir(parents=True, exist_ok=True)
    with open(shard.with_suffix(".tmp"), "wb") as file:
        np.save(file, table)
    shard.with_suffix(".tmp").replace(shard)
    return table


def starts(source, options: Distill) -> list[list[int]]:
    """What each sample begins with: the token that the model's texts begin with, or one drawn evenly from the vocabulary (Liu et
    al. 2023, arXiv:2305.17888); with `prime`, as many tokens from anywhere in the text, behind the former.

    Raises: HealError for text that is shorter.
    """
    rng, first = np.random.default_rng(options.seed), heal_data.first_token(source)
    if not options.prime:
        vocab = source.tree.embed.table.get_value().shape[0]
        return (
            [[int(x)] for x in rng.integers(0, vocab, options.sample)] if first is None else [[first]] * options.sample
        )
    streams = heal_data.texts(source, options)
    room = np.array([max(0, len(stream) - options.prime + 1) for stream in streams])
    if not room.sum():
        longest = max(map(len, streams), default=0)
        raise HealError(
            f"distill.prime: got {options.prime} tokens; the longest text has {longest:,}: give longer text, or less of it"
        )
    before = [] if first is None else [first]
    found = []
    for place in rng.integers(0, room.sum(), options.sample):
        which = int(np.searchsorted(np.cumsum(room), place, side="right"))
        at = int(place - room[:which].sum())
        found.append(before + streams[which][at : at + options.prime].tolist())
    return found


def in_dtype(model: nnx.Module, dtype: str) -> nnx.Module:
    """The model with what products are made of, and what attention caches, in `dtype`."""
    tree = fill(ir.abstract(model), cast(values_of(model), narrow(model), dtype).__getitem__)
    for _, part in ir.walk(tree):
        if isinstance(spec := getattr(part, "cache", None), CacheSpec):
            part.cache = spec.replace(dtype=dtype)
    return tree
