"""Attention ops: the rows in plain JAX against a float64 oracle that loops over rows, heads and queries."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optx import formats, tensor
from optx.cache import Ragged
from optx.pallas import dispatch
from optx.pallas.attention import reference
from optx.pallas.attention.reference import Mask
from optx.target import TARGETS

TOLERANCE = 2e-5


def rows_of(op):
    """The plain rows: kernels of a device have test files of their own, over the shared cases."""
    plain = [row for row in dispatch.ROWS if row.op == op and row.backend == "xla"]
    return pytest.mark.parametrize("row", plain, ids=lambda row: row.name)


def run(row, *args, **kwargs):
    """Arrays and ragged batches are traced, all else is static, as it is in a compiled step."""
    traced = {k: v for k, v in kwargs.items() if isinstance(v, jax.Array | Ragged)}
    static = {k: v for k, v in kwargs.items() if k not in traced}
    return jax.jit(lambda args, traced: row.run(*args, **traced, **static))(args, traced)


def numbers(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def visible(mask: Mask, query: int, key: int) -> bool:
    """The documented rule, one query and one key."""
    if mask.causal and key > query:
        return False
    if key < mask.skip or (mask.lag is not None and key >= (query + 1 - mask.lag) // mask.block * mask.block):
        return False
    oldest = None if mask.window is None else query + 1 - mask.window
    if mask.lag is None and oldest is not None:
        oldest = oldest // mask.block * mask.block
    return oldest is None or key >= oldest or key < mask.sinks


def oracle(q, k, v, seen, *, scale, softcap=None, sink_logits=None, logit_scale=None):
    """One row: q [Q, N, H], k and v [S, K, H], seen bool[K, Q, S] -> out [Q, N, Hv], lse [Q, N], scores [S, K]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    queries, heads = q.shape[:2]
    kv_heads = k.shape[1]
    out, lse = np.zeros((queries, heads, v.shape[2])), np.full((queries, heads), -np.inf)
    scores = np.zeros((k.shape[0], kv_heads))
    for i in range(queries):
        for n in range(heads):
            h = n * kv_heads // heads
            keys = np.flatnonzero(seen[h, i])
            logits = k[keys, h] @ q[i, n] * scale
            if logit_scale is not None:
                logits = logits * logit_scale[keys, h]
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            mass = np.exp(logits)
            total = mass.sum() + (0 if sink_logits is None else math.exp(sink_logits[n]))
            if total == 0:
                continue
            out[i, n] = mass / total @ v[keys, h]
            lse[i, n] = math.log(total)
            scores[keys, h] += mass / total
    return out, lse, scores


def assert_close(got, want, what):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=TOLERANCE, rtol=TOLERANCE, err_msg=what)


# Self-contained sequences.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A case of flash_attention: B = 2 sequences of `length`."""

    length: int = 11  # with CHUNK = 4: two whole blocks and a ragged one
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    mask: Mask = Mask()
    scale: float | None = None
    softcap: float | None = None
    sink_logits: bool = False
    counts: tuple[int, int] | None = None
    segments: tuple[int, ...] | None = None


DENSE = {
    "causal": Dense(),
    "full": Dense(mask=Mask(causal=False)),
    "window": Dense(mask=Mask(window=3)),
    "window_1": Dense(mask=Mask(window=1)),
    "window_longer_than_the_text": Dense(mask=Mask(window=50)),
    "window_and_sinks": Dense(mask=Mask(window=3, sinks=2)),
    "full_window": Dense(mask=Mask(causal=False, window=4)),
    "mha": Dense(kv_heads=4),
    "gqa_8": Dense(heads=8, kv_heads=1),
    "gqa_3": Dense(heads=6, kv_heads=2),
    "values_narrower": Dense(value_dim=5),
    "values_wider": Dense(head_dim=6, value_dim=16),
    "scale": Dense(scale=0.7),
    "softcap": Dense(softcap=1.5, scale=2.0),
    "sink_logits": Dense(sink_logits=True),
    "everything": Dense(
        heads=6, mask=Mask(window=4, sinks=1), softcap=2.0, sink_logits=True, value_dim=3, counts=(11, 6)
    ),
    "counts": Dense(counts=(7, 0)),
    "segments": Dense(segments=(0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3)),
    "segments_and_window": Dense(segments=(0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3), mask=Mask(window=2)),
    "one_token": Dense(length=1),
    "one_block": Dense(length=4),
    "whole_blocks": Dense(length=8),
}


