"""Ticks on the device: gather token ids, run the model over a ragged batch, choose the next tokens, write them back.

Several decode ticks may run in one dispatch: stop ids and limits are then checked on the device, row by row.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from optx.cache import Address, CachePlan, Caches, Layout, Ragged
from optx.engine import xla
from optx.engine.compaction import Compaction, compact, share_out
from optx.engine.drafting import Drafted, Models, propose
from optx.engine.sampling import KNOBS, Chosen, Way, choose, mark
from optx.engine.speculation import verify
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
    def traced(self, function: Callable) -> Callable: ...  # of a step that runs as no CUDA graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tick:
    """What the host says about one dispatch, as numpy arrays. T tokens of B rows: Q a row, padded and row-major (T = B Q), or
    with `mixed` as many as `counts` says, row after row, padded at the end. N ticks, each fed by the one before (Q is 1 then).
    With `verify` a row's tokens after the first are drafts, -1 where the device makes them."""

    tokens: np.ndarray  # int32[T]; -1: the row's newest token on the device
    counts: np.ndarray  # int32[B] tokens of each row, 0: idle
    starts: np.ndarray  # int32[B] position of each row's first token
    slots: np.ndarray  # int32[B] row of the token pool and of the state pools; past the end: idle
    seeds: np.ndarray  # uint32[B]
    tables: tuple[np.ndarray, ...]  # int32[G, B, pages] a group; G = 1, or K where heads keep different tokens
    lengths: tuple[np.ndarray, ...]  # int32[G, B] a group, the first tick's tokens included
    writes: tuple[np.ndarray, ...]  # int32[N, T] a group, [N, G, T] with G = K
    limits: np.ndarray  # int32[B]: tokens that a row draws, at most
    stops: np.ndarray  # int32[B, S]: tokens that end a row; -1: none
    prompts: np.ndarray  # int32[B]: tokens of each row's prompt
    biased: np.ndarray  # int32[B, K]: tokens with a bias; -1: none. K is 0 but for way "full"
    sampling: np.ndarray  # float32[B, 7 + K]: KNOBS, then the biases
    masks: np.ndarray | None = None  # uint32[B, ceil(V / 32)]: one bit a token that the row may choose; None: all
    ticks: int = 1  # N
    mixed: bool = False
    verify: bool = False

    def pack(self) -> tuple[np.ndarray, tuple]:
        """All integers but masks in one vector (one transfer, one argument) and the shapes that `unpack` needs."""
        parts = jax.tree.leaves((self.tokens, self.counts, self.starts, self.slots, self.seeds.view(np.int32), self.limits,
                                 self.stops, self.prompts, self.biased, self.tables, self.lengths, self.writes))  # fmt: skip
        shapes = tuple(part.shape for part in parts)
        return np.concatenate([np.pad(part.reshape(-1), (0, -part.size % ALIGN)) for part in parts]), shapes


