"""What drafts on the device: a smaller model, or the model's own MTP module. Its caches lie in the pages of the target's.

A target and its drafter are one program over one cache plan. Layers of both that keep the same tokens share a page table, so
whatever the engine does with pages (prefixes, forks, windows, preemption, stepping back) it does to both. The drafter runs
along with every tick, which keeps its caches where the target's are; it never decides what a token is.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from optx.cache import Address, CachePlan, Caches, Ragged, View, view
from optx.engine.sampling import KNOBS, Way, choose
from optx.engine.speculation import Speculation
from optx.errors import RequestError
from optx.pools import store_tokens

HIDDEN_KEY = jnp.iinfo(jnp.int32).max  # position of an entry that no query sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Where one model's layers and token groups are in a joint cache plan."""

    layers: tuple[int, int]  # first, end
    groups: tuple[int, ...]

    def caches(self, joint: Caches) -> Caches:
        first, end = self.layers
        return Caches(layers=joint.layers[first:end], positions=tuple(joint.positions[g] for g in self.groups))

    def put(self, joint: Caches, own: Caches) -> Caches:
        first, end = self.layers
        positions = list(joint.positions)
        for group, array in zip(self.groups, own.positions, strict=True):
            positions[group] = array
        return Caches(layers=(*joint.layers[:first], *own.layers, *joint.layers[end:]), positions=tuple(positions))

    def address(self, joint: Address) -> Address:
        tables, lengths, writes = (
            tuple(each[g] for g in self.groups) for each in (joint.tables, joint.lengths, joint.writes)
        )
        return dataclasses.replace(joint, tables=tables, lengths=lengths, writes=writes)


class Drafter(Protocol):
    """Runs over a ragged batch like a model's backbone, and its head turns what comes out into logits of the next tokens."""

    carries: bool  # whether it asks for the hidden states before the tokens

    def run(self, tokens, before, ragged, caches, address) -> tuple[jax.Array, Caches]: ...

    def head(self, hidden) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class SmallerModel:
    """A model of its own: takes no notice of the target's hidden states. Tables of embeddings may be padded differently."""

    model: Any
    vocab: int  # its own
    wide: int  # the target's
    carries: bool = False

    def run(self, tokens, before, ragged, caches, address):
        hidden, caches, _ = self.model.backbone(jnp.minimum(tokens, self.vocab - 1), ragged, caches, address)
        return hidden, caches

    def head(self, hidden):
        padding = ((0, 0), (0, max(self.wide - self.vocab, 0)))
        return jnp.pad(self.model.head(hidden)[:, : self.wide], padding, constant_values=-jnp.inf)


@dataclasses.dataclass(frozen=True)
class OwnModule:
    """The target's MTP module: a token and the hidden state before it give the hidden state that the next is read from.

    Its entry for a token lies where the target's does, so that pages hold what their own tokens say; the first token has no
    state before it, and its entry is seen by no query.
    """

    model: Any
    plan: CachePlan
    carries: bool = True

    def run(self, tokens, before, ragged, caches, address):
        stored = [store_tokens(p, ragged.positions, w) for p, w in zip(caches.positions, address.writes, strict=True)]
        caches = dataclasses.replace(caches, positions=tuple(stored))
        own = view(self.plan, caches, address, 0)
        own = _without_first(own)
        before = jnp.where((ragged.positions > 0)[:, None], before, 0)
        hidden, pool = self.model.draft(before, self.model.embed(tokens), ragged, own)
        return hidden, dataclasses.replace(caches, layers=(pool,))

    def head(self, hidden):
        return self.model.head(hidden)


def _without_first(own: View) -> View:
    """The same, with the first token's entry hidden from queries."""
    positions = jnp.where(own.positions == 0, HIDDEN_KEY, own.positions)
    return dataclasses.replace(own, positions=positions, near=own.near and _without_first(own.near))


@dataclasses.dataclass(frozen=True)
class Models:
    """A merged target with its drafter: `backbone` and `head` are the target's over joint caches."""

    target: Any
    drafter: Drafter
    parts: tuple[Part, Part]

    def backbone(self, tokens, ragged, caches, address):
        part = self.parts[0]
        hidden, own, taps = self.target.backbone(tokens, ragged, part.caches(caches), part.address(address))
        return hidden, part.put(caches, own), taps

    def head(self, hidden):
        return self.target.head(hidden)

    def follow(self, tokens, hidden, carried, ragged, caches, address) -> Caches:
        """The drafter runs over what the target ran over. carried [R, D]: the target's hidden states before this, by row."""
        before = hidden if carried is None else states_before(hidden, carried, ragged, address.slots)
        return self.draft(tokens, before, ragged, caches, address)[1]

    def draft(self, tokens, before, ragged, caches, address) -> tuple[jax.Array, Caches]:
        """tokens int32[T] and the target's hidden states [T, D] of the tokens before them -> (hidden states, caches)."""
        part = self.parts[1]
        hidden, own = self.drafter.run(tokens, before, ragged, part.caches(caches), part.address(address))
        return hidden, part.put(caches, own)


