"""What layers remember: the frozen `CacheSpec`, the pools that hold it, and the ragged batch that addresses them.

A spec says what is remembered; a `Layout` says how much room there is. Token caches (`paged`, `latent`) live in pools of
pages `[pages, K, P, H]`, heads first: the tokens of one head in one page are one box to copy. A row lists its pages in a
table, in the order in which tokens were appended. Every cached token has its position apart from its slot, so a listing
may have gaps in positions (windows) and masks still hold; where a policy throws tokens away (`evict`), slots of the listing
stand for positions, since heads keep different tokens in one page. State caches (`state`) hold one entry a row.

Layers whose specs keep the same tokens form a group with one page table and one array of positions. A layer that keeps its
newest and first tokens exact beside packed ones belongs to two groups (`CacheSpec.parts`; near.py).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optx import tensor
from optx.errors import FormatError
from optx.eviction.policy import Policy
from optx.formats import Float8Static, Format
from optx.pools import Caches as Caches
from optx.pools import Layout as Layout
from optx.pools import Pool, copy, store
from optx.pools import Stream as Stream
from optx.pools import View as View
from optx.pools import pages_for as pages_for
from optx.ragged import Address as Address
from optx.ragged import Ragged as Ragged
from optx.selection import Selection
from optx.tensor import Tensor

NEAR = "near_"  # begins the names of streams that hold exact copies
RECORDED = "recorded"  # what a policy of eviction records by kv head and slot, in the pool beside the streams


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What one layer remembers. Frozen and hashable; passes replace it, the engine reads it and names no technique."""

    kind: Literal["paged", "latent", "state"]
    streams: tuple[Stream, ...]
    dtype: str = "float32"  # storage of streams without a format
    format: Format | None = None  # None: stored in dtype; else packed along the last axis: a scale a token and head
    window: int | None = None  # newest tokens that a query sees; None: all
    sinks: int = 0  # with a window: first positions that stay visible and stored
    recent: int = 0  # with a format: newest tokens that are also kept in dtype, and read there
    first: int = 0  # with a format: first positions, likewise
    rotated: bool = True  # keys are stored after RoPE
    share: int | None = None  # index of the layer whose cache this layer reads; None: its own
    evict: Policy | None = None  # which tokens a row keeps; None: all, or those in the window
    select: Selection | None = None  # which of them a query reads, by the streams that are an index; None: all

    def __post_init__(self):
        if self.evict is not None and (self.kind != "paged" or self.window is not None):
            what = f"a window of {self.window} tokens" if self.window else f"a {self.kind} cache"
            raise FormatError(f"{what} with eviction ({self.evict}); allowed: paged keys and values without a window")
        if self.window is not None and not 1 <= self.window < 2**31:
            raise FormatError(f"cache window {self.window}; allowed: at least 1 and below 2^31 tokens, or null for all")
        if not 0 <= self.sinks < 2**31:
            raise FormatError(f"cache sinks {self.sinks}; allowed: at least 0 and below 2^31 tokens")
        self._check_exact()
        self._check_selection()
        if self.evict is not None and self.near is not None:
            raise FormatError(
                f"exact tokens beside packed ones with eviction ({self.evict}): it moves tokens one by one; leave out 'recent', "
                "'first' and formats whose scales span tokens, or the eviction"
            )
        if self.kind == "state" and (self.window or self.packed):
            raise FormatError("a state cache has neither window nor format: its size does not grow with the context")
        for stream, format_ in zip(self.streams, self.formats, strict=True):
            reason = format_ and format_.check(stream.shape[-1])
            if reason:
                raise FormatError(f"cache stream {stream.name}{list(stream.shape)}: {reason}")

    def _check_selection(self) -> None:
        against = {
            f"a window of {self.window} tokens": self.window is not None,
            f"eviction ({self.evict})": self.evict is not None,
            "exact tokens beside packed ones ('recent', 'first', or scales that span tokens)": self.near is not None,
            f"a {self.kind} cache": self.kind == "state",
        }
        if self.select is not None and (wrong := [what for what, holds in against.items() if holds]):
            raise FormatError(f"{wrong[0]} with selected reads ({self.select}); allowed: one of the two")

    def _check_exact(self) -> None:
        for name, tokens in (("recent", self.recent), ("first", self.first)):
            if not 0 <= tokens < 2**31 or (tokens and not self.packed):
                raise FormatError(f"cache {name} {tokens}; allowed: 0 to 2^31 - 1 tokens, 0 where nothing is packed")
        if self.near is not None and self.window is not None and self.near.window >= self.window:
            raise FormatError(
                f"cache window {self.window}: all that it sees are the {self.near.window} newest tokens, which are kept exact; "
                "leave out the format, or keep fewer exact"
            )

    def format_of(self, stream: Stream) -> Format | None:
        """How a stream is stored; None: dense, in its dtype."""
        return stream.format or self.format

    @property
    def formats(self) -> tuple[Format | None, ...]:
        """`format_of` each stream, in their order."""
        return tuple(self.format_of(stream) for stream in self.streams)

    @property
    def packed(self) -> bool:
        """Whether any stream has a format."""
        return any(self.formats)

    @property
    def storage(self) -> str:
        """What streams are stored in, as text: `int8`, or `k int8, v int4` where they differ."""
        if len(kinds := {str(format_ or self.dtype) for format_ in self.formats}) == 1:
            return kinds.pop()
        each = zip(self.streams, self.formats, strict=True)
        return ", ".join(f"{stream.name} {format_ or stream.dtype or self.dtype}" for stream, format_ in each)

    @property
    def holds_tokens(self) -> bool:
        return self.kind != "state"

    @property
    def table_key(self) -> tuple:
        """Layers with equal keys keep the same tokens and share a page table."""
        return ("tokens", self.window, self.sinks, self.evict) if self.holds_tokens else ("state",)

    @property
    def table_keys(self) -> tuple[tuple, ...]:
        """Those of its parts; none of a state."""
        return tuple(part.table_key for part in self.parts) if self.holds_tokens else ()

    @property
    def share_granularity(self) -> Literal["token", "checkpoint"]:
        """How finely a prefix can be shared: any token (copying one page at most), or only at stored checkpoints."""
        return "token" if self.holds_tokens else "checkpoint"

    @property
    def block(self) -> int:
        """Tokens that are packed together: 1, or more where scales span tokens."""
        return max((format_.block_rows for format_ in self.formats if format_), default=1)

    @functools.cached_property
    def near(self) -> "CacheSpec | None":
        """What is kept in dtype beside the packed tokens: the cache of a sliding window with sinks, whose streams are called
        `near_<name>`; None where nothing is. A block of tokens stays there until it is packed."""
        first = self.first if self.window is None else min(self.first, self.sinks)
        if self.recent == first == 0 and self.block == 1:
            return None
        streams = tuple(dataclasses.replace(s, name=NEAR + s.name, format=None) for s in self.streams)
        window = max(self.recent, 1) + self.block - 1
        exact = {"format": None, "recent": 0, "first": 0, "evict": None, "select": None}
        return self.replace(streams=streams, window=window, sinks=first, **exact)

    @property
    def parts(self) -> tuple["CacheSpec", ...]:
        """One a token group that the layer belongs to: all tokens, and those kept exact."""
        return (self,) if self.near is None else (self, self.near)

    @property
    def unit_bytes(self) -> float:
        """Stored bytes a token (token caches) or a row (state caches), metadata included; 0 when shared. What is kept exact
        does not grow with the context and is counted in `bytes`."""
        if self.share is not None:
            return 0
        return sum(map(self.stream_bytes, self.streams)) + sum(tensor.nbytes(x) for x in self._recorded(()).values())

    def stream_bytes(self, stream: Stream) -> float:
        """What one of its streams takes of `unit_bytes`."""
        return tensor.nbytes(self._abstract(stream, (), (self.block,) * self.holds_tokens)) / self.block / stream.every

    @property
    def index(self) -> tuple[Stream, ...]:
        """Streams by which a query chooses what it reads of the others."""
        return () if self.select is None else tuple(s for s in self.streams if s.name in self.select.index)

    @property
    def follows(self) -> int | None:
        """Index of the layer of which it reads tokens, or takes the choice of them; None: of none."""
        return self.share if self.share is not None or self.select is None else self.select.like

    @property
    def read(self) -> "CacheSpec":
        """Without its index: what the ops of attention are told of."""
        streams = tuple(s for s in self.streams if s not in self.index)
        return self if self.select is None else self.replace(streams=streams, select=None)

    @property
    def page(self) -> int:
        """What the size of a page is a multiple of."""
        return math.lcm(self.block, *(stream.every for stream in self.streams))

    def tokens(self, context: int) -> int:
        """Tokens of a context of `context` that a row keeps and that one decode step reads."""
        if self.evict is not None:
            return self.evict.held(context)
        return context if self.window is None else min(context, self.window + self.sinks)

    def bytes(self, batch: int, context: int) -> float:
        """Bytes held for `batch` rows at `context` tokens; what one decode step reads."""
        if not self.holds_tokens:
            return batch * self.unit_bytes
        return batch * sum(part.unit_bytes * part.tokens(context) for part in self.parts)

    def replace(self, **changes) -> "CacheSpec":
        return dataclasses.replace(self, **changes)

    def __str__(self):
        parts = [self.kind, self.storage]
        parts += [f"window {self.window}"] if self.window else []
        parts += [f"sinks {self.sinks}"] if self.sinks else []
        parts += [f"recent {self.recent}"] if self.recent else []
        parts += [f"first {self.first}"] if self.first else []
        parts += [f"shared with layer {self.share}"] if self.share is not None else []
        parts += [f"evict {self.evict}"] if self.evict is not None else []
        parts += [f"reads {self.select}"] if self.select is not None else []
        return " ".join(parts)

    def _abstract(self, stream: Stream, lead: tuple[int, ...], page: tuple[int, ...] = ()) -> Any:
        """lead: axes before the stream's own; page: the axis of tokens, after its heads."""
        *heads, size = stream.shape
        shape = (*lead, *heads, *page, size)
        dense = jax.ShapeDtypeStruct(shape, stream.dtype or self.dtype)
        format_ = self.format_of(stream)
        return dense if format_ is None else tensor.quantize(dense, format_, axis=-1)

    def _recorded(self, lead: tuple[int, ...], page: tuple[int, ...] = ()) -> Pool:
        """What the policy of eviction records of attention, beside the streams: float32[..., K, P, C]."""
        channels = self.evict.channels if self.evict is not None else 0
        shape = (*lead, self.streams[0].shape[0], *page, channels)
        return {RECORDED: jax.ShapeDtypeStruct(shape, jnp.float32)} if channels else {}

    def abstract(self, layout: Layout) -> Pool:
        """The pool's arrays as shapes: [pages + 1, K, P, H] a stream of tokens, [slots + 1, ...] a state; without those of
        `near`.

        The last page (row) takes the writes of padding and is never read. Raises FormatError for pages that end in a block.
        """
        if self.share is not None:
            return {}
        size = layout.page_size
        if self.select is not None and self.select.block > 1 and (size % self.page or self.select.block % size):
            raise FormatError(
                f"cache {self}: pages of {size} tokens; allowed: a multiple of {self.page}, the tokens of an entry of its index, "
                f"that divides {self.select.block}, the tokens of a block"
            )
        if size % self.block:
            raise FormatError(
                f"cache {self}: pages of {size} tokens do not divide into groups of {self.block}, which share their "
                f"scales; take a page size that is a multiple of {self.block}, or a smaller group"
            )
        if self.holds_tokens:
            lead = (layout.pages + 1,)
            pools = {s.name: self._abstract(s, lead, (size // s.every,)) for s in self.streams}
            return pools | self._recorded(lead, (size,))
        return {s.name: self._abstract(s, (layout.slots + 1,)) for s in self.streams}

    def init(self, layout: Layout) -> Pool:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.abstract(layout))

    def append(self, pool: Pool, new: dict[str, jax.Array], writes: jax.Array) -> Pool:
        """Stores `new` [T, ...] by stream at flat slots `writes` = page * P + offset, int32[T] or by head int32[K, T]."""
        new = {name: self._pack(name, x, pool[name].dtype) for name, x in new.items()}
        return jax.tree.map(lambda p, x: store(p, x, writes, self.holds_tokens), pool, new)

    def _pack(self, name: str, x: jax.Array, dtype) -> Tensor:
        """`x` of the stream called `name` as it is stored; dtype: what it is read back in where it has a format."""
        format_ = self._format_named(name)
        return x if format_ is None else dataclasses.replace(tensor.quantize(x, format_, axis=-1), dtype=dtype)

    def _format_named(self, name: str) -> Format | None:
        return next(self.format_of(stream) for stream in self.streams if stream.name == name)

    def as_stored(self, new: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """`new` [T, ...] by stream as attention reads it back from the cache: rounded where the spec has a format."""
        return {name: tensor.dense(self._pack(name, x, x.dtype)) for name, x in new.items()}

    def move(self, pool: Pool, src: jax.Array, dst: jax.Array) -> Pool:
        """Copies entries `src` int32[M] over `dst`: flat token slots, or state rows. Fork, compaction, snapshots."""
        every = {stream.name: stream.every for stream in self.streams} | ({RECORDED: 1} if RECORDED in pool else {})
        return {name: copy(pool[name], src // n, dst // n, self.holds_tokens) for name, n in every.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Which layer has which spec and which group of page tables."""

    specs: tuple[CacheSpec | None, ...]

    def __post_init__(self):
        for i, spec in enumerate(self.specs):
            if spec is not None and spec.share is not None:
                owner = self.specs[spec.share] if 0 <= spec.share < i else None
                if owner is None or owner.share is not None or owner.table_keys != spec.table_keys:
                    raise FormatError(
                        f"layers/{i}: cache shared with layer {spec.share}; it must be an earlier layer "
                        "with a cache of its own, the same window, and the same tokens kept exact"
                    )
                if any(isinstance(format_, Float8Static) for format_ in owner.formats):
                    raise FormatError(
                        f"layers/{i}: cache shared with layer {spec.share}, which is stored in {owner.storage}: its calibrated "
                        "scales are that layer's alone; give it a format whose scales are stored with the tokens"
                    )

    @property
    def keys(self) -> tuple[tuple, ...]:
        """Table keys of the token groups, in order of first use."""
        return tuple(dict.fromkeys(key for s in self.specs if s is not None for key in s.table_keys))

    def group(self, layer: int) -> int | None:
        """Index of the layer's token group; None for state caches and layers without cache."""
        spec = self.specs[layer]
        return self.keys.index(spec.table_key) if spec is not None and spec.holds_tokens else None

    @property
    def groups(self) -> tuple[CacheSpec, ...]:
        """One spec of each token group (window and sinks are what a group has in common)."""
        return tuple(self.members(group)[0] for group in range(len(self.keys)))

    def members(self, group: int) -> list[CacheSpec]:
        """Of all layers in a token group the part of their spec that is in it."""
        return [part for s in self.specs if s is not None for part in s.parts if part.table_key == self.keys[group]]

    @property
    def endless(self) -> bool:
        """Whether sequences may grow past the positions that the model knows: all that is cached lies at its slot."""
        return bool(self.groups) and all(spec.evict is not None and spec.evict.reindexed for spec in self.groups)

    def owner(self, layer: int) -> int:
        spec = self.specs[layer]
        return layer if spec is None or spec.share is None else spec.share

    @property
    def unit_bytes(self) -> float:
        """Bytes that one more token (and a row, of states) takes for good."""
        return sum(s.unit_bytes for s in self.specs if s is not None)

    def bytes(self, batch: int, context: int) -> float:
        return sum(s.bytes(batch, context) for s in self.specs if s is not None)

    def abstract(self, layout: Layout | Sequence[Layout]) -> Caches:
        """All pools as shapes. layout: one for all token groups, or one a group (states take the first)."""
        layouts = [layout] * max(len(self.keys), 1) if isinstance(layout, Layout) else list(layout)
        by_key = dict(zip(self.keys, layouts, strict=False))

        def pools(spec: CacheSpec | None) -> Pool:
            found = {}
            for part in spec.parts if spec is not None else ():
                found |= part.abstract(by_key.get(part.table_key, layouts[0]))
            return found

        return Caches(
            layers=tuple(pools(spec) for spec in self.specs),
            positions=tuple(
                jax.ShapeDtypeStruct((x.pages + 1, x.page_size), jnp.int32) for x in layouts[: len(self.keys)]
            ),
        )

    def init(self, layout: Layout | Sequence[Layout]) -> Caches:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.abstract(layout))

    def move_tokens(self, caches: Caches, group: int, src: jax.Array, dst: jax.Array) -> Caches:
        """Copies tokens between flat slots int32[M] in pools of a group, positions too; [K, M]: heads apart, without these."""
        layers = list(caches.layers)
        for i, spec in enumerate(self.specs):
            for part in spec.parts if spec is not None and spec.share is None else ():
                if part.table_key == self.keys[group]:
                    layers[i] = layers[i] | part.move(layers[i], src, dst)
        positions = list(caches.positions)
        positions[group] = positions[group] if src.ndim == 2 else copy(positions[group], src, dst, True)
        return Caches(layers=tuple(layers), positions=tuple(positions))

    def move_states(self, caches: Caches, src: jax.Array, dst: jax.Array) -> Caches:
        """Copies rows of every state pool: snapshot, restore, fork."""
        layers = [
            spec.move(pool, src, dst) if spec is not None and not spec.holds_tokens else pool
            for spec, pool in zip(self.specs, caches.layers, strict=True)
        ]
        return dataclasses.replace(caches, layers=tuple(layers))


def view(plan: CachePlan, caches: Caches, address: Address, layer: int) -> View:
    spec, pool = plan.specs[layer], caches.layers[plan.owner(layer)]
    found = None
    for key in reversed(spec.table_keys if spec is not None else ()):
        group = plan.keys.index(key)
        found = View(
            pool=pool,
            slots=address.slots,
            positions=caches.positions[group],
            table=address.tables[group],
            lengths=address.lengths[group],
            writes=address.writes[group],
            prompts=address.prompts,
            near=found,
        )
    return found or View(pool=pool, slots=address.slots)
