"""One tick on the device: gather token ids, run the model over a ragged batch, choose the next tokens, write them back."""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from optx.cache import Address, CachePlan, Caches, Ragged
from optx.engine.sampling import sample


class Program(Protocol):
    """A lowered model: flat leaves, `merge` to a module with `backbone` and `head`, its caches and longest context."""

    leaves: tuple[jax.Array, ...]
    plan: CachePlan
    context: int

    def merge(self, leaves): ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tick:
    """What the host says about one tick. B rows in the batch, Q tokens a row (padded), row-major."""

    tokens: jax.Array  # int32[B * Q]; -1: the row's newest token on the device
    counts: jax.Array  # int32[B] tokens of each row, 0: idle
    starts: jax.Array  # int32[B] position of each row's first token
    slots: jax.Array  # int32[B] row of the token pool and of the state pools; past the end: idle
    tables: tuple[jax.Array, ...]  # int32[1, B, pages] a group
    lengths: tuple[jax.Array, ...]  # int32[1, B] a group
    writes: tuple[jax.Array, ...]  # int32[B * Q] a group
    seeds: jax.Array  # uint32[B]
    sampling: jax.Array  # float32[B, 3]: temperature, top_k, top_p


class Stepper:
    """The jitted tick of a program, with its compile count."""

    def __init__(self, program: Program):
        self.program = program
        self._tick = jax.jit(
            functools.partial(_tick, program.merge), donate_argnums=(1, 2), static_argnames=("rows", "greedy")
        )

    @property
    def compiles(self) -> int:
        """Programs compiled so far."""
        return self._tick._cache_size()

    def __call__(self, caches: Caches, newest: jax.Array, tick: Tick, *, rows: int, greedy: bool):
        """-> (caches, newest int32[slots] with the chosen tokens, chosen int32[B]).

        Donates caches and newest.
        """
        return self._tick(self.program.leaves, caches, newest, tick, rows=rows, greedy=greedy)


def _tick(merge, leaves, caches: Caches, newest, tick: Tick, *, rows: int, greedy: bool):
    model = merge(leaves)
    width = tick.tokens.shape[0] // rows
    row = jnp.repeat(jnp.arange(rows, dtype=jnp.int32), width)
    offset = jnp.tile(jnp.arange(width, dtype=jnp.int32), rows)
    real = offset < tick.counts[row]
    ragged = Ragged(
        rows=jnp.where(real, row, rows),
        starts=jnp.arange(rows, dtype=jnp.int32) * width,
        counts=tick.counts,
        positions=jnp.where(real, tick.starts[row] + offset, 0),
        longest=width,
        rectangular=True,
    )
    held = jnp.take(newest, tick.slots[row], mode="clip")
    tokens = jnp.where(real, jnp.where(tick.tokens < 0, held, tick.tokens), 0)
    address = Address(tables=tick.tables, lengths=tick.lengths, writes=tick.writes, slots=tick.slots)
    hidden, caches, _ = model.backbone(tokens, ragged, caches, address)
    last = ragged.starts + jnp.maximum(tick.counts - 1, 0)
    logits = model.head(hidden[last])
    if greedy:
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        temperature, top_k, top_p = tick.sampling.T
        step = tick.starts + tick.counts
        chosen = sample(logits, temperature, top_k.astype(jnp.int32), top_p, tick.seeds, step)
    newest = newest.at[tick.slots].set(chosen, mode="drop")
    return caches, newest, chosen
