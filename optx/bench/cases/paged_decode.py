"""Cases and benchmark shapes of `paged_decode`: up to 8 new tokens a row over paged keys and values."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from optx.bench.cases import Case, Shape
from optx.bench.cases.filled import random, random_codes
from optx.formats import Affine, Codebook, Float8, Float8Static, Format, Int, PerChannel
from optx.nn.attention import paged_spec
from optx.pallas.attention import reference
from optx.pallas.attention.reference import Mask
from optx.tensor import QTensor, is_qtensor

OP = "paged_decode"
INT8, INT4, FP8 = Int(width=8), Int(width=4), Float8()
INT8_ZERO, INT4_ZERO = Int(width=8, symmetric=False), Int(width=4, symmetric=False)


def batch(
    rng,
    lengths,
    *,
    heads,
    kv_heads,
    head_dim,
    page_size,
    dtype="bfloat16",
    format=None,
    queries=1,
    asked=None,
    lists=1,
    gaps=False,
    sink_logits=False,
    logit_scale=False,
    first=None,
    **kwargs,
):
    """A call: rows of `lengths` cached slots, the newest `asked` of them (all `queries` when None) the queries' own.

    lists: page lists (G), each of other lengths where more than one; gaps: positions with holes, as eviction leaves them.
    first: page size of exact first tokens, which lie in pages of their own.
    Pages lie in random order. Whatever no row has written, the last page, and absent queries hold NaN.
    """
    size = len(lengths)
    asked = np.minimum(lengths, queries) if asked is None else np.array(asked)
    kept = np.array([[max(n - 7 * group, int(asked[b])) for b, n in enumerate(lengths)] for group in range(lists)])
    pages = -(-kept // page_size)
    total, taken = int(pages.sum()), 0
    order = rng.permutation(total)
    table = np.full((lists, size, max(int(pages.max()), 1)), total, np.int32)
    positions = np.full((total + 1, page_size), -1, np.int32)
    written = np.zeros((total + 1, kv_heads, page_size), bool)
    q_positions = np.full((size, queries), -1, np.int32)
    for row, length in enumerate(lengths):
        new = int(asked[row])
        old = np.cumsum(rng.integers(1, 4, size=length - new) if gaps else np.ones(length - new, int)) - 1
        q_positions[row, :new] = (old[-1] if len(old) else -1) + 1 + np.arange(new)
        for group in range(lists):
            some = np.sort(rng.permutation(len(old))[: kept[group, row] - new])
            at = np.concatenate([old[some], q_positions[row, :new]])
            listed = order[taken : taken + pages[group, row]]
            table[group, row, : len(listed)] = listed
            taken += len(listed)
            for i, page in enumerate(listed):
                here = at[i * page_size : (i + 1) * page_size]
                positions[page, : len(here)] = here
                written[page, slice(None) if lists == 1 else group, : len(here)] = True
    shape = (total + 1, kv_heads, page_size, head_dim)
    pools = [_pool(rng.standard_normal(shape), written, each, dtype) for each in both(format)]
    q = rng.standard_normal((size, queries, heads, head_dim))
    q[q_positions < 0] = np.nan
    if sink_logits:
        kwargs["sink_logits"] = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    if logit_scale:
        factors = np.where(written, rng.uniform(0.5, 1.5, written.shape), np.nan)
        kwargs["logit_scale"] = jnp.asarray(factors, jnp.float32)
    if first is not None:
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": first}
        (_, *near), where = batch(
            rng, [int(n) for n in np.minimum(lengths, kwargs["mask"].skip + 3)], dtype=dtype, **sizes
        )
        where = {name: where[name] for name in ("positions", "table", "lengths")}
        kwargs["first"] = dict(zip(("k_pool", "v_pool"), near, strict=True)) | where
    return (jnp.asarray(q, dtype), *pools), {
        "positions": jnp.asarray(positions),
        "table": jnp.asarray(table),
        "lengths": jnp.asarray(kept, jnp.int32),
        "q_positions": jnp.asarray(q_positions),
        **kwargs,
    }


def both(format) -> tuple[Format | None, Format | None]:
    """Of keys and of values: `format` is one for both, or a pair."""
    return format if isinstance(format, tuple) else (format, format)


def _pool(x, written, format: Format | None, dtype):
    """x [pages, K, P, H] as it is stored; what is not `written` cannot be read without harm."""
    mark = written[..., None]
    if format is None:
        return jnp.asarray(np.where(mark, x, np.nan), dtype)
    parts = format.encode(jnp.asarray(x, jnp.float32))
    data = parts.data
    if isinstance(format, Float8 | Float8Static):
        data = jnp.where(mark, data.astype(jnp.float32), jnp.nan).astype(data.dtype)
    kwargs = {"format": format, "length": x.shape[-1], "axis": -1, "dtype": jnp.dtype("float32")}
    if parts.scale is None:
        return QTensor(data=data, **kwargs)
    rows = parts.scale.shape[2]
    mark = written.reshape(*written.shape[:2], rows, -1).any(-1)[..., None]  # tokens that share scales
    poisoned = lambda part: jnp.where(mark, part, jnp.nan).astype(part.dtype)  # noqa: E731
    zero = parts.zero
    zero = poisoned(zero) if zero is not None and jnp.issubdtype(zero.dtype, jnp.floating) else zero
    return QTensor(data=data, scale=poisoned(parts.scale), zero=zero, **kwargs)


def exact(args, kwargs):
    """out, lse and scores of the reference in float32."""
    q, *pools = args
    pools = [x if is_qtensor(x) else x.astype(jnp.float32) for x in pools]
    return reference.paged_decode(jnp.nan_to_num(q.astype(jnp.float32)), *pools, **kwargs)


def results(output, kwargs):
    """out and lse of the rows' queries, and the scores where they are asked for."""
    real = np.asarray(kwargs["q_positions"]) >= 0
    out, lse, scores = output
    found = [out[real], lse, jnp.where(real[..., None, None], 0, out)]
    return found if scores is None else [*found, scores]