LOOPED = ("causal", "full", "window", "window_and_sinks", "full_window", "everything", "segments", "counts")


@pytest.mark.parametrize("name, unroll", [*((name, 8) for name in DENSE), *((name, 0) for name in LOOPED)])
@rows_of("flash_attention")
def test_flash_attention(row, name, unroll, rng, monkeypatch):
    """Few blocks of queries are unrolled, each over the keys that it can see; many are looped over."""
    monkeypatch.setattr(reference, "CHUNK", 4)
    monkeypatch.setattr(reference, "UNROLL", unroll)
    case = DENSE[name]
    q = numbers(rng, 2, case.length, case.heads, case.head_dim)
    k = numbers(rng, 2, case.length, case.kv_heads, case.head_dim)
    v = numbers(rng, 2, case.length, case.kv_heads, case.value_dim)
    sink = numbers(rng, case.heads) if case.sink_logits else None
    counts = case.counts or (case.length,) * 2
    segments = np.asarray(case.segments or (0,) * case.length)
    optional = {
        "sink_logits": sink,
        "segments": np.broadcast_to(segments, (2, case.length)) if case.segments else None,
        "valid": np.arange(case.length) < np.asarray(counts)[:, None] if case.counts else None,
    }
    out, lse, scores = run(
        row,
        *map(jnp.asarray, (q, k, v)),
        mask=case.mask,
        scale=case.scale,
        softcap=case.softcap,
        **{name: jnp.asarray(x) for name, x in optional.items() if x is not None},
    )
    assert scores is None and out.dtype == jnp.float32 and lse.dtype == jnp.float32
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    for b in range(2):
        seen = np.array(
            [
                [visible(case.mask, i, j) and j < counts[b] and segments[i] == segments[j] for j in range(case.length)]
                for i in range(case.length)
            ]
        )
        seen = np.broadcast_to(seen, (case.kv_heads, *seen.shape))
        want = oracle(q[b], k[b], v[b], seen, scale=scale, softcap=case.softcap, sink_logits=sink)
        assert_close(out[b], want[0], "out")
        assert_close(lse[b], want[1], "lse")