def unpack(packed: jax.Array, shapes: tuple, sampling: jax.Array, masks: jax.Array | None) -> Tick:
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
        biased=biased, tables=tables, lengths=lengths, writes=writes, sampling=sampling, masks=masks,
    )  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What ticks carry from one to the next beside caches, by row."""

    newest: jax.Array  # int32[R], the token chosen last
    seen: jax.Array | None = None  # uint16[R, V], which tokens came; with way "full" alone
    hidden: jax.Array | None = None  # [R, D], at the last token computed; where a drafter asks for it

    def after(self, slots, tokens, seen, hidden, last) -> "Rows":
        """slots int32[B] (past the end: dropped) chose tokens int32[B]; hidden [T, D], of which rows `last` int32[B]."""
        return Rows(
            newest=self.newest.at[slots].set(tokens, mode="drop"),
            seen=seen,
            hidden=self.hidden if self.hidden is None else self.hidden.at[slots].set(hidden[last], mode="drop"),
        )


class Stepper:
    """The jitted tick of a program over caches of its own, with its compile count.

    Caches are flat arrays between ticks: a tree of packed pools costs a millisecond of comparing formats a call.
    """

    def __init__(self, program: Program, layouts: Sequence[Layout], rows: int, debug=False, graphs=True):
        """debug: ticks check their page tables on the device too and raise where they are wrong; graphs: as in EngineOptions."""
        self.program, self._layouts, self._rows = program, layouts, rows
        self._debug, self._graphs = debug, graphs
        self._caches, self._treedef = jax.tree.flatten(program.plan.init(layouts))
        self._state = self._fresh_rows()
        self._all_tokens: dict[int, jax.Array] = {}  # masks that forbid nothing, by rows
        # By shapes, ticks and way of choosing: static arguments would cost more a call.
        self._ticks: dict[tuple, Callable] = {}
        self._copy = jax.jit(functools.partial(_copy, program.plan, self._treedef), donate_argnums=(0, 1))
        self._compact = [
            jax.jit(functools.partial(compact, program.plan, self._treedef, group), donate_argnums=0)
            for group in range(len(program.plan.keys))
        ]
        self._shares: dict[tuple[int, ...], Callable] = {}  # by the groups whose heads compete

    @property
    def compiles(self) -> int:
        """Programs compiled so far."""
        programs = (*self._ticks.values(), self._copy, *self._compact, *self._shares.values())
        return sum(program._cache_size() for program in programs)

    @property
    def caches(self) -> Caches:
        return jax.tree.unflatten(self._treedef, self._caches)

    @caches.setter
    def caches(self, caches: Caches) -> None:
        self._caches = jax.tree.leaves(caches)

    def __call__(self, tick: Tick, way: Way) -> Chosen:
        """Runs the ticks; -> what was chosen, with a leading axis N; token -1 where a row had ended before."""
        program, args = self._prepared(tick, way)
        seen = self._state.seen
        self._caches, rows, chosen = program(*args)
        self._state = rows if way == "full" else dataclasses.replace(rows, seen=seen)
        return chosen

    def compile(self, ticks: Sequence[tuple[Tick, Way]]) -> Iterator[None]:
        """Compiles the programs of such ticks, several at once, and runs none; yields after each."""
        lowered = (program.lower(*args) for program, args in (self._prepared(*one) for one in ticks))
        with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for done in concurrent.futures.as_completed([pool.submit(one.compile) for one in lowered]):
                done.result()
                yield

    def _prepared(self, tick: Tick, way: Way) -> tuple[Callable, tuple]:
        """The jitted program of such a tick, and its arguments."""
        packed, shapes = tick.pack()
        key = (shapes, tick.ticks, tick.mixed, tick.verify, way)
        if key not in self._ticks:
            step = functools.partial(_ticks, self.program.merge, self._treedef, *key)
            checked = _checked(self.program.checkified(step)) if self._debug else None
            self._ticks[key] = checked or self._jitted(step)
        if way == "full":
            self.track_seen()
        rows = self._state if way == "full" else dataclasses.replace(self._state, seen=None)
        masks = self._masks(tick) if way == "full" else None
        return self._ticks[key], (self.program.leaves, self._caches, rows, packed, tick.sampling, masks)

    def _jitted(self, step: Callable) -> Callable:
        step = step if self._graphs else self.program.traced(step)
        return jax.jit(step, donate_argnums=(1, 2), compiler_options=xla.options(self._graphs))

    def _fresh_rows(self) -> "Rows":
        carried = self.program.carries if isinstance(self.program, Drafted) else None
        hidden = None if carried is None else jnp.zeros((self._rows, *carried.shape), carried.dtype)
        return Rows(newest=jnp.zeros(self._rows, jnp.int32), hidden=hidden)

    def renew(self) -> None:
        """Caches and what goes with them as at the start; compiled programs stay."""
        self._caches = self._state = None  # given back before new ones are made
        self._caches = jax.tree.leaves(self.program.plan.init(self._layouts))
        self._state = self._fresh_rows()

    def _masks(self, tick: Tick) -> jax.Array:
        """On the device: those that forbid nothing lie there already, so that rows without a grammar send none."""
        if tick.masks is not None:
            return jax.device_put(tick.masks)
        batch = len(tick.counts)
        if batch not in self._all_tokens:
            self._all_tokens[batch] = jnp.full((batch, -(-self.program.vocab // 32)), 0xFFFFFFFF, jnp.uint32)
        return self._all_tokens[batch]

    def track_seen(self) -> None:
        """From now on there is a record of which tokens rows have seen, uint16[R, V]."""
        if self._state.seen is None:
            seen = jnp.zeros((self._rows, self.program.vocab), jnp.uint16)
            self._state = dataclasses.replace(self._state, seen=seen)

    def copy(self, source: int, target: int, slots: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Row `target` gets states, newest and seen tokens of row `source`, and by group the cached tokens at flat slots
        (from, to), at most a page of them; of heads apart [K, P]."""
        moves = []
        for positions, (from_, to) in zip(self.caches.positions, slots, strict=True):
            move = np.zeros((2, *to.shape[:-1], positions.shape[1]), np.int32)
            move[1] = (positions.shape[0] - 1) * positions.shape[1]  # the page that takes the writes of padding
            move[..., : to.shape[-1]] = from_, to
            moves.append(move)
        ends = np.array([[source], [target]], np.int32)
        self._caches, self._state = self._copy(self._caches, self._state, tuple(moves), ends)

    def compact(self, compaction: Compaction) -> None:
        """A row keeps what the policy of its group chooses."""
        numbers = np.int32(compaction.length), compaction.keep
        self._caches = self._compact[compaction.group](self._caches, compaction.table, *numbers)

    def share_out(self, due: Sequence[Compaction]) -> np.ndarray:
        """int32[len(due), K]: how many tokens each head of a row keeps where heads compete; waits for the device."""
        groups = tuple(one.group for one in due)
        if groups not in self._shares:
            self._shares[groups] = jax.jit(functools.partial(share_out, self.program.plan, self._treedef, groups))
        tables = np.stack([one.table for one in due])
        return np.asarray(self._shares[groups](self._caches, tables, np.int32(due[0].length), due[0].keep[0]))


