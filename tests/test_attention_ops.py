"""Attention ops: every row of the dispatch table against a float64 oracle that loops over rows, heads and queries."""

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

PLATFORMS = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}  # xla runs anywhere
TOLERANCE = 2e-5


def rows_of(op):
    return pytest.mark.parametrize("row", [r for r in dispatch.ROWS if r.op == op], ids=lambda r: r.name)


def run(row, *args, **kwargs):
    """Arrays and ragged batches are traced, all else is static, as it is in a compiled step."""
    platform = PLATFORMS.get(row.backend)
    if platform and jax.default_backend() != platform:
        pytest.skip(f"{row.name} runs on {platform}")
    traced = {k: v for k, v in kwargs.items() if isinstance(v, jax.Array | Ragged)}
    static = {k: v for k, v in kwargs.items() if k not in traced}
    return jax.jit(lambda args, traced: row.run(*args, **traced, **static))(args, traced)


def numbers(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def visible(mask: Mask, query: int, key: int) -> bool:
    """The documented rule, one query and one key."""
    if mask.causal and key > query:
        return False
    return mask.window is None or key > query - mask.window or key < mask.sinks


def oracle(q, k, v, seen, *, scale, softcap=None, sink_logits=None, logit_scale=None):
    """One row: q [Q, N, H], k [S, K, H], v [S, K, Hv], seen bool[K, Q, S] -> out [Q, N, Hv], lse [Q, N], scores [S, K]."""
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
    "everything": Dense(heads=6, mask=Mask(window=4, sinks=1), softcap=2.0, sink_logits=True, value_dim=3, counts=(11, 6)),
    "counts": Dense(counts=(7, 0)),
    "segments": Dense(segments=(0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3)),
    "segments_and_window": Dense(segments=(0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3), mask=Mask(window=2)),
    "one_token": Dense(length=1),
    "one_block": Dense(length=4),
    "whole_blocks": Dense(length=8),
}


@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
@rows_of("flash_attention")
def test_flash_attention(row, case, rng, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 4)
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


PAGED = {
    "causal": Paged(),
    "window": Paged(mask=Mask(window=3)),
    "window_and_sinks": Paged(mask=Mask(window=3, sinks=2)),
    "decode": Paged(counts=(1, 1, 1, 1, 1), lengths=(9, 1, 2, 14, 4)),
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
        self.case, rows = case, len(case.lengths)
        groups = case.kv_heads if case.by_head else 1
        self.groups = groups
        # Heads that keep different pages may keep different numbers of tokens; a row's queries are cached by all.
        self.lengths = np.array([[max(c, n - 2 * g) if n else 0 for n, c in zip(case.lengths, case.counts)] for g in range(groups)])
        self.width = -(-max(case.lengths) // case.page) + 1
        pages = rows * self.width + 2
        flat = (pages * case.page, case.kv_heads)
        self.k, self.v = np.full((*flat, case.head_dim), np.nan, np.float32), np.full((*flat, case.value_dim), np.nan, np.float32)
        self.logit_scale = np.full(flat, np.nan, np.float32)
        # One array of positions serves all heads of a page, so heads get pages of their own.
        self.positions = np.zeros(pages * groups * case.page, np.int32)
        self.k, self.v, self.logit_scale = (np.tile(x, (groups, *[1] * (x.ndim - 1))) for x in (self.k, self.v, self.logit_scale))
        order = rng.permutation(pages * groups)
        self.table = rng.integers(0, pages * groups, size=(groups, rows, self.width))
        self.slots, used = {}, 0
        for g in range(groups):
            for b in range(rows):
                length = self.lengths[g, b]
                need = -(-length // case.page)
                self.table[g, b, :need] = order[used : used + need]
                used += need
                at = (self.table[g, b, :need, None] * case.page + np.arange(case.page)).reshape(-1)[:length]
                self.slots[g, b] = at
                self.positions[at] = self.cached_positions(b, length, rng)
                heads = [g] if case.by_head else range(case.kv_heads)
                for h in heads:
                    self.k[at, h] = numbers(rng, length, case.head_dim)
                    self.v[at, h] = numbers(rng, length, case.value_dim)
                    self.logit_scale[at, h] = rng.uniform(0.5, 1.5, length)
        self.pages = pages * groups

    def cached_positions(self, b, length, rng):
        """The queries are the row's last positions; what stands before them may have gaps and any order."""
        count = self.case.counts[b]
        old = np.arange(self.case.lengths[b] - count)
        if self.case.gaps:
            old = rng.permutation(old)
        return np.concatenate([old[: length - count], self.query_positions(b)])

    def query_positions(self, b):
        return np.arange(self.case.lengths[b] - self.case.counts[b], self.case.lengths[b])

    def pool(self, flat):
        paged = jnp.asarray(flat.reshape(self.pages, self.case.page, *flat.shape[1:]))
        if self.case.format is None or flat is self.logit_scale:
            return paged
        return tensor.quantize(paged, formats.parse(self.case.format), axis=-1)

    def want(self, b, q, **kwargs):
        """The oracle on the row's tokens; scores by slot of the listing."""
        case = self.case
        outs = []
        k = np.asarray(tensor.dense(self.pool(self.k))).reshape(self.k.shape)
        v = np.asarray(tensor.dense(self.pool(self.v))).reshape(self.v.shape)
        out, lse = np.zeros((case.counts[b], case.heads, case.value_dim)), np.zeros((case.counts[b], case.heads))
        scores = np.zeros((self.width * case.page, case.kv_heads))
        del outs
        ratio = case.heads // case.kv_heads
        for h in range(case.kv_heads):
            at = self.slots[h if case.by_head else 0, b]
            seen = np.array(
                [[visible(case.mask, p, s) for s in self.positions[at]] for p in self.query_positions(b)], bool
            ).reshape(1, case.counts[b], len(at))
            mine = slice(h * ratio, (h + 1) * ratio)
            keys = k[at, h : h + 1]
            values = keys[..., : case.value_dim] if case.latent else v[at, h : h + 1]
            out[:, mine], lse[:, mine], scores[: len(at), h : h + 1] = oracle(
                q[:, mine],
                keys,
                values,
                seen,
                scale=case.head_dim**-0.5 if case.scale is None else case.scale,
                softcap=case.softcap,
                sink_logits=None if kwargs["sink_logits"] is None else kwargs["sink_logits"][mine],
                logit_scale=self.logit_scale[at, h : h + 1] if case.logit_scale else None,
            )
        return out, lse, scores