@rows_of("flash_attention")
def test_flash_attention_keeps_the_type_of_its_queries(row, rng):
    q, k, v = (jnp.asarray(numbers(rng, 1, 5, 2, 8), jnp.bfloat16) for _ in range(3))
    out, lse, _ = run(row, q, k, v)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    exact, _, _ = run(row, *(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.03)


# Paged caches.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paged:
    """A case of ragged_paged_attention. Rows hold `lengths` cached tokens, the last `counts` of which are queries."""

    lengths: tuple[int, ...] = (9, 1, 0, 14, 4)
    counts: tuple[int, ...] = (3, 1, 0, 1, 0)
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    mask: Mask = Mask()
    scale: float | None = None
    softcap: float | None = None
    sink_logits: bool = False
    logit_scale: bool = False
    latent: bool = False  # no pool of values: they are the first value_dim numbers of the keys
    by_head: bool = False  # every kv head has its own listing and lengths
    gaps: bool = False  # cached positions are not 0, 1, 2, ... and not in order
    format: str | None = None
    page: int = 4
    padding: int = 3  # tokens after the last row's
    rectangular: bool = False


PAGED = {
    "causal": Paged(),
    "window": Paged(mask=Mask(window=3)),
    "window_and_sinks": Paged(mask=Mask(window=3, sinks=2)),
    "packed": Paged(mask=Mask(lag=2, skip=3), format="int8"),
    "packed_blocks_in_a_window": Paged(mask=Mask(window=9, sinks=4, lag=3, skip=2, block=2), gaps=True),
    "exact": Paged(mask=Mask(window=2, sinks=3, block=4), gaps=True),
    "exact_first_tokens": Paged(mask=Mask(window=0, sinks=3)),
    "decode": Paged(counts=(1, 1, 1, 1, 1), lengths=(9, 1, 2, 14, 4)),
    "rectangular": Paged(counts=(2, 2, 2), lengths=(9, 2, 6), padding=0, rectangular=True),
    "chunk_from_the_start": Paged(counts=(9, 1, 0, 5, 0)),
    "mha": Paged(kv_heads=4),
    "mqa_8": Paged(heads=8, kv_heads=1),
    "gqa_3": Paged(heads=6),
    "values_narrower": Paged(value_dim=5),
    "softcap": Paged(softcap=1.5, scale=2.0),
    "sink_logits": Paged(sink_logits=True),
    "latent": Paged(kv_heads=1, head_dim=12, value_dim=8, latent=True, scale=0.4),
    "logit_scale": Paged(logit_scale=True),
    "latent_logit_scale": Paged(kv_heads=1, head_dim=12, value_dim=8, latent=True, logit_scale=True),
    "by_head": Paged(by_head=True),
    "by_head_window_sinks": Paged(by_head=True, mask=Mask(window=4, sinks=1), gaps=True, heads=6),
    "gaps": Paged(gaps=True),
    "gaps_window": Paged(gaps=True, mask=Mask(window=5)),
    "page_of_one": Paged(page=1),
    "one_page": Paged(page=16),
    "no_padding": Paged(padding=0),
    "int8": Paged(format="int8"),
    "int4": Paged(format="int4", by_head=True),
    "int4_asym": Paged(format="int4_g4_asym", sink_logits=True),
    "fp8": Paged(format="fp8_e4m3", mask=Mask(window=4)),
    "fp8_latent": Paged(format="fp8_e5m2", kv_heads=1, head_dim=12, value_dim=4, latent=True),
    "everything": Paged(
        heads=6, by_head=True, gaps=True, mask=Mask(window=6, sinks=2), softcap=2.0, sink_logits=True, logit_scale=True
    ),
}


class Pools:
    """A case laid out in shuffled pages. What no row owns is NaN, at positions that every query would see."""

    def __init__(self, case: Paged, rng: np.random.Generator):
        self.case, self.groups = case, case.kv_heads if case.by_head else 1
        # Heads that keep different pages may keep different numbers of tokens; the queries are cached by all of them.
        self.lengths = np.array(
            [[max(c, n - 2 * g) for n, c in zip(case.lengths, case.counts)] for g in range(self.groups)], np.int32
        )
        self.width = max(case.lengths) // case.page + 2
        self.pages = self.groups * len(case.lengths) * self.width + 3
        self.table = rng.integers(0, self.pages, size=(*self.lengths.shape, self.width), dtype=np.int32)
        self.positions = np.zeros(self.pages * case.page, np.int32)
        flat = (self.pages * case.page, case.kv_heads)
        self.k = np.full((*flat, case.head_dim), np.nan, np.float32)
        self.v = np.full((*flat, case.value_dim), np.nan, np.float32)
        self.logit_scale = np.full(flat, np.nan, np.float32)
        self.slots = {}  # flat slots of a row's tokens, by (group, row)
        free = iter(rng.permutation(self.pages))
        for g, b in np.ndindex(self.lengths.shape):
            length = self.lengths[g, b]
            for i in range(-(-length // case.page)):
                self.table[g, b, i] = next(free)
            at = (self.table[g, b, :, None] * case.page + np.arange(case.page)).reshape(-1)[:length]
            self.slots[g, b] = at
            # Queries are the row's last positions; what lies before them ascends and may have gaps.
            queries = self.query_positions(b)
            old = np.arange(case.lengths[b] - case.counts[b])
            old = rng.permutation(old) if case.gaps else old
            self.positions[at] = np.concatenate([np.sort(old[: length - len(queries)]), queries])
            heads = [g] if case.by_head else list(range(case.kv_heads))
            where = np.ix_(at, heads)
            self.k[where] = numbers(rng, length, len(heads), case.head_dim)
            self.v[where] = numbers(rng, length, len(heads), case.value_dim)
            self.logit_scale[where] = rng.uniform(0.5, 1.5, (length, len(heads)))

    def query_positions(self, b):
        return np.arange(self.case.lengths[b] - self.case.counts[b], self.case.lengths[b])

    def pool(self, flat):
        paged = jnp.moveaxis(jnp.asarray(flat.reshape(self.pages, self.case.page, *flat.shape[1:])), 1, 2)
        if self.case.format is None:
            return paged
        return tensor.quantize(paged, formats.parse(self.case.format), axis=-1)

    def want(self, b, q, sink):
        """out, lse and scores of row b by the oracle, a kv head at a time; scores by slot of the head's listing."""
        case, ratio = self.case, self.case.heads // self.case.kv_heads
        k, v = (np.moveaxis(tensor.dense(self.pool(x)), 2, 1).reshape(x.shape) for x in (self.k, self.v))
        out, lse = np.zeros((len(q), case.heads, case.value_dim)), np.zeros((len(q), case.heads))
        scores = np.zeros((self.width * case.page, case.kv_heads))
        for h in range(case.kv_heads):
            at = self.slots[h if case.by_head else 0, b]
            seen = [[visible(case.mask, p, s) for s in self.positions[at]] for p in self.query_positions(b)]
            mine = slice(h * ratio, (h + 1) * ratio)
            keys = k[at, h : h + 1]
            out[:, mine], lse[:, mine], scores[: len(at), h : h + 1] = oracle(
                q[:, mine],
                keys,
                keys[..., : case.value_dim] if case.latent else v[at, h : h + 1],
                np.array(seen, bool).reshape(1, len(q), len(at)),
                scale=case.head_dim**-0.5 if case.scale is None else case.scale,
                softcap=case.softcap,
                sink_logits=None if sink is None else sink[mine],
                logit_scale=self.logit_scale[at, h : h + 1] if case.logit_scale else None,
            )
        return out, lse, scores

    def ragged(self):
        """The batch with idle rows that start anywhere, and padding tokens at the end."""
        case, counts = self.case, np.asarray(self.case.counts, np.int32)
        total = counts.sum() + case.padding
        rows = np.concatenate([np.repeat(np.arange(len(counts)), counts), np.full(case.padding, len(counts))])
        starts = np.where(counts > 0, np.cumsum(counts) - counts, total - 1)
        positions = np.concatenate([*map(self.query_positions, range(len(counts))), np.zeros(case.padding)])
        arrays = (jnp.asarray(x, jnp.int32) for x in (rows, starts, counts, positions))
        fields = dict(zip(("rows", "starts", "counts", "positions"), arrays))
        longest = counts.max() + (not case.rectangular)
        return Ragged(**fields, longest=int(longest), rectangular=case.rectangular)

    def run(self, row, q, sink, **kwargs):
        case = self.case
        if sink is not None:
            kwargs["sink_logits"] = jnp.asarray(sink)
        if case.logit_scale:
            by_page = self.logit_scale.reshape(self.pages, case.page, -1)
            kwargs["logit_scale"] = jnp.moveaxis(jnp.asarray(by_page), 1, 2)
        kwargs = {"lengths": jnp.asarray(self.lengths), "table": jnp.asarray(self.table), **kwargs}
        return run(
            row,
            jnp.asarray(q),
            self.pool(self.k),
            None if case.latent else self.pool(self.v),
            ragged=self.ragged(),
            positions=jnp.asarray(self.positions.reshape(self.pages, case.page)),
            mask=case.mask,
            scale=case.scale,
            softcap=case.softcap,
            value_dim=case.value_dim if case.latent else None,
            **kwargs,
        )


@pytest.mark.parametrize("case", PAGED.values(), ids=PAGED)
@rows_of("ragged_paged_attention")
def test_ragged_paged_attention(row, case, rng):
    pools = Pools(case, rng)
    counts = case.counts
    q = numbers(rng, sum(counts) + case.padding, case.heads, case.head_dim)
    q[sum(counts) :] = np.nan  # nothing of a padding token may reach a row
    sink = numbers(rng, case.heads) if case.sink_logits else None
    out, lse, scores = pools.run(row, q, sink, want_scores=True)
    assert out.shape == (*q.shape[:2], case.value_dim) and lse.shape == q.shape[:2]
    assert scores.shape == (len(counts), pools.width * case.page, case.kv_heads)
    start = 0
    for b, count in enumerate(counts):
        mine = slice(start, start + count)
        want = pools.want(b, q[mine], sink)
        assert_close(out[mine], want[0], f"out of row {b}")
        assert_close(lse[mine], want[1], f"lse of row {b}")
        assert_close(scores[b], want[2], f"scores of row {b}")
        if sink is None and not case.mask.apart:
            assert abs(float(scores[b].sum()) - case.heads * count) < 1e-3, "a query's mass is 1"
        start += count


@pytest.mark.parametrize("case", [Paged(counts=(4, 1, 0, 1, 0)), Paged(gaps=True, kv_heads=1)], ids=["order", "gaps"])
@rows_of("ragged_paged_attention")
def test_two_halves_merged_by_lse_are_the_whole(row, case, rng):
    """out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i): the first page and the others."""
    pools = Pools(case, rng)
    q = numbers(rng, sum(case.counts) + case.padding, case.heads, case.head_dim)
    real = slice(0, sum(case.counts))
    out, lse, _ = pools.run(row, q, None)
    cut = 1  # pages in the first half; rows shorter than that have an empty second half
    halves = [
        (pools.table[:, :, :cut], np.minimum(pools.lengths, cut * case.page)),
        (pools.table[:, :, cut:], np.maximum(pools.lengths - cut * case.page, 0)),
    ]
    parts = [pools.run(row, q, None, table=jnp.asarray(t), lengths=jnp.asarray(n)) for t, n in halves]
    outs, lses = (np.stack([np.asarray(part[i], np.float64)[real] for part in parts]) for i in (0, 1))
    assert np.isneginf(lses[1]).any() and np.isfinite(lses[1]).any()
    total = np.log(np.exp(lses).sum(0))
    merged = (np.exp(lses - total)[..., None] * outs).sum(0)
    assert_close(merged, np.asarray(out)[real], "out")
    assert_close(total, np.asarray(lse)[real], "lse")


@pytest.mark.parametrize("sink_logits", [False, True])
@rows_of("ragged_paged_attention")
def test_queries_that_see_nothing_give_zero(row, sink_logits, rng):
    """An empty cache, and a window that has left all cached tokens behind. lse is then that of the sink logit alone."""
    case = Paged(lengths=(5, 6), counts=(1, 2), mask=Mask(window=2), sink_logits=sink_logits)
    pools = Pools(case, rng)
    pools.positions[pools.slots[0, 1]] = [0, 1, 0, 1, 0, 1]  # the queries of row 1 stand at 4 and 5
    pools.lengths[:, 0] = 0
    q = numbers(rng, 3 + case.padding, case.heads, case.head_dim)
    sink = numbers(rng, case.heads) if sink_logits else None
    out, lse, scores = pools.run(row, q, sink, want_scores=True)
    np.testing.assert_array_equal(out[:3], np.zeros((3, case.heads, case.value_dim)))
    np.testing.assert_array_equal(scores, np.zeros_like(scores))
    want = np.broadcast_to(-np.inf if sink is None else sink, (3, case.heads))
    np.testing.assert_allclose(lse[:3], want, atol=1e-6)


@rows_of("flash_attention")
def test_sequences_without_real_tokens_give_zero(row, rng):
    q, k, v = (jnp.asarray(numbers(rng, 2, 6, 2, 8)) for _ in range(3))
    valid = jnp.asarray([[False] * 6, [True] * 6])
    out, lse, _ = run(row, q, k, v, valid=valid)
    np.testing.assert_array_equal(out[0], np.zeros_like(out[0]))
    assert np.isneginf(np.asarray(lse[0])).all() and np.isfinite(np.asarray(lse[1])).all()


@rows_of("ragged_paged_attention")
def test_large_logits_do_not_overflow(row, rng):
    case = Paged(scale=300.0, counts=(3, 1, 0, 1, 0))
    pools = Pools(case, rng)
    q = numbers(rng, 5 + case.padding, case.heads, case.head_dim)
    out, lse, scores = pools.run(row, q, None)
    assert scores is None, "not wanted"
    assert np.isfinite(np.asarray(out)[:5]).all() and np.isfinite(np.asarray(lse)[:5]).all()
    assert np.abs(np.asarray(lse)[:5]).max() > 500, "exp of these logits is infinite in float32"


def test_every_op_has_a_reference_that_takes_everything():
    for op in {row.op for row in dispatch.ROWS}:
        last = dispatch.rows(op)[-1]
        assert last.backend == "xla" and last.arch == "any" and last.verified
        assert all(last.supports({}, target) is None for target in TARGETS.values())
