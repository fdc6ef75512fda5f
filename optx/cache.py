"""What layers remember: the frozen `CacheSpec`, the pools that hold it, and the ragged batch that addresses them.

A spec says what is remembered; a `Layout` says how much room there is. Token caches (`paged`, `latent`) live in pools of
pages `[pages, K, P, H]`, heads first: the tokens of one head in one page are one box to copy. A row lists its pages in a
table, in the order in which tokens were appended. Every cached token has its position apart from its slot, so a listing
may have gaps in positions (windows) and masks still hold; where a policy throws tokens away (`evict`), slots of the listing
stand for positions, since heads keep different tokens in one page. State caches (`state`) hold one entry a row.

Layers whose specs keep the same tokens form a group with one page table and one array of positions.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optx import tensor
from optx.errors import FormatError
from optx.eviction.policy import Policy
from optx.formats import Format
from optx.ragged import Address as Address
from optx.ragged import Ragged as Ragged
from optx.tensor import Tensor

Pool = dict[str, Tensor]
RECORDED = "recorded"  # what a policy of eviction records by kv head and slot, in the pool beside the streams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """One array that a layer leaves behind: `shape` a token (`(K, H)`) for token caches, a row for state caches."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None  # None: the spec's dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What one layer remembers. Frozen and hashable; passes replace it, the engine reads it and names no technique."""

    kind: Literal["paged", "latent", "state"]
    streams: tuple[Stream, ...]
    dtype: str = "float32"  # storage of streams without a format
    format: Format | None = None  # None: stored in dtype; else packed along the last axis: a scale a token and head
    window: int | None = None  # newest tokens that a query sees; None: all
    sinks: int = 0  # with a window: first positions that stay visible and stored
    rotated: bool = True  # keys are stored after RoPE
    share: int | None = None  # index of the layer whose cache this layer reads; None: its own
    evict: Policy | None = None  # which tokens a row keeps; None: all, or those in the window

    def __post_init__(self):
        if self.evict is not None and (self.kind != "paged" or self.window is not None):
            what = f"a window of {self.window} tokens" if self.window else f"a {self.kind} cache"
            raise FormatError(f"{what} with eviction ({self.evict}); allowed: paged keys and values without a window")
        if self.window is not None and not 1 <= self.window < 2**31:
            raise FormatError(f"cache window {self.window}; allowed: at least 1 and below 2^31 tokens, or null for all")
        if not 0 <= self.sinks < 2**31:
            raise FormatError(f"cache sinks {self.sinks}; allowed: at least 0 and below 2^31 tokens")
        if self.kind == "state" and (self.window or self.format):
            raise FormatError("a state cache has neither window nor format: its size does not grow with the context")
        for stream in self.streams if self.format else ():
            reason = self.format.check(stream.shape[-1])
            if reason:
                raise FormatError(f"cache stream {stream.name}{list(stream.shape)}: {reason}")

    @property
    def holds_tokens(self) -> bool:
        return self.kind != "state"

    @property
    def table_key(self) -> tuple:
        """Layers with equal keys keep the same tokens and share a page table."""
        return ("tokens", self.window, self.sinks, self.evict) if self.holds_tokens else ("state",)

    @property
    def share_granularity(self) -> Literal["token", "checkpoint"]:
        """How finely a prefix can be shared: any token (copying one page at most), or only at stored checkpoints."""
        return "token" if self.holds_tokens else "checkpoint"

    @property
    def unit_bytes(self) -> float:
        """Stored bytes a token (token caches) or a row (state caches), metadata included; 0 when shared."""
        if self.share is not None:
            return 0
        recorded = [tensor.nbytes(x) for x in self._recorded(()).values()]
        return sum(tensor.nbytes(self._abstract(s, ())) for s in self.streams) + sum(recorded)

    def tokens(self, context: int) -> int:
        """Tokens of a context of `context` that a row keeps and that one decode step reads."""
        if self.evict is not None:
            return self.evict.held(context)
        return context if self.window is None else min(context, self.window + self.sinks)

    def bytes(self, batch: int, context: int) -> float:
        """Bytes held for `batch` rows at `context` tokens; what one decode step reads."""
        return batch * self.unit_bytes * (self.tokens(context) if self.holds_tokens else 1)

    def replace(self, **changes) -> "CacheSpec":
        return dataclasses.replace(self, **changes)

    def __str__(self):
        parts = [self.kind, str(self.format or self.dtype)]
        parts += [f"window {self.window}"] if self.window else []
        parts += [f"sinks {self.sinks}"] if self.sinks else []
        parts += [f"shared with layer {self.share}"] if self.share is not None else []
        parts += [f"evict {self.evict}"] if self.evict is not None else []
        return " ".join(parts)

    def _abstract(self, stream: Stream, lead: tuple[int, ...], page: tuple[int, ...] = ()) -> Any:
        """lead: axes before the stream's own; page: the axis of tokens, after its heads."""
        *heads, size = stream.shape
        shape = (*lead, *heads, *page, size)
        dense = jax.ShapeDtypeStruct(shape, stream.dtype or self.dtype)
        if self.format is None:
            return dense
        return tensor.quantize(dense, self.format, axis=-1)

    def _recorded(self, lead: tuple[int, ...], page: tuple[int, ...] = ()) -> Pool:
        """What the policy of eviction records of attention, beside the streams: float32[..., K, P, C]."""
        channels = self.evict.channels if self.evict is not None else 0
        shape = (*lead, self.streams[0].shape[0], *page, channels)
        return {RECORDED: jax.ShapeDtypeStruct(shape, jnp.float32)} if channels else {}

    def abstract(self, layout: "Layout") -> Pool:
        """The pool's arrays as shapes: [pages + 1, K, P, H] a stream of tokens, [slots + 1, ...] a state.

        The last page (row) takes the writes of padding and is never read.
        """
        if self.share is not None:
            return {}
        if self.holds_tokens:
            lead, page = (layout.pages + 1,), (layout.page_size,)
            return {s.name: self._abstract(s, lead, page) for s in self.streams} | self._recorded(lead, page)
        return {s.name: self._abstract(s, (layout.slots + 1,)) for s in self.streams}

    def init(self, layout: "Layout") -> Pool:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.abstract(layout))

    def append(self, pool: Pool, new: dict[str, jax.Array], writes: jax.Array) -> Pool:
        """Stores `new` [T, ...] by stream at flat slots `writes` int32[T] = page * P + offset; past the last page: dropped."""
        if self.holds_tokens and self.format is not None:
            packed = {name: tensor.quantize(x, self.format, axis=-1) for name, x in new.items()}
            new = {name: dataclasses.replace(x, dtype=pool[name].dtype) for name, x in packed.items()}
        return jax.tree.map(lambda p, x: _store(p, x, writes, self.holds_tokens), pool, new)

    def as_stored(self, new: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """`new` [T, ...] by stream as attention reads it back from the cache: rounded where the spec has a format."""
        if not self.holds_tokens or self.format is None:
            return new
        return {name: tensor.quantize(x, self.format, axis=-1).dequantize() for name, x in new.items()}

    def move(self, pool: Pool, src: jax.Array, dst: jax.Array) -> Pool:
        """Copies entries `src` int32[M] over `dst`: flat token slots, or state rows. Fork, compaction, snapshots."""
        return jax.tree.map(lambda p: _store(p, _load(p, src, self.holds_tokens), dst, self.holds_tokens), pool)


def _coordinates(pool, index, tokens: bool) -> tuple:
    """Where entries lie: (row,) of a state pool; (page, slice of heads, offset) of a token pool, whose tokens are the last
    but one axis ([pages + 1, K, P, H]; positions, [pages + 1, P], have nothing after them)."""
    if not tokens:
        return (index,)
    axis = max(pool.ndim - 2, 1)
    page, offset = index // pool.shape[axis], index % pool.shape[axis]
    return (page, *[slice(None)] * (axis - 1), offset)


def _load(pool, index, tokens: bool):
    return pool.at[_coordinates(pool, index, tokens)].get(mode="clip")


def store_tokens(pool: jax.Array, new: jax.Array, writes: jax.Array) -> jax.Array:
    """`new` [T, ...] into a token pool, [pages + 1, K, P, H] or [pages + 1, P], at flat slots `writes` int32[T]."""
    return _store(pool, new, writes, True)


FEW = 16  # entries up to which they are stored one by one on CPU


def _store(pool, new, index, tokens: bool):
    """Entries `new` [M, ...] into the pool, in place when it is donated."""
    new, where = new.astype(pool.dtype), _coordinates(pool, index, tokens)
    scatter = lambda pool: pool.at[where].set(new, mode="drop")  # noqa: E731
    if new.shape[0] > FEW:
        return scatter(pool)

    def slices(pool):
        """XLA on CPU copies the whole pool when a scatter, or a reshape of the pool, is also read in the same program;
        slices at full rank it does not."""
        for i in range(new.shape[0]):
            start = [0 if isinstance(at, slice) else at[i] for at in where]
            start += [0] * (pool.ndim - len(start))
            pool = jax.lax.dynamic_update_slice(pool, entry(new[i]), start)
        return pool

    def entry(x):
        return x.reshape(
            [1 if not isinstance(at, slice) else pool.shape[d] for d, at in enumerate(where)]
            + list(pool.shape[len(where) :])
        )

    return jax.lax.platform_dependent(pool, cpu=slices, default=scatter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Room in the pools: `pages` of `page_size` tokens in every token pool, `slots` rows in every state pool.

    Pools have one page (row) more, which takes the writes of padding: flat slot pages * page_size, row slots.
    """

    pages: int
    page_size: int
    slots: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Which layer has which spec and which group of page tables."""

    specs: tuple[CacheSpec | None, ...]

    def __post_init__(self):
        for i, spec in enumerate(self.specs):
            if spec is not None and spec.share is not None:
                owner = self.specs[spec.share] if 0 <= spec.share < i else None
                if owner is None or owner.share is not None or owner.table_key != spec.table_key:
                    raise FormatError(
                        f"layers/{i}: cache shared with layer {spec.share}; it must be an earlier layer "
                        "with a cache of its own and the same window"
                    )

    @property
    def keys(self) -> tuple[tuple, ...]:
        """Table keys of the token groups, in order of first use."""
        return tuple(dict.fromkeys(s.table_key for s in self.specs if s is not None and s.holds_tokens))

    def group(self, layer: int) -> int | None:
        """Index of the layer's token group; None for state caches and layers without cache."""
        spec = self.specs[layer]
        return self.keys.index(spec.table_key) if spec is not None and spec.holds_tokens else None

    @property
    def groups(self) -> tuple[CacheSpec, ...]:
        """One spec of each token group (window and sinks are what a group has in common)."""
        return tuple(next(s for s in self.specs if s is not None and s.table_key == key) for key in self.keys)

    @property
    def endless(self) -> bool:
        """Whether sequences may grow past the positions that the model knows: all that is cached lies at its slot."""
        return bool(self.groups) and all(spec.evict is not None and spec.evict.reindexed for spec in self.groups)

    def owner(self, layer: int) -> int:
        spec = self.specs[layer]
        return layer if spec is None or spec.share is None else spec.share

    def bytes(self, batch: int, context: int) -> float:
        return sum(s.bytes(batch, context) for s in self.specs if s is not None)

    def abstract(self, layout: Layout | Sequence[Layout]) -> "Caches":
        """All pools as shapes. layout: one for all token groups, or one a group (states take the first)."""
        layouts = [layout] * max(len(self.keys), 1) if isinstance(layout, Layout) else list(layout)
        return Caches(
            layers=tuple(
                {} if s is None else s.abstract(layouts[self.group(i) or 0]) for i, s in enumerate(self.specs)
            ),
            positions=tuple(
                jax.ShapeDtypeStruct((x.pages + 1, x.page_size), jnp.int32) for x in layouts[: len(self.keys)]
            ),
        )

    def init(self, layout: Layout | Sequence[Layout]) -> "Caches":
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.abstract(layout))

    def move_tokens(self, caches: "Caches", group: int, src: jax.Array, dst: jax.Array) -> "Caches":
        """Copies tokens between flat slots in every pool of a group, their positions too."""
        layers = [
            spec.move(pool, src, dst) if self.group(i) == group else pool
            for i, (spec, pool) in enumerate(zip(self.specs, caches.layers, strict=True))
        ]
        positions = list(caches.positions)
        positions[group] = _store(positions[group], _load(positions[group], src, True), dst, True)
        return Caches(layers=tuple(layers), positions=tuple(positions))

    def move_states(self, caches: "Caches", src: jax.Array, dst: jax.Array) -> "Caches":
        """Copies rows of every state pool: snapshot, restore, fork."""
        layers = [
            spec.move(pool, src, dst) if spec is not None and not spec.holds_tokens else pool
            for spec, pool in zip(self.specs, caches.layers, strict=True)
        ]
        return dataclasses.replace(caches, layers=tuple(layers))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Caches:
    """All pools of a model: one dict of streams a layer, and int32[pages, P] positions a token group."""

    layers: tuple[Pool, ...]
    positions: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """One layer's side of the caches during a step."""

    pool: Pool
    slots: jax.Array
    positions: jax.Array | None = None
    table: jax.Array | None = None
    lengths: jax.Array | None = None
    writes: jax.Array | None = None
    prompts: jax.Array | None = None


def view(plan: CachePlan, caches: Caches, address: Address, layer: int) -> View:
    group = plan.group(layer)
    pool = caches.layers[plan.owner(layer)]
    if group is None:
        return View(pool=pool, slots=address.slots)
    return View(
        pool=pool,
        slots=address.slots,
        positions=caches.positions[group],
        table=address.tables[group],
        lengths=address.lengths[group],
        writes=address.writes[group],
        prompts=address.prompts,
    )


def pages_for(tokens: int, page_size: int) -> int:
    return math.ceil(tokens / page_size)
