"""rotate_append on Hopper: a warp takes one head of one token from its projection to its place, in one launch.

A lane holds neighbours (2 i, 2 i + 1) of the head, and of a rotation by halves both that turn against each other, so that
sums and maxima are shuffles, codes of 4 bits pair up in one lane, and no thread waits for another warp. The warps need no
order: no two tokens of a tick share a slot, and what padding would store is left out.

The tables of cos and sin, float32[T, dim], are XLA's: layers that turn alike share one a step. Every rounding is the
reference's own (to the activations' type after the norm and after the rotation, to the scale's type before the codes): scales
and codes differ from it only where a sum of squares added up in another order, the last bit of 1 / sqrt, or a division (XLA's
go through a reciprocal, these are exact) tips a rounding.

`_program` is written in a lane's numbers and takes the machine that works on them: `Threads` emits a GPU's instructions.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optx import near
from optx.cache import NEAR, CacheSpec, Ragged, View
from optx.errors import LoweringError
from optx.formats import Format
from optx.formats.codebook import centroids
from optx.pallas.attention.page_formats import Pages, pages_of
from optx.pallas.late import dependent, plgpu, scalar
from optx.pallas.rotate_append.reference import rotate, rotate_keys, separate
from optx.pallas.threads_sm90 import Threads, across
from optx.tensor import is_qtensor

OP = "rotate_append"
WARPS, LANES = 4, 32  # of a block; of a warp
WIDEST = 512  # numbers of a head: 16 a lane
HALVES = ("bfloat16", "float16")
SCALES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """An RMSNorm of a head: y = x / sqrt(mean(x^2) + eps) * (offset + weight)."""

    eps: float
    offset: float
    dtype: str  # of the weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """One pool that keys or values go to."""

    name: str  # of the stream; what is kept exact is called near_<name>
    kind: Pages
    pages: int  # without the one for padding
    page: int
    clip: float = 1.0  # share of the range that codes span
    stored: str = "float16"  # dtype of dense pages, of scales

    @property
    def stream(self) -> str:
        return self.name.removeprefix(NEAR)

    @property
    def levels(self) -> float:
        """Steps of a scale: what absmax (int: twice absmax, or max - min) is divided by."""
        top = float(jnp.finfo(jnp.float8_e4m3fn).max)
        return top if self.kind.code == "fp8" else float(2**self.kind.bits - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is specialised on; hashable, a static argument."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    joined: bool  # q, k and v side by side in one array
    dtype: str
    q_norm: Norm | None
    k_norm: Norm | None
    turned: int  # first numbers of a head that are rotated, 0: none
    interleaved: bool
    stores: tuple[Store, ...]

    @property
    def units(self) -> int:
        """Heads of a token."""
        return self.heads + 2 * self.kv_heads


def supports(args, target) -> str | None:
    if (target.platform, target.arch) != ("gpu", "sm90"):
        return f"is for gpu/sm90, not {target.platform}/{target.arch}"
    cache, head_dim, rope = args["cache"], args["head_dim"], args["rope"]
    if cache.kind != "paged":
        return f"stores paged keys and values, not a {cache.kind} cache"
    reason = _reason(cache, head_dim, rope, args["q_norm"], args["k_norm"])
    if reason is None and args["dtype"] not in HALVES:
        reason = f"activations of {args['dtype']}; allowed: {', '.join(HALVES)}"
    return reason


def _reason(cache: CacheSpec, head_dim: int, rope, *norms) -> str | None:
    """Why the kernel does not store heads like these, or None."""
    if head_dim % 2 or head_dim > WIDEST:
        return f"head_dim {head_dim}; allowed: even, at most {WIDEST}"
    if (
        rope is not None
        and rope.rotation is None
        and (rope.dim > head_dim or rope.dim % (2 if rope.interleaved else 4))
    ):
        how = "interleaved" if rope.interleaved else "by halves"
        return f"{rope.dim} numbers rotated {how}; allowed: at most {head_dim}, a multiple of 4 by halves"
    for format_ in cache.formats:
        if reason := format_ and _format_reason(format_, head_dim, rope):
            return reason
    if (not all(cache.formats) or cache.near is not None) and cache.dtype not in HALVES:
        return f"pages of {cache.dtype}; allowed: {', '.join(HALVES)}"
    for norm in norms:
        if norm is not None and norm.out is not None:
            return f"a norm that returns {norm.out}; allowed: the dtype of its input"
    return None


def _format_reason(format_: Format, head_dim: int, rope) -> str | None:
    """Why codes of this format are not made, or None. Those whose scales span tokens are made by XLA, of the exact tokens."""
    kind = pages_of(format_)
    if kind is None or not kind.scaled:
        return f"pages of {format_}; allowed: dense, fp8 e4m3, int8, int4, int3, int2, codebook4, affine and KIVI's"
    if kind.span is not None:
        return None
    if getattr(format_, "scale_dtype", "float16") not in SCALES:
        return f"scales of {format_.scale_dtype}; allowed: {', '.join(SCALES)}"
    turned = 0 if rope is None or rope.rotation is not None else rope.dim
    if (least := {"int2": 4, "int3": 8}.get(kind.code)) and (head_dim % least or turned % (2 * least)):
        allowed = f"multiples of {least} and of {2 * least}"
        return f"{format_} of {head_dim} numbers, {turned} of them rotated; allowed: {allowed}"
    if kind.group is not None and (kind.group not in (32, 64) or head_dim % 128 or turned % 128):
        return (
            f"{format_} of {head_dim} numbers, {turned} of them rotated; allowed: groups of 32 or 64, multiples of 128"
        )
    return None


def rotate_append(
    q,
    k,
    v,
    pool,
    *,
    positions,
    writes,
    spec: CacheSpec,
    rope=None,
    q_norm=None,
    k_norm=None,
    view: View | None = None,
    ragged: Ragged | None = None,
):
    """As the reference, for bfloat16 and float16. The pool is updated in place where its buffer may be reused.

    Codes whose scales span tokens are made by XLA of what this kernel has kept exact, and a rotation of heads behind their
    positions (`rope.rotation`) is XLA's before it.
    rope: an object with `dim`, `interleaved` and `turns(positions) -> (cos, sin) float32[T, dim / 2]`; norms: objects with
    `weight`, `eps`, `offset` and `out`. What is written past page `pages` - 1 is not stored.
    Raises: LoweringError for what the kernel does not take.
    """
    if rope is not None and rope.rotation is not None:  # matrix products: by XLA
        q, k, v = separate(q, k, v, spec)
        q, k = rotate(q, q_norm, rope, positions), rotate_keys(k, k_norm, rope, positions)
        rope = q_norm = k_norm = None
    plan = _plan(q, k, v, pool, spec, rope, q_norm, k_norm)
    angles = [] if rope is None else [jnp.concatenate(rope.turns(positions), axis=-1)]
    norms = [norm.weight.get_value() for norm in (q_norm, k_norm) if norm is not None]
    writes = [writes] if view is None else [writes, view.near.writes]
    inputs = ([q] if plan.joined else [q, k, v], writes, angles, norms)
    q, leaves = _run(plan, inputs, [_leaves(pool[s.name]) for s in plan.stores])
    found = {s.name: _rebuilt(pool[s.name], x) for s, x in zip(plan.stores, leaves, strict=True)}
    return q, found if view is None else near.with_blocks(spec, pool | found, view, ragged)


def _leaves(stream) -> list[jax.Array]:
    """Data, then scale and zero point where there are."""
    parts = (stream.data, stream.scale, stream.zero) if is_qtensor(stream) else (stream,)
    return [part for part in parts if part is not None]


def _rebuilt(stream, leaves):
    if not is_qtensor(stream):
        return leaves[0]
    return dataclasses.replace(stream, **dict(zip(("data", "scale", "zero"), leaves, strict=False)))


def _refuse(argument: str, got, allowed: str):
    raise LoweringError(f"{OP}: {argument} {got}; allowed: {allowed}")


def _plan(q, k, v, pool, spec, rope, q_norm, k_norm) -> Plan:
    t, n, h = q.shape
    kv_heads = pool["k"].shape[1]
    if reason := _reason(spec, h, rope, q_norm, k_norm):
        _refuse("call", reason, "what `supports` takes")
    if str(q.dtype) not in HALVES or any(x is not None and x.dtype != q.dtype for x in (k, v)):
        _refuse("dtypes", ", ".join(str(x.dtype) for x in (q, k, v) if x is not None), " or ".join(HALVES) + " alike")
    for name, stream in pool.items():
        if math.prod(stream.shape[:3]) >= 1 << 31:
            _refuse(f"pool {name}", stream.shape, "less than 2^31 tokens of a head")
    return Plan(
        tokens=t,
        heads=n - 2 * kv_heads if k is None else n,
        kv_heads=kv_heads,
        head_dim=h,
        joined=k is None,
        dtype=str(q.dtype),
        q_norm=_norm(q_norm),
        k_norm=_norm(k_norm),
        turned=0 if rope is None else rope.dim,
        interleaved=rope is not None and rope.interleaved,
        stores=tuple(_store(name, x) for name, x in pool.items() if not is_qtensor(x) or x.format.block_rows == 1),
    )


def _store(name: str, stream) -> Store:
    pages, _, page, _ = stream.shape
    if not is_qtensor(stream):
        return Store(name=name, kind=pages_of(None), pages=pages - 1, page=page, stored=str(stream.dtype))
    facts = {"kind": pages_of(stream.format), "clip": getattr(stream.format, "clip", 1.0)}
    return Store(name=name, pages=pages - 1, page=page, stored=str(stream.scale.dtype), **facts)


def _norm(norm) -> Norm | None:
    if norm is None:
        return None
    return Norm(eps=float(norm.eps), offset=float(norm.offset), dtype=str(norm.weight.get_value().dtype))


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, inputs, leaves):
    """One function object for all layers of a shape: it is assembled once."""
    arrays, structure = jax.tree.flatten(inputs)
    pools, pool_structure = jax.tree.flatten(leaves)

    def body(*refs):
        *refs, out = refs

        @plgpu.inline_mgpu(arg_types=((plgpu.RefType(),) * len(refs), plgpu.RefType(), scalar()), return_type=())
        def head(_, refs, out, block):
            given = jax.tree.unflatten(structure, refs[: len(arrays)])
            stored = jax.tree.unflatten(pool_structure, refs[len(arrays) :])
            _program(Threads(block.registers.item()), plan, *given, stored, out)
            return ()

        head(tuple(refs), out, lax.axis_index("block"))

    refs = [jax.new_ref(pool) for pool in pools]
    out = dependent(
        body,
        out_type=jax.ShapeDtypeStruct((plan.tokens, plan.heads, plan.head_dim), jnp.dtype(plan.dtype)),
        grid=(-(-plan.tokens * plan.units // WARPS),),
        grid_names=("block",),
        num_threads=1,
        thread_name="wg",
        kernel_name=OP,
    )(*arrays, *refs)
    return out, jax.tree.unflatten(pool_structure, [jax.freeze(ref) for ref in refs])


# --- What a lane does -------------------------------------------------------------------------------------------------
#
# A place is a pair of neighbours: (which pair of the head, whether the lane has one there). A head whose pairs do not divide by
# 32 leaves lanes without; they work on zeros and store nothing.


def _program(m, plan: Plan, xs, writes, angles, norms, pools, out):
    """The work of all lanes on machine m. Refs: xs [q, k, v] or one for all, writes, angles, norms, pools, q's output."""
    unit = m.block() * WARPS + (m.thread() >> 5)
    lane = m.thread() & (LANES - 1)
    with m.when(unit < plan.tokens * plan.units):
        token, head = unit // plan.units, unit % plan.units
        at = {"q": head, "k": head - plan.heads, "v": head - (plan.heads + plan.kv_heads)}
        norms = dict(zip([x for x in "qk" if getattr(plan, f"{x}_norm")], norms, strict=True))
        with m.when(head < plan.heads):
            _Head(m, plan, lane).query(xs, token, head, angles, norms.get("q"), out)
        for name, norm in (("k", norms.get("k")), ("v", None)):
            both = zip(plan.stores, pools, strict=True)
            targets = [(s, writes[s.name != s.stream], pool) for s, pool in both if s.stream == name]
            with m.when((at[name] >= 0) & (at[name] < plan.kv_heads)):
                _Head(m, plan, lane).store(name, xs, token, at[name], angles, norm, targets)