def stored(spec, format):
    """A cache of paged keys and values in `format`, one for both or a pair."""
    if not isinstance(format, tuple):
        return spec.replace(format=format)
    streams = zip(spec.streams, format, strict=True)
    return spec.replace(streams=tuple(dataclasses.replace(stream, format=each) for stream, each in streams))


def site(heads, kv_heads, head_dim, page_size, dtype="bfloat16", format=None, mask=Mask(), **facts):  # noqa: B008 - frozen
    window = None if mask.window is None else max(mask.window, 1)
    spec = paged_spec(kv_heads, head_dim, dtype=dtype, window=window)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "cache": stored(spec.replace(sinks=mask.sinks), format).replace(recent=mask.lag or 0, first=mask.skip),
        "mask": mask,
        **facts,
    }


def case(name, lengths, *, heads=8, kv_heads=2, head_dim=128, page_size=64, small=False, tolerance=5e-3, **more):
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
    facts = {
        key: more[key]
        for key in ("dtype", "format", "mask", "softcap", "logit_scale", "want_scores", "first")
        if key in more
    }
    return Case(
        op=OP,
        name=name,
        make=lambda rng: batch(rng, lengths, **shape, **more),
        site=site(**shape, **facts),
        small=small,
        tolerance=tolerance,
        pick=results,
    )


