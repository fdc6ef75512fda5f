"""Cases and benchmark shapes of attention over MLA latents: `paged_decode` and `ragged_paged_attention`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from optx.bench.cases import Case, Shape
from optx.cache import CacheSpec, Ragged, Stream
from optx.formats import Int
from optx.pallas.attention.reference import Mask
from optx.tensor import quantize

DECODE, RAGGED = "paged_decode", "ragged_paged_attention"


def pages_of(rng, length, width, page_size, dtype, gaps=False, scaled=False, format=None):
    """Rows of `length` cached latents, pages in random order; what no row has written holds NaN.

    gaps: positions with holes, as eviction leaves them; scaled: logit scales a token, True for one; format: of latents.
    -> (pool, kwargs of the op, positions by row).
    """
    length = np.array(length)
    count = -(-length // page_size)
    total = int(count.sum())
    order, taken = rng.permutation(total), 0
    table = np.full((1, len(length), max(int(count.max()), 1)), total, np.int32)
    positions = np.full((total + 1, page_size), -1, np.int32)
    scale = np.full((total + 1, int(scaled) or 1, page_size), np.nan, np.float32)
    at = []
    for row, n in enumerate(length):
        steps = rng.integers(1, 4, size=n) if gaps else np.ones(n, int)
        at.append(np.cumsum(steps) - 1)
        listed = order[taken : taken + count[row]]
        table[0, row, : count[row]] = listed
        taken += count[row]
        for i, page in enumerate(listed):
            here = at[row][i * page_size : (i + 1) * page_size]
            positions[page, : len(here)] = here
            scale[page, :, : len(here)] = rng.uniform(0.5, 1.5, size=(scale.shape[1], len(here)))
    kwargs = {
        "positions": jnp.asarray(positions),
        "table": jnp.asarray(table),
        "lengths": jnp.asarray(length[None], jnp.int32),
    }
    if scaled:
        kwargs["logit_scale"] = jnp.asarray(scale)
    pool = normal(rng, (total + 1, 1, page_size, width), dtype, kwargs["positions"][:, None, :, None] >= 0)
    pool = pool if format is None else quantize(jnp.nan_to_num(pool), format, axis=-1)
    return pool, kwargs, at


def normal(rng, shape, dtype, real):
    """Normal numbers made on the device, NaN where not `real` (bool, broadcast to shape)."""
    make = jax.jit(lambda key, real: jnp.where(real, jax.random.normal(key, shape), jnp.nan).astype(dtype))
    return make(jax.random.key(int(rng.integers(2**31))), real)


def decode(rng, length, *, queries, heads, rank, rope, page_size, dtype="bfloat16", missing=0, **more):
    """A call of `paged_decode`; missing: of so many rows the first query token is not there."""
    kwargs = {name: more.pop(name) for name in ("gaps", "scaled", "format") if name in more}
    pool, kwargs, at = pages_of(rng, length, rank + rope, page_size, dtype, **kwargs)
    asked = np.full((len(length), queries), -1, np.int32)
    for row, n in enumerate(length):
        here = at[row][max(n - queries, 0) :]
        asked[row, queries - len(here) :] = here
        if row < missing:
            asked[row, : queries - len(here) + 1] = -1
    q = normal(rng, (len(length), queries, heads, rank + rope), dtype, True)
    more = {name: value(rng, heads) if name == "sink_logits" else value for name, value in more.items()}
    return (q, pool, None), {**kwargs, "q_positions": jnp.asarray(asked), "value_dim": rank, **more}


def ragged(rng, counts, context, *, heads, rank, rope, page_size, dtype="bfloat16", padding=0, **more):
    """A call of `ragged_paged_attention`: rows of `counts` new tokens on `context` cached ones, `padding` tokens of no row."""
    kwargs = {name: more.pop(name) for name in ("gaps", "scaled") if name in more}
    counts, context = np.array(counts), np.array(context)
    pool, kwargs, at = pages_of(rng, counts + context, rank + rope, page_size, dtype, **kwargs)
    rows = np.concatenate([np.repeat(np.arange(len(counts)), counts), np.full(padding, len(counts))])
    asked = np.concatenate([at[row][context[row] :] for row in range(len(counts))] + [np.zeros(padding, int)])
    q = normal(rng, (len(rows), heads, rank + rope), dtype, jnp.asarray(rows < len(counts))[:, None, None])
    more = {name: value(rng, heads) if name == "sink_logits" else value for name, value in more.items()}
    batch = Ragged(
        rows=jnp.asarray(rows, jnp.int32),
        starts=jnp.asarray(np.cumsum(counts) - counts, jnp.int32),
        counts=jnp.asarray(counts, jnp.int32),
        positions=jnp.asarray(asked, jnp.int32),
        longest=max(int(counts.max()), 1),
    )
    return (q, pool, None), {**kwargs, "ragged": batch, "value_dim": rank, **more}


def real_tokens(output, kwargs):
    """out and lse of the tokens that are there."""
    if "ragged" in kwargs:
        batch = kwargs["ragged"]
        real = np.flatnonzero(np.asarray(batch.rows) < batch.batch)
        return [x[real] for x in output[:2]]
    return list(output[:2])


def site(heads, rank, rope, dtype="bfloat16", mask=Mask(), softcap=None, page_size=64, scaled=0, format=None):  # noqa: B008 - frozen
    streams = (Stream(name="latent", shape=(1, rank + rope), format=format),)
    spec = CacheSpec(kind="latent", streams=streams, dtype=dtype, window=mask.window, sinks=mask.sinks)
    sizes = {"heads": heads, "kv_heads": 1, "head_dim": rank + rope, "value_dim": rank, "page_size": page_size}
    more = {"logit_scales": int(scaled), "selected": scaled > 1 or format is not None}
    return {**sizes, "cache": spec, "mask": mask, "softcap": softcap, **more}


def case(op, name, rows, *, heads=16, rank=512, rope=64, page_size=64, small=False, **more):
    """rows: lengths of a decode, or (counts, context) of a ragged batch."""
    sizes = {"heads": heads, "rank": rank, "rope": rope, "page_size": page_size}

    def make(rng):
        return decode(rng, rows, **sizes, **more) if op == DECODE else ragged(rng, *rows, **sizes, **more)

    asked = {key: more[key] for key in ("mask", "softcap", "dtype", "scaled", "format") if key in more}
    return Case(op=op, name=f"mla_{name}", make=make, site=site(**sizes, **asked), small=small, pick=real_tokens)


def _sinks(rng, heads):
    return jnp.asarray(rng.standard_normal(heads), jnp.float32)


ROWS = [300, 1, 0, 64, 777, 65, 128, 129]
MIXED = ([40, 1, 1, 130, 0, 17], [100, 70, 300, 513, 0, 0])
SLIDING = Mask(window=90, sinks=4)
TINY = {"heads": 8, "rank": 128, "rope": 64, "page_size": 32, "small": True}
new = functools.partial(case, DECODE)
mixed = functools.partial(case, RAGGED)
CASES = (
    new("tiny", [70, 1, 0, 140], queries=1, **TINY),
    new("tiny_tokens", [100, 2], queries=3, missing=1, **TINY),
    new(
        "tiny_window",
        [150, 30],
        queries=2,
        mask=Mask(window=40, sinks=3),
        softcap=20.0,
        sink_logits=_sinks,
        scaled=True,
        gaps=True,
        **{**TINY, "page_size": 16},
    ),
    new("tiny_head_scaled", [70, 1, 0, 40], queries=2, scaled=4, format=Int(width=4), **TINY),
    mixed("tiny_mixed", ([9, 1, 0, 1], [30, 70, 0, 5]), padding=2, **TINY),
    *(new(f"page{size}", ROWS, queries=1, heads=128, page_size=size) for size in (16, 32, 64, 128)),
    *(new(f"heads{heads}", ROWS, queries=1, heads=heads) for heads in (8, 16, 40, 64, 96)),
    *(new(f"tokens{queries}", ROWS, queries=queries, heads=16, missing=2) for queries in (2, 4, 5, 8)),
    new("tokens2_heads128", ROWS, queries=2, heads=128, missing=2),
    new("fp16", ROWS, queries=1, heads=128, dtype="float16"),
    new("batch1", [5000], queries=1, heads=128),
    new("many_rows", [130 * i for i in range(70)], queries=1, heads=64),
    new("softcap", ROWS, queries=1, heads=128, softcap=20.0),
    new("scaled", ROWS, queries=2, heads=32, page_size=16, scaled=True, gaps=True),
    new("head_scaled", ROWS, queries=1, heads=32, rank=192, scaled=8),
    new("head_scaled_long", [8192, 7000], queries=1, heads=32, rank=192, scaled=8, format=Int(width=4)),
    new("head_scaled_tokens2", ROWS, queries=2, heads=32, page_size=16, scaled=2, softcap=20.0),
    new("int4_page128", ROWS, queries=1, heads=16, page_size=128, format=Int(width=4)),
    new("window", ROWS, queries=2, heads=64, mask=SLIDING, gaps=True, page_size=16),
    new("window_sinks", ROWS, queries=1, heads=128, mask=SLIDING, gaps=True, page_size=128, sink_logits=_sinks),
    new("not_causal", ROWS, queries=4, heads=16, mask=Mask(causal=False)),
    new("sink_logits", [9000, 40, 0], queries=1, heads=16, sink_logits=_sinks),
    new("rank192", ROWS, queries=1, heads=64, rank=192),
    new("rank256", ROWS, queries=2, heads=128, rank=256),
    new("rank128_rope32", ROWS, queries=1, heads=32, rank=128, rope=32),
    new("rank512_rope0", ROWS, queries=1, heads=16, rope=0),
    new("rank512_rope128", ROWS, queries=1, heads=64, rope=128),
    new("rank256_rope128", ROWS, queries=1, heads=64, rank=256, rope=128),
    *(mixed(f"mixed_page{size}", MIXED, heads=128, page_size=size, padding=7) for size in (16, 64, 128)),
    mixed("mixed_heads16", MIXED, padding=7),
    mixed("mixed_window", MIXED, heads=16, mask=SLIDING, gaps=True, softcap=20.0, sink_logits=_sinks, scaled=True),
    mixed("mixed_not_causal", MIXED, heads=64, mask=Mask(causal=False)),
    mixed("mixed_rank256", MIXED, heads=128, rank=256, page_size=32),
    mixed("decodes", ([1, 1, 1], [4000, 90, 0]), heads=128),
)


def shape(op, name, counts, context, *, heads=128, rank=512, rope=64, page_size=64, scaled=0, format=None):
    counts, context = np.array(counts), np.array(context)
    sizes = {"heads": heads, "rank": rank, "rope": rope, "page_size": page_size}
    stored = 2 * (rank + rope) if format is None else (rank + rope) * format.width / 8 + 2
    read = (stored + 2 * scaled) * float(np.sum(counts + context))
    tokens = 2 * heads * (2 * rank + rope) * float(np.sum(counts))  # queries and results
    pairs = float(np.sum(counts * context + counts * (counts + 1) / 2))

    def make(rng):
        if op == DECODE:
            return decode(rng, counts + context, queries=int(counts[0]), **sizes, scaled=scaled, format=format)
        return ragged(rng, counts, context, **sizes)

    flops = 2 * heads * (2 * rank + rope) * pairs
    return Shape(
        op=op,
        name=f"mla_{name}",
        make=make,
        site=site(**sizes, scaled=scaled, format=format),
        bytes=read + tokens,
        flops=flops,
    )


SHAPES = (
    shape(DECODE, "decode_32x8k", [1] * 32, [8191] * 32),
    shape(DECODE, "decode_32x8k_2tokens", [2] * 32, [8190] * 32),
    shape(DECODE, "decode_128x8k", [1] * 128, [8191] * 128),
    shape(DECODE, "decode_1x40k", [1], [40959]),
    shape(DECODE, "decode_32x8k_16heads", [1] * 32, [8191] * 32, heads=16),
    shape(DECODE, "lists_1x8k_int4", [1], [8191], heads=32, rank=192, scaled=8, format=Int(width=4)),
    shape(RAGGED, "chunk2k_on_8k", [2048], [8192]),
)