@dataclasses.dataclass(frozen=True)
class Drafted:
    """A program (`step.Program`) made of a target's and a drafter's, None for the target's own module."""

    target: Any
    drafter: Any = None

    @property
    def leaves(self) -> tuple[jax.Array, ...]:
        return (*self.target.leaves, *(self.drafter.leaves if self.drafter else ()))

    @property
    def context(self) -> int:
        return self.target.context

    @property
    def vocab(self) -> int:
        return self.target.vocab

    @property
    def checkified(self):
        return self.target.checkified

    @property
    def traced(self):
        return self.target.traced

    @property
    def carries(self) -> jax.ShapeDtypeStruct | None:
        """What goes from one tick to the next for a row [D]: the target's hidden state at its last token, if the drafter asks."""
        if self.drafter is not None:
            return None
        run = lambda leaves: self.target.merge(leaves).backbone(jnp.zeros(1, jnp.int32), Ragged.dense(1, 1))  # noqa: E731
        hidden = jax.eval_shape(run, self.target.leaves)[0]
        return jax.ShapeDtypeStruct(hidden.shape[1:], hidden.dtype)

    @property
    def share(self) -> float:
        """Bytes that one draft reads of those that a tick of the target reads, roughly."""
        if self.drafter is None:
            return 1 / len(self.target.plan.specs)
        own, target = (sum(leaf.nbytes for leaf in program.leaves) for program in (self.drafter, self.target))
        return own / target

    @property
    def drafter_plan(self) -> CachePlan:
        return self.drafter.plan if self.drafter else CachePlan(specs=(self.target.draft,))

    @functools.cached_property
    def plan(self) -> CachePlan:
        """The target's layers, then the drafter's."""
        first = len(self.target.plan.specs)
        moved = [
            spec if spec is None or spec.share is None else spec.replace(share=spec.share + first)
            for spec in self.drafter_plan.specs
        ]
        return CachePlan(specs=(*self.target.plan.specs, *moved))

    def part(self, plan: CachePlan, first: int) -> Part:
        return Part(
            layers=(first, first + len(plan.specs)), groups=tuple(self.plan.keys.index(key) for key in plan.keys)
        )

    def merge(self, leaves) -> Models:
        count = len(self.target.leaves)
        target = self.target.merge(leaves[:count])
        if self.drafter is None:
            drafter: Drafter = OwnModule(target, self.drafter_plan)
        else:
            drafter = SmallerModel(self.drafter.merge(leaves[count:]), self.drafter.vocab, self.vocab)
        parts = (self.part(self.target.plan, 0), self.part(self.drafter_plan, len(self.target.plan.specs)))
        return Models(target, drafter, parts)


def with_drafter(program, how: Speculation | None) -> tuple[Any, float]:
    """-> (the program with what drafts for it on the device, the share of a tick's bytes that one draft reads).

    Raises: RequestError where the model cannot step back, or has nothing to draft with.
    """
    if how is None:
        return program, 0.0
    drafter = how.draft.program if how.draft is not None else None
    for whose, one in (("model", program), ("draft model", drafter)):
        if one is not None and any(spec is not None and not spec.holds_tokens for spec in one.plan.specs):
            raise RequestError(
                f"speculate: the {whose} has layers with a state, which cannot step back over drafts that were wrong; "
                "leave speculate out, or take a draft model that keeps tokens alone"
            )
    if how.method == "ngram":
        return program, 0.0
    if how.method == "mtp" and program.draft is None:
        raise RequestError("speculate: the model has no MTP module; allowed: method 'ngram', or 'draft' with a model")
    joint = Drafted(program, drafter)
    return joint, joint.share


def states_before(hidden, carried, ragged: Ragged, slots):
    """The hidden state [T, D] before each token: its neighbour's in `hidden` [T, D], or `carried` [R, D] of the row's slot."""
    row = jnp.minimum(ragged.rows, ragged.batch - 1)
    first = jnp.arange(hidden.shape[0], dtype=jnp.int32) == ragged.starts[row]
    shifted = jnp.concatenate([hidden[:1], hidden[:-1]])
    return jnp.where(first[:, None], jnp.take(carried, slots[row], axis=0, mode="clip"), shifted)


def propose(models: Models, way: Way, tick, address: Address, caches, newest, before):
    """Drafts for a verify tick of Q tokens a row -> (newest and drafts int32[B, Q], caches).

    newest int32[B]; before: the state before it [B, D], where the drafter asks for one. The drafter decodes one token after the
    other, each drawn with the noise that the target's draw has.
    """
    batch, width = newest.shape[0], tick.tokens.shape[0] // newest.shape[0]
    rows = jnp.arange(batch, dtype=jnp.int32)
    writes = tuple(w.reshape(batch, width) for w in address.writes)

    def advance(state, i):
        caches, token, before = state
        live = i + 1 < tick.counts
        ragged = Ragged(
            rows=jnp.where(live, rows, batch), starts=rows, counts=live.astype(jnp.int32),
            positions=jnp.where(live, tick.starts + i, 0), longest=1, rectangular=True,
        )  # fmt: skip
        here = dataclasses.replace(
            address,
            lengths=tuple(jnp.where(live, x - tick.counts + i + 1, 0) for x in address.lengths),
            writes=tuple(w[:, i] for w in writes),
        )
        hidden, caches = models.draft(token, before, ragged, caches, here)
        logits = models.drafter.head(hidden)
        drawn = choose(
            "greedy" if way == "greedy" else "sampled", logits, tick.sampling[:, : len(KNOBS)], tick.seeds,
            tick.starts + i + 1,
        )  # fmt: skip
        return (caches, drawn.tokens, hidden.astype(before.dtype) if models.drafter.carries else before), drawn.tokens

    (caches, _, _), drafts = jax.lax.scan(advance, (caches, newest, before), jnp.arange(width - 1, dtype=jnp.int32))
    return jnp.concatenate([newest[:, None], drafts.T], axis=1), caches