class _Head:
    """One head of one token in the lanes of a warp."""

    def __init__(self, m, plan: Plan, lane):
        self.m, self.plan, self.lane = m, plan, lane
        half = 0 if plan.interleaved else plan.turned // 4
        self.first, self.second = self._places(0, half), self._places(half, half)
        self.turned = self._places(0, plan.turned // 2 - 2 * half)  # in place: pairs of neighbours
        self.rest = self._places(plan.turned // 2, (plan.head_dim - plan.turned) // 2)
        self.places = [*self.first, *self.second, *self.turned, *self.rest]

    def _places(self, start: int, count: int):
        found = []
        for base in range(0, count, LANES):
            pair = self.lane + base
            whole = base + LANES <= count
            has = None if whole else pair < count
            found.append((self._or_zero(has, pair) + start, has))
        return found

    def _or_zero(self, has, x):
        return x if has is None else self.m.where(has, x, 0)

    def query(self, xs, token, head, angles, norm, out):
        words = self._words("q", xs, token, head, angles, norm)
        base = self.m.wide(token * self.plan.heads + head) * (2 * self.plan.head_dim)
        for (pair, has), word in zip(self.places, words, strict=True):
            self.m.store(out, base + self.m.wide(pair * 4), word, 4, has)

    def store(self, name, xs, token, head, angles, norm, targets):
        """targets: (store, its refs of slots, of the pool's leaves)."""
        m = self.m
        slots = [m.load(writes, m.wide(token * 4), 1)[0] for _, writes, _ in targets]
        words = self._words(name, xs, token, head, angles if name == "k" else [], norm)
        for (to, _, pool), slot in zip(targets, slots, strict=True):
            with m.when((slot >= 0) & (slot < to.pages * to.page)):
                row = m.wide((slot // to.page * self.plan.kv_heads + head) * to.page + slot % to.page)
                self._store(to, pool, row, words)

    def _store(self, to: Store, pool, row, words):
        m, plan = self.m, self.plan
        numbers = [m.unpack(word, plan.dtype) for word in words]
        if to.kind.code == "dense":
            packed = words if to.stored == plan.dtype else [m.pack(x, to.stored) for x in numbers]
        else:
            packed, grids = self._codes(to, numbers)
            for (pair, _), (scale, *zero) in zip(self.places, grids, strict=False):
                sizes = 4 if to.stored == "float32" else 2, 1 if to.kind.zero == "code" else 2
                for ref, word, size in zip(pool[1:], (scale, *zero), sizes, strict=False):
                    self._store_small(to, ref, row, pair, word, size)
        if to.kind.bits == 2:
            self._store_plane(pool[0], row * (plan.head_dim // 4), packed, 4)
            return
        if to.kind.bits == 3:
            base = row * (plan.head_dim // 8 * 3)
            low = [(word & 3) | ((word >> 1) & 12) for word in packed]
            high = [((word >> 2) & 1) | ((word >> 4) & 2) for word in packed]
            self._store_plane(pool[0], base, low, 4)
            self._store_plane(pool[0], base + plan.head_dim // 4, high, 2)
            return
        size = to.kind.bits // 4
        base = row * (plan.head_dim // 2 * size)
        for (pair, has), word in zip(self.places, packed, strict=True):
            m.store(pool[0], base + m.wide(pair * size), word, size, has)

    def _store_small(self, to: Store, ref, row, pair, word, size):
        """One number a head, or one for each group of numbers."""
        if to.kind.group is None:
            self.m.store(ref, row * size, word, size, self.lane < 1)
            return
        at, lanes = self.m.wide(pair // (to.kind.group // 2)), to.kind.group // 2
        at = row * (self.plan.head_dim // to.kind.group) + at
        self.m.store(ref, at * size, word, size, (self.lane & (lanes - 1)) < 1)

    def _store_plane(self, ref, base, words, bits: int):
        """`bits` of each pair, those of as many lanes as fill a byte, which the first of them stores."""
        m, lanes = self.m, 8 // bits
        for (pair, has), word in zip(self.places, words, strict=True):
            for distance in (1, 2)[: lanes.bit_length() - 1]:
                word = word | (m.shuffle(word, distance) << bits * distance)
            first = (self.lane & (lanes - 1)) < 1
            m.store(ref, base + m.wide(pair >> lanes.bit_length() - 1), word, 1, first if has is None else first & has)

    # From the projection to what is stored

    def _words(self, name, xs, token, head, angles, norm):
        """Words of two 16-bit numbers by place: the head as it is attended to."""
        m, plan = self.m, self.plan
        if plan.joined:
            ref, row = (
                xs[0],
                token * plan.units + head + {"q": 0, "k": plan.heads, "v": plan.heads + plan.kv_heads}[name],
            )
        else:
            ref, row = xs["qkv".index(name)], token * (plan.heads if name == "q" else plan.kv_heads) + head
        base = m.wide(row) * (2 * plan.head_dim)
        words = [m.load(ref, base + m.wide(pair * 4), 1)[0] for pair, _ in self.places]
        words = [self._or_zero(has, word) for (_, has), word in zip(self.places, words, strict=True)]
        turns = [self._turns(ref, token) for ref in angles]
        if norm is not None:
            words = self._normed(words, norm, getattr(plan, f"{name}_norm"))
        return self._rotated(words, *turns) if turns else words

    def _normed(self, words, ref, norm: Norm):
        m, plan = self.m, self.plan
        wide = norm.dtype == "float32"
        weights = []
        for pair, _ in self.places:
            found = m.load(ref, m.wide(pair * (8 if wide else 4)), 2 if wide else 1)
            weights.append([m.float(x) for x in found] if wide else m.unpack(found[0], norm.dtype))
        numbers = [m.unpack(word, plan.dtype) for word in words]
        squares = functools.reduce(operator.add, [x * x for pair in numbers for x in pair])
        mean = self._across(squares, operator.add) * (1 / plan.head_dim)
        factor = m.rsqrt(mean + norm.eps)
        return [
            m.pack([x * factor * (w + norm.offset) for x, w in zip(*both, strict=True)], plan.dtype)
            for both in zip(numbers, weights, strict=True)
        ]

    def _turns(self, ref, token):
        """(cos, sin) by place that turns: two numbers each by halves, one where neighbours turn."""
        m, plan = self.m, self.plan
        count = 1 if plan.interleaved else 2
        places = self.turned if plan.interleaved else self.first
        base = m.wide(token) * (4 * plan.turned)
        found = []
        for pair, _ in places:
            at = base + m.wide(pair * (4 * count))
            found.append([[m.float(x) for x in m.load(ref, at + start, count)] for start in (0, 2 * plan.turned)])
        return found

    def _rotated(self, words, turns):
        """first cos - second sin, second cos + first sin."""
        m, dtype = self.m, self.plan.dtype
        turn = lambda a, b, cos, sin: (a * cos - b * sin, b * cos + a * sin)  # noqa: E731
        count = len(turns)
        if self.plan.interleaved:
            turned = [
                m.pack(turn(*m.unpack(w, dtype), *cos, *sin), dtype)
                for w, (cos, sin) in zip(words, turns, strict=False)
            ]
            return [*turned, *words[count:]]
        first, second = [], []
        for a, b, (cos, sin) in zip(words[:count], words[count : 2 * count], turns, strict=True):
            both = zip(m.unpack(a, dtype), m.unpack(b, dtype), cos, sin, strict=True)
            for found, pair in zip((first, second), zip(*(turn(*x) for x in both), strict=True), strict=True):
                found.append(m.pack(pair, dtype))
        return [*first, *second, *words[2 * count :]]

    def _across(self, x, op):
        return across(self.m, x, op)

    # Codes, by the rules of optx/formats/ints.py

    def _codes(self, to: Store, numbers):
        """-> (words of two codes by place, words of (scale, zero point) of all places, or by place where groups have theirs)."""
        if to.kind.code == "codebook4":
            return self._nearest(to, numbers)
        parts = [numbers] if to.kind.group is None else [[pair] for pair in numbers]
        found = [self._ranged(to, part) for part in parts]
        return [word for words, _ in found for word in words], [grid for _, grid in found]

    def _ranged(self, to: Store, numbers):
        """Codes of numbers that share a scale."""
        m, kind = self.m, to.kind
        flat = [x for pair in numbers for x in pair]
        lanes = LANES if kind.group is None else kind.group // 2
        over = lambda op, xs: across(m, functools.reduce(op, xs), op, lanes)  # noqa: E731
        clip = lambda x: x if to.clip == 1 else x * to.clip  # noqa: E731
        within = lambda x: m.minimum(m.maximum(x, 0.0), to.levels)  # noqa: E731
        if kind.zero == "least":
            low = over(m.minimum, self._placed(numbers, math.inf))
            span = over(m.maximum, self._placed(numbers, -math.inf)) - low
            low = low if to.clip == 1 else low + span * ((1 - to.clip) / 2)
            word, scale = self._scale(to, clip(span))
            least = m.pack([low, low], "float16")
            offset = (m.unpack(least, "float16")[0] * -1.0) / scale
            codes = [[m.int(within(m.round(x / scale + offset))) for x in pair] for pair in numbers]
            return [a | (b << kind.bits) for a, b in codes], (word, least)
        if kind.zero == "code":
            low = m.minimum(clip(over(m.minimum, flat)), 0.0)
            span = m.maximum(clip(over(m.maximum, flat)), 0.0) - low
        else:
            span = clip(over(m.maximum, [m.abs(x) for x in flat]))
            span = span if kind.code == "fp8" else span * 2.0
        word, scale = self._scale(to, span)
        if kind.code == "fp8":
            return [m.e4m3([x / scale for x in pair]) for pair in numbers], (word,)
        zero = within(m.round((low * -1.0) / scale)) if kind.zero else None
        middle = float(2 ** (kind.bits - 1)) if zero is None else zero
        codes = [[m.int(within(m.round(x / scale) + middle)) for x in pair] for pair in numbers]
        flip = 0x8080 if kind.code == "int8" and zero is None else 0  # symmetric codes are stored signed
        words = [(a | (b << kind.bits)) ^ flip for a, b in codes]
        return words, (word,) if zero is None else (word, m.int(zero))

    def _placed(self, numbers, other: float):
        """All numbers, `other` where a lane has none. Groups fill their lanes."""
        if len(numbers) < len(self.places):
            return [x for pair in numbers for x in pair]
        has = [has for _, has in self.places]
        return [
            x if h is None else self.m.where(h, x, other) for h, pair in zip(has, numbers, strict=True) for x in pair
        ]

    def _nearest(self, to: Store, numbers):
        """Codes of the nearest centroids, by the rules of optx/formats/codebook.py."""
        m = self.m
        length = self._length([x for pair in numbers for x in pair])
        step = m.where(length > 0.0, length, 1.0) * (1 / math.sqrt(self.plan.head_dim))
        found = [[self._centroid(x / step) for x in pair] for pair in numbers]
        values = self._placed([[x for _, x in pair] for pair in found], 0.0)
        scale = m.minimum(length / self._length(values), float(jnp.finfo(to.stored).max))
        scale = m.where(length < math.inf, scale, math.nan)
        word = m.bits(scale) if to.stored == "float32" else m.pack([scale, scale], to.stored)
        return [m.int(a) | (m.int(b) << 4) for (a, _), (b, _) in found], [(word,)]

    def _centroid(self, x):
        """(code, its centroid) of a number of the unit vector, times sqrt(H)."""
        m, table = self.m, np.asarray(centroids(4))
        edges = np.asarray((table[1:] + table[:-1]) / 2, np.float32)
        none = m.float(m.bits(x) & 0)
        code, value = none, none + float(table[0])
        for i, edge in enumerate(edges):
            beyond = x > float(edge)
            code = m.where(beyond, none + float(i + 1), code)
            value = m.where(beyond, none + float(table[i + 1]), value)
        return code, value

    def _length(self, numbers):
        m = self.m
        squares = self._across(functools.reduce(operator.add, [x * x for x in numbers]), operator.add)
        return squares * m.rsqrt(m.maximum(squares, float(jnp.finfo(jnp.float32).tiny)))

    def _scale(self, to: Store, span):
        """The scale as it is stored, and as a number: finite and not 0, or NaN where a number of the head is not finite."""
        m, info = self.m, jnp.finfo(to.stored)
        tiny = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
        scale = m.minimum(m.maximum(span / to.levels, tiny), float(info.max))
        scale = m.where(span > 0.0, scale, 1.0)
        scale = m.where(m.abs(span) < math.inf, scale, math.nan)
        if to.stored == "float32":
            return m.bits(scale), scale
        word = m.pack([scale, scale], to.stored)
        return word, m.unpack(word, to.stored)[0]