def _copy(plan: CachePlan, treedef, caches, rows, moves, ends):
    caches = jax.tree.unflatten(treedef, caches)
    for group in range(len(plan.keys)):
        caches = plan.move_tokens(caches, group, *moves[group])
    caches = plan.move_states(caches, *ends)
    return jax.tree.leaves(caches), jax.tree.map(lambda x: x.at[ends[1]].set(x[ends[0]]), rows)


def _checked(step):
    """A checkified step that raises where a check fails; it keeps its inputs, so that a failed one leaves them."""
    checked = jax.jit(step)

    def run(*args):
        error, out = checked(*args)
        if message := error.get():
            raise LoweringError(message.split(" (`check`")[0])
        return out

    run._cache_size, run.lower = checked._cache_size, checked.lower
    return run


def _ticks(merge, treedef, shapes, ticks, mixed, drafted, way, leaves, caches, rows, packed, sampling, masks):
    """-> (flat caches, rows, Chosen with a leading axis)."""
    model, tick = merge(leaves), unpack(packed, shapes, sampling, masks)
    if drafted:
        return _verify_tick(model, treedef, tick, way, caches, rows)
    run = functools.partial(_tick, model, treedef, tick, mixed, way)
    live = tick.counts > 0
    if not mixed and tick.tokens.shape == live.shape:  # decodes, planned before the host knew which rows have ended
        newest = jnp.take(rows.newest, tick.slots, mode="clip")
        live &= (tick.tokens >= 0) | ~jnp.any(newest[:, None] == tick.stops, axis=1)
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
    counts = jnp.where(live, tick.counts, 0)
    starts = tick.starts + i
    row, real, ragged = (_row_after_row if mixed else _padded)(counts, starts, tick.tokens.shape[0])
    held = jnp.take(rows.newest, tick.slots[row], mode="clip")
    given = (tick.tokens >= 0) & (i == 0)
    tokens = jnp.where(real, jnp.where(given, tick.tokens, held), 0)
    lengths = tuple(length + jnp.where(live, i, 0) for length in tick.lengths)
    address = Address(
        tables=tick.tables,
        lengths=lengths,
        writes=tuple(w[i] for w in tick.writes),
        slots=tick.slots,
        prompts=tick.prompts,
    )
    hidden, caches, _ = model.backbone(tokens, ragged, caches, address)
    if isinstance(model, Models):
        caches = model.follow(tokens, hidden, rows.hidden, ragged, caches, address)
    last = ragged.starts + jnp.maximum(counts - 1, 0)
    slots = jnp.where(live, tick.slots, rows.newest.shape[0])
    known, extra = _known(way, tick, rows, slots, starts, jnp.where(given & real, slots[row], len(rows.newest)), tokens,
                          ragged)  # fmt: skip
    chosen = choose(
        way, model.head(hidden[last]), tick.sampling[:, : len(KNOBS)], tick.seeds, starts + tick.counts, **extra
    )
    if known is not None:  # a chunk before a prompt's last chooses nothing
        none = jnp.zeros(counts.shape, bool)
        known = mark(known, jnp.where(tick.limits > 0, slots, len(rows.newest)), chosen.tokens, none)
    return jax.tree.leaves(caches), rows.after(slots, chosen.tokens, known, hidden, last), chosen