RAGGED = [700, 1, 0, 64, 65, 333, 2000]
FORMATS = {"int8": INT8, "int8_zero": INT8_ZERO, "int4": INT4, "int4_zero": INT4_ZERO, "fp8": FP8}
SLIDING = Mask(window=90, sinks=4)
PACKED, EXACT = Mask(lag=0, skip=4), Mask(window=0, sinks=4)  # what kv_int4 leaves to packed and to exact pages
BLOCKS, NEWEST = Mask(lag=50, skip=9, block=32), Mask(window=50, sinks=9, block=32)
ALL = Mask(window=300, sinks=20, lag=40, skip=10)
LLAMA = {"heads": 32, "kv_heads": 8}
OSS = {"heads": 64, "kv_heads": 8, "head_dim": 64, "sink_logits": True}
TINY = {"heads": 4, "kv_heads": 1, "head_dim": 64, "page_size": 16, "small": True}
NARROW = {**TINY, "head_dim": 128, "page_size": 32}
FEW_BITS = {
    "oscar2": tuple(Int(width=2, symmetric=False, clip=clip) for clip in (0.96, 0.92)),
    "int2": Int(width=2),
    "int3": Int(width=3),
    "oscar3": tuple(Int(width=3, symmetric=False, clip=clip) for clip in (0.96, 0.92)),
    "kivi4": (PerChannel(width=4, group=32), Affine(width=4, group=32)),
    "kivi2": (PerChannel(width=2, group=32), Affine(width=2, group=64)),
    "kivi3": (PerChannel(width=3, group=32), Affine(width=3, group=32)),
    "turbo4": Codebook(width=4),
    "int4_affine": Affine(width=4),
    "int2_groups": Int(width=2, group=32, symmetric=False),
    "int4_groups": Int(width=4, group=64),
}
# Kernels make 16-bit numbers of these, which rounds each key and value: by 2.2e-3 to 3.3e-3 of it, either's share of the error.
MADE = dict.fromkeys(("kivi4", "kivi3", "kivi2", "int2_groups", "int4_groups"), 8e-3)

