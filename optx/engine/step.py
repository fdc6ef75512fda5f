"""Ticks on the device: gather token ids, run the model over a ragged batch, choose the next tokens, write them back.

Several decode ticks may run in one dispatch: stop ids and limits are then checked on the device, row by row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from optx.cache import Address, CachePlan, Caches, Layout, Ragged
from optx.engine.sampling import KNOBS, Chosen, Way, choose, mark
from optx.errors import LoweringError

# Integers between the starts of packed parts: XLA hands kernels pointers into the vector, and those of Pallas Mosaic GPU
# take buffers at multiples of 256 bytes only.
ALIGN = 64


class Program(Protocol):
    """A lowered model: flat leaves, `merge` to a module with `backbone` and `head`, its caches, context and vocabulary."""

    leaves: tuple[jax.Array, ...]
    plan: CachePlan
    context: int
    vocab: int

    def merge(self, leaves): ...

    def checkified(self, function: Callable) -> Callable: ...  # -> (checkify error, result), values checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tick:
    """What the host says about one dispatch, as numpy arrays. T tokens of B rows: Q a row, padded and row-major (T = B Q), or
    with `mixed` as many as `counts` says, row after row, padded at the end. N ticks, each fed by the one before (Q is 1 then)."""

    tokens: np.ndarray  # int32[T]; -1: the row's newest token on the device
    counts: np.ndarray  # int32[B] tokens of each row, 0: idle
    starts: np.ndarray  # int32[B] position of each row's first token
    slots: np.ndarray  # int32[B] row of the token pool and of the state pools; past the end: idle
    seeds: np.ndarray  # uint32[B]
    tables: tuple[np.ndarray, ...]  # int32[1, B, pages] a group
    lengths: tuple[np.ndarray, ...]  # int32[1, B] a group, the first tick's tokens included
    writes: tuple[np.ndarray, ...]  # int32[N, T] a group
    limits: np.ndarray  # int32[B]: tokens that a row may still produce
    stops: np.ndarray  # int32[B, S]: tokens that end a row; -1: none
    prompts: np.ndarray  # int32[B]: tokens of each row's prompt
    biased: np.ndarray  # int32[B, K]: tokens with a bias; -1: none. K is 0 but for way "full"
    sampling: np.ndarray  # float32[B, 7 + K]: KNOBS, then the biases
    ticks: int = 1  # N
    mixed: bool = False

    def pack(self) -> tuple[np.ndarray, tuple]:
        """All integers in one vector (one transfer, one argument) and the shapes that `unpack` needs."""
        parts = jax.tree.leaves((self.tokens, self.counts, self.starts, self.slots, self.seeds.view(np.int32), self.limits,
                                 self.stops, self.prompts, self.biased, self.tables, self.lengths, self.writes))  # fmt: skip
        shapes = tuple(part.shape for part in parts)
        return np.concatenate([np.pad(part.reshape(-1), (0, -part.size % ALIGN)) for part in parts]), shapes


def unpack(packed: jax.Array, shapes: tuple, sampling: jax.Array) -> Tick:
    """Inverse of `Tick.pack`, on the device."""
    sizes = [math.prod(shape) for shape in shapes]
    starts = np.cumsum([0] + [size + -size % ALIGN for size in sizes])
    parts = [packed[at : at + size].reshape(shape) for at, size, shape in zip(starts, sizes, shapes, strict=False)]
    tokens, counts, starts, slots, seeds, limits, stops, prompts, biased, *rest = parts
    groups = len(rest) // 3
    tables, lengths, writes = (tuple(rest[i * groups : (i + 1) * groups]) for i in range(3))
    seeds = jax.lax.bitcast_convert_type(seeds, jnp.uint32)
    return Tick(
        tokens=tokens, counts=counts, starts=starts, slots=slots, seeds=seeds, limits=limits, stops=stops, prompts=prompts,
        biased=biased, tables=tables, lengths=lengths, writes=writes, sampling=sampling,
    )  # fmt: skip


class Stepper:
    """The jitted tick of a program over caches of its own, with its compile count.

    Caches are flat arrays between ticks: a tree of packed pools costs a millisecond of comparing formats a call.
    """

    def __init__(self, program: Program, layouts: Sequence[Layout], rows: int, debug: bool = False):
        """debug: every tick also checks its page tables on the device and raises where they are wrong."""
        self.program = program
        self._debug = debug
        self._caches, self._treedef = jax.tree.flatten(program.plan.init(layouts))
        # What ticks carry from one to the next beside caches: the newest token of each row, and for rows that need it which
        # tokens they have seen.
        self._newest = jnp.zeros(rows, jnp.int32)
        self._seen: jax.Array | None = None
        # By shapes, ticks and way of choosing: static arguments would cost more a call.
        self._ticks: dict[tuple, Callable] = {}

    @property
    def compiles(self) -> int:
        """Programs compiled so far."""
        return sum(tick._cache_size() for tick in self._ticks.values())

    @property
    def caches(self) -> Caches:
        return jax.tree.unflatten(self._treedef, self._caches)

    @caches.setter
    def caches(self, caches: Caches) -> None:
        self._caches = jax.tree.leaves(caches)

    def __call__(self, tick: Tick, way: Way) -> Chosen:
        """Runs the ticks; -> what was chosen, with a leading axis N; token -1 where a row had ended before."""
        packed, shapes = tick.pack()
        key = (shapes, tick.ticks, tick.mixed, way)
        if key not in self._ticks:
            step = functools.partial(_ticks, self.program.merge, self._treedef, *key)
            checked = _checked(self.program.checkified(step)) if self._debug else None
            self._ticks[key] = checked or jax.jit(step, donate_argnums=(1, 2))
        if way == "full" and self._seen is None:
            self._seen = jnp.zeros((self._newest.shape[0], self.program.vocab), jnp.uint16)
        rows = (self._newest, self._seen) if way == "full" else (self._newest,)
        self._caches, rows, chosen = self._ticks[key](self.program.leaves, self._caches, rows, packed, tick.sampling)
        self._newest, *seen = rows
        self._seen = seen[0] if seen else self._seen
        return chosen


def _checked(step):
    """A checkified step that raises where a check fails; it keeps its inputs, so that a failed one leaves them."""
    checked = jax.jit(step)

    def run(*args):
        error, out = checked(*args)
        if message := error.get():
            raise LoweringError(message.split(" (`check`")[0])
        return out

    run._cache_size = checked._cache_size
    return run


def _ticks(merge, treedef, shapes, ticks, mixed, way, leaves, caches, rows, packed, sampling):
    """rows: (newest tokens int32[R],) and with way "full" (..., seen uint16[R, V])."""
    model, tick = merge(leaves), unpack(packed, shapes, sampling)
    run = functools.partial(_tick, model, treedef, tick, mixed, way)
    live = tick.counts > 0
    if ticks == 1:
        caches, rows, chosen = run(0, live, caches, rows)
        return caches, rows, jax.tree.map(lambda x: x[None], chosen)

    def go_on(state):
        i, _, _, live, _ = state
        return (i < ticks) & jnp.any(live)

    def advance(state):
        i, caches, rows, live, out = state
        caches, rows, chosen = run(i, live, caches, rows)
        tokens = chosen.tokens
        chosen = dataclasses.replace(chosen, tokens=jnp.where(live, tokens, -1))
        out = jax.tree.map(lambda all_, one: all_.at[i].set(one), out, chosen)
        ended = jnp.any(tokens[:, None] == tick.stops, axis=1) | (i + 1 >= tick.limits)
        return i + 1, caches, rows, live & ~ended, out

    one = jax.eval_shape(run, 0, live, list(caches), rows)[2]
    out = jax.tree.map(lambda x: jnp.full((ticks, *x.shape), -1, x.dtype), one)
    _, caches, rows, _, out = jax.lax.while_loop(go_on, advance, (jnp.int32(0), list(caches), rows, live, out))
    return caches, rows, out


def _tick(model, treedef, tick: Tick, mixed: bool, way: Way, i, live, caches, rows):
    """Tick i of a dispatch over rows `live` bool[B] -> (flat caches, rows, Chosen)."""
    caches = jax.tree.unflatten(treedef, caches)
    newest, *seen = rows
    counts = jnp.where(live, tick.counts, 0)
    starts = tick.starts + i
    row, real, ragged = (_row_after_row if mixed else _padded)(counts, starts, tick.tokens.shape[0])
    held = jnp.take(newest, tick.slots[row], mode="clip")
    given = (tick.tokens >= 0) & (i == 0)
    tokens = jnp.where(real, jnp.where(given, tick.tokens, held), 0)
    lengths = tuple(length + jnp.where(live, i, 0) for length in tick.lengths)
    address = Address(tables=tick.tables, lengths=lengths, writes=tuple(w[i] for w in tick.writes), slots=tick.slots)
    hidden, caches, _ = model.backbone(tokens, ragged, caches, address)
    logits = model.head(hidden[ragged.starts + jnp.maximum(counts - 1, 0)])
    slots = jnp.where(live, tick.slots, newest.shape[0])
    if way == "full":
        known = seen[0].at[jnp.where(starts == 0, slots, newest.shape[0])].set(0, mode="drop")
        known = mark(known, jnp.where(given & real, slots[row], newest.shape[0]), tokens,
                     ragged.positions < tick.prompts[row])  # fmt: skip
        extra = {"seen": jnp.take(known, tick.slots, axis=0, mode="clip")}
        extra["bias"] = (tick.biased, tick.sampling[:, len(KNOBS) :])
    else:
        known, extra = None, {}
    chosen = choose(way, logits, tick.sampling[:, : len(KNOBS)], tick.seeds, starts + tick.counts, **extra)
    if known is not None:  # a chunk before a prompt's last chooses nothing
        none = jnp.zeros(counts.shape, bool)
        seen = [mark(known, jnp.where(tick.limits > 0, slots, newest.shape[0]), chosen.tokens, none)]
    newest = newest.at[slots].set(chosen.tokens, mode="drop")
    return jax.tree.leaves(caches), (newest, *seen), chosen


def _padded(counts, starts, total: int):
    """T / B tokens a row -> (row of each token, whether it is one, Ragged)."""
    batch, width = counts.shape[0], total // counts.shape[0]
    row = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), width)
    first = jnp.arange(batch, dtype=jnp.int32) * width
    return _ragged(counts, starts, row, first, total, width, rectangular=True)


def _row_after_row(counts, starts, total: int):
    """The same for rows that lie one after the other without gaps."""
    ends = jnp.cumsum(counts)
    row = jnp.searchsorted(ends, jnp.arange(total, dtype=jnp.int32), side="right").astype(jnp.int32)
    row = jnp.minimum(row, counts.shape[0] - 1)
    return _ragged(counts, starts, row, ends - counts, total, total, rectangular=False)


def _ragged(counts, starts, row, first, total, longest, rectangular):
    offset = jnp.arange(total, dtype=jnp.int32) - first[row]
    real = offset < counts[row]
    ragged = Ragged(
        rows=jnp.where(real, row, counts.shape[0]),
        starts=first,
        counts=counts,
        positions=jnp.where(real, starts[row] + offset, 0),
        longest=longest,
        rectangular=rectangular,
    )
    return row, real, ragged