def _verify_tick(model, treedef, tick: Tick, way: Way, caches, rows):
    """A tick over the newest token and the drafts of each row -> (flat caches, rows, Chosen with leading axes [Q, B])."""
    caches = jax.tree.unflatten(treedef, caches)
    counts, starts, batch = tick.counts, tick.starts, tick.counts.shape[0]
    row, real, ragged = _padded(counts, starts, tick.tokens.shape[0])
    address = Address(
        tables=tick.tables, lengths=tick.lengths, writes=tuple(w[0] for w in tick.writes), slots=tick.slots
    )
    tokens = tick.tokens.reshape(batch, -1)
    given = tokens[:, 0] >= 0
    newest = jnp.where(given, tokens[:, 0], jnp.take(rows.newest, tick.slots, mode="clip"))
    if isinstance(model, Models):
        before = newest if rows.hidden is None else jnp.take(rows.hidden, tick.slots, axis=0, mode="clip")
        tokens, caches = propose(model, way, tick, address, caches, newest, before)
    else:
        tokens = tokens.at[:, 0].set(newest)
    tokens = jnp.where(real, tokens.reshape(-1), 0)
    hidden, caches, _ = model.backbone(tokens, ragged, caches, address)
    if isinstance(model, Models):
        caches = model.follow(tokens, hidden, rows.hidden, ragged, caches, address)
    logits, tokens = model.head(hidden).reshape(batch, ragged.longest, -1), tokens.reshape(batch, -1)
    slots = jnp.where(counts > 0, tick.slots, len(rows.newest))
    first = jnp.arange(len(row)) == ragged.starts[row]
    known, extra = _known(way, tick, rows, slots, starts, jnp.where(first & given[row], slots[row], len(rows.newest)),
                          tokens.reshape(-1), ragged)  # fmt: skip
    chosen, accepted = verify(
        way, logits, tokens, counts, tick.sampling[:, : len(KNOBS)], tick.seeds, starts + 1, **extra
    )
    drawn = chosen.tokens.T.reshape(-1)
    if known is not None:
        known = mark(known, jnp.where(drawn >= 0, slots[row], len(rows.newest)), drawn, jnp.zeros(drawn.shape, bool))
    last = ragged.starts + accepted
    return jax.tree.leaves(caches), rows.after(slots, drawn[last], known, hidden, last), chosen


def _known(way: Way, tick: Tick, rows: "Rows", slots, starts, given, tokens, ragged):
    """-> (what rows have seen [R, V] with tokens [T] marked for the rows `given` [T], what `choose` takes beside logits)."""
    if way != "full":
        return None, {}
    known = rows.seen.at[jnp.where(starts == 0, slots, len(rows.newest))].set(0, mode="drop")
    at = jnp.minimum(ragged.rows, ragged.batch - 1)
    known = mark(known, given, tokens, ragged.positions < tick.prompts[at])
    bias = (tick.biased, tick.sampling[:, len(KNOBS) :])
    return known, {"seen": jnp.take(known, tick.slots, axis=0, mode="clip"), "bias": bias, "masks": tick.masks}


def _padded(counts, starts, total: int):
    """T / B tokens a row -> (row of each token, whether it is one, Ragged)."""
    batch, width = counts.shape[0], total // counts.shape[0]
    row = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), width)
    first = jnp.arange(batch, dtype=jnp.int32) * width
    return _ragged(counts, starts, row, first, total, width, rectangular=True)


def _row_after_row(counts, starts, total: int):
    """The same for rows that lie one after the other without gaps."""
    ends = jnp.cumsum(counts)
    at = jnp.arange(total, dtype=jnp.int32)
    row = jnp.searchsorted(ends, at, side="right", method="compare_all")  # a search would be a loop of kernels
    row = jnp.minimum(row.astype(jnp.int32), counts.shape[0] - 1)
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