CASES = (
    case("small", [70, 0, 1], **TINY),
    case("small_window", [200, 17], **TINY, mask=Mask(window=20, sinks=2), gaps=True, softcap=20.0, sink_logits=True),
    case("small_queries", [70, 3], **TINY, queries=3, asked=[3, 2], dtype="float16"),
    case("small_lists", [70, 30], **{**TINY, "kv_heads": 2}, lists=2, gaps=True),
    *(case(f"small_{name}", [70, 3], **TINY, format=value) for name, value in FORMATS.items()),
    case("small_packed", [70, 0, 3], **TINY, mask=PACKED, format=INT4_ZERO),
    case("small_first", [70, 0, 3, 1], **TINY, mask=PACKED, format=Affine(width=4), first=16),
    case(
        "small_first_queries",
        [70, 2, 5],
        **TINY,
        mask=Mask(lag=0, skip=3),
        format=INT4_ZERO,
        first=16,
        queries=3,
        softcap=20.0,
        sink_logits=True,
    ),
    case("small_exact", [70, 33, 0, 1], **TINY, mask=Mask(window=0, sinks=5)),
    case("small_blocks", [70, 33, 0], **TINY, mask=Mask(lag=9, skip=5, block=8), format=INT8, queries=2, gaps=True),
    case("small_newest", [70, 33, 0], **TINY, mask=Mask(window=9, sinks=5, block=8), queries=2, gaps=True),
    case(
        "small_all", [70, 33], **TINY, mask=Mask(window=40, sinks=7, lag=9, skip=5), format=INT8, queries=2, gaps=True
    ),
    *(
        case(f"small_{name}", [70, 3], **NARROW, format=value, tolerance=MADE.get(name, 5e-3))
        for name, value in FEW_BITS.items()
    ),
    case("small_fp8_static", [70, 3], **TINY, format=Float8Static()),
    case("small_scores", [70, 3], **TINY, logit_scale=True, want_scores=True),
    *(case(f"page{size}", RAGGED, **LLAMA, page_size=size) for size in (16, 32, 64, 128)),
    *(case(f"fp16_dim{size}", RAGGED, head_dim=size, dtype="float16") for size in (64, 128, 256)),
    *(case(f"group{n}", RAGGED, heads=2 * n) for n in (1, 3, 7, 16)),
    *(case(f"queries{n}", RAGGED, queries=n, asked=[n, 1, 0, n, n, 1, n]) for n in (2, 5, 8)),
    case("queries8_group16", RAGGED, heads=32, queries=8, asked=[8, 1, 0, 8, 8, 1, 7]),
    case("dim64", RAGGED, **OSS),
    case("dim256", RAGGED, head_dim=256, page_size=32, softcap=50.0),
    case("softcap", RAGGED, **LLAMA, softcap=5.0),
    case("not_causal", RAGGED, queries=4, mask=Mask(causal=False)),
    case("window", RAGGED, **OSS, mask=SLIDING, gaps=True),
    case("window_page16", RAGGED, **LLAMA, page_size=16, mask=SLIDING),
    case("window_page128", RAGGED, queries=3, page_size=128, mask=Mask(window=300), gaps=True),
    case("window_int4", RAGGED, format=INT4_ZERO, queries=2, mask=SLIDING, gaps=True, softcap=20.0, sink_logits=True),
    case("packed_int4", RAGGED, **LLAMA, mask=PACKED, format=INT4_ZERO),
    case("first", RAGGED, **LLAMA, mask=PACKED, format=Affine(width=4), first=64),
    case("first_dim64", RAGGED, **OSS, mask=Mask(lag=0, skip=8), format=INT4, first=16, page_size=16),
    case(
        "first_queries",
        RAGGED,
        mask=PACKED,
        format=INT4_ZERO,
        first=64,
        queries=3,
        heads=6,
        softcap=20.0,
        sink_logits=True,
    ),
    case("first_dim256", RAGGED, mask=Mask(lag=0, skip=20), format=INT4, first=16, head_dim=256),
    case("exact", RAGGED, **LLAMA, mask=EXACT),
    case("blocks_int8", RAGGED, **LLAMA, mask=BLOCKS, format=INT8, queries=3, gaps=True, page_size=32),
    case("newest", RAGGED, **LLAMA, mask=NEWEST, queries=3, gaps=True),
    case("all_int4", RAGGED, mask=ALL, format=INT4, gaps=True, lists=2, page_size=16, softcap=20.0, sink_logits=True),
    case("lists", RAGGED, lists=2, gaps=True),
    case("lists_window", RAGGED, lists=2, gaps=True, mask=SLIDING, queries=2, page_size=32),
    *(
        case(f"{name}_page{page}_dim{size}", RAGGED, **LLAMA, format=value, page_size=page, head_dim=size)
        for name, value in FORMATS.items()
        for page, size in ((16, 128), (64, 64), (64, 128), (128, 256))
    ),
    *(
        case(f"{name}_queries", RAGGED, format=value, queries=6, softcap=30.0, sink_logits=True)
        for name, value in FORMATS.items()
    ),
    *(case(name, RAGGED, **LLAMA, format=value, tolerance=MADE.get(name, 5e-3)) for name, value in FEW_BITS.items()),
    case(
        "kivi4_queries",
        RAGGED,
        tolerance=MADE["kivi4"],
        format=FEW_BITS["kivi4"],
        mask=BLOCKS,
        queries=6,
        softcap=30.0,
        page_size=32,
    ),
    case("oscar2_queries", RAGGED, format=FEW_BITS["oscar2"], mask=Mask(lag=64, skip=64), queries=6, sink_logits=True),
    case("int3_dim256", RAGGED, head_dim=256, page_size=16, format=FEW_BITS["oscar3"], queries=6, softcap=30.0),
    case("int4_least", RAGGED, **LLAMA, mask=PACKED, format=Affine(width=4), page_size=16),
    case("fp8_static", RAGGED, **LLAMA, format=Float8Static()),
    case("turbo4_dim64", RAGGED, **OSS, format=FEW_BITS["turbo4"], page_size=16),
    case("long", [40_000], **LLAMA),
    case("many", [int(n) for n in np.random.default_rng(0).integers(0, 900, 64)], heads=16, kv_heads=4),
    case("logit_scale", RAGGED, logit_scale=True, softcap=20.0),
    case("scores", RAGGED, queries=2, want_scores=True, sink_logits=True),
    case("scores_window", RAGGED, mask=SLIDING, gaps=True, want_scores=True, page_size=16),
    case("scores_lists", RAGGED, lists=2, gaps=True, want_scores=True, logit_scale=True, page_size=32),
    *(
        case(f"scores_{name}", RAGGED, format=FORMATS[name], want_scores=True, logit_scale=True)
        for name in ("int8_zero", "int4", "fp8")
    ),
)


def _fill(rng, lengths, *, heads, kv_heads, head_dim, page_size, queries, format, first=None, **kwargs):
    """A call made on the device: every row of the same length."""
    size, length = len(lengths), lengths[0]
    pages = -(-length // page_size)
    table = rng.permutation(size * pages).reshape(size, pages)
    positions = np.zeros((size * pages + 1, page_size), np.int32)
    positions[table] = np.arange(pages * page_size).reshape(pages, page_size)
    shape = (size * pages + 1, kv_heads, page_size, head_dim)
    seeds = [int(x) for x in rng.integers(2**31, size=3)]
    keys = [jax.random.key(seed) for seed in seeds[:2]]
    pools = [
        random(key, shape, jnp.bfloat16) if each is None else random_codes(key, shape, each)
        for key, each in zip(keys, both(format), strict=True)
    ]
    if first is not None:
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": first}
        (_, *near), where = _fill(rng, [first] * size, queries=1, format=None, **sizes)
        where = {name: where[name] for name in ("positions", "table", "lengths")}
        kwargs["first"] = dict(zip(("k_pool", "v_pool"), near, strict=True)) | where
    args = (random(jax.random.key(seeds[2]), (size, queries, heads, head_dim), jnp.bfloat16), *pools)
    return args, {
        "positions": jnp.asarray(positions),
        "table": jnp.asarray(table[None], jnp.int32),
        "lengths": jnp.full((1, size), length, jnp.int32),
        "q_positions": jnp.tile(jnp.arange(length - queries, length, dtype=jnp.int32), (size, 1)),
        **kwargs,
    }


def _xla(q, k_pool, v_pool, **kwargs):
    return reference.paged_decode(q, k_pool, v_pool, **kwargs)[0]


def _cudnn(q, k_pool, v_pool, *, table, lengths, **_):
    """cuDNN over keys and values gathered page by page: it reads no pages through JAX's public functions."""
    k, v = (reference.gather_pages(pool, table) for pool in (k_pool, v_pool))
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths[0], implementation="cudnn")


def shape(
    name, size, length, *, page_size=64, heads=32, kv_heads=8, head_dim=128, queries=1, format=None, peers=None, **more
):
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
    mask = more.get("mask", Mask())
    seen = length if mask.window is None else min(length, mask.window + queries - 1 + mask.sinks)
    token = sum(head_dim * (16 if each is None else each.bits(head_dim)) / 8 for each in both(format))
    read = size * seen * kv_heads * token + (4 * size * seen if mask.window is not None else 0)
    read += 4 * size * mask.skip * kv_heads * head_dim if "first" in more else 0
    return Shape(
        op=OP,
        name=f"{name}_page{page_size}",
        make=lambda rng: _fill(rng, [length] * size, **sizes, queries=queries, format=format, **more),
        site=site(**sizes, format=format, mask=mask, first=more.get("first")),
        bytes=read + 2 * 2 * size * queries * heads * head_dim,
        flops=4.0 * size * seen * queries * heads * head_dim,
        copies=max(1, min(4, math.ceil(1.5e9 / read))),
        peers={} if peers is None else peers,
    )


SHAPES = (
    *(shape("32x8k", 32, 8192, page_size=size) for size in (16, 32)),
    shape("32x8k", 32, 8192, peers={"xla": _xla, "cudnn_gathered": _cudnn}),
    shape("32x8k", 32, 8192, page_size=128),
    shape("1x40k", 1, 40_000),
    shape("1x1M", 1, 2**20),
    *(shape(f"32x8k_{name}", 32, 8192, format=value) for name, value in FORMATS.items()),
    shape("32x8k_kv_int4", 32, 8192, format=Affine(width=4), mask=PACKED, first=64),
    # Where more than the first tokens are exact, and where kernels do not take those in: two calls, and their merge.
    *(shape(f"32x8k_packed_{f}", 32, 8192, format=f, mask=PACKED) for f in (INT4_ZERO, Affine(width=4))),
    shape("32x128_exact", 32, 128, mask=EXACT),
    *(shape(f"32x8k_{name}", 32, 8192, format=value) for name, value in FEW_BITS.items()),
    shape("32x8k_dim64", 32, 8192, heads=64, head_dim=64),
    shape("32x8k_dim256", 32, 8192, heads=16, head_dim=256),
    shape("32x8k_queries4", 32, 8192, queries=4),
    shape("32x1k", 32, 1024),
    shape("32x32k_window1k", 32, 32768, mask=Mask(window=1024)),
)
